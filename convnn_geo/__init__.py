"""wip"""
from convnn_geo.checks import checking
