"""Which engine finds the neighbours: by name, or the best that can."""

from __future__ import annotations

from collections.abc import Callable

import torch

from convnn_geo.checks import check_name
from convnn_geo.metrics import Distances, Feature
from convnn_geo.metrics.distances import DIRECT_DIMENSIONS
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operators import is_watched
from convnn_geo.points import Points
from convnn_geo.search.cells import Cells
from convnn_geo.search.costs import expected
from convnn_geo.search.dense import Dense
from convnn_geo.search.faiss import Faiss
from convnn_geo.search.faiss_ivf import FaissIVF
from convnn_geo.search.flashlib import FlashLib
from convnn_geo.search.grid import GridSearch
from convnn_geo.search.kd_tree import KDTree
from convnn_geo.search.keops import KeOps
from convnn_geo.search.nearest import IMPLEMENTATIONS, fingerprint
from convnn_geo.search.points import by_coordinates
from convnn_geo.search.problem import Problem
from convnn_geo.search.pyg_lib import PygLib
from convnn_geo.search.pynndescent import PyNNDescent
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.random_projections import RandomProjections
from convnn_geo.search.rings import Rings
from convnn_geo.search.rows import Hidden
from convnn_geo.search.torch_cluster import TorchCluster
from convnn_geo.search.torchbvh import TorchBVH
from convnn_geo.search.triton import Triton

_GRID, _RINGS = GridSearch(), Rings()
_SAMPLE = 2048
"""Directions that are looked at to tell whether many are the same."""
_TREES = (KDTree.name, TorchCluster.name, PygLib.name)
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        _GRID,
        _RINGS,
        Cells(),
        KDTree(),
        TorchCluster(),
        PygLib(),
        Faiss(),
        KeOps(),
        TorchBVH(),
        FlashLib(),
        Triton(),
        Dense(),
        FaissIVF(),
        PyNNDescent(),
        RandomProjections(),
    )
}


def engines() -> list[str]:
    """Names of the engines installed here, in the order in which ``backend="auto"`` asks them.

    :data:`ENGINES` has all, and :meth:`Engine.missing` tells what one needs.

    Example:
        >>> "dense" in engines()
        True
    """
    return [name for name, engine in ENGINES.items() if engine.missing() is None]


def fastest(query: Query) -> str:
    """The exact engine that is likely fastest, among those that can serve a query.

    Args:
        query: what is asked.
    """
    if _GRID.refuses(query) is None and _GRID.keeps(query):  # searched once for each size
        return _GRID.name
    if _RINGS.refuses(query) is None and _RINGS.pays(query):  # the others look at all pairs
        return _RINGS.name
    if _two_directions(query):
        return Dense.name
    seconds = expected(query)
    for name in sorted(seconds, key=seconds.__getitem__):
        engine = ENGINES.get(name)
        if engine is None or engine.approximate or _unsuited(query, name):
            continue
        if engine.refuses(query) is None:
            return name
    fused = ENGINES[Triton.name].refuses(query) is None
    many = query.source.num_points >= (32768 if fused else 4096)
    if many and ENGINES[Cells.name].refuses(query) is None:
        return Cells.name
    return Triton.name if fused else Dense.name


class Reasons(list[tuple[str, str | None]]):
    """Engines, and why each is not taken; None for the one that is. ``print`` shows a table."""

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self)
        lines = [f"{name:<{width}}  {reason}" for name, reason in self if reason is not None]
        taken = [f"{name:<{width}}  taken" for name, reason in self if reason is None]
        return "\n".join([*taken, *lines])


def explain_query(query: Query) -> Reasons:
    """Each engine that was asked, and why it is not taken; None for the one that is, the last."""
    best = fastest(query)
    if best == GridSearch.name:
        return Reasons([(best, None)])
    rows = [
        (name, "approximate: ask for it by name" if engine.approximate else engine.refuses(query))
        for name, engine in ENGINES.items()
    ]
    rows = [row for row in rows if row[1] is not None]
    refused = {name for name, _ in rows}
    why = _unlike_the_best(query, best)
    rows += [(name, why(name)) for name in ENGINES if name not in {*refused, best}]
    return Reasons([*rows, (best, None)])


def _unlike_the_best(query: Query, best: str) -> Callable[[str], str]:
    """Why an engine that could serve a query is not taken."""
    if _two_directions(query):
        return lambda name: "directions on one axis are two, so that all tie"
    if best == Rings.name:
        return lambda name: "it looks at all pairs"
    seconds = expected(query)
    if best not in seconds:
        return lambda name: _unsuited(query, name) or "not measured on this kind of device"
    return lambda name: (
        _unsuited(query, name)
        or (
            f"slower, by the cases most like this: {1e3 * seconds[name]:.3g} ms, "
            f"{best} {1e3 * seconds[best]:.3g} ms"
            if name in seconds
            else "too slow to measure, or not measured"
        )
    )


def _unsuited(query: Query, name: str) -> str | None:
    """Why an engine takes longer than its costs, as measured, say; None where it doesn't."""
    if name == _GRID.name:
        return "what it finds is too much to be kept for the next call"
    if name == Rings.name:
        return "of few pixels with many channels most are looked at, which products do sooner"
    if name == Dense.name and _double(query):
        return "a tree is faster for few coordinates in float64"
    if name in _TREES and query.problem is not None and query.problem.kind == "products":
        return "the axis that turns products into distances is long, so that trees see most of all"
    if name in _TREES and _tied(query):
        return "many directions are the same, as in pictures, and trees search ties again"
    return None


def _double(query: Query) -> bool:
    """Whether few coordinates are in float64, as mixtures have them, which dense has no C for.

    The costs measured are those of float32; a tree takes a tenth of dense's time here.
    """
    problem = query.problem
    double = problem is not None and problem.q.dtype == torch.float64
    return double and problem.q.shape[-1] <= DIRECT_DIMENSIONS


def _directions(query: Query) -> bool:
    """Whether vectors differ by angles alone."""
    return query.problem is not None and query.problem.kind == "angles"


def _tied(query: Query) -> bool:
    """Whether more than a few of a sample of directions are the same but for rounding.

    Colours of a picture have few: a tree took 20 seconds for a photograph of 16384 pixels that
    dense took 0.07 for. Of 100,000 random directions in the plane a tree takes 0.15 seconds, and
    dense six times as long.
    """
    if not _directions(query):
        return False
    rows = query.problem.keys.flatten(0, -2)
    if rows.device.type != "cpu" or is_watched():
        return True  # nobody waits for a GPU to tell, and what is traced has no values
    rows = (rows[:: max(1, len(rows) // _SAMPLE)] * 2**20).round()
    return len(rows) - len(fingerprint(rows).unique()) > len(rows) // 200


def _two_directions(query: Query) -> bool:
    """Whether vectors of one axis differ by angles: what asks for near points finds all of them."""
    return _directions(query) and query.problem.q.shape[-1] == 1


def find(query: Query, backend: str = "auto") -> Neighborhood:
    """Run a query on the engine named, or on the one that is likely fastest."""
    among = query.subset.index
    available = query.source.num_points if among is None else among.shape[-1]
    if query.k > available:
        raise ValueError(
            f"k={query.k} is larger than the number of candidates, {available}; lower k"
        )
    if backend == "auto":
        engine = _traced(query) if torch.compiler.is_compiling() else ENGINES[fastest(query)]
    else:
        engine = ENGINES[check_name("search backend", backend, ["auto", *ENGINES])]
        reason = engine.refuses(query)
        if reason is not None:
            raise ValueError(f"search backend {backend!r} can't serve this query: {reason}")
    index, distance, mask = engine(query)
    return Neighborhood(index, query.source.num_points, distance, mask)


class _Deferred(Engine):
    """The choice that a traced program makes when it runs, by the sizes that come."""

    name = "auto"

    def __init__(self) -> None:
        IMPLEMENTATIONS[self.name] = self.nearest

    def refuses(self, query: Query) -> str | None:
        """Points among all sources; there is no choice for others."""
        if query.subset.index is not None or query.subset.mask is not None:
            return "candidates are restricted"
        return None if query.dimension is not None else "the metric is not one of points"

    def run(self, query: Query) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As every engine for points."""
        return by_coordinates(query, self.name)

    def nearest(
        self, problem: Problem, k: int, hidden: Hidden, slab: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By the engine that is likely fastest."""
        points = Points(problem.q), Points(problem.keys)
        query = Query(*points, Feature(), k, excluded=hidden.own, bind=problem.bound)
        return IMPLEMENTATIONS[fastest(query)](problem, k, hidden, slab)


_DEFERRED = _Deferred()


def _traced(query: Query) -> Engine:
    """Who answers in a program whose sizes may be open still, so that none is looked at."""
    served = (e for e in (_GRID, _RINGS, _DEFERRED) if e.refuses(query) is None)
    return next(served, ENGINES[Dense.name])


def with_self_first(rest: Neighborhood, bound: Distances, own: torch.Tensor) -> Neighborhood:
    """Each target's own point as neighbour 0, then its nearest others.

    Args:
        rest: the others, ``(..., n, k - 1)``.
        bound: what is measured.
        own: ``(n,)``, the source that each target is.
    """
    shape = (*rest.index.shape[:-1], 1)
    first = own[:, None].expand(shape)
    with torch.no_grad():
        distance = bound.at(first)
    mask = rest.mask
    if mask is not None:
        mask = torch.cat([torch.ones_like(mask[..., :1]), mask], -1)
        if rest.k == 0:
            mask = None
    return Neighborhood(
        torch.cat([first, rest.index], -1),
        rest.num_sources,
        torch.cat([distance.expand(shape), rest.distance], -1),  # type: ignore[list-item]
        mask,
    )
