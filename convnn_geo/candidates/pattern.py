"""Patterns over pairs of points: causal, block-local and strided attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convnn_geo.caching import keep
from convnn_geo.candidates.base import Candidates, Subset, need_grid
from convnn_geo.candidates.classes import Axis, Classes, combined
from convnn_geo.checks import check_int, check_tuple
from convnn_geo.points import Grid, Points


class Causal(Candidates):
    """Sources up to the target's own place in the order.

    Of a grid in raster order; targets that are none of its points are numbered from the first.
    """

    def forward(self, target: Points, source: Points) -> Subset:
        """Mask ``(n, m)``, True at and under the diagonal."""
        j, own = torch.arange(source.num_points, device=source.device), None
        if source.grid is not None and target.grid is not None and source.grid != target.grid:
            own = source.grid.index_of(target.grid, source.device)
        if own is None:
            own = torch.arange(target.num_points, device=source.device)
        return Subset(mask=j <= own[:, None])


class Block(Candidates):
    """Sources in the same block: non-overlapping windows, as in Swin (arXiv 2103.14030).

    Args:
        size: points of a block along each axis; where it does not divide the grid, the last block
            holds what remains.
        shift: pixels by which the blocks are moved; blocks cut by the border stay cut, which is
            what Swin's masked cyclic shift computes.

    Example:
        >>> import torch
        >>> from convnn_geo.candidates import Block
        >>> from convnn_geo.points import Points
        >>> tokens = Points.from_tokens(torch.zeros(1, 4, 1))
        >>> Block(2)(tokens, tokens).mask.int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    def __init__(self, size: int | tuple[int, ...], shift: int | tuple[int, ...] = 0) -> None:
        super().__init__()
        for name, value, minimum in (("size", size, 1), ("shift", shift, 0)):
            check_tuple(name, value, 1 if isinstance(value, int) else len(value), minimum)
        self.size, self.shift = size, shift

    def forward(self, target: Points, source: Points) -> Subset:
        """Mask ``(n, m)``."""
        grid = need_grid("Block", source).size
        sides = check_tuple("size", self.size, len(grid))
        most = math.prod(tuple(map(min, sides, grid)))
        return Subset(mask=_same(self._block(target), self._block(source)), most=most, own=True)

    def classes(self, grid: Grid, device: torch.device) -> Classes:
        """The blocks of a grid of pixels."""
        sides = check_tuple("size", self.size, len(grid.size))
        shifts = check_tuple("shift", self.shift, len(grid.size), 0)
        return _blocks(grid.size, sides, shifts, device)

    def _block(self, points: Points) -> Tensor:
        axes = len(need_grid("Block", points).size)
        sizes = check_tuple("size", self.size, axes)
        shifts = check_tuple("shift", self.shift, axes, 0)
        along = zip(points.position.unbind(-1), shifts, sizes, strict=True)
        return torch.stack([((x - shift) / size).floor() for x, shift, size in along], -1)

    def extra_repr(self) -> str:
        return f"size={self.size}, shift={self.shift}"


class Congruent(Candidates):
    """Sources a multiple of ``stride`` pixels away along each axis: the strided pattern of
    Sparse Transformers (https://arxiv.org/abs/1904.10509).

    Args:
        stride: pixels.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = check_int("stride", stride)

    def forward(self, target: Points, source: Points) -> Subset:
        """Mask ``(n, m)``."""
        need_grid("Congruent", target)
        grid = need_grid("Congruent", source).size
        most = math.prod([(length + self.stride - 1) // self.stride for length in grid])
        mask = _same(target.position % self.stride, source.position % self.stride)
        return Subset(mask=mask, most=most, own=True)

    def classes(self, grid: Grid, device: torch.device) -> Classes:
        """The points of a grid of pixels, every ``stride``-th together."""
        return _residues(grid.size, self.stride, device)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


@keep(64)
def _blocks(
    lengths: tuple[int, ...], sizes: tuple[int, ...], shifts: tuple[int, ...], device: torch.device
) -> Classes:
    parts = list(zip(lengths, sizes, shifts, strict=True))
    whole = (size >= length or length % size == 0 for length, size, _ in parts)
    full = all(whole) and all(shift % size == 0 for _, size, shift in parts)
    return combined([Axis.blocks(*part, device) for part in parts], full)


@keep(64)
def _residues(lengths: tuple[int, ...], stride: int, device: torch.device) -> Classes:
    full = all(stride >= length or length % stride == 0 for length in lengths)
    return combined([Axis.residues(length, stride, device) for length in lengths], full)


def _same(target: Tensor, source: Tensor) -> Tensor:
    return (target.unsqueeze(-2) == source.unsqueeze(-3)).all(-1)
