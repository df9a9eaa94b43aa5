"""Engines for points: whoever proposes neighbours, the order and the ties are ours."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convnn_geo.checks import all_finite
from convnn_geo.search.coincident import Thinned
from convnn_geo.search.nearest import (
    IMPLEMENTATIONS,
    by_rows,
    measured,
    nearest,
    put_rows,
    referee,
    unsure_rows,
)
from convnn_geo.search.problem import Problem
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.rows import Hidden
from convnn_geo.search.smallest import by_value_then_place
from convnn_geo.shapes import broadcast_shapes


class PointEngine(Engine):
    """An engine that proposes the Euclidean neighbours of points, in any order of near ones.

    Proposals are one more than k. Distances are recomputed and neighbours sorted by
    (distance, index). Targets whose k-th and last neighbour are closer than rounding are searched
    again, for more neighbours and at last by rows.
    """

    whole = False
    """Whether all targets must be asked at once; some at a time take less memory."""

    def __init__(self) -> None:
        IMPLEMENTATIONS[self.name] = self.nearest

    def prepare(self, keys: Tensor) -> Any:
        """What :meth:`propose` looks into: a tree or the like over points ``(b, m, d)``."""
        return keys

    @abstractmethod
    def propose(self, prepared: Any, q: Tensor, asked: int) -> Tensor | None:
        """The ``asked`` nearest of points ``(b, n, d)`` among those prepared: ``(b, n, asked)``.

        -1 where one is missing; None where it gives up.
        """

    def limit(self, device: torch.device) -> int | None:
        """The most neighbours that it finds at once; None for no limit."""
        return None

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """How far off its comparison of squared distances near ``value (b, n)`` can be."""
        return (q.shape[-1] + 4) * torch.finfo(q.dtype).eps * value

    def refuses(self, query: Query) -> str | None:
        """Needs its package, Euclidean coordinates, and all candidates."""
        missing = self.missing()
        if missing is not None:
            return missing
        if query.subset.index is not None or query.subset.mask is not None:
            return "candidates are restricted; it searches all sources only"
        limit = self.limit(query.target.device)
        if limit is not None and query.k + 1 + (query.excluded is not None) > limit:
            return f"k={query.k} is over its limit of {limit - 1} on {query.target.device.type}"
        if query.dimension is None:
            return "the metric's order is not that of Euclidean distances, nor of products"
        return None

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """Search, and measure."""
        return by_coordinates(query, self.name)

    def nearest(self, problem: Problem, k: int, hidden: Hidden, slab: int) -> tuple[Tensor, Tensor]:
        """Values and places of the ``k`` nearest, some targets at a time."""
        points = problem.coordinates()
        same = points[0] is points[1]
        lead = broadcast_shapes(*(t.shape[:-2] for t in points))
        q, keys = (
            t.expand(*lead, *t.shape[-2:]).flatten(0, -3) if lead else t[None] for t in points
        )
        q, keys = q.contiguous(), keys.contiguous()
        asked = k + 1 + (hidden.own is not None)
        finite = all_finite(q) and (same or all_finite(keys))  # a tree of NaN is no tree
        if not finite or not q.numel() or k < 1 or asked > keys.shape[-2]:
            return by_rows(problem, k, hidden, slab)
        prepared = self.prepare(keys)
        examples, n = q.shape[:2]
        step = n if self.whole else max(1, slab // (16 * asked * max(1, examples)))
        values = q.new_empty(*lead, n, k, dtype=problem.dtype)
        places = torch.empty_like(values, dtype=torch.long)
        for start in range(0, n, max(step, 1)):
            part = slice(start, min(start + step, n))
            values[..., part, :], places[..., part, :] = self._settled(
                problem.between(part.start, part.stop),
                *(prepared, q[:, part], keys, lead, k),
                *(hidden.between(part.start, part.stop), asked, slab),
            )
        return values, places

    def _settled(
        self,
        problem: Problem,
        prepared: Any,
        q: Tensor,
        keys: Tensor,
        lead: torch.Size,
        k: int,
        hidden: Hidden,
        asked: int,
        slab: int,
    ) -> tuple[Tensor, Tensor]:
        """Ask for ``asked`` neighbours, and for more where ties reach past them."""
        proposed = self.propose(prepared, q, asked)
        if proposed is None:
            return by_rows(problem, k, hidden, slab)
        place = proposed.view(*lead, *proposed.shape[-2:])
        lost = (place < 0) | (
            place >= keys.shape[-2]
        )  # none was found: distances are infinite, say
        missing, place = lost.any(-1), place.where(~lost, 0)
        if hidden.own is not None:
            lost = lost | (place == hidden.own.unsqueeze(-1))
        value = referee(problem.bound(), place, slab, problem.dtype)
        farthest = value.amax(-1)
        value, place = by_value_then_place(value.masked_fill(lost, torch.inf), place)
        unsure = missing | self.unsure(problem, q, keys, farthest, value[..., k - 1])
        value, place = value[..., :k].contiguous(), place[..., :k].contiguous()
        if bool(unsure.any()):
            rows = unsure_rows(unsure)
            few, behind = problem.targets(rows), hidden.targets(rows)
            more, limit = 4 * asked, self.limit(q.device)
            again = self._thinned(few, k, behind, slab)
            if again is None and more <= keys.shape[-2] and (limit is None or more <= limit):
                part = few.coordinates()[0]
                part = part.expand(*lead, *part.shape[-2:]).reshape(q.shape[0], -1, q.shape[-1])
                again = self._settled(few, prepared, part, keys, lead, k, behind, more, slab)
            elif again is None:
                again = by_rows(few, k, behind, slab)
            value, place = put_rows(value, place, rows, again)
        return value, place

    def _thinned(
        self, problem: Problem, k: int, hidden: Hidden, slab: int
    ) -> tuple[Tensor, Tensor] | None:
        """Example by example, without points that only coincide with others; None if none do."""
        if problem.bias is not None:
            return None
        examples = alone(problem, hidden)
        thinned = [Thinned.of(one.keys, k + (own is not None)) for one, own in examples]
        if not any(thinned):
            return None
        found = []
        for (one, own), less in zip(examples, thinned, strict=True):
            if less is not None:
                one = replace(one, keys=one.keys[less.kept])
                own = None if own is None else less.renumbered(own)
            value, place = self.nearest(one, k, Hidden(own=own), slab)
            found.append((value, place if less is None else less.kept[place]))
        return together(found, problem)

    def unsure(
        self, problem: Problem, q: Tensor, keys: Tensor, farthest: Tensor, last: Tensor
    ) -> Tensor:
        """Targets ``(..., n)`` whose k nearest may not all be among the proposals.

        What was not proposed is no nearer than the farthest that was, but for rounding.

        Args:
            problem: what is searched.
            q: targets ``(b, n, d)``.
            keys: sources ``(b, m, d)``.
            farthest: ``(..., n)``, the largest value of a proposal.
            last: ``(..., n)``, the k-th smallest.
        """
        slack = self._slack(problem, q, keys, farthest.reshape(q.shape[:2])).view(farthest.shape)
        return ~(farthest - last > slack)

    def _slack(self, problem: Problem, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """:meth:`slack` in terms of the problem's values."""
        if problem.kind == "points":
            slack = self.slack(q, keys, value)
            if problem.axes is None:
                return slack
            length = q.norm(dim=-1) + keys.norm(dim=-1).amax(-1, keepdim=True)
            return slack + 8 * torch.finfo(q.dtype).eps * length * value.sqrt()  # scaled first
        if problem.kind == "angles":  # whose values are half of squared distances
            return self.slack(q, keys, 2 * value) / 2
        # The axis that turns products into distances is as long as the longest key, and rounded.
        length = q.norm(dim=-1) + keys.norm(dim=-1).amax(-1, keepdim=True)
        rounding = 8 * torch.finfo(q.dtype).eps * length.square()
        return (self.slack(q, keys, length.square()) + rounding) * (problem.scale / 2)


def by_coordinates(query: Query, engine: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :meth:`Engine.run` gives, by an implementation named."""
    if query.problem is None:
        raise TypeError(f"{engine} needs a metric with coordinates")
    hidden = Hidden(own=query.excluded)
    values, place = nearest(query.problem, query.k, hidden, query.slab, engine)
    if query.exact:
        values = measured(query.bound, values, place, query.slab)
    return place, values, None


def alone(problem: Problem, hidden: Hidden) -> list[tuple[Problem, Tensor | None]]:
    """Each example as a problem of its own, with the places that its targets are not to find."""
    lead = broadcast_shapes(problem.q.shape[:-2], problem.keys.shape[:-2])

    def parts(tensor: Tensor | None, last: int = 2) -> Sequence[Any]:
        if tensor is None:
            return [None] * lead.numel()
        own = tensor.shape[tensor.ndim - last :]
        return tensor.expand(*lead, *own).reshape(lead.numel(), *own).unbind()

    tensors = (parts(problem.q), parts(problem.keys), parts(problem.axes), parts(problem.bias, 1))
    return [
        (replace(problem, q=q, keys=keys, axes=axes, bias=bias), own)
        for q, keys, axes, bias, own in zip(*tensors, parts(hidden.own, 1), strict=True)
    ]


def together(found: Sequence[tuple[Tensor, Tensor]], problem: Problem) -> tuple[Tensor, Tensor]:
    """What was found for each example, as the problem has them."""
    lead = broadcast_shapes(problem.q.shape[:-2], problem.keys.shape[:-2])
    values, places = (
        (torch.stack(t) if len(t) > 1 else t[0]).view(*lead, *t[0].shape)
        for t in zip(*found, strict=True)
    )
    return values, places


def unlike_a_gpu(engine: str, query: Query) -> str | None:
    """Why a query is not one of float32 on a GPU; None if it is."""
    if query.target.device.type != "cuda":
        return f"{engine} is for GPUs, the points are on {query.target.device}"
    if query.problem is not None and query.problem.q.dtype != torch.float32:
        return f"{engine} has float32 only, and these distances need float64"
    return None
