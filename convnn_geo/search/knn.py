"""search.knn: the k nearest of each point, for clouds, tokens and images alike."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from convnn_geo.candidates import Subset
from convnn_geo.checks import (
    check_alike,
    check_finite,
    check_floating,
    check_int,
    check_limit,
    check_name,
    check_tensor,
)
from convnn_geo.metrics import Feature, Metric, Spatial, as_metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Points, row_starts
from convnn_geo.search.clouds import find_in_clouds, serves_clouds
from convnn_geo.search.query import Query
from convnn_geo.search.ragged import Ragged, check_batch, check_both, too_many
from convnn_geo.search.registry import Reasons, explain_query, find, with_self_first
from convnn_geo.typing import SELF_POINTS

_EUCLIDEAN = as_metric("euclidean")
SHORT = ("error", "truncate", "pad")
"""What becomes of a k that is over the number of candidates."""


def knn(
    x: Tensor | Points,
    y: Tensor | Points | None = None,
    k: int | None = None,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    metric: Metric | str = "euclidean",
    backend: str = "auto",
    *,
    self_point: str = "natural",
    max_distance: float | None = None,
    short: str = "error",
    memory: int | None = None,
    check: bool = True,
) -> Neighborhood:
    """For each point of ``y`` its ``k`` nearest in ``x``, as ``torch_cluster.knn`` has it.

    Ties go to the lowest index in ``x``, on every backend and device. Differentiable distances of
    the chosen pairs: ``metric.pairs(...)``, or :func:`knn_graph` with ``return_distance=True``.

    Args:
        x: sources, ``(m, c)``, or dense examples ``(b, m, c)``, or :class:`Points`.
        y: targets, ``(n, c)`` or ``(b, n, c)``; ``x`` itself by default.
        k: neighbours, at most the number of sources in the smallest example.
        batch_x: ``(m,)``, sorted example numbers of the rows of ``x``, as in PyG.
        batch_y: ``(n,)``, likewise.
        metric: a metric or its name. A tensor serves as both features and positions.
        backend: an engine of :func:`engines`, or ``"auto"``.
        self_point: of a set searched in itself: ``"natural"``: where it ranks; ``"first"``:
            neighbour 0, whatever its distance; ``"excluded"``: never a neighbour.
        max_distance: neighbours farther than this leave their slot empty; in the metric's unit,
            squared for a squared metric.
        short: what becomes of a k over the number of candidates: ``"error"``; ``"truncate"``: all
            examples get as many neighbours as the smallest can; ``"pad"``: slots stay empty.
        memory: bytes that a slab of distances may take; by default what suits the device.
        check: refuse non-finite values; under ``torch.compile`` and ``torch.export`` nobody does.

    Returns:
        A :class:`Neighborhood` with ``index`` and ``distance`` ``(n, k)`` or ``(b, n, k)``,
        nearest first; ``index`` counts rows of ``x``. Where slots may be empty it has a ``mask``.
        Its ``to_edge_index()`` has sources in row 0, as PyG's layers take it; ``torch_cluster.knn``
        has targets there.

    Raises:
        ValueError: k < 1, k over the number of sources, unsorted batch, non-finite values,
            unequal dimensions or devices, unknown names.
        TypeError: integer features, unequal dtypes.

    Example:
        >>> import torch
        >>> from convnn_geo.search import knn
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> knn(x, k=2).index.tolist()
        [[0, 1], [1, 0], [2, 3], [3, 2]]
        >>> knn(x, k=1, self_point="excluded").index.flatten().tolist()
        [1, 0, 3, 2]
    """
    metric, k = _asked(metric, y, k)
    check_name("self_point", self_point, SELF_POINTS)
    check_name("short", short, SHORT)
    if max_distance is not None:
        check_limit("max_distance", max_distance)
    source = _points("x", x)
    same = y is None or (y is x and (batch_y is None or batch_y is batch_x))
    target = source if y is None or same else _points("y", y)
    _check_self(self_point, same)
    if same and batch_y is None:
        batch_y = batch_x
    _check_pair(source, target)
    if memory is not None:
        memory = check_int("memory", memory)
    # What is traced has no values yet, and what is meta has none at all.
    check = check and not torch.compiler.is_compiling() and source.device.type != "meta"
    if check:
        for name, points in (("x", source),) if same else (("x", source), ("y", target)):
            check_finite(name, points.x, None if points.pos is points.x else points.pos)
    search = _Search(metric, backend, self_point, short, memory)
    if batch_x is None and batch_y is None:
        found = search(target, source, k)
    else:
        rows = source.features if source.x is not None else source.position
        if rows.ndim != 2:
            raise ValueError(
                "batch vectors go with rows (n, c); dense examples (b, n, c) carry their own batch"
            )
        if torch.compiler.is_compiling():
            query = Query(target, source, metric, k, Subset(), memory=memory)
            found = find_in_clouds(query, batch_x, batch_y, backend, self_point, short)
            return found if max_distance is None else found.within(max_distance)
        ragged = _ragged(source, target, batch_x, batch_y, same)
        if not target.num_points:
            return _empty(target, source, k)
        if short == "error" and not ragged.level:
            ragged.check(k, self_point == "excluded")
        query = Query(target, source, metric, k, memory=memory)
        if ragged.level or short == "truncate" or not serves_clouds(query, backend):
            found = ragged(search, k, backend)
        else:
            found = find_in_clouds(
                query, ragged.batch_x, ragged.batch_y, backend, self_point, short
            )
            if found.mask is not None and bool(found.mask.all()):
                found = replace(found, mask=None)
    known = isinstance(metric, (Feature, Spatial))  # which give none
    if check and not known and bool(found.distance.isnan().any()):  # type: ignore[union-attr]
        raise ValueError(
            f"{metric}: expected distances, got NaN from finite points; mend the metric, or pass "
            "check=False"
        )
    return found if max_distance is None else found.within(max_distance)


def explain_search(
    x: Tensor | Points,
    y: Tensor | Points | None = None,
    k: int | None = None,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    metric: Metric | str = "euclidean",
    *,
    self_point: str = "natural",
    short: str = "error",
) -> Reasons:
    """Which engine ``backend="auto"`` takes, and why it takes no other.

    Args:
        x: sources, as :func:`knn` takes them.
        y: targets; ``x`` itself by default.
        k: neighbours.
        batch_x: ``(m,)``, as :func:`knn` takes it; clouds of unequal size are explained by one of
            them, about as large as the one that a target is in.
        batch_y: ``(n,)``, likewise.
        metric: a metric or its name.
        self_point: of a set searched in itself, as :func:`knn` takes it.
        short: of a k over the number of candidates, as :func:`knn` takes it.

    Returns:
        Each engine that was asked, and why it is not taken; None for the one that is, the last.
        ``print`` shows a table.

    Raises:
        ValueError: k < 1 or over the number of sources, unequal dimensions or devices.
        TypeError: integer features, unequal dtypes.

    Example:
        >>> import torch
        >>> from convnn_geo.search import engines, explain_search
        >>> engine, reason = explain_search(torch.rand(1000, 64), k=9)[-1]
        >>> engine in engines(), reason is None
        (True, True)
    """
    metric, k = _asked(metric, y, k)
    check_name("self_point", self_point, SELF_POINTS)
    check_name("short", short, SHORT)
    same = y is None or (y is x and (batch_y is None or batch_y is batch_x))
    source = _points("x", x)
    target = source if y is None or same else _points("y", y)
    _check_self(self_point, same)
    _check_pair(source, target)
    if batch_x is not None or batch_y is not None:
        ragged = _ragged(source, target, batch_x, batch_x if same else batch_y, same)
        if target.num_points and short == "error":
            ragged.check(k, self_point == "excluded")
        source, target = ragged.typical()
    excluded = self_point == "excluded"
    least = max(0, _fewest(target, source) - excluded)
    if k > least and short == "error":
        raise ValueError(too_many(k, least, excluded))
    k = max(1, min(k, least))
    own = None
    if self_point != "natural":
        own = row_starts(source.num_points, 1, source.device)
    others = max(1, k - (self_point == "first"))
    return explain_query(Query(target, source, metric, others, _subset(source), excluded=own))


def _ragged(
    source: Points, target: Points, batch_x: Tensor | None, batch_y: Tensor | None, same: bool
) -> Ragged:
    """Rows of clouds, their batch vectors sound."""
    check_both(batch_x, batch_y)
    batch_x = check_batch("batch_x", batch_x, source)
    batch_y = batch_x if same else check_batch("batch_y", batch_y, target)
    last = max((int(batch[-1]) for batch in (batch_x, batch_y) if batch.numel()), default=0)
    if last > 4 * (len(batch_x) + len(batch_y)):  # counted without what lies between
        number = torch.cat([batch_x, batch_y]).unique(return_inverse=True)[1]
        batch_x, batch_y = number[: len(batch_x)], number[len(batch_x) :]
    return Ragged(source, target, batch_x, batch_y, same)


class _Search:
    """What is done with each set of dense examples."""

    def __init__(
        self, metric: Metric, backend: str, self_point: str, short: str, memory: int | None
    ) -> None:
        self.metric, self.backend, self.memory = metric, backend, memory
        self.self_point, self.short = self_point, short

    def __call__(self, target: Points, source: Points, k: int) -> Neighborhood:
        own = self.self_point == "excluded"
        least, most = _fewest(target, source) - own, source.num_points - own
        if k > least and target.num_points:
            if self.short == "error":
                raise ValueError(too_many(k, least, own))
            if self.short == "truncate":
                k, most = max(least, 0), least
        if not target.num_points or min(k, most) < 1:
            return _empty(target, source, k)
        subset, memory = _subset(source), self.memory
        query = Query(target, source, self.metric, min(k, most), subset, memory=memory)
        if self.self_point == "natural":
            return find(query, self.backend).padded(k)
        self_index = row_starts(source.num_points, 1, source.device)
        query = replace(query, k=query.k - (not own), excluded=self_index)
        found = find(query, self.backend)
        if not own:
            found = with_self_first(found, query.bound, self_index)
        return found.padded(k)


def _asked(metric: Metric | str, y: Any, k: int | None) -> tuple[Metric, int]:
    """The metric, and how many neighbours."""
    if k is None:
        hint = f"; pass k={y}, it comes third" if isinstance(y, Integral) else ""
        raise TypeError(f"expected the number of neighbours, k={hint}")
    return _EUCLIDEAN if metric == "euclidean" else as_metric(metric), check_int("k", k)


def _fewest(target: Points, source: Points) -> int:
    """Sources of the smallest example."""
    if source.mask is None or not source.mask.numel():
        return source.num_points
    counts = source.mask.sum(-1)
    if target.mask is not None:  # examples without targets do not count
        counts = counts.where(target.mask.any(-1), source.num_points)
    return int(counts.min())


def _subset(source: Points) -> Subset:
    return Subset(mask=None if source.mask is None else source.mask.unsqueeze(-2))


def _points(name: str, value: Tensor | Points) -> Points:
    if isinstance(value, Points):
        return value
    check_floating(name, check_tensor(name, value))
    if value.ndim == 1:
        raise ValueError(
            f"{name}: expected (n, c) or (b, n, c), got shape {tuple(value.shape)}; of one number "
            f"a point, pass {name}.unsqueeze(-1)"
        )
    check_tensor(name, value, (2, 3))
    if not value.shape[-1]:
        raise ValueError(
            f"{name}: expected at least one dimension a point, got {tuple(value.shape)}"
        )
    return Points(value, value)


def _check_self(self_point: str, same: bool) -> None:
    if self_point != "natural" and not same:
        raise ValueError(f"self_point={self_point!r} is for a set searched in itself: leave y out")


def _check_pair(source: Points, target: Points) -> None:
    for key in ("x", "pos"):
        s, t = getattr(source, key), getattr(target, key)
        if s is None or t is None:
            continue
        check_alike("x", s, "y", t)
        if s.ndim != t.ndim:
            raise ValueError(
                f"x and y: expected both ragged (n, c) or both dense (b, n, c), "
                f"got shapes {tuple(s.shape)} and {tuple(t.shape)}"
            )
        if s.shape[-1] != t.shape[-1]:
            raise ValueError(f"x and y: dimensions differ: {s.shape[-1]} in x, {t.shape[-1]} in y")
        if s.ndim == 3 and s.shape[0] != t.shape[0]:
            raise ValueError(f"x and y: batches differ: {s.shape[0]} in x, {t.shape[0]} in y")


def _empty(target: Points, source: Points, k: int) -> Neighborhood:
    rows = target.features if target.x is not None else target.position
    shape = (*rows.shape[:-1], k)
    index = torch.zeros(shape, dtype=torch.long, device=source.device)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    distance = torch.full(shape, torch.inf, dtype=dtype, device=source.device)
    mask = torch.zeros(shape, dtype=torch.bool, device=source.device) if index.numel() else None
    return Neighborhood(index, source.num_points, distance, mask)
