"""ImageToPoints: every pixel a point."""

from __future__ import annotations

from typing import Any

from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform

from convnn_geo.checks import check_tuple
from convnn_geo.points import Grid
from convnn_geo.transforms.base import Transform
from convnn_geo.transforms.images import Mask, check_mask, kept_pixels, take_image
from convnn_geo.typing import Size


@functional_transform("image_to_points")
class ImageToPoints(Transform):
    r"""Pixels as points: colours in ``data.x``, places in ``data.pos`` (``image_to_points``).

    .. math:: x_{r w + c} = \text{image}[:, r, c], \quad p_{r w + c} = (r, c)

    Positions are (row, col) in pixels of the whole image, row 0 on top; ``data.pos.flip(-1)`` is
    (x, y). Bytes and 16 bits become [0, 1], floats stay as they are. A ``Data`` may hold the image
    as ``data.image``: points take its place, and all else, a label, say, stays.

    Args:
        stride: take every ``stride``-th row and column only; an integer or (row, col).
        mask: ``(h, w)``, True for the pixels to keep; or a function of the image ``(c, h, w)`` in
            floats that returns such a mask.

    Shapes:
        - **input:** a PIL image, an array :math:`(h, w)` or :math:`(h, w, c)`, or a tensor
          :math:`(h, w)` or :math:`(c, h, w)`
        - **x:** :math:`(n, c)`, in raster order
        - **pos:** :math:`(n, 2)`

    Raises:
        TypeError: no image, a mask that is not boolean, integers other than uint8 and uint16.
        ValueError: other shapes, a ``Data`` without image, stride < 1, a mask of another size.

    Example:
        >>> import torch
        >>> data = ImageToPoints(mask=lambda image: image[0] > 0)(torch.eye(3))
        >>> data.x.tolist(), data.pos.tolist()
        ([[1.0], [1.0], [1.0]], [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    """

    def __init__(self, stride: Size = 1, mask: Mask | None = None) -> None:
        self.stride = check_tuple("stride", stride, 2)
        self.mask = check_mask("ImageToPoints", mask)

    def forward(self, data: Any) -> Data:
        """The image's points."""
        image, data = take_image("ImageToPoints", data)
        kept = kept_pixels("ImageToPoints", self.mask, image)
        rows, columns = (slice(None, None, step) for step in self.stride)
        image = image[:, rows, columns]
        grid = Grid(tuple(image.shape[1:]), step=self.stride)
        x, pos = image.flatten(1).T, grid.positions(image.device, image.dtype)
        if kept is not None:
            chosen = kept[rows, columns].flatten()
            x, pos = x[chosen], pos[chosen]
        data.x, data.pos = x.contiguous(), pos
        return data
