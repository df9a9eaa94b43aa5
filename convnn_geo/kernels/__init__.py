"""What is done with a neighbourhood: sums, means, maxima, taps and networks on edges."""

from convnn_geo.kernels.base import Join, Kernel, Max, Mean, Sum
from convnn_geo.kernels.edge import EdgeMLP, GravNet, MaxRelative, VectorAttention
from convnn_geo.kernels.taps import HeadTaps, Separable, Taps

__all__ = [
    "EdgeMLP",
    "GravNet",
    "HeadTaps",
    "Join",
    "Kernel",
    "Max",
    "MaxRelative",
    "Mean",
    "Separable",
    "Sum",
    "Taps",
    "VectorAttention",
]
