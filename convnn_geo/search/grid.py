"""Analytic search on a grid: positions alone decide, so it is done once for each size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convnn_geo.caching import keep
from convnn_geo.metrics import Differences, Interpolation, Metric, Spatial, Sum
from convnn_geo.operators import operator
from convnn_geo.points import Grid, Points
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.smallest import k_smallest

_MOST = 2**21
"""Neighbours, at most, that are kept for the next call: 32 MiB."""


class GridSearch(Engine):
    """The nearest pixels of an image by position, exact at borders and with ties.

    Looks at a box around each target, and widens it until nothing outside could be nearer. What it
    finds depends on sizes alone and is kept for the next image of that size.
    """

    name = "grid"

    def keeps(self, query: Query) -> bool:
        """Whether what it finds is small enough to be kept."""
        return _few(query.target, query.k)

    def refuses(self, query: Query) -> str | None:
        """Needs a spatial metric, and sources on a grid."""
        if _spatial(query.metric) is None:
            return "the metric looks at more than positions"
        if query.source.grid is None or query.source.pos is not None:
            return "the sources lie on no grid"
        if query.target.grid is None or query.target.pos is not None:
            return "the targets lie on no grid"
        if not query.plain:
            return "candidates are restricted; it searches all sources only"
        if not isinstance(query.bound, Differences):
            return "a bias is added to the distances"
        return None

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """What was found for these sizes before, or boxes, doubled until they suffice."""
        spatial: Spatial = _spatial(query.metric)  # type: ignore[assignment]
        target: Grid = query.target.grid  # type: ignore[assignment]
        source: Grid = query.source.grid  # type: ignore[assignment]
        index, distance = _on_grid(
            *(target.size, query.k, query.dtype == torch.float64, query.target.device),
            *(target.origin, target.step, source.size, source.origin, source.step),
            *(spatial.p, spatial.squared, spatial.scale, query.exact),
        )
        return index, distance, None


@operator("nearest_on_grid")
def _on_grid(
    target_size: Sequence[int],
    k: int,
    double: bool,
    device: torch.device,
    target_origin: Sequence[float],
    target_step: Sequence[float],
    source_size: Sequence[int],
    source_origin: Sequence[float],
    source_step: Sequence[float],
    p: float,
    squared: bool,
    scale: Sequence[float] | None,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    target = Grid(tuple(target_size), tuple(target_origin), tuple(target_step))
    source = Grid(tuple(source_size), tuple(source_origin), tuple(source_step))
    if device.type == "meta":
        return _shapes(target_size, k, double, device)
    kept = _few(target, k)
    index, distance = (_kept if kept else _nearest)(
        *(target, source, p, squared, None if scale is None else tuple(scale)),
        *(k, exact, torch.float64 if double else torch.float32, device),
    )
    # What is kept is not given away: the caller may write into its own.
    return (index.clone(), distance.clone()) if kept else (index, distance)


@_on_grid.register_fake
def _shapes(
    target_size: Sequence[int], k: int, double: bool, device: torch.device, *_: Any
) -> tuple[Tensor, Tensor]:
    index = torch.empty(math.prod(target_size), k, dtype=torch.long, device=device)
    return index, torch.empty_like(index, dtype=torch.float64 if double else torch.float32)


def _nearest(
    target: Grid,
    source: Grid,
    p: float,
    squared: bool,
    scale: tuple[float, ...] | None,
    k: int,
    exact: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    points = [Points(pos=grid.positions(device, dtype)) for grid in (target, source)]
    bound: Differences = Spatial(p, squared, scale).bind(*points)  # type: ignore[assignment]
    sharp, axes = bound.refined().sharp(), len(source.size)
    radius = math.ceil(k ** (1 / axes) / 2) + 1
    while True:
        index, reach = _box(target, source, radius, sharp, device)
        if index.shape[-1] >= k:
            best, place = k_smallest(sharp.at(index).to(dtype), k)
            enough = (best[..., -1:] < reach.to(dtype)).all()  # both as they are compared
            if index.shape[-1] == source.num_points or bool(enough):
                index = index.gather(-1, place)
                return index, bound.refined().at(index).to(dtype) if exact else best
        radius *= 2


_kept = keep(8)(_nearest)


def _few(target: Grid | Points, k: int) -> bool:
    return target.num_points * k <= _MOST


def _box(
    target: Grid, source: Grid, radius: int, bound: Differences, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sources ``(n, w)`` in a box around each target, and a distance that all others exceed."""
    axes = len(source.size)
    index = torch.zeros((1,) * (2 * axes), dtype=torch.long, device=device)
    places = bound.q.to(bound.dtype).view(*target.size, axes)
    extent = bound.k.to(bound.dtype).view(*source.size, axes)
    reach = places.new_full((1,) * axes, torch.inf)
    for axis, length in enumerate(source.size):
        line = extent.select(-1, axis)
        for other in reversed([a for a in range(axes) if a != axis]):
            line = line.select(other, 0)
        at = places.select(-1, axis)
        for other in reversed([a for a in range(axes) if a != axis]):
            at = at.select(other, 0)
        width = min(2 * radius + 1, length)
        step = source.step[axis] or 1.0
        nearest = ((at - source.origin[axis]) / step).round().clamp(0, length - 1).long()
        start = (nearest - radius).clamp(0, length - width)
        # What lies outside is at least as far as the first line left out on either side.
        beyond = torch.full_like(at, torch.inf)
        left, right = start > 0, start + width < length
        scale = bound.axis_scale(axis)
        before = (at - line[(start - 1).clamp_min(0)]).abs() * scale
        after = (at - line[(start + width).clamp_max(length - 1)]).abs() * scale
        beyond = torch.where(left, torch.minimum(beyond, before), beyond)
        beyond = torch.where(right, torch.minimum(beyond, after), beyond)
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = at.numel(), width
        box = start[:, None] + torch.arange(width, device=device)
        index = index * length + box.view(shape)
        reach = torch.minimum(reach, beyond.view([-1 if a == axis else 1 for a in range(axes)]))
    reach = bound.single(reach.expand(target.size).flatten()).unsqueeze(-1)
    return index.flatten(0, axes - 1).flatten(1), reach


def _spatial(metric: Metric) -> Spatial | None:
    """The spatial metric that this one comes down to, if it does."""
    if isinstance(metric, Spatial):
        return metric
    if isinstance(metric, Sum):
        counting = [m for w, m in zip(metric.weights, metric.metrics, strict=True) if w > 0]
        if len(counting) == 1 and sum(metric.weights) == 1:
            return _spatial(counting[0])  # type: ignore[arg-type]
    if isinstance(metric, Interpolation) and metric.end is not None:
        return _spatial(metric.end)
    return None
