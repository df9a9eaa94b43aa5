"""Attention over the k nearest keys as an operator, and its backward: in C, in Triton, by torch.

Backward goes over the chosen pairs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.gpu.layout import empty_result, leading
from convnn_geo.metrics import Biased, full_precision
from convnn_geo.operators import is_traced, operator
from convnn_geo.points import gather_rows
from convnn_geo.search.nearest import by_rows
from convnn_geo.search.problem import Problem
from convnn_geo.search.rows import Hidden, in_slabs, smallest_in_rows
from convnn_geo.shapes import broadcast_shapes

_SLAB = 2**23
"""Bytes of distances at once, where torch does it."""


@operator("neighbor_attention")
def attend(
    kind: str,
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    k: int,
    scale: float,
    temperature: float,
    engine: str,
    wanted: bool = True,
    less: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ``(..., n, c)``, weights before dropout and places ``(..., n, k)``.

    Weights and places are for backward: Triton leaves them empty unless they are ``wanted``. What
    pairs' distances are ``less`` by is ``(..., n | 1, m)``.
    """
    if engine == "triton":
        from convnn_geo.gpu import attention

        rest = (k, scale, temperature, wanted, less)
        return attention.attend(q, keys, value, bias, mask, keep, *rest)
    dtype = value.dtype
    q, keys, value = _precise(q, keys, value)
    found = compiled.attention(kind, q, keys, value, bias, mask, keep, k, scale, temperature, less)
    if found is not None:
        return found[0].to(dtype), *found[1:]
    problem = Problem(kind, q, keys, bias, scale, torch.float32, exact=True)
    with full_precision(q.device):
        if less is None:
            values, place = by_rows(problem, k, Hidden(mask), _SLAB)
        else:
            rows, hidden = Biased(problem.bound(), less).ordering(), Hidden(mask)
            _, place = smallest_in_rows(rows, k, hidden, _SLAB, torch.float32)
            # As they are: in rows what is no number was made one, so that it has a place.
            values, kept = in_slabs(rows, place, _SLAB, torch.float32), hidden.kept(place)
            values = values if kept is None else values.masked_fill(~kept, torch.inf)
    lead = broadcast_shapes(place.shape[:-2], value.shape[:-2])
    place = place.expand(*lead, *place.shape[-2:]).contiguous()
    score = (-values / temperature).expand(place.shape)
    empty = (score == -torch.inf).all(-1, keepdim=True)
    weight = score.masked_fill(empty, 0.0).softmax(-1).masked_fill(score == -torch.inf, 0.0)
    used = weight if keep is None else weight * keep
    out = empty_result(value, lead, q.shape[-2])
    out.copy_(_weighted(used, gather_rows(value, place)))
    lost = q.sum(-1, keepdim=True).isnan()  # also where a query sees nobody
    return out.masked_fill_(lost, torch.nan).to(dtype), weight, place


def _precise(*tensors: Tensor) -> list[Tensor]:
    """The same in float32 at least: rows are read many times, converted once."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _weighted(weight: Tensor, rows: Tensor) -> Tensor:
    """``sum_j weight_j row_j``, ``(..., c)``; rows without weight have no part, NaN or not."""
    weight = weight.unsqueeze(-1)
    return (weight * rows.masked_fill(weight == 0, 0.0)).sum(-2)


@attend.register_fake
def _(
    kind: str,
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    k: int,
    scale: float,
    temperature: float,
    engine: str,
    wanted: bool = True,
    less: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    lead, triton = leading(q, keys, value, bias, mask, less), engine == "triton"
    shape = (*lead, q.shape[-2], k) if wanted or not triton else (0,)
    weight = q.new_empty(shape, dtype=torch.float32)
    out = empty_result(value, lead, q.shape[-2])
    return out, weight, torch.empty_like(weight, dtype=torch.int32 if triton else torch.long)


@attend.register_flops
def _flops(
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    k: int,
    less: Tensor | None,
) -> int:
    lead, n = leading(q, keys, value, bias, mask, less).numel(), q.shape[-2]
    return 2 * lead * n * (keys.shape[-2] * q.shape[-1] + k * value.shape[-1])


@operator("neighbor_attention_backward")
def _attend_backward(
    kind: str,
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    temperature: float,
    engine: str,
    grad: Tensor,
    weight: Tensor,
    place: Tensor,
    biased: bool = True,
    to_weight: Tensor | None = None,
    of_pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to targets, keys, values and bias, in the leading shape of the result.

    And to distances ``(..., n, k)``, empty unless those ``of_pairs`` are asked for. That of a bias
    may be empty unless there is one. Where weights themselves have a gradient, which is rare, all
    are found by operations of torch.
    """
    if to_weight is None and engine == "triton":
        from convnn_geo.gpu import attention

        return attention.attend_backward(
            q, keys, value, keep, scale, temperature, grad, weight, place, biased, of_pairs
        )
    like, found = (q, keys, value), None
    q, keys, value, grad = _precise(q, keys, value, grad)
    if to_weight is None:
        found = compiled.attention_backward(
            kind, q, keys, value, keep, scale, temperature, grad, weight, place, of_pairs
        )
    if found is not None:
        return found
    lead, kept = place.shape[:-2], 1.0 if keep is None else keep
    place = place.long()

    def scattered(rows: Tensor, m: int) -> Tensor:
        """Rows of pairs ``(..., n, k, c)`` summed by key."""
        into = rows.new_zeros(*lead, m, rows.shape[-1])
        index = place.flatten(-2).unsqueeze(-1).expand(*lead, -1, rows.shape[-1])
        return into.scatter_add(-2, index, rows.flatten(-3, -2))

    m, unused = keys.shape[-2], (weight == 0).unsqueeze(-1)
    used = (weight * kept).unsqueeze(-1)
    slope = (grad.unsqueeze(-2) * gather_rows(value, place).masked_fill(used == 0, 0.0)).sum(-1)
    slope = kept * slope.masked_fill(used.squeeze(-1) == 0, 0.0)
    if to_weight is not None:
        slope = slope + to_weight.masked_fill(weight == 0, 0.0)
    to_value = scattered((used * grad.unsqueeze(-2)).masked_fill(used == 0, 0.0), m)
    mean = (weight * slope).sum(-1, keepdim=True)
    of_distance = (weight * (mean - slope) / temperature).unsqueeze(-1).masked_fill(unused, 0.0)
    own = {"points": 2.0, "angles": 1.0, "products": 0.0}[kind]
    other = -scale if kind == "products" else -own
    there, here = gather_rows(keys, place).masked_fill(unused, 0.0), q.unsqueeze(-2)
    here = here.masked_fill(unused, 0.0)
    through = of_distance
    if kind == "angles":  # a zero vector is as far from all others
        zero = (here.norm(dim=-1, keepdim=True) < 0.5) | (there.norm(dim=-1, keepdim=True) < 0.5)
        through = of_distance.masked_fill(zero, 0.0)
    to_q = (through * (own * here + other * there)).sum(-2)
    to_keys = scattered(through * (own * there + other * here), m)
    grads = [
        t.to(given.dtype) if engine == "triton" and given.shape[:-2] == lead else t
        for t, given in zip((to_q, to_keys, to_value), like, strict=True)
    ]
    to_bias, of_distance = scattered(of_distance, m).squeeze(-1), of_distance.squeeze(-1)
    return grads[0], grads[1], grads[2], to_bias, of_distance if of_pairs else q.new_empty(0)


@_attend_backward.register_fake
def _(
    kind: str,
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    temperature: float,
    engine: str,
    grad: Tensor,
    weight: Tensor,
    place: Tensor,
    biased: bool = True,
    to_weight: Tensor | None = None,
    of_pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lead, m = place.shape[:-2], keys.shape[-2]
    own = [engine == "triton" and t.shape[:-2] == lead for t in (q, keys, value)]
    grads = [
        weight.new_empty((*lead, *t.shape[-2:]), dtype=t.dtype if whole else None)
        for t, whole in zip((q, keys, value), own, strict=True)
    ]
    to_bias = weight.new_empty((*lead, m) if biased or engine != "triton" else 0)
    to_pairs = weight.new_empty(place.shape if of_pairs else 0)
    return grads[0], grads[1], grads[2], to_bias, to_pairs


@_attend_backward.register_flops
def _flops_back(q: Tensor, value: Tensor, place: Tensor) -> int:
    return 4 * place.numel() * (q.shape[-1] + value.shape[-1])


def _plain(
    kind: str,
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    place: Tensor,
    scale: float,
    temperature: float,
    less: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sum over pairs that are chosen already, by operations with gradients of any order.

    And their weights, before dropout.
    """
    place, exact = place.long(), torch.promote_types(q.dtype, torch.float32)
    here, there = q.unsqueeze(-2).to(exact), gather_rows(keys, place).to(exact)
    if kind == "products":
        distance = -scale * (here * there).sum(-1)
        if bias is not None:
            distance = distance + gather_rows(bias.unsqueeze(-1), place).squeeze(-1)
    else:
        distance = (here - there).square().sum(-1)
    if kind == "angles":
        zero = (here.norm(dim=-1) < 0.5) | (there.norm(dim=-1) < 0.5)
        distance = (distance / 2).masked_fill(zero, 1.0)
    if less is not None:
        pairs = less.expand(*place.shape[:-1], less.shape[-1])
        distance = distance - pairs.gather(-1, place)
    seen = weight > 0  # what is hidden, or too far to weigh, has no gradient
    score = (-distance / temperature).masked_fill(~seen, -torch.inf)
    score = score.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weight = score.softmax(-1) * seen
    used = weight if keep is None else weight * keep
    return _weighted(used, gather_rows(value, place)).to(value.dtype), weight


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    kind, q, keys, value, bias, _, keep, _, scale, temperature, engine, _, less = inputs
    ctx.kind, ctx.rest = kind, (scale, temperature, engine)
    ctx.save_for_backward(q, keys, value, bias, keep, less, *output[1:])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # or backward gets zeros as large as these


def _backward(ctx, grad, to_weight, _):  # type: ignore[no-untyped-def]
    if grad is None and to_weight is None:
        return (None,) * 13
    q, keys, value, bias, keep, less, weight, place = ctx.saved_tensors
    if grad is None:
        grad = value.new_zeros(*place.shape[:-1], value.shape[-1])
    if torch.is_grad_enabled() and not is_traced():  # to be differentiated again
        inputs = (q, keys, value, bias, less)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        scale, temperature, _ = ctx.rest
        found = _plain(
            ctx.kind, q, keys, value, bias, keep, weight, place, scale, temperature, less
        )
        given = (grad,) if to_weight is None else (grad, to_weight)
        options = {"create_graph": True, "allow_unused": True}
        left = iter(torch.autograd.grad(found[: len(given)], wanted, given, **options))
        *grads, to_less = (None if t is None or not t.requires_grad else next(left) for t in inputs)
        return (None, *grads, *[None] * 7, to_less)
    learns = less is not None and ctx.needs_input_grad[12]
    to_q, to_keys, to_value, to_bias, to_pairs = _attend_backward(
        *(ctx.kind, q, keys, value, keep, *ctx.rest, grad, weight, place),
        *(bias is not None, to_weight, learns),
    )
    return (
        None,
        to_q.sum_to_size(q.shape).to(q.dtype),
        to_keys.sum_to_size(keys.shape).to(keys.dtype),
        to_value.sum_to_size(value.shape).to(value.dtype),
        None if bias is None else to_bias.sum_to_size(bias.shape),
        *[None] * 7,
        _by_pairs(-to_pairs, place, less.shape) if learns else None,
    )


def _by_pairs(grad: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    """Numbers of chosen pairs ``(..., n, k)`` summed where they belong in ``(..., n | 1, m)``.

    Axes that the shape does not have are summed at once, not filled and summed.
    """
    lead = (1,) * (grad.ndim - len(shape)) + tuple(shape[:-1])
    shared = [axis for axis, size in enumerate(lead) if size == 1]
    order = [axis for axis in range(grad.ndim - 1) if axis not in shared]
    kept = [lead[axis] for axis in order]
    grad, place = (t.permute(*order, *shared, -1).reshape(*kept, -1) for t in (grad, place.long()))
    return grad.new_zeros(*kept, shape[-1]).scatter_add(-1, place, grad).view(shape)


attend.register_autograd(_backward, setup_context=_setup)
