"""The operator behind every search: opaque to torch.compile, one order on every engine.

Neighbours come in the order of (distance, index), where distances are compared as the *referee*
has them: summed from differences, in float64 beyond eight dimensions or where coordinates are
scaled, then rounded to the dtype of the points. A faster way of computing serves where its
rounding can't change that order; rows where it might are searched again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convnn_geo.metrics import Angular, BilinearForm, Differences, Distances
from convnn_geo.metrics.distances import take
from convnn_geo.operators import operator
from convnn_geo.search.fused import ROOMY, by_fused_rows
from convnn_geo.search.problem import Problem
from convnn_geo.search.rows import Hidden, in_slabs, smallest_in_rows
from convnn_geo.search.smallest import order_by_value_then_place
from convnn_geo.shapes import broadcast_shapes

Implementation = Callable[[Problem, int, Hidden, int], tuple[Tensor, Tensor]]
"""``(problem, k, hidden, slab) -> (values, places)``, each ``(..., n, k)``."""

IMPLEMENTATIONS: dict[str, Implementation] = {}


def nearest(
    problem: Problem, k: int, hidden: Hidden, slab: int, engine: str
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of a problem by an engine: values and places."""
    return _nearest(*problem.arguments(), k, hidden.mask, hidden.own, slab, engine)


def implemented(
    engine: str, problem: Problem, k: int, hidden: Hidden, slab: int
) -> tuple[Tensor, Tensor]:
    """An engine's answer. TF32 would choose other neighbours."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return IMPLEMENTATIONS[engine](problem, k, hidden, slab)
    finally:
        torch.set_float32_matmul_precision(precision)


@operator("nearest", waits=True)
def _nearest(
    kind: str,
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    axes: Tensor | None,
    scale: float,
    double: bool,
    exact: bool,
    k: int,
    mask: Tensor | None,
    own: Tensor | None,
    slab: int,
    engine: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem.from_arguments(kind, q, keys, bias, axes, scale, double, exact)
    values, places = implemented(engine, problem, k, Hidden(mask, own), slab)
    return values.contiguous(), places.contiguous()


@_nearest.register_fake
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
    mask: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    lead = broadcast_shapes(q.shape[:-2], keys.shape[:-2], () if mask is None else mask.shape[:-2])
    shape = (*lead, q.shape[-2], k)
    values = q.new_empty(shape, dtype=torch.float64 if double else torch.float32)
    return values, values.new_empty(shape, dtype=torch.long)


@_nearest.register_flops
def _flops(q: Tensor, keys: Tensor) -> int:
    lead = broadcast_shapes(q.shape[:-2], keys.shape[:-2])
    return 2 * lead.numel() * q.shape[-2] * keys.shape[-2] * q.shape[-1]


def by_rows(
    problem: Problem, k: int, hidden: Hidden, slab: int, any_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Dense search: rows of distances by one matrix product, or by differences where few axes.

    ``any_order``: who the nearest are must be right, their order only to rounding.
    """
    found = by_fused_rows(problem, k, hidden, slab)
    if found is not None:
        return found
    n = problem.q.shape[-2]
    if problem.q.nbytes > slab < ROOMY and n > 1:  # bounds copies of targets, too
        step = max(1, slab * n // problem.q.nbytes)
        return _in_parts(problem, k, hidden, slab, step, any_order)
    bound, dtype = problem.bound(), problem.dtype
    rough = bound.ordering(dtype)
    if type(rough) is BilinearForm:
        values, places = _by_product(problem, rough, k, hidden, slab, any_order)
        again = problem.exact
    else:
        values, places = smallest_in_rows(rough, k, hidden, slab, dtype)
        again = problem.exact and hidden.may_have_put(values)
    if again:
        seen = referee(bound, places, slab, dtype)
        values = torch.where(values == torch.inf, values, seen)
    return values, places


def _in_parts(
    problem: Problem, k: int, hidden: Hidden, slab: int, step: int, any_order: bool
) -> tuple[Tensor, Tensor]:
    """:func:`by_rows` for some targets at a time."""
    n, seen = problem.q.shape[-2], () if hidden.mask is None else hidden.mask.shape[:-2]
    lead = broadcast_shapes(problem.q.shape[:-2], problem.keys.shape[:-2], seen)
    values = problem.q.new_empty(*lead, n, k, dtype=problem.dtype)
    places = torch.empty_like(values, dtype=torch.long)
    for start in range(0, n, step):
        stop = min(start + step, n)
        part, behind = problem.between(start, stop), hidden.between(start, stop)
        found = by_rows(part, k, behind, slab, any_order)
        values[..., start:stop, :], places[..., start:stop, :] = found
    return values, places


def _by_product(
    problem: Problem, rough: BilinearForm, k: int, hidden: Hidden, slab: int, any_order: bool
) -> tuple[Tensor, Tensor]:
    """By a product that tells all but near ones apart; rows where it doesn't are searched again."""
    asked = min(k + 1, problem.keys.shape[-2])
    values, places = smallest_in_rows(rough, asked, hidden, slab, problem.dtype)
    margin = 2 * rough.rounding()
    if problem.kind == "points":  # what decides holds the target's square, too, and is rounded
        size = rough.q.square().sum(-1, keepdim=True)
        margin = margin + 6 * torch.finfo(problem.dtype).eps * size
    first = k - 1 if any_order else 0  # from whom on it matters who is nearer
    unsure = _undecided(problem, values[..., first:], places[..., first:], margin)
    if 1 < asked < problem.keys.shape[-2]:
        unsure = unsure | _open_ended(problem, values, places, hidden.own)
    values, places = values[..., :k], places[..., :k]
    if bool(unsure.any()):
        rows = unsure_rows(unsure)
        settled = _settle(problem, rough, rows, k, hidden, margin, slab)
        values, places = put_rows(values, places, rows, settled)
    return values, places


def _undecided(problem: Problem, values: Tensor, places: Tensor, margin: Tensor) -> Tensor:
    """Rows ``(..., n)`` with neighbours closer to one another than rounding, but not equal."""
    gap = values.diff(dim=-1)
    unclear = ~((gap > margin) | (values[..., 1:] == torch.inf))  # what is hidden is in no order
    equal = unclear & (gap == 0)
    if bool(equal.any()):
        # Equal keys stand in the order of their places, which is right.
        keys = problem.keys
        if problem.bias is not None:
            keys = torch.cat([keys, problem.bias.expand(keys.shape[:-1]).unsqueeze(-1)], -1)
        name = fingerprint(keys).expand(*places.shape[:-2], -1)
        named = name.unsqueeze(-2).expand(*places.shape[:-1], -1).gather(-1, places)
        unclear = unclear & ~(equal & (named.diff(dim=-1) == 0))
    return unclear.any(-1)


def _open_ended(problem: Problem, values: Tensor, places: Tensor, own: Tensor | None) -> Tensor:
    """Rows ``(..., n)`` that end in equal keys, so that who comes after these is not known.

    Where these keys are the target itself, nobody who comes after can be nearer; and none of them
    comes after where those listed are the first of them. Their products need not be equal: BLAS
    may sum those at the edge of a block in an order of their own.
    """
    tied = (values[..., -1] == values[..., -2]) & (values[..., -1] < torch.inf)
    if problem.kind == "products" or not bool(tied.any()):
        return tied
    name = fingerprint(problem.keys)
    rank = _ranks(name)
    last, listed = places[..., -1:], places[..., :-1]

    def at(values: Tensor, place: Tensor) -> Tensor:
        return values.unsqueeze(-2).expand(*place.shape[:-1], -1).gather(-1, place)

    itself = at(name, last).squeeze(-1) == fingerprint(problem.q)
    highest = at(rank, listed).amax(-1)
    if own is not None:  # which is not listed, and comes before some that are
        place = own.expand(highest.shape).unsqueeze(-1).clamp_min(0)
        same = (own >= 0) & (at(name, place) == at(name, last)).squeeze(-1)
        highest = highest - (same & (at(rank, place).squeeze(-1) < highest)).long()
    return tied & ~(itself & (highest < listed.shape[-1]))


def _ranks(name: Tensor) -> Tensor:
    """How many before each in its row ``(..., m)`` are the same."""
    order = name.argsort(dim=-1, stable=True)
    ordered = name.gather(-1, order)
    number = torch.arange(name.shape[-1], device=name.device).expand(name.shape)
    starts = torch.nn.functional.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
    rank = number - number.where(starts, 0).cummax(-1).values
    return torch.empty_like(order).scatter(-1, order, rank)


def fingerprint(keys: Tensor) -> Tensor:
    """A number ``(..., m)`` for each key: the same for equal keys and, but for luck, no others."""
    bits = (keys + 0.0).view(torch.int64 if keys.dtype == torch.float64 else torch.int32)
    generator = torch.Generator().manual_seed(0)
    size = (bits.shape[-1],)
    odd = torch.randint(-(2**30), 2**30, size, generator=generator, device="cpu") * 2 + 1
    return (bits * odd.to(bits)).sum(-1)


def _settle(
    problem: Problem,
    rough: BilinearForm,
    rows: Tensor,
    k: int,
    hidden: Hidden,
    margin: Tensor,
    slab: int,
) -> tuple[Tensor, Tensor]:
    """Neighbours of the targets ``rows`` as the referee orders them.

    A somewhat longer list by the rough product mostly holds them all; where it may not, the rows
    are searched by an exact product.
    """
    bound, behind = problem.targets(rows).bound(), hidden.targets(rows)
    longer, m = k + 8, problem.keys.shape[-2]
    if longer < m:
        listed, place = smallest_in_rows(rough.targets(rows), longer, behind, slab, problem.dtype)
        value, place, order = _as_referee(bound, listed, place, k, slab)
        farthest = listed.gather(-1, order[..., :k]).amax(-1)
        beyond = listed[..., -1]  # what the list leaves out is no nearer
        complete = (farthest + take(margin, rows).squeeze(-1) < beyond) | (beyond == torch.inf)
        if bool(complete.all()):
            return value, place
    exact, asked = bound.exactly(problem.dtype) or rough.targets(rows), min(k + 1, m)
    listed, place = smallest_in_rows(exact, asked, behind, slab, problem.dtype)
    value, chosen, _ = _as_referee(bound, listed, place, k, slab)
    apart = bound.apart()
    if not isinstance(exact, BilinearForm) or apart is None:
        return value, chosen
    # Vectors that differ by their last bits alone are too near even for float64's product.
    few = problem.targets(rows)
    unsure = _undecided(few, listed, place, 2 * exact.rounding())
    if 1 < asked < m:
        unsure = unsure | _open_ended(few, listed, place, behind.own)
    if not bool(unsure.any()):
        return value, chosen
    rows = unsure_rows(unsure)
    listed, place = smallest_in_rows(
        apart.targets(rows), k, behind.targets(rows), slab, problem.dtype
    )
    seen = _as_referee(bound.targets(rows), listed, place, k, slab)[:2]
    return put_rows(value, chosen, rows, seen)


def _as_referee(
    bound: Distances, listed: Tensor, place: Tensor, k: int, slab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``k`` of a list by the referee: values, places, and the order that sorts it."""
    value = referee(bound, place, slab, listed.dtype)
    value = torch.where(listed == torch.inf, listed, value)
    order = order_by_value_then_place(value, place)
    first = order[..., :k]
    return value.gather(-1, first), place.gather(-1, first), order


def put_rows(
    values: Tensor, places: Tensor, rows: Tensor, found: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """``values`` and ``places`` ``(..., n, k)`` with the targets ``rows`` replaced."""
    where = rows.transpose(-1, -2).expand(found[1].shape)
    return values.scatter(-2, where, found[0]), places.scatter(-2, where, found[1])


def unsure_rows(unsure: Tensor) -> Tensor:
    """Rows marked in ``(..., n)`` as ``(..., 1, r)``, filled up with others to equal number."""
    first = unsure.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return first[..., : int(unsure.sum(-1).max())].unsqueeze(-2)


def referee(bound: Distances, place: Tensor, slab: int, dtype: torch.dtype) -> Tensor:
    """Distances of chosen pairs as they are compared, ``(..., n, k)``."""
    return in_slabs(bound.refined(), place, slab, dtype)


def measured(bound: Distances, values: Tensor, place: Tensor, slab: int) -> Tensor:
    """Distances of the nearest, in order.

    Args:
        bound: what is measured.
        values: ``(..., n, k)``, by what they were compared: often squares, or distances without
            what is the same for a whole row.
        place: ``(..., n, k)``.
        slab: bytes that may be taken.

    Of two that were compared by values that are equal but for rounding, the distance of the later
    may round to less: it is raised to that of the earlier.
    """
    if not place.numel():
        return values
    if isinstance(bound, Differences) and bound.p == 2 and bound.scale is None:
        return bound.of_square(values)
    if isinstance(bound, Angular):
        return values
    return referee(bound, place, slab, values.dtype).cummax(-1).values


IMPLEMENTATIONS["dense"] = by_rows
