"""How fast each search engine finds neighbours, and how many of the right ones."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from convnn_geo import search
from convnn_geo.bench import inputs, peer
from convnn_geo.bench.measure import count_syncs, host_time, percentiles, sample, watch_memory
from convnn_geo.bench.worker import CALLED, READY
from convnn_geo.metrics import Metric
from convnn_geo.points import Points

SAMPLE = 1000
"""Targets, at most, whose neighbours are checked."""


@dataclass(frozen=True)
class Cell:
    """One question to one engine: the ``k`` nearest of each of ``n`` points among them.

    Args:
        engine: its name, ``"auto"``, or :data:`peer.NAME`.
        metric: a name that :func:`inputs.metric` knows.
        input: a name that :func:`inputs.points` knows.
        n: points an example.
        dimension: of features.
        k: neighbours.
        batch: examples.
        device: where.
        seconds: that samples take in all.
        seed: of the points.
    """

    engine: str
    metric: str = "euclidean"
    input: str = "random"
    n: int = 1024
    dimension: int = 3
    k: int = 9
    batch: int = 1
    device: str = "cpu"
    seconds: float = 0.5
    seed: int = 0

    def no_larger(self, other: Cell) -> bool:
        """Whether this is the same question to the same engine, and no larger in any way.

        Of the same dimension: in another, engines take other ways, which may be faster.
        """
        return (
            replace(self, n=other.n, k=other.k, batch=other.batch) == other
            and self.n <= other.n
            and self.k <= other.k
            and self.batch <= other.batch
        )


@dataclass(frozen=True)
class Result:
    """What was measured of a cell; NaN for what can't be, as the host's time on the CPU.

    Args:
        cell: the question.
        note: why there is no result; empty where there is one.
        median: seconds of a call.
        p10: tenth percentile.
        p90: ninetieth percentile.
        samples: behind these.
        points: searched in a second.
        memory: MiB that the first call added.
        recall: share of the right neighbours that were found, of :data:`SAMPLE` targets.
        host: seconds until the call returns, GPU only.
        syncs: how often it waits for the GPU.
    """

    cell: Cell
    note: str = ""
    median: float = math.nan
    p10: float = math.nan
    p90: float = math.nan
    samples: int = 0
    points: float = math.nan
    memory: float = math.nan
    recall: float = math.nan
    host: float = math.nan
    syncs: float = math.nan

    @property
    def ended(self) -> bool:
        """Whether the call took too long, or a smaller one did."""
        return self.note.startswith(">")


def cells(
    engines: Sequence[str],
    metrics: Sequence[str],
    names: Sequence[str],
    n: Sequence[int],
    dimensions: Sequence[int],
    k: Sequence[int],
    batch: Sequence[int],
    device: str = "cpu",
    seconds: float = 0.5,
) -> list[Cell]:
    """All combinations that inputs have points for, small ones first, engines side by side.

    Approximate engines come after all others: some compile themselves for half a minute.

    Example:
        >>> [c.n for c in cells(["dense"], ["cosine"], ["digits"], [64, 4096], [64], [9], [1])]
        [64]
    """
    grid = itertools.product(
        sorted(n), sorted(batch), sorted(dimensions), sorted(k), names, metrics
    )
    found = [
        Cell(engine, metric, name, size, dimension, count, examples, device, seconds)
        for size, examples, dimension, count, name, metric in grid
        if inputs.suits(name, size, dimension) and count <= size
        for engine in engines
    ]
    return sorted(found, key=lambda cell: is_approximate(cell.engine))


def engine_of(cell: Cell) -> str:
    """What measures a cell: each has a process of its own, for threads stay with a process."""
    return cell.engine


def is_approximate(engine: str) -> bool:
    """Whether an engine may miss neighbours.

    Example:
        >>> is_approximate("dense")
        False
    """
    return engine in search.ENGINES and search.ENGINES[engine].approximate


def measure(cell: Cell) -> Iterator[str | Result]:
    """Measure a cell, in the stages that :class:`Worker` asks for."""
    try:
        yield from _measure(cell)
    finally:  # processes that wait hold no points
        _loaded.cache_clear()
        _truth.cache_clear()


def _measure(cell: Cell) -> Iterator[str | Result]:
    points = _points(cell)
    call = _call(cell, points)
    if isinstance(call, str):
        yield Result(cell, call)
        return
    small = max(64, 4 * (cell.k + 1))  # compiles what is compiled when first used
    warm = _call(cell, _first(points, small))
    if not isinstance(warm, str):
        warm()
    yield READY
    with watch_memory(cell.device) as memory:
        index = call()
    yield CALLED
    median, p10, p90 = percentiles(times := sample(call, cell.seconds))
    gpu = cell.device.startswith("cuda")
    yield Result(
        cell,
        "",
        *(median, p10, p90, len(times), cell.batch * cell.n / median, memory.added),
        recall(cell, index),
        host_time(call) if gpu else math.nan,
        count_syncs(call) if gpu else math.nan,
    )


def recall(cell: Cell, index: Tensor) -> float:
    """Share of the neighbours found that are as near as the k nearest, by distances in float64."""
    query, kth = _truth(replace(cell, engine=""))
    first = index[0] if index.ndim == 3 else index  # places on a grid are the same in all examples
    found = first[_targets(cell).to(index.device)].cpu()
    distance = query.bound.at(found).squeeze(0)
    near = distance <= kth + 1e-6 * kth.abs() + 1e-12
    ordered = found.sort(-1)
    again = torch.zeros_like(near)
    again[:, 1:] = ordered.values[:, 1:] == ordered.values[:, :-1]  # counts once
    return (near.gather(-1, ordered.indices) & ~again).double().mean().item()


@functools.lru_cache(maxsize=1)
def _truth(cell: Cell) -> tuple[search.Query, Tensor]:
    """The first example's sampled targets against all its points, and the k-th distances."""
    points = _points(cell)
    whole = _example(points, slice(None))
    some = _example(points, _targets(cell))
    query = search.Query(some, whole, inputs.metric(cell.metric), cell.k)
    distance = search.find(query, "dense").distance
    return query, distance.squeeze(0)[:, -1:]  # type: ignore[union-attr]


def _targets(cell: Cell) -> Tensor:
    generator = torch.Generator().manual_seed(cell.seed)
    return torch.randperm(cell.n, generator=generator)[:SAMPLE].sort().values


def _example(points: Points, rows: Tensor | slice) -> Points:
    """Rows of the first example in float64 on the CPU; places are written out."""
    x = None if points.x is None else points.x[:1, rows].cpu().double()
    pos = points.position
    pos = pos[:1, rows] if pos.ndim == 3 else pos[None, rows]
    return Points(x, pos.cpu().double())


def _points(cell: Cell) -> Points:
    return _loaded(cell.input, cell.n, cell.dimension, cell.batch, cell.seed, cell.device)


@functools.lru_cache(maxsize=1)
def _loaded(name: str, n: int, dimension: int, batch: int, seed: int, device: str) -> Points:
    points = inputs.points(name, n, dimension, batch, seed)
    x, pos = (None if t is None else t.to(device) for t in (points.x, points.pos))
    return replace(points, x=x, pos=pos)


def _first(points: Points, count: int) -> Points:
    """The first points of each example; places on a grid are written out."""
    x = None if points.x is None else points.x[:, :count]
    return Points(x, points.position[..., :count, :])


def _call(cell: Cell, points: Points) -> Callable[[], Tensor] | str:
    """The search, giving ``(b, n, k)``; or why there is none."""
    metric = inputs.metric(cell.metric).to(cell.device)
    if cell.engine == peer.NAME:
        return peer.refuses(cell.metric) or peer.search(points, cell.metric, cell.k)
    if cell.engine != "auto":
        engine = search.ENGINES[cell.engine]
        query = search.Query(points, points, metric, cell.k)
        refused = engine.missing() or engine.refuses(query)
        if refused:
            return refused
    return partial(_search, points, cell.k, metric, cell.engine)


def _search(points: Points, k: int, metric: Metric, engine: str) -> Tensor:
    return search.knn(points, k=k, metric=metric, backend=engine).index
