"""Recipes against their peers: torch's own layers, PyG's, and double loops."""

from convnn_geo.verify.golden import golden
from convnn_geo.verify.runner import Row, check, run

__all__ = ["Row", "check", "golden", "run"]
