"""What is done with a neighbourhood: sums, means, maxima, taps and networks on edges."""

from convnn_geo.kernels.base import Kernel, Max, Mean, Sum
from convnn_geo.kernels.edge import EdgeMLP, MaxRelative, VectorAttention
from convnn_geo.kernels.taps import HeadTaps, Separable, Taps

__all__ = [
    "EdgeMLP",
    "HeadTaps",
    "Kernel",
    "Max",
    "MaxRelative",
    "Mean",
    "Separable",
    "Sum",
    "Taps",
    "VectorAttention",
]
