"""Measuring engines and layers: for ``convnn-geo bench`` and the scripts in ``benchmarks/``."""

from convnn_geo.bench.machine import commit, machine, versions
from convnn_geo.bench.measure import Timing, compare, forward_and_backward, report, sample

__all__ = [
    "Timing",
    "commit",
    "compare",
    "forward_and_backward",
    "machine",
    "report",
    "sample",
    "versions",
]
