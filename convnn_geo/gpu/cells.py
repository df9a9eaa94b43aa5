"""The nearest of points in up to three dimensions, from the cells of a grid around each target.

Points are sorted by cells, so that cells in a line along the last axis are one run of sources, and
targets that come one after the other lie near one another. A thread has one target, and keeps its
nearest in registers, in order. It looks into the cells around its own; if then somebody outside
could be nearer than the k-th, once more into all cells within the k-th's distance. Nobody waits
for the device: how many cells there are in all follows from how many points there are, how they
are spread over axes is decided there.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.pairs import place_of, value_of
from convnn_geo.gpu.tiles import PADDING

CROWD = 2.8
"""Standard deviations by which a ball as wide as cells reach is to hold more than k points."""
WIDE = 16
"""Neighbours from which on two smaller cells each way are looked into first, instead of one."""
LANES = 32
"""Targets of a program, one a thread."""
_BLOCK = 1024
"""Points of a program that sorts."""
_LONGEST = tl.constexpr(65536)
"""Cells of an axis, at most: rounding then moves no point by much of one."""
_ROUNDING = tl.constexpr(2.0**-20)
"""Share of its place, counted in cells, by which rounding may move a point, and more."""
_NOBODY = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""Comes after every pair of a distance and a place."""
_NAN = tl.constexpr(0x7FC00000)
"""The code of NaN."""


@triton.jit(do_not_specialize=["cells"])
def _lay_out(low_ptr, high_ptr, axis_ptr, cells, d: tl.constexpr):
    """One example's grid: for each axis its corner, cells a unit, a cell's edge and their number.

    Cells are about as wide as they are long; an axis shorter than that has but one. So has one
    whose extent is no number, or none that divides.
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
        size = tl.sum(tl.where(several, tl.log2(extent), 0.0), 0) - tl.log2(
            tl.cast(cells, tl.float32)
        )
        number = tl.sum(several.to(tl.float32), 0)
        edge = tl.exp2(size / tl.maximum(number, 1.0) + 1e-4)
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
def _axis(axis_ptr, example, axis: tl.constexpr):
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
def _first(place, count):
    """The cell of a place, or that next to it; the first for NaN."""
    return tl.where(place > 0, tl.minimum(place, count - 1), 0.0).to(tl.int32)


@triton.jit
def _last(place, count):
    """The same; the last for NaN."""
    return tl.where(place < count - 1, tl.maximum(place, 0.0), count - 1).to(tl.int32)


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
        low, scale, _, count = _axis(axis_ptr, example, axis)
        x = _coordinate(point_ptr, at, real, axis, d)
        cell = cell * count.to(tl.int32) + _first((x - low) * scale, count)
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
def _point(sorted_ptr, at):
    """Coordinates and places of sorted points, read two at a time."""
    both = tl.load(sorted_ptr + at * 2)
    last = tl.load(sorted_ptr + at * 2 + 1)
    return _float(both), _float(both >> 32), _float(last >> 32), last & 0xFFFFFFFF


@triton.jit
def _emptied(best, which, K: tl.constexpr):
    """Lists without neighbours, of some targets."""
    found = (tl.where(which, _NOBODY, best[0]),)
    for i in tl.static_range(1, K):
        found = found + (tl.where(which, _NOBODY, best[i]),)  # noqa: RUF005
    return found


@triton.jit
def _inserted(best, pair, K: tl.constexpr):
    """Lists in order with one more pair each; the last drops out."""
    nearer = pair < best[0]
    found = (tl.where(nearer, pair, best[0]),)
    for i in tl.static_range(1, K):
        pair = tl.where(nearer, best[i - 1], pair)
        nearer = pair < best[i]
        found = found + (tl.where(nearer, pair, best[i]),)  # noqa: RUF005
    return found


@triton.jit
def _any(chosen):
    return tl.max(chosen.to(tl.int32), 0) > 0


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
    return _first(at - reach, count), _last(at + reach, count)


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
    tx, ty, tz, place = _point(target_ptr, at)
    row = example * n + place.to(tl.int32)
    own = row
    if HAS_OWN:
        own = tl.load(own_ptr + row).to(tl.int32)
    low, scale_x, edge_x, count_x = _axis(axis_ptr, example, 0)
    px = (tx - low) * scale_x
    low, scale_y, edge_y, count_y = _axis(axis_ptr, example, 1)
    py = (ty - low) * scale_y
    low, scale_z, edge_z, count_z = _axis(axis_ptr, example, 2)
    pz = (tz - low) * scale_z
    slack_x = (tl.abs(px) + count_x) * _ROUNDING
    slack_y = (tl.abs(py) + count_y) * _ROUNDING
    slack_z = (tl.abs(pz) + count_z) * _ROUNDING
    cx, cy, cz = _first(px, count_x), _first(py, count_y), _first(pz, count_z)
    rows, columns = count_y.to(tl.int32), count_z.to(tl.int32)

    best = (tl.full([LANES], _NOBODY, tl.int64),)
    for _ in tl.static_range(1, K):
        best = best + (best[0],)  # noqa: RUF005
    full = at < 0  # whose list is
    radius, ring = tl.zeros([LANES], tl.float32), tl.full([LANES], RING, tl.float32)
    while _any(searching):
        x0, x1 = _box(px, cx, count_x, scale_x, slack_x, radius, ring, full)
        y0, y1 = _box(py, cy, count_y, scale_y, slack_y, radius, ring, full)
        z0, z1 = _box(pz, cz, count_z, scale_z, slack_z, radius, ring, full)
        best = _emptied(best, searching, K)
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
                    x_, y_, z_, place = _point(source_ptr, tl.minimum(at, sources - 1))
                    dx, dy, dz = tx - x_, ty - y_, tz - z_
                    bits = (dx * dx + dy * dy + dz * dz).to(tl.int32, bitcast=True)
                    code = tl.minimum(bits & 0x7FFFFFFF, _NAN)
                    there = at < end
                    if HAS_OWN:
                        there = there & (place.to(tl.int32) != own)
                    code = tl.where(there, code, PADDING)
                    if _any(code <= (best[K - 1] >> 32).to(tl.int32)):
                        best = _inserted(best, (code.to(tl.int64) << 32) | place, K)
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


def _sorted(points: Tensor, axes: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Rows ``(b n, 2)`` of x, y and place, z by cell, two in one number, and where cells start."""
    (b, n, d), total = points.shape, points.shape[0] * points.shape[1]
    cell = torch.empty(2, total, dtype=torch.int32, device=points.device)
    counts = torch.zeros(b * cells + 1, dtype=torch.int32, device=points.device)
    grid = (triton.cdiv(total, _BLOCK),)
    plain = {"d": d, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    _count[grid](points, axes, cell[0], cell[1], counts, total, n, cells, **plain)
    starts = counts.cumsum(0, dtype=torch.int32)
    rows = torch.empty(total, 4, dtype=torch.int32, device=points.device)
    _fill[grid](points, cell[0], cell[1], starts, rows, total, n, **plain)
    return rows.view(torch.int64), starts


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
    axes = keys.new_empty(b, 4, 3)
    low, high = keys.aminmax(dim=1)
    _lay_out[(b,)](low, high, axes, cells, d=d, num_warps=1, enable_fp_fusion=False)
    sources, starts = _sorted(keys, axes, cells)
    targets = sources if same else _sorted(q, axes, cells)[0]
    values = q.new_empty(b * n, k)
    places = torch.empty_like(values, dtype=torch.int64)
    _search[(triton.cdiv(b * n, LANES),)](
        *(sources, starts, targets, axes, own, values, places),
        *(b * m, b * n, n, cells),
        K=k,
        RING=ring,
        LANES=LANES,
        HAS_OWN=own is not None,
        num_warps=LANES // 32,
        enable_fp_fusion=False,
    )
    return values, places
