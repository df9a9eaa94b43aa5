"""PyTorch Geometric transforms: images to points, points to graphs; usable as ``pre_transform``.

Positions of pixels are (row, col) in pixels, row 0 on top, as everywhere in convnn_geo;
``data.pos.flip(-1)`` is the (x, y) of :class:`torch_geometric.transforms.ToSLIC`.

Example:
    >>> import torch
    >>> from torch_geometric.transforms import Compose
    >>> from convnn_geo.transforms import ImageToPoints, NeighborGraph
    >>> transform = Compose([ImageToPoints(stride=2), NeighborGraph(k=4)])
    >>> transform(torch.rand(3, 8, 12))
    Data(x=[24, 3], pos=[24, 2], edge_index=[2, 96])
"""

from convnn_geo.transforms.image_to_points import ImageToPoints
from convnn_geo.transforms.neighbor_graph import NeighborGraph
from convnn_geo.transforms.slic import SLIC

__all__ = ["SLIC", "ImageToPoints", "NeighborGraph"]
