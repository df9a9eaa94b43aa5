"""Dense search: all distances, a slab of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.metrics import Distances
from convnn_geo.search.nearest import measured, nearest, referee
from convnn_geo.search.problem import Problem
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.rows import Hidden, smallest_in_rows
from convnn_geo.search.smallest import order_by_value_then_place
from convnn_geo.search.windows import in_windows


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
        shared = query.subset.index
        if shared is not None and shared.shape[-2] != 1:
            return in_windows(query, shared)
        bound = query.bound if shared is None else query.bound.select(shared)
        hidden = Hidden(query.subset.mask, _own_place(query))
        problem = query.problem if shared is None else Problem.of(bound, query.dtype, query.exact)
        if problem is not None:
            values, place = nearest(problem, query.k, hidden, query.slab, self.name)
        else:
            rows = bound.ordering()
            values, place = smallest_in_rows(rows, query.k, hidden, query.slab, query.dtype)
        enough = hidden.mask is None and query.k < bound.shape[-1]  # beside the own
        kept = None if enough else hidden.kept(place)
        if query.exact and problem is not None:
            values = measured(bound, values, place, query.slab)
            values = values if kept is None else values.masked_fill(~kept, torch.inf)
        elif query.exact:
            values, place, kept = measured_again(query, bound, place, kept)
        if shared is not None:
            place = shared.expand(*place.shape[:-1], shared.shape[-1]).gather(-1, place)
        return place, values, kept


def measured_again(
    query: Query, bound: Distances, place: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Distances, places in their order, and which are kept: rows and pairs may round otherwise."""
    values = referee(bound, place, query.slab, query.dtype)
    seen = values if kept is None else values.masked_fill(~kept, torch.inf)
    order = order_by_value_then_place(seen, place)
    kept = None if kept is None else kept.gather(-1, order)
    return values.gather(-1, order), place.gather(-1, order), kept


def _own_place(query: Query) -> Tensor | None:
    """Where the source that a target must not find is among the sources searched."""
    own, shared = query.excluded, query.subset.index
    if own is None or shared is None:
        return own
    same = shared == own[:, None]
    return torch.where(same.any(-1), same.to(torch.uint8).argmax(-1), -1)
