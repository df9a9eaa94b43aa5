"""Clouds of unequal size, searched one by one or filled up to one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convnn_geo.caching import once
from convnn_geo.checks import check_tensor
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Points

LARGE = 256
"""Points a cloud from which on clouds are worth a search each."""
SEARCH = 2**15
"""Pairs that are looked at in the time in which a search begins and ends."""


@dataclass(frozen=True)
class Ragged:
    """Rows of several clouds, in PyG's form.

    Args:
        source: ``m`` rows.
        target: ``n`` rows.
        batch_x: ``(m,)``, sorted, the cloud of each source.
        batch_y: ``(n,)``, likewise of each target.
        same: whether the targets are the sources.
    """

    source: Points
    target: Points
    batch_x: Tensor
    batch_y: Tensor
    same: bool

    def __call__(
        self, search: Callable[[Points, Points, int], Neighborhood], k: int, backend: str
    ) -> Neighborhood:
        """Neighbours ``(n, k)`` within each cloud, counted as rows of the source."""
        clouds, sources, targets = self.sizes
        if self.level:
            return self._level(search, k, clouds)
        small = self.target.num_points < LARGE * max(clouds, 1)
        if small and backend in ("auto", "dense") and not self.uneven:
            return self._together(search, k, clouds, sources)
        return self._apart(search, k, sources.tolist(), targets.tolist())

    @once
    def sizes(self) -> tuple[int, Tensor, Tensor]:
        """Number of clouds, sources and targets of each."""
        last = [int(b[-1]) for b in (self.batch_x, self.batch_y) if b.numel()]
        clouds = 1 + max(last, default=-1)
        sources = torch.bincount(self.batch_x, minlength=clouds)
        targets = torch.bincount(self.batch_y, minlength=clouds)
        return clouds, sources, targets

    @once
    def level(self) -> bool:
        """Whether all clouds are of one size."""
        clouds, sources, targets = self.sizes
        return clouds > 0 and bool((sources == sources[0]).all() & (targets == targets[0]).all())

    @once
    def uneven(self) -> bool:
        """Whether to fill all up to the largest takes far more than a search each."""
        clouds, sources, targets = self.sizes
        pairs = int((sources * targets).sum())
        filled = clouds * int(sources.max()) * int(targets.max()) if clouds else 0
        return filled > 4 * pairs + clouds * SEARCH

    def typical(self) -> tuple[Points, Points]:
        """Sources and targets: all, if of one size, or a cloud about as large as a target's."""
        clouds, sources, targets = self.sizes
        if self.level:
            source = _examples(self.source, clouds)
            return source, source if self.same else _examples(self.target, clouds)
        one = typical(sources, targets)
        first = [int(counts[:one].sum()) for counts in (sources, targets)]
        source = part_of(self.source, first[0], int(sources[one]))
        return source, source if self.same else part_of(self.target, first[1], int(targets[one]))

    def check(self, k: int, excluded: bool) -> None:
        """Raise where a cloud has targets, but fewer than ``k`` candidates for each."""
        _, sources, targets = self.sizes
        least = int(sources.where(targets > 0, self.source.num_points).min())
        if not least:
            raise ValueError(
                "an example has targets but no sources; check that batch_x and batch_y number the "
                "same examples, or pass short='pad'"
            )
        if k > least - excluded:
            raise ValueError(too_many(k, least - excluded, excluded))

    def _level(
        self, search: Callable[[Points, Points, int], Neighborhood], k: int, clouds: int
    ) -> Neighborhood:
        """Of one size: the rows are dense examples already."""
        source = _examples(self.source, clouds)
        target = source if self.same else _examples(self.target, clouds)
        found = search(target, source, k)
        start = torch.arange(clouds, device=found.index.device) * source.num_points
        found = _counted(found, start[:, None, None]).apply(lambda t: t.flatten(0, 1))
        return replace(found, num_sources=self.source.num_points)

    def _together(
        self,
        search: Callable[[Points, Points, int], Neighborhood],
        k: int,
        clouds: int,
        sources: Tensor,
    ) -> Neighborhood:
        """Filled up to the size of the largest."""
        source = Points.from_batch(self.source.x, self.source.pos, self.batch_x, clouds)
        target = source
        if not self.same:
            target = Points.from_batch(self.target.x, self.target.pos, self.batch_y, clouds)
        found = search(target, source, k)
        start = sources.cumsum(0) - sources
        found = _counted(found, start[:, None, None]).apply(target.to_rows)
        found = replace(found, num_sources=self.source.num_points)
        filled = found.mask is None or bool(found.mask.all())
        return replace(found, mask=None) if filled else found

    def _apart(
        self,
        search: Callable[[Points, Points, int], Neighborhood],
        k: int,
        sources: list[int],
        targets: list[int],
    ) -> Neighborhood:
        """One after the other."""
        found: list[Neighborhood] = []
        first_source = first_target = 0
        for m, n in zip(sources, targets, strict=True):
            source = part_of(self.source, first_source, m)
            target = source if self.same else part_of(self.target, first_target, n)
            if n:
                found.append(_counted(search(target, source, k), first_source))
            first_source, first_target = first_source + m, first_target + n
        slots = min((part.k for part in found), default=k)  # the smallest cloud's, if truncated
        return _joined([part.apply(lambda t: t[:, :slots]) for part in found], self.source, slots)


def _counted(found: Neighborhood, start: Tensor | int) -> Neighborhood:
    """The same with sources counted from ``start`` on."""
    index = found.index + start
    return replace(found, index=index if found.mask is None else filled(index, found.mask))


def filled(index: Tensor, mask: Tensor) -> Tensor:
    """Places ``(..., n, k)`` whose empty slots name the nearest: none looks into another cloud.

    What is multiplied by 0 there may be NaN, which shows in gradients. Who has no neighbour at all
    names source 0.
    """
    nearest = index[..., :1].where(mask[..., :1], 0)
    return index.where(mask, nearest)


def _examples(points: Points, clouds: int) -> Points:
    x, pos = (None if t is None else t.unflatten(0, (clouds, -1)) for t in (points.x, points.pos))
    return Points(x, pos)


def part_of(points: Points, start: int, size: int) -> Points:
    """The ``size`` rows from ``start`` on."""
    x, pos = (None if t is None else t[start : start + size] for t in (points.x, points.pos))
    return Points(x, pos)


def _joined(parts: list[Neighborhood], source: Points, k: int) -> Neighborhood:
    rows = source.features if source.x is not None else source.position
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    index = torch.cat([p.index for p in parts] or [rows.new_zeros(0, k, dtype=torch.long)])
    distance = torch.cat([p.distance for p in parts] or [rows.new_zeros(0, k, dtype=dtype)])  # type: ignore[misc]
    mask = None
    if any(p.mask is not None for p in parts):
        masks = [p.mask if p.mask is not None else torch.ones_like(p.index) for p in parts]
        mask = torch.cat([m.bool() for m in masks])
        mask = None if bool(mask.all()) else mask
    return Neighborhood(index, source.num_points, distance, mask)


def typical(sources: Tensor, targets: Tensor) -> int:
    """Of clouds of so many points the one about as large as what a target looks at, on average."""
    size = (sources * targets).sum() / targets.sum().clamp_min(1)
    return int((sources - size).abs().where(targets > 0, torch.inf).argmin())


def too_many(k: int, available: int, excluded: bool) -> str:
    """What is said of a k over the number of candidates."""
    return (
        f"k={k} is larger than the number of candidates, {available}"
        + (" besides the point itself" if excluded else "")
        + "; lower k, merge examples that are too small, or pass short='pad' or 'truncate'"
    )


def check_both(batch_x: Tensor | None, batch_y: Tensor | None) -> None:
    """Raise where one of two batch vectors names several examples, and the other is missing."""
    for name, batch, other in (("batch_x", batch_x, batch_y), ("batch_y", batch_y, batch_x)):
        if other is None and isinstance(batch, Tensor) and batch.numel() and bool(batch.max() > 0):
            missing = "batch_y" if name == "batch_x" else "batch_x"
            raise ValueError(
                f"{name} names {int(batch.max()) + 1} examples, but there is no {missing}: pass "
                "the example of each row of both sets"
            )


def check_batch(name: str, batch: Tensor | None, points: Points) -> Tensor:
    """A batch vector that is whole, sorted and as long as the points; zeros for None."""
    if batch is None:
        return torch.zeros(points.num_points, dtype=torch.long, device=points.device)
    check_tensor(name, batch, 1)
    if batch.dtype != torch.long:
        raise TypeError(f"{name}: expected dtype torch.int64, got {batch.dtype}; .long() makes it")
    if batch.device != points.device:
        raise ValueError(f"{name} is on {batch.device}, the points on {points.device}")
    if batch.numel() != points.num_points:
        raise ValueError(
            f"{name}: expected one number a point, got {batch.numel()} for {points.num_points}"
        )
    if batch.numel() > 1 and bool((batch[1:] < batch[:-1]).any()):
        raise ValueError(
            f"{name}: expected sorted example numbers; sort the points by {name} first"
        )
    if batch.numel() and int(batch[0]) < 0:
        raise ValueError(f"{name}: expected numbers from 0 on, got {int(batch[0])}")
    return batch
