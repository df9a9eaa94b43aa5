"""Search in clouds of unequal size as one operator: at once, where an engine can.

How large clouds are only the batch vectors say, and a traced program has no values: it is looked
at when the operator runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convnn_geo.checks import check_name, in_this_package
from convnn_geo.compiled import Runs
from convnn_geo.metrics import Feature, Metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operators import operator
from convnn_geo.points import Points, row_starts
from convnn_geo.search.fused import in_runs, serves_runs
from convnn_geo.search.launches import serves
from convnn_geo.search.nearest import implemented, measured
from convnn_geo.search.problem import Problem
from convnn_geo.search.query import Query
from convnn_geo.search.ragged import check_batch, check_both, filled, too_many, typical
from convnn_geo.search.registry import ENGINES, fastest
from convnn_geo.search.rows import Hidden
from convnn_geo.search.triton import in_clouds


def find_in_clouds(
    query: Query,
    batch_x: Tensor | None,
    batch_y: Tensor | None,
    backend: str,
    self_point: str = "natural",
    short: str = "error",
) -> Neighborhood:
    """The nearest of each row of a query among the rows of its own cloud.

    Args:
        query: between all rows ``(n, c)`` and ``(m, c)``.
        batch_x: ``(m,)``, sorted, the cloud of each source; None for one cloud.
        batch_y: ``(n,)``, likewise of each target.
        backend: an engine, or ``"auto"``.
        self_point: see :func:`convnn_geo.search.knn`.
        short: ``"error"`` or ``"pad"``.
    """
    if _looks_at_sets(query.metric):
        raise ValueError(f"{query.metric} looks at whole clouds, whose sizes can't be traced")
    if short == "truncate":
        raise ValueError("short='truncate': how many neighbours it leaves can't be traced; pad")
    problem = query.problem
    if problem is None:
        raise ValueError(
            f"{query.metric} is neither a distance of points nor a product; "
            "in clouds of a batch others can't be traced"
        )
    check_name("search backend", backend, ["auto", *ENGINES])
    first = self_point == "first"
    if backend != "auto":
        own = (
            None
            if self_point == "natural"
            else row_starts(query.source.num_points, 1, query.source.device)
        )
        reason = ENGINES[backend].refuses(replace(query, k=query.k - first, excluded=own))
        if reason is not None:
            raise ValueError(f"search backend {backend!r} can't serve this query: {reason}")
    elif query.dimension is None:
        backend = "dense"
    values, place = _nearest_in_clouds(
        *problem.arguments(),
        *(query.k - first, batch_x, batch_y),
        *(self_point != "natural", short == "pad", query.slab, backend),
    )
    # No gradient goes through a search. Not by no_grad: a traced program that raises inside of it,
    # as the operator does where k is over a cloud's size, leaves gradients off for its caller.
    mask = place >= 0
    place = place.clamp_min(0)
    distance = measured(query.bound, values, place, query.slab).detach()
    if first:
        own = torch.arange(len(place), device=place.device)[:, None]
        place, mask = torch.cat([own, place], -1), torch.cat([own >= 0, mask], -1)
        distance = torch.cat([query.bound.at(own).detach().to(distance), distance], -1)
    if short != "pad":
        return Neighborhood(place, query.source.num_points, distance)
    place = filled(place, mask)
    return Neighborhood(place, query.source.num_points, distance.where(mask, torch.inf), mask)


def serves_clouds(query: Query, backend: str) -> bool:
    """Whether clouds of unequal size may be searched at once: in C, or in one launch on a GPU."""
    if not knows_pairs(query.metric) or query.problem is None:
        return False
    if query.target.device.type == "cpu" and backend in ("auto", "dense"):
        return serves_runs(query.problem, query.k, query.slab)
    return _serves_launch(query, backend)


def _serves_launch(query: Query, backend: str) -> bool:
    if backend != "triton" and (backend != "auto" or query.target.device.type != "cuda"):
        return False
    return serves(query.problem) and ENGINES["triton"].refuses(query) is None


def knows_pairs(metric: Metric) -> bool:
    """Whether distances surely depend on pairs alone, so that all clouds may be measured at once.

    Of a metric of the user's own that is not known.
    """
    parts = [part for part in metric.modules() if isinstance(part, Metric)]
    return all(map(in_this_package, parts)) and not _looks_at_sets(metric)


def _looks_at_sets(metric: Metric) -> bool:
    return any(getattr(part, "by_set", False) for part in metric.modules())


@operator("nearest_in_clouds", waits=True)
def _nearest_in_clouds(
    kind: str,
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    axes: Tensor | None,
    scale: float,
    double: bool,
    exact: bool,
    k: int,
    batch_x: Tensor | None,
    batch_y: Tensor | None,
    excluded: bool,
    padded: bool,
    slab: int,
    engine: str,
) -> tuple[Tensor, Tensor]:
    check_both(batch_x, batch_y)
    batch_x = check_batch("batch_x", batch_x, Points(keys))
    batch_y = check_batch("batch_y", batch_y, Points(q))
    problem = Problem.from_arguments(kind, q, keys, bias, axes, scale, double, exact)
    if _serves_launch(_asked(problem, k), engine):
        found = in_clouds(problem, k, batch_x, batch_y, excluded, engine)
        if found is not None:
            return found
    batch_x = batch_x.contiguous()  # a column of a table, say
    clouds, counts = batch_y.unique_consecutive(return_counts=True)
    starts = torch.searchsorted(batch_x, clouds), torch.searchsorted(batch_x, clouds, right=True)
    runs = Runs(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), *starts)
    least = int(runs.sources.min()) if len(clouds) else k + 1
    if k > least - excluded and not padded:
        raise ValueError(too_many(k, least - excluded, excluded))
    if len(clouds) and _dense_is_best(problem, k, runs, slab, engine):
        found = in_runs(problem, k, runs, excluded, slab)
        if found is not None:
            return found
    return _apart(problem, k, runs, excluded, slab, engine)


def _asked(problem: Problem, k: int) -> Query:
    return Query(Points(problem.q), Points(problem.keys), Feature(), k, bind=problem.bound)


def _part(problem: Problem, targets: slice, sources: slice) -> Problem:
    """A cloud by itself."""
    bias = None if problem.bias is None else problem.bias[sources]
    return replace(problem, q=problem.q[targets], keys=problem.keys[sources], bias=bias)


def _dense_is_best(problem: Problem, k: int, runs: Runs, slab: int, engine: str) -> bool:
    """Whether dense search is asked for, or likely fastest, and can look at all clouds at once."""
    if engine not in ("auto", "dense") or not serves_runs(problem, k, slab):
        return False
    return engine == "dense" or fastest(_asked(_typical(problem, runs), k)) == "dense"


def _typical(problem: Problem, runs: Runs) -> Problem:
    """One of the clouds, by which an engine is chosen for all."""
    one = typical(runs.sources, runs.targets)
    rows = slice(int(runs.target_start[one]), int(runs.target_start[one + 1]))
    return _part(problem, rows, slice(int(runs.source_start[one]), int(runs.source_stop[one])))


def _apart(
    problem: Problem, k: int, runs: Runs, excluded: bool, slab: int, engine: str
) -> tuple[Tensor, Tensor]:
    """One cloud after the other."""
    q = problem.q
    values = q.new_full((len(q), k), torch.inf, dtype=problem.dtype)
    places = torch.full((len(q), k), -1, device=q.device)
    first = runs.target_start.tolist()
    sources = zip(runs.source_start.tolist(), runs.source_stop.tolist(), strict=True)
    for row, stop, (start, end) in zip(first, first[1:], sources, strict=False):
        there = min(k, end - start - excluded)
        if there < 1:
            continue
        rows = slice(row, stop)
        own = torch.arange(stop - row, device=q.device) if excluded else None
        part = _part(problem, rows, slice(start, end))
        value, place = implemented(engine, part, there, Hidden(own=own), slab)
        values[rows, :there], places[rows, :there] = value, place + start
    return values, places


@_nearest_in_clouds.register_fake
def _shapes(
    kind: str,
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    axes: Tensor | None,
    scale: float,
    double: bool,
    exact: bool,
    k: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    values = q.new_empty(q.shape[0], k, dtype=torch.float64 if double else torch.float32)
    return values, values.new_empty(q.shape[0], k, dtype=torch.long)


@_nearest_in_clouds.register_flops
def _flops(q: Tensor, keys: Tensor, batch_x: Tensor | None, batch_y: Tensor | None) -> int:
    pairs = len(q) * len(keys)
    given = [batch for batch in (batch_x, batch_y) if type(batch) is Tensor and not batch.is_meta]
    if len(given) == 2 and pairs:
        batch_x, batch_y = given
        clouds = 1 + int(torch.maximum(batch_x[-1], batch_y[-1]))
        counts = (batch.bincount(minlength=clouds) for batch in (batch_x, batch_y))
        pairs = int(torch.mul(*counts).sum())
    return 2 * pairs * q.shape[-1]
