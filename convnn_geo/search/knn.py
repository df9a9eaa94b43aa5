"""search.knn: the k nearest of each point, for clouds, tokens and images alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convnn_geo.candidates import Subset
from convnn_geo.checks import (
    check_alike,
    check_finite,
    check_floating,
    check_int,
    check_tensor,
)
from convnn_geo.metrics import Metric, as_metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Points
from convnn_geo.search.query import Query
from convnn_geo.search.registry import find


def knn(
    x: Tensor | Points,
    y: Tensor | Points | None = None,
    k: int | None = None,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    metric: Metric | str = "euclidean",
    backend: str = "auto",
    *,
    memory: int | None = None,
    check: bool = True,
) -> Neighborhood:
    """For each point of ``y`` its ``k`` nearest in ``x``, as ``torch_cluster.knn`` has it.

    Ties go to the lowest index in ``x``, on every backend and device. Differentiable distances of
    the chosen pairs: ``metric.pairs(...)``.

    Args:
        x: sources, ``(m, c)``, or dense examples ``(b, m, c)``, or :class:`Points`.
        y: targets, ``(n, c)`` or ``(b, n, c)``; ``x`` itself by default.
        k: neighbours, at most the number of sources in the smallest example.
        batch_x: ``(m,)``, sorted example numbers of the rows of ``x``, as in PyG.
        batch_y: ``(n,)``, likewise.
        metric: a metric or its name. A tensor serves as both features and positions.
        backend: an engine of :func:`engines`, or ``"auto"``.
        memory: bytes that a slab of distances may take; by default what suits the device.
        check: refuse non-finite values.

    Returns:
        A :class:`Neighborhood` with ``index`` and ``distance`` ``(n, k)`` or ``(b, n, k)``,
        nearest first; ``index`` counts rows of ``x``.

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
    """
    metric = as_metric(metric)
    if k is None:
        raise TypeError("knn: expected the number of neighbours, k=")
    k = check_int("k", k)
    source = _points("x", x)
    target = source if y is None else _points("y", y)
    if y is None:
        batch_y = batch_x
    _check_pair(source, target)
    if memory is not None:
        memory = check_int("memory", memory)
    if check:
        check_finite("x", source.x, source.pos)
        check_finite("y", target.x, target.pos)
    if batch_x is None and batch_y is None:
        available = source.num_points
        if source.mask is not None and source.mask.numel():
            available = int(source.mask.sum(-1).min())
        if k > available and target.num_points:
            raise ValueError(_too_many(k, available))
        if not target.num_points:
            rows = target.features if target.x is not None else target.position
            return _empty((*rows.shape[:-1], k), source)
        mask = None if source.mask is None else source.mask.unsqueeze(-2)
        query = Query(target, source, metric, k, Subset(mask=mask), memory=memory)
        return find(query, backend)
    return _ragged(source, target, k, batch_x, batch_y, metric, backend, memory)


def _points(name: str, value: Tensor | Points) -> Points:
    if isinstance(value, Points):
        return value
    check_floating(name, check_tensor(name, value, (2, 3)))
    return Points(value, value)


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


def _too_many(k: int, available: int) -> str:
    return (
        f"k={k} is larger than the number of candidates, {available}; lower k "
        "or merge examples that are too small"
    )


def _empty(shape: tuple[int, ...], source: Points) -> Neighborhood:
    index = torch.zeros(shape, dtype=torch.long, device=source.device)
    rows = source.features if source.x is not None else source.position
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    distance = torch.zeros(shape, dtype=dtype, device=source.device)
    return Neighborhood(index, source.num_points, distance)


def check_batch(name: str, batch: Tensor | None, points: Points) -> Tensor:
    """A batch vector that is whole, sorted and as long as the points; zeros for None."""
    if batch is None:
        return torch.zeros(points.num_points, dtype=torch.long, device=points.device)
    check_tensor(name, batch, 1)
    if batch.dtype != torch.long:
        raise TypeError(f"{name}: expected dtype torch.int64, got {batch.dtype}")
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


def _ragged(
    source: Points,
    target: Points,
    k: int,
    batch_x: Tensor | None,
    batch_y: Tensor | None,
    metric: Metric,
    backend: str,
    memory: int | None,
) -> Neighborhood:
    rows = source.features if source.x is not None else source.position
    if rows.ndim != 2:
        raise ValueError(
            "batch vectors go with rows (n, c); dense examples (b, n, c) carry their own batch"
        )
    batch_x = check_batch("batch_x", batch_x, source)
    batch_y = check_batch("batch_y", batch_y, target)
    if not target.num_points:
        return _empty((0, k), source)
    examples = 1 + int(max(batch_x.max() if batch_x.numel() else 0, batch_y.max()))
    count_x = torch.bincount(batch_x, minlength=examples)
    count_y = torch.bincount(batch_y, minlength=examples)
    smallest = int(count_x[count_y > 0].min())
    if k > smallest:
        raise ValueError(_too_many(k, smallest))
    dense_x = Points.from_batch(source.x, source.pos, batch_x, examples)
    dense_y = Points.from_batch(target.x, target.pos, batch_y, examples)
    if bool((count_x == count_x[0]).all()):
        dense_x = replace(dense_x, mask=None)
    mask = None if dense_x.mask is None else dense_x.mask.unsqueeze(-2)
    query = Query(dense_y, dense_x, metric, k, Subset(mask=mask), memory=memory)
    found = find(query, backend)
    start = count_x.cumsum(0) - count_x
    index = found.index + start[:, None, None]
    keep = dense_y.to_rows
    return Neighborhood(keep(index), source.num_points, keep(found.distance))  # type: ignore[arg-type]
