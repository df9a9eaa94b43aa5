"""The nearest of points in up to three dimensions, from the cells of a grid around each target.

Points are sorted by cells, so that cells in a line along the last axis are one run of sources, and
targets that come one after the other lie near one another. A thread has one target, and keeps its
nearest in registers, in order. It looks into the cells around its own; if then somebody outside
could be nearer than the k-th, once more into all cells within the k-th's distance.

Places are counted in cells from a grid's corner. Rounding moves them, alike for all points: what is
in a later cell does come later. By how much, ``slack`` bounds.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.grid import axis_of, cell_of, laid_out, point, sorted_by_cell
from convnn_geo.gpu.kept import any_of, emptied, inserted, nobody
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.pairs import place_of, value_of
from convnn_geo.gpu.tiles import PADDING

CROWD = 2.8
"""Standard deviations by which a ball as wide as cells reach is to hold more than k points."""
WIDE = 16
"""Neighbours from which on two smaller cells each way are looked into first, instead of one."""
LANES = 32
"""Targets of a program, one a thread."""
_ROUNDING = tl.constexpr(2.0**-20)
"""Share of its place, counted in cells, by which rounding may move a point, and more."""
_NAN = tl.constexpr(0x7FC00000)
"""The code of NaN."""


@triton.jit
def _last(place, count):
    """The cell of a place, or that next to it; the last for NaN."""
    return tl.where(place < count - 1, tl.maximum(place, 0.0), count - 1).to(tl.int32)


@triton.jit
def _gap(place, first, last, count, slack, edge):
    """How far outside of cells ``first`` to ``last`` is, at least."""
    left = tl.maximum(place - first.to(tl.float32) - slack, 0.0) * edge
    right = tl.maximum((last + 1).to(tl.float32) - place - slack, 0.0) * edge
    left = tl.where(first > 0, left, float("inf"))
    return tl.minimum(left, tl.where(last < count.to(tl.int32) - 1, right, float("inf")))


@triton.jit
def _apart(place, cell, slack, edge):
    """How far a cell is, at least; squared."""
    cell = cell.to(tl.float32)
    apart = tl.maximum(tl.maximum(cell - place, place - (cell + 1)) - slack, 0.0) * edge
    return apart * apart


@triton.jit
def _box(place, cell, count, scale, slack, radius, ring, full):
    """The first and the last cell within a radius, or, of a list not ``full``, of a ring."""
    at = tl.where(full, place, cell.to(tl.float32))
    reach = tl.where(full, radius * scale * 1.0001 + 4 * slack, ring)
    return cell_of(at - reach, count), _last(at + reach, count)


@triton.jit(do_not_specialize=["sources", "targets", "n", "cells"])
def _search(
    source_ptr,
    start_ptr,
    target_ptr,
    axis_ptr,
    own_ptr,
    value_ptr,
    place_ptr,
    sources,
    targets,
    n,
    cells,
    K: tl.constexpr,
    RING: tl.constexpr,
    LANES: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """The ``K`` nearest of some targets; ``sources`` and ``targets`` are those of all examples."""
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    searching = at < targets
    at = tl.minimum(at, targets - 1)
    example = at // n
    tx, ty, tz, place = point(target_ptr, at)
    row = example * n + place.to(tl.int32)
    own = row
    if HAS_OWN:
        own = tl.load(own_ptr + row).to(tl.int32)
    low, scale_x, edge_x, count_x = axis_of(axis_ptr, example, 0)
    px = (tx - low) * scale_x
    low, scale_y, edge_y, count_y = axis_of(axis_ptr, example, 1)
    py = (ty - low) * scale_y
    low, scale_z, edge_z, count_z = axis_of(axis_ptr, example, 2)
    pz = (tz - low) * scale_z
    slack_x = (tl.abs(px) + count_x) * _ROUNDING
    slack_y = (tl.abs(py) + count_y) * _ROUNDING
    slack_z = (tl.abs(pz) + count_z) * _ROUNDING
    cx, cy, cz = cell_of(px, count_x), cell_of(py, count_y), cell_of(pz, count_z)
    rows, columns = count_y.to(tl.int32), count_z.to(tl.int32)

    best = nobody(K, LANES)
    full = at < 0  # whose list is
    radius, ring = tl.zeros([LANES], tl.float32), tl.full([LANES], RING, tl.float32)
    while any_of(searching):
        x0, x1 = _box(px, cx, count_x, scale_x, slack_x, radius, ring, full)
        y0, y1 = _box(py, cy, count_y, scale_y, slack_y, radius, ring, full)
        z0, z1 = _box(pz, cz, count_z, scale_z, slack_z, radius, ring, full)
        best = emptied(best, searching, K)
        steps_x = 2 * tl.max(tl.where(searching, tl.maximum(cx - x0, x1 - cx), 0), 0) + 1
        steps_y = 2 * tl.max(tl.where(searching, tl.maximum(cy - y0, y1 - cy), 0), 0) + 1
        for i in range(0, steps_x):  # from the middle to both sides
            x = cx + (i + 1) // 2 * (1 - 2 * (i % 2))
            apart_x = _apart(px, x, slack_x, edge_x)
            for j in range(0, steps_y):
                y = cy + (j + 1) // 2 * (1 - 2 * (j % 2))
                apart = apart_x + _apart(py, y, slack_y, edge_y)
                looked = searching & (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
                looked = looked & ((apart > value_of(~best[K - 1])) == 0)
                line = start_ptr + example * cells + (x * rows + y) * columns
                begin = tl.load(line + z0, mask=looked, other=0)
                end = tl.load(line + z1 + 1, mask=looked, other=0)
                for step in range(0, tl.max(end - begin, 0)):
                    at = begin + step
                    x_, y_, z_, place = point(source_ptr, tl.minimum(at, sources - 1))
                    dx, dy, dz = tx - x_, ty - y_, tz - z_
                    bits = (dx * dx + dy * dy + dz * dz).to(tl.int32, bitcast=True)
                    code = tl.minimum(bits & 0x7FFFFFFF, _NAN)
                    there = at < end
                    if HAS_OWN:
                        there = there & (place.to(tl.int32) != own)
                    code = tl.where(there, code, PADDING)
                    if any_of(code <= (best[K - 1] >> 32).to(tl.int32)):
                        best = inserted(best, (code.to(tl.int64) << 32) | place, K)
        square = value_of(~best[K - 1])
        gap = _gap(px, x0, x1, count_x, slack_x, edge_x)
        gap = tl.minimum(gap, _gap(py, y0, y1, count_y, slack_y, edge_y))
        gap = tl.minimum(gap, _gap(pz, z0, z1, count_z, slack_z, edge_z))
        searching = searching & ((gap < float("inf")) & ((square < gap * gap) == 0))
        # A radius that was not enough is one that rounding has taken everything of.
        ring = tl.where(full, float("inf"), 2 * ring + 1)
        known = square < float("inf")
        radius = tl.where(full, float("inf"), tl.sqrt(square))
        full = known & (full == 0)
    real = tl.program_id(0) * LANES + tl.arange(0, LANES) < targets
    to = row.to(tl.int64) * K
    for i in tl.static_range(0, K):
        tl.store(value_ptr + to + i, value_of(~best[i]), mask=real)
        tl.store(place_ptr + to + i, place_of(~best[i]).to(tl.int64), mask=real)


def _shares(k: int, d: int) -> tuple[float, int]:
    """How many points a cell is to have, and how many cells each way are looked into first."""
    ring = 1 if k < WIDE else 2
    ball = math.pi ** (d / 2) / math.gamma(d / 2 + 1)
    return (k + CROWD * math.sqrt(k)) / (ball * ring**d), ring


@gpu.on_its_device
def nearest(
    q: Tensor, keys: Tensor, k: int, own: Tensor | None = None, same: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared distances and places ``(b n, k)`` of the nearest, in order, ties by place.

    Args:
        q: ``(b, n, d)``, float32, contiguous; d up to 3.
        keys: ``(b, m, d)``, likewise.
        k: at most what an example has, and 64 or so.
        own: ``(b n,)``, a source that each target is not to find; -1 for none.
        same: whether ``q`` are ``keys``.

    Returns:
        float32 and int64. NaN comes after infinity.
    """
    (b, n, d), m = q.shape, keys.shape[1]
    shares, ring = _shares(k, d)
    cells = max(1, int(m / shares))
    axes = laid_out(keys, cells)
    sources, starts = sorted_by_cell(keys, axes, cells)
    targets = sources if same else sorted_by_cell(q, axes, cells)[0]
    values = q.new_empty(b * n, k)
    places = torch.empty_like(values, dtype=torch.int64)
    launch(
        _search,
        (gpu.cdiv(b * n, LANES),),
        (sources, starts, targets, axes, own, values, places),
        (b * m, b * n, n, cells),
        K=k,
        RING=ring,
        LANES=LANES,
        HAS_OWN=own is not None,
        num_warps=LANES // 32,
        enable_fp_fusion=False,
    )
    return values, places
