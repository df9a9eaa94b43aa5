"""Grids taken apart into classes of points that may choose one another, and nobody else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """Which points stand together.

    Args:
        index: ``(classes, s)``, the points of each in raster order; one with fewer names its first
            again.
        mask: ``(classes, s)``, True for points that are named for the first time; None where all
            classes are full.
        place: ``(n,)``, where each point stands among all of ``index``.
    """

    index: Tensor
    mask: Tensor | None
    place: Tensor


@dataclass(frozen=True)
class Axis:
    """The classes along one axis.

    Args:
        index: ``(classes, s)``, the points of each.
        inside: ``(classes, s)``, True where there is one.
        own: ``(length,)``, the class of each point.
        rank: ``(length,)``, and which of its points it is.
    """

    index: Tensor
    inside: Tensor
    own: Tensor
    rank: Tensor

    @classmethod
    def blocks(cls, length: int, size: int, shift: int, device: torch.device) -> Axis:
        """Runs of ``size`` points, the first of which begins ``shift`` points after the first."""
        first = (0 - shift) // size
        number = torch.arange((length - 1 - shift) // size - first + 1, device=device) + first
        start, stop = (number * size + shift).clamp_min(0), (number + 1) * size + shift
        point = torch.arange(length, device=device)
        own = (point - shift).div(size, rounding_mode="floor") - first
        place = start[:, None] + torch.arange(min(size, length), device=device)
        inside = place < stop.clamp_max(length)[:, None]
        return cls(place.where(inside, start[:, None]), inside, own, point - start[own])

    @classmethod
    def residues(cls, length: int, stride: int, device: torch.device) -> Axis:
        """Every ``stride``-th point."""
        first = torch.arange(min(stride, length), device=device)[:, None]
        place = first + stride * torch.arange((length + stride - 1) // stride, device=device)
        point = torch.arange(length, device=device)
        own, rank = point % stride, point.div(stride, rounding_mode="floor")
        inside = place < length
        return cls(place.where(inside, first), inside, own, rank)


def combined(axes: list[Axis], full: bool) -> Classes:
    """Classes of a grid: those of all axes, each with each.

    Args:
        axes: of the grid, in its order.
        full: whether all classes are.
    """
    index = axes[0].index.new_zeros(1, 1)
    inside, own, rank = axes[0].inside.new_ones(1, 1), index[0], index[0]
    for axis in axes:
        shape = (index.shape[0] * axis.index.shape[0], index.shape[1] * axis.index.shape[1])
        index = index[:, None, :, None] * len(axis.own) + axis.index[:, None]
        inside = inside[:, None, :, None] & axis.inside[:, None]
        index, inside = index.reshape(shape), inside.reshape(shape)
        own = (own[:, None] * axis.index.shape[0] + axis.own).flatten()
        rank = (rank[:, None] * axis.index.shape[1] + axis.rank).flatten()
    return Classes(index, None if full else inside, own * index.shape[1] + rank)
