"""Dense search: all distances, a slab of rows at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from convnn_geo.candidates import Subset
from convnn_geo.metrics import BilinearForm as Bilinear
from convnn_geo.metrics import Distances
from convnn_geo.points import gather_rows
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.smallest import k_smallest


class Dense(Engine):
    """A matrix product (or differences, at low dimension) and the k smallest of each row.

    Serves every metric, candidate set and device. Memory is bounded by ``Query.slab``, never
    ``n * m``.
    """

    name = "dense"

    def refuses(self, query: Query) -> str | None:
        """Never."""
        return None

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """Search slab by slab."""
        index = query.subset.index
        if index is not None and index.shape[-2] != 1:
            return _windowed(query, index)
        bound = query.bound if index is None else query.bound.select(index)
        return search_rows(query, bound)


def search_rows(query: Query, bound: Distances) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k smallest of each row of ``bound``, among the sources that the subset shares."""
    shape = torch.broadcast_shapes(
        bound.shape, (1, 1) if query.subset.mask is None else query.subset.mask.shape
    )
    ordering = bound.ordering()
    best, place = _by_example(query, ordering, shape)
    index = place
    if query.subset.index is not None:
        shared = query.subset.index
        index = shared.expand(*place.shape[:-1], shared.shape[-1]).gather(-1, place)
    kept = _kept(query, index, place)
    if not query.exact:
        return index, best, kept
    distance = bound.at(place)
    if isinstance(ordering, Bilinear):  # the product rounds otherwise than the distances do
        return _sort(index, distance, kept)
    return index, distance, kept


def _sort(
    index: Tensor, distance: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Neighbours by (distance, source), empty slots last."""
    if kept is None and bool((distance[..., 1:] > distance[..., :-1]).all()):
        return index, distance, kept
    order = index.argsort(dim=-1)
    order = order.gather(-1, distance.gather(-1, order).argsort(dim=-1, stable=True))
    if kept is not None:
        empty = (~kept.gather(-1, order)).to(torch.uint8)
        order = order.gather(-1, empty.argsort(dim=-1, stable=True))
        kept = kept.gather(-1, order)
    return index.gather(-1, order), distance.gather(-1, order), kept


def _by_example(query: Query, ordering: Distances, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Whole examples where they fit into a slab: one large product beats many small ones."""
    batch = shape[0] if len(shape) > 2 and query.plain else 1
    fitting = max(1, query.slab // max(1, query.itemsize * math.prod(shape[1:])))
    if fitting >= batch or ordering.examples(0, 1) is None:
        return _by_rows(query, ordering, shape)
    found = []
    for start in range(0, batch, fitting):
        stop = min(start + fitting, batch)
        some = ordering.examples(start, stop)
        found.append(_by_rows(query, some, torch.Size((stop - start, *shape[1:]))))  # type: ignore[arg-type]
    best, place = zip(*found, strict=True)
    return torch.cat(best), torch.cat(place)


def _by_rows(query: Query, ordering: Distances, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Slabs of rows of all examples at once: the k smallest values and their places."""
    *lead, n, m = shape
    step = max(1, query.slab // max(1, query.itemsize * math.prod(lead) * m))
    best, place = [], []
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = ordering.rows(start, stop).expand(*lead, stop - start, m)
        smallest, where = k_smallest(_hide(query, values, start, stop), query.k)
        best.append(smallest)
        place.append(where)
    if not best:
        values = torch.zeros(*lead, 0, query.k, device=query.target.device)
        return values, values.long()
    return torch.cat(best, -2), torch.cat(place, -2)


def _hide(query: Query, values: Tensor, start: int, stop: int) -> Tensor:
    """Put what must not be chosen behind all else; a NaN distance stays before it, not hidden."""
    mask, hidden = query.subset.mask, None
    if mask is not None:
        hidden = ~(mask[..., start:stop, :] if mask.shape[-2] > 1 else mask)
    if query.excluded is not None:
        sources = query.subset.index
        if sources is None:
            sources = torch.arange(values.shape[-1], device=values.device)
        elif sources.shape[-2] > 1:
            sources = sources[..., start:stop, :]
        own = sources == query.excluded[start:stop, None]
        hidden = own if hidden is None else hidden | own
    if hidden is None:
        return values
    largest = torch.finfo(values.dtype).max
    return values.nan_to_num(largest, largest, -largest).masked_fill(hidden, torch.inf)


def _kept(query: Query, index: Tensor, place: Tensor) -> Tensor | None:
    """Which of the chosen were allowed; None where nothing was hidden."""
    kept = None
    if query.subset.mask is not None:
        mask = query.subset.mask
        lead = torch.broadcast_shapes(mask.shape[:-2], place.shape[:-2])
        mask = mask.expand(*lead, place.shape[-2], mask.shape[-1])
        kept = mask.gather(-1, place.expand(*lead, *place.shape[-2:]))
    if query.excluded is not None:
        other = index != query.excluded[:, None]
        kept = other if kept is None else kept & other
    return kept


def _windowed(query: Query, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k nearest among each target's own candidates ``(..., n, w)``."""
    mask = query.subset.mask
    index, order = index.sort(dim=-1, stable=True)  # so that ties go to the lowest source
    if mask is not None:
        lead = torch.broadcast_shapes(mask.shape[:-2], order.shape[:-2])
        mask = mask.expand(*lead, *order.shape[-2:]).gather(
            -1, order.expand(*lead, *order.shape[-2:])
        )
    query = replace(query, subset=Subset(index, mask))
    values = _hide(query, query.bound.sharp().at(index), 0, index.shape[-2])
    _, place = k_smallest(values, query.k)
    chosen = index.expand(*place.shape[:-1], index.shape[-1]).gather(-1, place)
    return chosen, query.bound.at(chosen), _kept(query, chosen, place)


def all_rows(query: Query) -> Tensor:
    """Every source for each target, ``(..., n, m)``: the index of attention, for slow paths."""
    m = query.source.num_points
    return torch.arange(m, device=query.target.device).expand(query.target.num_points, m)


__all__ = ["Dense", "all_rows", "gather_rows", "search_rows"]
