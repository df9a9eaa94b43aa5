"""The layers that users import."""

from convnn_geo.nn import functional
from convnn_geo.nn.attention import ConvNNAttention
from convnn_geo.nn.branching import Branching
from convnn_geo.nn.conv import ConvNN1d, ConvNN2d, ConvNN3d
from convnn_geo.nn.neighbor_conv import NeighborConv
from convnn_geo.nn.point_conv import PointConvNN

__all__ = [
    "Branching",
    "ConvNN1d",
    "ConvNN2d",
    "ConvNN3d",
    "ConvNNAttention",
    "NeighborConv",
    "PointConvNN",
    "functional",
]
