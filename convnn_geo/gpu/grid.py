"""A grid of cells over points in up to three dimensions, and points sorted by its cells.

Nobody waits for the device: how many cells there are in all follows from how many points there
are; how they are spread over axes is decided there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.launching import launch

_BLOCK = 1024
"""Points of a program that sorts."""
_LONGEST = tl.constexpr(65536)
"""Cells of an axis, at most: rounding then moves no point by much of one."""


@triton.jit(do_not_specialize=["cells"])
def _lay_out(low_ptr, high_ptr, axis_ptr, cells, d: tl.constexpr):
    """One example's grid: for each axis its corner, cells a unit, a cell's edge and their number.

    Cells are about as wide as they are long; an axis shorter than that has but one. So has one
    whose extent is no number, or none to divide by.
    """
    axes = tl.arange(0, 4)
    axis = axes - (3 - d)  # those that there are come last
    there = (axis >= 0) & (axis < d)
    example = tl.program_id(0)
    low = tl.load(low_ptr + example * d + axis, mask=there, other=0.0)
    extent = tl.load(high_ptr + example * d + axis, mask=there, other=0.0) - low
    several = (extent > 0) & (extent < float("inf"))  # cells on this axis
    extent = tl.where(several, extent, 1.0)
    edge = extent
    for _ in tl.static_range(3):
        size = tl.sum(tl.where(several, tl.log2(extent), 0.0), 0)
        size = size - tl.log2(tl.cast(cells, tl.float32))
        edge = tl.exp2(size / tl.maximum(tl.sum(several.to(tl.float32), 0), 1.0) + 1e-4)
        several = several & (extent >= edge)
    count = tl.minimum(tl.maximum(tl.floor(extent / edge), 1.0), _LONGEST)
    scale = count / extent
    several = several & (count > 1) & (scale < float("inf"))
    count = tl.where(several, count, 1.0)
    number = tl.cast(1, tl.int64)
    for one in tl.static_range(3):
        number *= tl.sum(tl.where(axes == one, count, 0.0), 0).to(tl.int64)
    several = several & (number <= cells)  # should logarithms ever be that far off
    scale = tl.where(several, scale, 0.0)
    edge = tl.where(several, tl.div_rn(1.0, tl.where(several, scale, 1.0)), 0.0)
    at = axis_ptr + example * 12 + axes
    tl.store(at, tl.where(several, low, 0.0), mask=axes < 3)
    tl.store(at + 3, scale, mask=axes < 3)
    tl.store(at + 6, edge, mask=axes < 3)
    tl.store(at + 9, tl.where(several, count, 1.0), mask=axes < 3)


@triton.jit
def axis_of(axis_ptr, example, axis: tl.constexpr):
    """Corner, cells a unit, edge and number of cells of an axis."""
    at = axis_ptr + example * 12 + axis
    return tl.load(at), tl.load(at + 3), tl.load(at + 6), tl.load(at + 9)


@triton.jit
def _coordinate(point_ptr, at, real, axis: tl.constexpr, d: tl.constexpr):
    """Of points, on one of three axes, the last of which there are."""
    if axis < 3 - d:
        value = tl.zeros([at.shape[0]], tl.float32)
    else:
        value = tl.load(point_ptr + at.to(tl.int64) * d + (axis - 3 + d), mask=real, other=0.0)
    return value


@triton.jit
def cell_of(place, count):
    """The cell of a place, or that next to it; the first for NaN."""
    return tl.where(place > 0, tl.minimum(place, count - 1), 0.0).to(tl.int32)


@triton.jit(do_not_specialize=["total", "n", "cells"])
def _count(
    point_ptr, axis_ptr, cell_ptr, rank_ptr, count_ptr, total, n, cells,
    d: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each point's cell, how many points a cell has, and which of them this one is."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < total
    example = tl.where(real, at // n, 0)
    cell = tl.zeros([BLOCK], tl.int32)
    for axis in tl.static_range(0, 3):
        low, scale, _, count = axis_of(axis_ptr, example, axis)
        x = _coordinate(point_ptr, at, real, axis, d)
        cell = cell * count.to(tl.int32) + cell_of((x - low) * scale, count)
    cell += example * cells
    # Counted one place further up, so that a running sum of counts is where cells start.
    rank = tl.atomic_add(count_ptr + cell + 1, 1, mask=real, sem="relaxed")
    tl.store(cell_ptr + at, cell, mask=real)
    tl.store(rank_ptr + at, rank, mask=real)


@triton.jit(do_not_specialize=["total", "n"])
def _fill(
    point_ptr, cell_ptr, rank_ptr, start_ptr, sorted_ptr, total, n,
    d: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x, y, place and z in the order of cells; in a cell, in any."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < total
    cell = tl.load(cell_ptr + at, mask=real, other=0)
    to = tl.load(start_ptr + cell) + tl.load(rank_ptr + at, mask=real, other=0)
    line = sorted_ptr + to.to(tl.int64) * 4
    for axis in tl.static_range(0, 3):
        x = _coordinate(point_ptr, at, real, axis, d)
        tl.store(line + (axis + axis // 2), x.to(tl.int32, bitcast=True), mask=real)
    tl.store(line + 2, at % n, mask=real)


@triton.jit
def _float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def point(sorted_ptr, at):
    """Coordinates and places of sorted points, read two at a time."""
    both = tl.load(sorted_ptr + at * 2)
    last = tl.load(sorted_ptr + at * 2 + 1)
    return _float(both), _float(both >> 32), _float(last >> 32), last & 0xFFFFFFFF


def laid_out(points: Tensor, cells: int) -> Tensor:
    """A grid of so many cells, at most, for each example of points ``(b, n, d)``.

    ``(b, 4, 3)``: for each axis its corner, cells a unit, a cell's edge and the number of cells.
    """
    (b, _, d), (low, high) = points.shape, points.aminmax(dim=1)
    axes = points.new_empty(b, 4, 3)
    tensors = (low, high, axes)
    launch(_lay_out, (b,), tensors, (cells,), d=d, num_warps=1, enable_fp_fusion=False)
    return axes


def sorted_by_cell(points: Tensor, axes: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Rows ``(b n, 2)`` of x, y and place, z by cell, two in one number, and where cells start."""
    (b, n, d), total = points.shape, points.shape[0] * points.shape[1]
    cell = torch.empty(2, total, dtype=torch.int32, device=points.device)
    counts = torch.zeros(b * cells + 1, dtype=torch.int32, device=points.device)
    grid = (gpu.cdiv(total, _BLOCK),)
    plain: dict[str, Any] = {"d": d, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    tensors = (points, axes, cell[0], cell[1], counts)
    launch(_count, grid, tensors, (total, n, cells), **plain)
    starts = counts.cumsum(0, dtype=torch.int32)
    rows = torch.empty(total, 4, dtype=torch.int32, device=points.device)
    launch(_fill, grid, (points, cell[0], cell[1], starts, rows), (total, n), **plain)
    return rows.view(torch.int64), starts
