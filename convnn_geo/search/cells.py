"""Search through a grid of cells: clouds of up to three dimensions, on CPU and GPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo import compiled, gpu
from convnn_geo.checks import all_finite
from convnn_geo.metrics import Differences
from convnn_geo.search.coincident import Thinned
from convnn_geo.search.kd_tree import KDTree
from convnn_geo.search.nearest import IMPLEMENTATIONS, referee
from convnn_geo.search.points import PointEngine, alone, together
from convnn_geo.search.problem import Problem
from convnn_geo.search.query import Query
from convnn_geo.search.rows import Hidden
from convnn_geo.search.smallest import k_smallest
from convnn_geo.shapes import broadcast_shapes

LARGEST_K = 64
"""Neighbours, at most, that a thread of a GPU keeps."""


@dataclass(frozen=True)
class _Grid:
    """Points ``(m, d)`` sorted by the cells of a grid.

    Args:
        points: as they came.
        low: ``(d,)``, the corner.
        edge: ``(d,)``, of a cell.
        count: cells on each axis.
        order: ``(m,)``, points in the order of cells, the last axis fastest.
        start: ``(cells + 1,)``, where each cell starts in it.
    """

    points: Tensor
    low: Tensor
    edge: Tensor
    count: tuple[int, ...]
    order: Tensor
    start: Tensor

    @classmethod
    def of(cls, points: Tensor, wanted: float) -> _Grid:
        """A grid with about ``wanted`` points a cell."""
        low, high = points.amin(0), points.amax(0)
        extent = (high - low).double().tolist()
        cells, count = max(1.0, len(points) / wanted), [1] * len(extent)
        axes = sorted(range(len(extent)), key=extent.__getitem__)
        for place, axis in enumerate(axes):  # the shortest first: it may have but one
            left = axes[place:]
            edge = math.prod(extent[a] / cells ** (1 / len(left)) for a in left) ** (1 / len(left))
            count[axis] = min(1024, max(1, int(extent[axis] / edge))) if edge > 0 else 1
            cells = max(1.0, cells / count[axis])
        sides = torch.tensor(count, device=points.device)
        edge_ = (high - low) / sides
        edge_ = torch.where(edge_ > 0, edge_, torch.ones_like(edge_))
        grid = cls(points, low, edge_, tuple(count), sides, sides)
        cell = grid.flat(grid.cells(points))
        order = cell.argsort(stable=True)
        held = torch.bincount(cell, minlength=math.prod(count))
        start = torch.nn.functional.pad(held.cumsum(0), (1, 0))
        return cls(points, low, edge_, tuple(count), order, start)

    def cells(self, points: Tensor) -> Tensor:
        """The cell ``(n, d)`` that each point is in or next to."""
        last = torch.tensor(self.count, device=points.device) - 1
        place = ((points - self.low) / self.edge).clamp_min(0)
        return torch.minimum(place, last.to(place)).long()

    def flat(self, cell: Tensor) -> Tensor:
        """Numbers of cells ``(..., d)``."""
        number = torch.zeros_like(cell[..., 0])
        for axis, length in enumerate(self.count):
            number = number * length + cell[..., axis]
        return number


_AT_ONCE = 2**24
"""Pairs that are looked at together, by torch."""


class Cells(PointEngine):
    """Looks into the cells around each target until nothing outside can be nearer.

    In C on the CPU, where that can be compiled, in Triton on GPUs, and by torch elsewhere. On the
    CPU clouds that lie in tight clusters go to a tree.
    """

    name = "cells"

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, in up to three dimensions."""
        reason = super().refuses(query)
        if reason is None and query.dimension > 3:
            return (
                f"cells are for up to 3 dimensions, the points that stand for the metric have "
                f"{query.dimension}"
            )
        if reason is None and query.problem.kind != "points":
            return "points that stand for angles, or for products, lie in few of the cells"
        return reason

    def nearest(self, problem: Problem, k: int, hidden: Hidden, slab: int) -> tuple[Tensor, Tensor]:
        """In one launch on a GPU, example by example in C, or as other engines."""
        plain = problem.kind == "points" and problem.axes is None and problem.q.numel() > 0
        plain = plain and 0 < k <= problem.keys.shape[-2] - (hidden.own is not None)
        if plain and _on_a_gpu(problem, k):
            return _in_triton(problem, k, hidden.own)
        if not plain or not (all_finite(problem.q) and all_finite(problem.keys)):
            return self._otherwise(problem, k, hidden, slab)
        found = []
        for one, own in alone(problem, hidden):
            part = _in_c(one.q, one.keys, k, own)
            found.append(part or self._otherwise(one, k, Hidden(own=own), slab))
        values, places = together(found, problem)
        return values.to(problem.dtype), places

    def _otherwise(
        self, problem: Problem, k: int, hidden: Hidden, slab: int
    ) -> tuple[Tensor, Tensor]:
        if problem.q.device.type == "cpu" and KDTree().missing() is None:
            return IMPLEMENTATIONS[KDTree.name](problem, k, hidden, slab)
        return super().nearest(problem, k, hidden, slab)

    def propose(self, prepared: Tensor, q: Tensor, asked: int) -> Tensor:
        """Example by example, by torch."""
        return torch.stack(
            [_around(points, keys, asked) for points, keys in zip(q, prepared, strict=True)]
        )


def _on_a_gpu(problem: Problem, k: int) -> bool:
    """Whether a problem is one for our kernel."""
    points = (problem.q, problem.keys)
    single = all(t.dtype == torch.float32 and t.numel() < 2**30 for t in points)
    return single and k <= LARGEST_K and gpu.refuses(problem.q.device) is None


def _in_triton(problem: Problem, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """All examples at once, finite or not."""
    from convnn_geo.gpu.cells import nearest

    q, keys = problem.q, problem.keys
    same = q.data_ptr() == keys.data_ptr() and q.shape == keys.shape
    same = same and q.stride() == keys.stride()
    lead = broadcast_shapes(q.shape[:-2], keys.shape[:-2])
    q, keys = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (q, keys))
    q, keys = q.contiguous(), keys.contiguous()
    if own is not None:
        own = own.expand(*lead, own.shape[-1]).reshape(-1)
    values, places = nearest(q, keys, k, own, same)
    return values.view(*lead, -1, k), places.view(*lead, -1, k)


def _in_c(q: Tensor, keys: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """By C; where points lie too unevenly, once more without those that only coincide."""
    found = compiled.cells_nearest(q, keys, k, own)
    served = q.dtype == torch.float32 and q.device.type == "cpu" and compiled.library() is not None
    if found is not None or not served:
        return found
    thinned = Thinned.of(keys, k + (own is not None))
    if thinned is None:
        return None
    own = None if own is None else thinned.renumbered(own)
    found = compiled.cells_nearest(q, keys[thinned.kept], k, own)
    return None if found is None else (found[0], thinned.kept[found[1]])


def _around(q: Tensor, keys: Tensor, asked: int, wanted: float | None = None) -> Tensor:
    """Places ``(n, asked)`` of the nearest keys, from the cells in and next to each query's.

    Queries for which these do not suffice ask again with larger cells.
    """
    wanted = max(2.0, 0.7 * asked) if wanted is None else wanted
    grid = _Grid.of(keys, wanted)
    cell = grid.cells(q)
    found = torch.empty(len(q), asked, dtype=torch.long, device=q.device)
    unsure = []
    step = max(1, int(_AT_ONCE / (3 ** q.shape[-1] * 8 * wanted)))
    for part in grid.flat(cell).argsort().split(step):  # neighbours share what they look at
        near, sure = _box(grid, q[part], cell[part], asked)
        found[part] = near
        unsure.append(part[~sure])
    rest = torch.cat(unsure) if unsure else torch.zeros_like(found[:0, 0])
    if rest.numel():
        found[rest] = _around(q[rest], keys, asked, 8 * wanted)
    return found


def _box(grid: _Grid, q: Tensor, cell: Tensor, asked: int) -> tuple[Tensor, Tensor]:
    """The nearest within a cell of the query's on every axis, and whether none is nearer."""
    *others, last = range(q.shape[-1])
    steps = list(itertools.product((-1, 0, 1), repeat=len(others)))
    shift = torch.tensor(steps, device=q.device, dtype=torch.long).view(len(steps), len(others))
    row = cell[:, None, :-1] + shift  # runs of cells along the last axis lie together
    count = torch.tensor(grid.count, device=q.device)
    inside = ((row >= 0) & (row < count[:-1])).all(-1)
    first, beyond = (
        grid.flat(torch.cat([row, end[:, None, None].expand(*row.shape[:-1], 1)], -1))
        for end in ((cell[:, last] - 1).clamp_min(0), (cell[:, last] + 1).clamp_max(count[-1] - 1))
    )
    begin = grid.start[first.where(inside, 0)]
    size = (grid.start[beyond.where(inside, 0) + 1] - begin).where(inside, 0)
    width = max(int(size.max()), math.ceil(asked / len(steps)))
    if len(q) > 1 and size.numel() * width > _AT_ONCE:  # some cell holds far more than the others
        halves = (_box(grid, *part, asked) for part in zip(q.chunk(2), cell.chunk(2), strict=True))
        near, sure = zip(*halves, strict=True)
        return torch.cat(near), torch.cat(sure)
    slot = torch.arange(width, device=q.device)
    place = (begin.unsqueeze(-1) + slot).clamp_max(len(grid.order) - 1)
    index = grid.order[place].flatten(1)
    value = referee(Differences(q, grid.points, root=False), index, 2**23, q.dtype)
    there = (slot < size.unsqueeze(-1)).flatten(1)
    value, best = k_smallest(value.masked_fill(~there, torch.nan), asked)  # after infinity
    gap = torch.full_like(value[:, -1], torch.inf)
    for axis in range(q.shape[-1]):
        x, at, edge = q[:, axis], cell[:, axis], grid.edge[axis]
        low, spare = grid.low[axis], 1e-3 * edge  # rounding moves a point by less
        left = (x - (low + (at - 1) * edge) - spare).where(at > 1, torch.inf)
        right = (low + (at + 2) * edge - x - spare).where(at + 2 < count[axis], torch.inf)
        gap = torch.minimum(gap, torch.minimum(left, right))
    enough = (gap == torch.inf) | ((gap > 0) & (value[:, -1] < gap.square() * (1 - 1e-5)))
    return index.gather(-1, best), enough & ~value[:, -1].isnan()
