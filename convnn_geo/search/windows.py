"""Search among each target's own candidates, such as those of a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.metrics import Distances
from convnn_geo.operators import operator
from convnn_geo.search.fused import by_fused_rows, serves
from convnn_geo.search.problem import Problem
from convnn_geo.search.query import Query
from convnn_geo.search.rows import Hidden, in_slabs
from convnn_geo.search.smallest import k_smallest
from convnn_geo.shapes import broadcast_shapes


def in_windows(query: Query, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k nearest among candidates ``(..., n, w)``: sources, distances, and which are kept."""
    mask, own, problem = query.subset.mask, query.excluded, query.problem
    if problem is None:
        values, chosen, kept = _nearest(
            query.bound.sharp(), query.dtype, query.k, index, mask, own, query.slab
        )
    else:
        given = (*problem.arguments(), query.k, index, mask, own, query.slab)
        values, chosen, full = _in_windows(*given)
        kept = full if mask is not None or own is not None else None
    return chosen, query.bound.at(chosen) if query.exact else values, kept


@operator("nearest_in_windows")
def _in_windows(
    kind: str,
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    axes: Tensor | None,
    scale: float,
    double: bool,
    exact: bool,
    k: int,
    index: Tensor,
    mask: Tensor | None,
    own: Tensor | None,
    slab: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _shapes(kind, q, keys, bias, axes, scale, double, exact, k, index, mask)[1].shape
    alike = index.shape[:-2].numel() == 1 and (mask is None or mask.shape[:-2].numel() == 1)
    problem = Problem.from_arguments(kind, q, keys, bias, axes, scale, double, exact)
    if alike and axes is None and not double:
        candidates = index.flatten(0, -2).long()
        allowed = None if mask is None else mask.flatten(0, -2)
        found = among_all(problem, k, candidates, allowed, own, slab)
        if found is None:
            found = compiled.windows_nearest(
                kind, q, keys, k, candidates, allowed, bias, scale, own
            )
        if found is not None:
            return found[0].view(shape), found[1].view(shape), found[2].view(shape)
    # Compared as every engine does: in float64, then rounded.
    bound = problem.bound().refined()
    values, chosen, kept = _nearest(bound, problem.dtype, k, index, mask, own, slab)
    kept = torch.ones_like(chosen, dtype=torch.bool) if kept is None else kept
    values, chosen, kept = (t.expand(shape).contiguous() for t in (values, chosen, kept))
    return values, chosen, kept


def among_all(
    problem: Problem, k: int, index: Tensor, allowed: Tensor | None, own: Tensor | None, slab: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The nearest in wide windows, by a mask over all sources, whose products are faster.

    Values, places and which are there, ``(..., n, k)``. None where that is not served, where a
    source is named twice, and for windows so narrow that a mask takes more memory than they do.

    Args:
        index: candidates ``(n, w)``.
        allowed: ``(n, w)``, True where choice is allowed; None for everywhere.
        own: ``(n,)``, a source that each target is not to find; -1 for none.
    """
    m = problem.keys.shape[-2]
    if m > index.shape[-1] * index.itemsize or not serves(problem, k, slab):
        return None
    seen = index if allowed is None else index.masked_fill(~allowed, m)
    mask = seen.new_zeros(len(index), m + 1, dtype=torch.bool).scatter_(-1, seen, True)
    named = index.numel() if allowed is None else int(allowed.count_nonzero())
    once = int(mask[:, :m].count_nonzero()) == named
    found = by_fused_rows(problem, k, Hidden(mask[:, :m], own), slab) if once else None
    if found is None:
        return None
    return *found, found[0] < torch.inf


def _nearest(
    bound: Distances,
    dtype: torch.dtype,
    k: int,
    index: Tensor,
    mask: Tensor | None,
    own: Tensor | None,
    slab: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By torch: values, sources, and which are kept."""
    index, order = index.sort(dim=-1, stable=True)  # so that ties go to the lowest source
    if mask is not None:
        lead = broadcast_shapes(mask.shape[:-2], order.shape[:-2])
        shape = (*lead, *order.shape[-2:])
        mask = mask.expand(shape).gather(-1, order.expand(shape))
    if own is not None:
        other = index != own[:, None]
        mask = other if mask is None else mask & other
    hidden = Hidden(mask)
    values = in_slabs(bound, index, slab, dtype)
    best, place = k_smallest(hidden.put_behind(values, 0, index.shape[-2]), k)
    chosen = index.expand(*place.shape[:-1], index.shape[-1]).gather(-1, place)
    return best, chosen, hidden.kept(place)


@_in_windows.register_fake
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
    index: Tensor,
    mask: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    leads = (
        q.shape[:-2],
        keys.shape[:-2],
        index.shape[:-2],
        () if mask is None else mask.shape[:-2],
    )
    chosen = index.new_empty((*broadcast_shapes(*leads), q.shape[-2], k))
    dtype = torch.float64 if double else torch.float32
    values = torch.empty_like(chosen, dtype=dtype)
    return values, chosen, torch.empty_like(chosen, dtype=torch.bool)


@_in_windows.register_flops
def _flops(q: Tensor, keys: Tensor, index: Tensor) -> int:
    lead = broadcast_shapes(q.shape[:-2], keys.shape[:-2], index.shape[:-2])
    return 2 * lead.numel() * index.shape[-2] * index.shape[-1] * q.shape[-1]
