"""Which engine finds the neighbours: by name, or the best that can."""

from __future__ import annotations

from dataclasses import replace

import torch

from convnn_geo.checks import check_name
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.search.dense import Dense
from convnn_geo.search.grid import GridSearch
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.torch_cluster import PygLib, TorchCluster

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (GridSearch(), TorchCluster(), PygLib(), Dense())
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
    """Each engine with the reason why it would not be taken; None for the one that is."""
    rows: list[tuple[str, str | None]] = []
    for name, engine in ENGINES.items():
        reason = engine.refuses(query) or engine.worthwhile(query)
        rows.append((name, reason))
        if reason is None:
            break
    return rows


def find(query: Query, backend: str = "auto") -> Neighborhood:
    """Run a query on the engine named, or on the first that is worthwhile."""
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
