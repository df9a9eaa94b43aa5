"""SLIC: an image as its superpixels."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.utils import scatter

from convnn_geo.checks import check_finite, check_int, check_number
from convnn_geo.extras import require
from convnn_geo.points import Grid
from convnn_geo.transforms.base import Transform
from convnn_geo.transforms.images import Mask, check_mask, kept_pixels, take_image


@functional_transform("slic")
class SLIC(Transform):
    r"""Superpixels as points: mean colours in ``data.x``, centroids in ``data.pos`` (``slic``).

    .. math:: x_s = \frac{1}{|s|} \sum_{i \in s} x_i, \quad p_s = \frac{1}{|s|} \sum_{i \in s} p_i

    Superpixels are those of :func:`skimage.segmentation.slic` (Achanta et al., TPAMI 2012), images
    and positions those of :class:`~convnn_geo.transforms.ImageToPoints`: (row, col) in pixels,
    where :class:`torch_geometric.transforms.ToSLIC` has (x, y).

    Args:
        n_segments: superpixels asked for; SLIC makes about as many.
        compactness: the larger, the more square they are.
        mask: as for ImageToPoints; superpixels are made of the pixels kept.
        add_segment: add ``data.segment``, the superpixel of each pixel, -1 where none.
        options: of :func:`skimage.segmentation.slic`, e.g. ``sigma`` and ``slic_zero``.

    Shapes:
        - **input:** as for ImageToPoints
        - **x:** :math:`(n, c)`
        - **pos:** :math:`(n, 2)`
        - **segment:** :math:`(1, h, w)`

    Raises:
        MissingExtraError: scikit-image is not installed.
        TypeError: no image, a mask that is not boolean, options that scikit-image doesn't know.
        ValueError: other shapes, n_segments < 1, a mask of another size, non-finite pixels.

    Example:
        >>> import torch
        >>> image = torch.zeros(8, 12)
        >>> image[:, 6:] = 1
        >>> data = SLIC(n_segments=2)(image)
        >>> data.x.tolist(), data.pos.tolist()
        ([[0.0], [1.0]], [[3.5, 2.5], [3.5, 8.5]])
    """

    def __init__(
        self,
        n_segments: int = 75,
        compactness: float = 10.0,
        *,
        mask: Mask | None = None,
        add_segment: bool = False,
        **options: Any,
    ) -> None:
        self.n_segments = check_int("n_segments", n_segments)
        self.compactness = check_number("compactness", compactness, exclusive=True)
        self.mask = check_mask("SLIC", mask)
        self.add_segment = add_segment
        known = inspect.signature(require("skimage.segmentation", extra="data").slic).parameters
        ours = {"image", "n_segments", "compactness", "mask", "start_label", "channel_axis"}
        unknown = set(options) - (set(known) - ours)
        if unknown:
            raise TypeError(
                f"SLIC: expected options of skimage.segmentation.slic other than those that it "
                f"sets itself, got {', '.join(sorted(unknown))}; there are "
                f"{', '.join(sorted(set(known) - ours))}"
            )
        self.options = options

    def forward(self, data: Any) -> Data:
        """The image's superpixels."""
        image, data = take_image("SLIC", data)
        kept = kept_pixels("SLIC", self.mask, image)
        if kept is None:
            kept = torch.ones(image.shape[1:], dtype=torch.bool, device=image.device)
        pixels = image.permute(1, 2, 0)[kept]
        check_finite("SLIC", pixels)
        grid = Grid(tuple(image.shape[1:]))
        place = grid.positions(image.device, torch.float64)[kept.flatten()]
        segment, count = self._segments(image, kept)
        for name, values in (("x", pixels), ("pos", place)):
            mean = scatter(values.double(), segment, 0, count, reduce="mean")
            data[name] = mean.to(image.dtype)
        if self.add_segment:
            data.segment = torch.full_like(kept, -1, dtype=torch.long)
            data.segment[kept] = segment
            data.segment = data.segment.unsqueeze(0)
        return data

    def _segments(self, image: Tensor, kept: Tensor) -> tuple[Tensor, int]:
        """The superpixel of each pixel kept, counted from 0 without gaps, and their number."""
        if not kept.any():  # scikit-image fails on nothing
            return torch.zeros(0, dtype=torch.long, device=image.device), 0
        labels = require("skimage.segmentation", extra="data").slic(
            image.permute(1, 2, 0).cpu().numpy().astype(np.float64),
            n_segments=self.n_segments,
            compactness=self.compactness,
            mask=None if kept.all() else kept.cpu().numpy(),
            start_label=0,
            **self.options,
        )
        labels = torch.from_numpy(labels).to(image.device)[kept]
        found, segment = labels.unique(return_inverse=True)
        return segment, found.numel()
