"""Dense search: all distances, a slab of rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convnn_geo.metrics import Distances
from convnn_geo.points import gather_rows
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.smallest import k_smallest


class Dense(Engine):
    """A matrix product (or differences, at low dimension) and the k smallest of each row.

    Serves every metric, candidate set and device. Memory is bounded by ``Query.memory``, never
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


def search_rows(
    query: Query, bound: Distances, wanted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k smallest of each row of ``bound``, among the sources that the subset shares.

    Args:
        wanted: ``(..., n)``; slabs without a wanted row are left unsearched (and undefined).
    """
    ordering = bound.ordering()
    shape = torch.broadcast_shapes(
        bound.shape,
        (1, 1) if query.subset.mask is None else query.subset.mask.shape,
    )
    *lead, n, m = shape
    row = math.prod(lead) * m * max(4, query.target.features.element_size() if query.target.x is not None else 4)
    step = max(1, query.memory // max(row, 1))
    found, empty = [], torch.zeros((*lead, 0, query.k), dtype=torch.long, device=query.target.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        if wanted is not None and not bool(wanted[..., start:stop].any()):
            found.append(empty.expand(*lead, 0, query.k).new_zeros(*lead, stop - start, query.k))
            continue
        values = ordering.rows(start, stop).expand(*lead, stop - start, m)
        values = _hide(query, values, start, stop)
        best, place = k_smallest(values, query.k)
        found.append(place)
    place = torch.cat(found, -2) if found else empty
    index = place
    if query.subset.index is not None:
        shared = query.subset.index
        index = shared.expand(*lead, n, shared.shape[-1]).gather(-1, place)
    distance = query.bound.at(index)
    return index, distance, _kept(query, index, place)


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
    values = query.bound.at(index)
    best, place = k_smallest(_hide(query, values, 0, values.shape[-2]), query.k)
    chosen = index.expand(*place.shape[:-1], index.shape[-1]).gather(-1, place)
    return chosen, values.gather(-1, place), _kept(query, chosen, place)


def all_rows(query: Query) -> Tensor:
    """Every source for each target, ``(..., n, m)``: the index of attention, for slow paths."""
    m = query.source.num_points
    return torch.arange(m, device=query.target.device).expand(query.target.num_points, m)


__all__ = ["Dense", "all_rows", "gather_rows", "search_rows"]
