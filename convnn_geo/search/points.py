"""Engines for points: whoever proposes neighbours, the order and the ties are ours."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from convnn_geo.search.nearest import (
    IMPLEMENTATIONS,
    Problem,
    by_rows,
    by_value_then_place,
    measured,
    nearest,
    put_rows,
    referee,
    unsure_rows,
)
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.rows import Hidden


class PointEngine(Engine):
    """An engine that proposes the Euclidean neighbours of points, in any order of near ones.

    Proposals are one more than k. Distances are recomputed and neighbours sorted by
    (distance, index). Targets whose k-th and last neighbour are closer than rounding are searched
    again, for more neighbours and at last by rows.
    """

    def __init__(self) -> None:
        IMPLEMENTATIONS[self.name] = self._nearest

    @abstractmethod
    def propose(self, q: Tensor, keys: Tensor, asked: int) -> Tensor | None:
        """The ``asked`` nearest of points ``(b, n, d)`` among ``(b, m, d)``: ``(b, n, asked)``.

        None where it gives up.
        """

    def limit(self, device: torch.device) -> int | None:
        """The most neighbours that it finds at once; None for no limit."""
        return None

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """How far off its comparison of distances near ``value (b, n)`` can be."""
        return (q.shape[-1] + 4) * torch.finfo(q.dtype).eps * value

    def refuses(self, query: Query) -> str | None:
        """Needs its package, Euclidean coordinates, all candidates, one point more than k."""
        missing = self.missing()
        if missing is not None:
            return missing
        if not query.plain:
            return "candidates are restricted; it searches all sources only"
        if query.k + 1 > query.source.num_points:
            return f"needs more than k={query.k} sources, got {query.source.num_points}"
        limit = self.limit(query.target.device)
        if limit is not None and query.k + 1 > limit:
            return f"k={query.k} is over its limit of {limit - 1} on {query.target.device.type}"
        if query.bound.dimension is None:
            return "the metric's order is not that of Euclidean distances of points"
        return None

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """Search, and measure."""
        problem = Problem.of(query.bound, query.dtype)
        if problem is None:
            raise TypeError(f"{self.name} needs a metric with coordinates")
        values, place = nearest(problem, query.k, Hidden(), query.slab, self.name)
        if query.exact:
            values = measured(query.bound, place, query.slab, query.dtype)
        return place, values, None

    def _nearest(
        self, problem: Problem, k: int, hidden: Hidden, slab: int
    ) -> tuple[Tensor, Tensor]:
        points: tuple[Tensor, Tensor] = problem.bound().coordinates()  # type: ignore[assignment]
        lead = torch.broadcast_shapes(*(t.shape[:-2] for t in points))
        q, keys = (
            t.expand(*lead, *t.shape[-2:]).flatten(0, -3) if lead else t[None] for t in points
        )
        values, places = self._settled(
            problem, q.contiguous(), keys.contiguous(), lead, k, k + 1, slab
        )
        return values[..., :k], places[..., :k]

    def _settled(
        self,
        problem: Problem,
        q: Tensor,
        keys: Tensor,
        lead: torch.Size,
        k: int,
        asked: int,
        slab: int,
    ) -> tuple[Tensor, Tensor]:
        """Ask for ``asked`` neighbours, and for more where ties reach past them."""
        finite = bool(q.isfinite().all() and keys.isfinite().all())  # a tree of NaN is no tree
        proposed = self.propose(q, keys, asked) if finite else None
        if proposed is None:
            return by_rows(problem, k, Hidden(), slab)
        bound = problem.bound()
        place = proposed.view(*lead, *proposed.shape[-2:])
        value, order = by_value_then_place(referee(bound, place, slab, problem.dtype), place)
        place = place.gather(-1, order)
        slack = self.slack(q, keys, value[..., -1].reshape(q.shape[0], -1)).view(value.shape[:-1])
        unsure = ~(value[..., -1] - value[..., k - 1] > slack)
        value, place = value[..., :k].contiguous(), place[..., :k].contiguous()
        if bool(unsure.any()):
            rows = unsure_rows(unsure)
            few = problem.targets(rows)
            more, limit = 4 * asked, self.limit(q.device)
            if more <= keys.shape[-2] and (limit is None or more <= limit):
                part = few.bound().coordinates()[0]  # type: ignore[index]
                part = part.expand(*lead, *part.shape[-2:]).reshape(q.shape[0], -1, q.shape[-1])
                again = self._settled(few, part, keys, lead, k, more, slab)
            else:
                again = by_rows(few, k, Hidden(), slab)
            value, place = put_rows(value, place, rows, again)
        return value, place
