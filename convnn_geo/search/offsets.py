"""Offsets between the pixels of an image, in the order of how far they lead."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convnn_geo.caching import keep
from convnn_geo.metrics import Differences

_MOST = 2**20
"""Offsets, at most, that are sorted and kept: 20 MiB."""


def lists_all(size: tuple[int, ...]) -> bool:
    """Whether all offsets of a grid are few enough to be kept."""
    return math.prod(2 * length - 1 for length in size) <= _MOST


@keep(16)  # a model has a few sizes
def offsets(
    size: tuple[int, ...],
    step: tuple[float, ...],
    p: float,
    root: bool,
    scale: tuple[float, ...],
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Offsets between pixels ``(3, count)``, nearest first, and how far they lead.

    And how far the nearest leads that is left out: infinite where none is.

    Args:
        size: of the grid, up to three axes; those that there are come last.
        step: between its pixels, on each axis.
        p: exponent of the norm.
        root: take its root.
        scale: one factor, or one an axis; () for none.
        device: where they are wanted; the CPU by default.
    """
    half = [length - 1 for length in size]
    while math.prod(2 * h + 1 for h in half) > _MOST:
        half[half.index(max(half))] = max(half) // 2
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    factors = torch.tensor(scale, **exact) if scale else None

    def distance(offset: Tensor) -> Tensor:
        moved, here = offset * torch.tensor(step, **exact), torch.zeros(1, len(size), **exact)
        return Differences(moved, here, p, root, scale=factors).rows().flatten()

    short = [h < n - 1 for h, n in zip(half, size, strict=True)]
    ends = torch.diag(torch.tensor(half, device="cpu") + 1)[short]
    border = distance(ends).min().item() if len(ends) else math.inf
    ranges = [torch.arange(-h, h + 1, device="cpu") for h in half]
    offset = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).flatten(0, -2)
    far = distance(offset)
    order = far.argsort(stable=True)
    order = order[far[order] < border]
    offset = torch.nn.functional.pad(offset[order].int(), (3 - len(size), 0))
    return offset.t().contiguous().to(device), far[order].to(device), border
