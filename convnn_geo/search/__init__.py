"""Who finds the k nearest, and how fast: one call, many engines, one order of ties."""

from convnn_geo.search.clouds import knows_pairs
from convnn_geo.search.dense import Dense
from convnn_geo.search.grid import GridSearch
from convnn_geo.search.growing import within_reach
from convnn_geo.search.knn import explain_search, knn
from convnn_geo.search.knn_graph import knn_graph
from convnn_geo.search.pyg_lib import PygLib
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.radius import radius, radius_graph
from convnn_geo.search.ragged import check_batch
from convnn_geo.search.registry import ENGINES, engines, find, with_self_first
from convnn_geo.search.smallest import k_smallest
from convnn_geo.search.torch_cluster import TorchCluster

__all__ = [
    "ENGINES",
    "Dense",
    "Engine",
    "GridSearch",
    "PygLib",
    "Query",
    "TorchCluster",
    "check_batch",
    "engines",
    "explain_search",
    "find",
    "k_smallest",
    "knn",
    "knn_graph",
    "knows_pairs",
    "radius",
    "radius_graph",
    "with_self_first",
    "within_reach",
]
