"""Which engine finds the neighbours: by name, or the best that can."""

from __future__ import annotations

from dataclasses import replace

import torch

from convnn_geo.checks import check_name
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.search.approximate import NNDescent, RandomProjections
from convnn_geo.search.cells import Cells
from convnn_geo.search.costs import expected
from convnn_geo.search.dense import Dense
from convnn_geo.search.faiss import Faiss, FaissIVF
from convnn_geo.search.grid import GridSearch
from convnn_geo.search.kd_tree import KDTree
from convnn_geo.search.keops import KeOps
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.torch_cluster import PygLib, TorchCluster
from convnn_geo.search.triton import Triton

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        GridSearch(),
        Cells(),
        KDTree(),
        TorchCluster(),
        PygLib(),
        Faiss(),
        KeOps(),
        Triton(),
        Dense(),
        FaissIVF(),
        NNDescent(),
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


def explain_search(query: Query) -> list[tuple[str, str | None]]:
    """Each engine that was asked, and why it is not taken; None for the one that is, the last."""
    rows: list[tuple[str, str | None]] = []
    able = []
    for name, engine in ENGINES.items():
        reason = "approximate: ask for it by name" if engine.approximate else engine.refuses(query)
        if reason is not None:
            rows.append((name, reason))
            continue
        able.append(name)
        if name == GridSearch.name:  # nothing is searched where all is known
            break
    best, reasons = _fastest(query, able)
    rows += [(name, reasons[name]) for name in able if name != best]
    return [*rows, (best, None)]


def _fastest(query: Query, able: list[str]) -> tuple[str, dict[str, str]]:
    """The engine to take, and what is said of the others."""
    if GridSearch.name in able:
        return GridSearch.name, dict.fromkeys(able, "positions on a grid need no search")
    if _two_directions(query):
        return Dense.name, dict.fromkeys(able, "directions on one axis are two, so that all tie")
    # What is measured counts; but sizes that are traced must not be looked at one by one.
    seconds = {} if torch.compiler.is_compiling() else expected(query)
    known = {name: seconds[name] for name in able if name in seconds}
    if not known:
        many = query.source.num_points >= 4096
        best = Cells.name if Cells.name in able and many else Dense.name
        return best, dict.fromkeys(able, "not measured on this kind of device")
    best = min(known, key=known.__getitem__)
    reasons = {
        name: f"slower in the case most like this: {1e3 * known[name]:.3g} ms, "
        f"{best} {1e3 * known[best]:.3g} ms"
        if name in known
        else "too slow to measure, or not measured"
        for name in able
    }
    return best, reasons


def _two_directions(query: Query) -> bool:
    """Whether vectors of one axis differ by angles: what asks for near points finds all of them."""
    problem = query.problem
    return problem is not None and problem.kind == "angles" and problem.q.shape[-1] == 1


def find(query: Query, backend: str = "auto") -> Neighborhood:
    """Run a query on the engine named, or on the one that is likely fastest."""
    among = query.subset.index
    available = query.source.num_points if among is None else among.shape[-1]
    if query.k > available:
        raise ValueError(
            f"k={query.k} is larger than the number of candidates, {available}; lower k"
        )
    if backend == "auto":
        engine = ENGINES[explain_search(query)[-1][0]]
    else:
        engine = ENGINES[check_name("search backend", backend, ["auto", *ENGINES])]
        reason = engine.refuses(query)
        if reason is not None:
            raise ValueError(f"search backend {backend!r} can't serve this query: {reason}")
    index, distance, mask = engine(query)
    return Neighborhood(index, query.source.num_points, distance, mask)


def with_self_first(query: Query, backend: str, own: torch.Tensor) -> Neighborhood:
    """Each target's own point as neighbour 0, then its k - 1 nearest others.

    Args:
        own: ``(n,)``, the source that each target is.
    """
    rest = find(replace(query, k=query.k - 1, excluded=own), backend)
    shape = (*rest.index.shape[:-1], 1)
    first = own[:, None].expand(shape)
    with torch.no_grad():
        distance = query.bound.at(first)
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
