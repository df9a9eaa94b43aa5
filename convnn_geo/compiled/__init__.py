"""What is in C: compiled when first used; without a compiler everything works, more slowly."""

from convnn_geo.compiled.aggregation import attention, attention_backward, gather_taps
from convnn_geo.compiled.build import library
from convnn_geo.compiled.pairs import pairs, pairs_gradients, serves_pairs
from convnn_geo.compiled.problem import Runs
from convnn_geo.compiled.rings import rings_nearest
from convnn_geo.compiled.search import (
    LARGEST_K,
    cells_nearest,
    k_smallest,
    products_nearest,
    windows_nearest,
)

__all__ = [
    "LARGEST_K",
    "Runs",
    "attention",
    "attention_backward",
    "cells_nearest",
    "gather_taps",
    "k_smallest",
    "library",
    "pairs",
    "pairs_gradients",
    "products_nearest",
    "rings_nearest",
    "serves_pairs",
    "windows_nearest",
]
