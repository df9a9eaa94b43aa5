"""Search in clouds of unequal size as one operator, for programs that are traced.

How large clouds are only the batch vectors say, and a traced program has no values: it is looked
at when the program runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convnn_geo.checks import check_name
from convnn_geo.metrics import Feature, Metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operators import operator
from convnn_geo.points import Points
from convnn_geo.search.nearest import Problem, implemented, measured
from convnn_geo.search.query import Query
from convnn_geo.search.ragged import check_batch, check_both, too_many
from convnn_geo.search.registry import ENGINES
from convnn_geo.search.rows import Hidden
from convnn_geo.search.triton import in_clouds, is_plain


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
        own = None if self_point == "natural" else torch.arange(query.source.num_points)
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
    return Neighborhood(place, query.source.num_points, distance.where(mask, torch.inf), mask)


def serves_clouds(query: Query, backend: str) -> bool:
    """Whether clouds of unequal size may be searched in one launch: on a GPU, or where asked to."""
    if backend != "triton" and (backend != "auto" or query.target.device.type != "cuda"):
        return False
    if _looks_at_sets(query.metric) or query.problem is None or not is_plain(query.problem):
        return False
    return ENGINES["triton"].refuses(query) is None


def _looks_at_sets(metric: Metric) -> bool:
    return any(getattr(part, "by_set", False) for part in metric.modules())


@operator("nearest_in_clouds")
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
    if serves_clouds(Query(Points(q), Points(keys), Feature(), k, bind=problem.bound), engine):
        found = in_clouds(problem, k, batch_x, batch_y, excluded, engine)
        if found is not None:
            return found
    values = q.new_full((len(q), k), torch.inf, dtype=problem.dtype)
    places = torch.full((len(q), k), -1, device=q.device)
    clouds, targets = batch_y.unique_consecutive(return_counts=True)
    ends = torch.searchsorted(batch_x, clouds, right=True).tolist()
    starts = torch.searchsorted(batch_x, clouds).tolist()
    least = min((end - start for start, end in zip(starts, ends, strict=True)), default=k + 1)
    if k > least - excluded and not padded:
        raise ValueError(too_many(k, least - excluded, excluded))
    row = 0
    for start, end, n in zip(starts, ends, targets.tolist(), strict=True):
        rows, own = slice(row, row + n), None
        if excluded:
            own = torch.arange(n, device=q.device)
        there = min(k, end - start - excluded)
        if there > 0:
            part = replace(
                problem,
                q=q[rows],
                keys=keys[start:end],
                bias=None if bias is None else bias[start:end],
            )
            value, place = implemented(engine, part, there, Hidden(own=own), slab)
            values[rows, :there], places[rows, :there] = value, place + start
        row += n
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
