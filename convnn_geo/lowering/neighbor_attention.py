"""Attention over the k nearest keys as one operator: no scores of size n m, no copies of keys.

What :class:`Gather` does in four steps (search, distances of the chosen pairs, softmax, product)
is done here a few rows at a time, in C; by torch where that is not served. Backward goes over the
chosen pairs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo import compiled, gpu
from convnn_geo.gpu.layout import empty_result, leading
from convnn_geo.kernels import Sum
from convnn_geo.lowering.attention import by_mask, by_rows_of_distances, simply_nearest
from convnn_geo.lowering.rules import Again, Rule
from convnn_geo.metrics import (
    Angular,
    BilinearForm,
    Differences,
    Feature,
    Interpolation,
    Metric,
    full_precision,
)
from convnn_geo.operation import Operation, show_nan
from convnn_geo.operators import directly, is_traced, is_transformed, operator
from convnn_geo.points import gather_rows
from convnn_geo.search.nearest import by_rows
from convnn_geo.search.problem import Problem
from convnn_geo.search.rows import Hidden
from convnn_geo.selection import KNearest
from convnn_geo.shapes import broadcast_shapes
from convnn_geo.weighting import Softmax

_SLAB = 2**23
_WIDEST = 2048
"""Bytes of a row, at most, of which backward holds several in shared memory."""


class NeighborAttention(Rule):
    """Search, softmax and sum in one pass over rows that stay in cache, on the CPU."""

    name = "neighbor_attention"
    backend = "compiled"

    def refuses(self, op: Operation) -> str | None:
        """Needs softmax over the k nearest by a dot product, a cosine or squared distances."""
        reason = _refuses(op)
        if reason is not None:
            return reason
        if op.value.device.type != "cpu":
            return f"the points are on {op.value.device}, not on the CPU"
        if not _is_one_form(op.bound):
            return "the metric is neither a dot product, nor cosine, nor squared distances"
        if not op.value.dtype == op.bound.dtype == torch.float32:
            return f"values are {op.value.dtype}, not torch.float32"
        if not torch.compiler.is_compiling() and compiled.library() is None:
            return "there is no C compiler, or CONVNN_GEO_COMPILE is 0"
        return _over(op, compiled.LARGEST_K)

    def run(self, op: Operation) -> Tensor:
        """Attend."""
        problem = Problem.of(op.bound, torch.float32)
        if problem is None:
            raise TypeError("neighbor_attention needs points or products")
        points = (problem.kind, problem.q, problem.keys)
        return _run(op, *points, problem.bias, problem.scale, "compiled")

    def again(self, op: Operation) -> Again | None:
        """Where features are what is multiplied."""
        problem = Problem.of(op.bound, torch.float32)
        if problem is None or problem.kind != "products":
            return None
        return _again(op, problem.q, problem.keys, problem.bias, problem.scale, "compiled")


class TritonAttention(Rule):
    """The same by Triton: scores pass through registers; any bilinear metric, half precision."""

    name = "triton_attention"
    backend = "triton"

    def refuses(self, op: Operation) -> str | None:
        """Needs softmax over the k nearest by a bilinear metric, and a GPU."""
        reason = _refuses(op) or gpu.refuses(op.value.device)
        if reason is not None:
            return reason
        form = _form(op)
        if form is None:
            return "the metric is not bilinear"
        if op.value.dtype == torch.float64:
            return "values are torch.float64"
        width = max(form.q.shape[-1], op.value.shape[-1])
        if width * op.value.dtype.itemsize > _WIDEST:
            return f"heads of {width} channels are too wide to be held where backward needs them"
        if op.target.num_points * _filled(op) >= 2**31:
            return "a head has more pairs than 32 bits count"
        return _over(op, gpu.LARGEST_K)

    def run(self, op: Operation) -> Tensor:
        """Attend."""
        form = _form(op)
        if form is None:
            raise TypeError("triton_attention needs a bilinear metric")
        return _run(op, "products", form.q, form.k, form.b, form.scale, "triton")

    def again(self, op: Operation) -> Again | None:
        """Where features are what is multiplied."""
        form = _form(op)
        return None if form is None else _again(op, form.q, form.k, form.b, form.scale, "triton")


def _form(op: Operation) -> BilinearForm | None:
    """Distances as one product: of the features themselves where the metric is just that.

    Products of halves are exact in float32, so tensor cores give its distances.
    """
    metric: Metric | None = op.metric
    while isinstance(metric, Interpolation):
        metric = metric.end
    if type(metric) is not Feature or metric.kind not in ("dot", "scaled_dot"):
        return op.product
    q, keys = op.target.features, op.source.features
    plain = metric.query is None and metric.key is None and q.dtype == keys.dtype
    if not plain or q.dtype != op.value.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return op.product
    return BilinearForm(q, keys, scale=1.0 if metric.kind == "dot" else q.shape[-1] ** -0.5)


def _run(
    op: Operation,
    kind: str,
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    scale: float,
    engine: str,
) -> Tensor:
    weighting: Softmax = op.weighting  # type: ignore[assignment]
    k = _filled(op)
    keep, mask = None, op.subset.mask
    if weighting.training and weighting.dropout:  # of weights in the shape that gather has them
        lead = broadcast_shapes(
            *(q.shape[:-2], keys.shape[:-2]), () if mask is None else mask.shape[:-2]
        )
        ones = op.value.new_ones(*lead, q.shape[-2], k, dtype=torch.float32)
        keep = F.dropout(ones, weighting.dropout)
    inputs = [t for t in (q, keys, op.value, bias) if t is not None]
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    out, _, _ = _attend(
        *(kind, q, keys, op.value, bias, mask, keep, k),
        *(float(scale), float(weighting.temperature), engine, trains),
    )
    # Of queries that are not finite the operators make NaN by themselves; in Triton unless a mask
    # hides all keys from them, and where the metric looks at the features.
    shown = engine == "compiled" or (mask is None and q is op.target.x)
    return out if shown and op.target.pos is None else show_nan(out, op)


def _again(
    op: Operation, q: Tensor, keys: Tensor, bias: Tensor | None, scale: float, engine: str
) -> Again | None:
    """:meth:`Rule.again` where products of features, and softmax of these, are all there is."""
    weighting: Softmax = op.weighting  # type: ignore[assignment]
    plain = q is op.target.x and keys is op.source.x and bias is None and op.subset.mask is None
    positions = op.target.pos is not None or op.source.pos is not None
    if not plain or positions or weighting.dropout:
        return None
    k, options = _filled(op), (float(scale), float(weighting.temperature), engine)
    alone = _alone() if engine == "triton" else None

    def run(q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        learns = q.requires_grad or keys.requires_grad or value.requires_grad
        trains = learns and torch.is_grad_enabled()
        if alone is not None and not trains:
            return directly(alone, q, keys, value, k, *options[:2])
        return _attend("products", q, keys, value, None, None, None, k, *options, trains)[0]

    return run


def _alone() -> Callable[..., Tensor]:
    from convnn_geo.gpu import attention  # imports triton

    return attention.alone


def _filled(op: Operation) -> int:
    """Slots of a target that can hold a neighbour."""
    selection: KNearest = op.selection  # type: ignore[assignment]
    return min(selection.k, op.source.num_points)


def _over(op: Operation, limit: int) -> str | None:
    k = _filled(op)
    return None if k <= limit else f"k={k} is over {limit}"


def _refuses(op: Operation) -> str | None:
    """Why an operation is no attention over the k nearest that runs as one operator."""
    chosen = op.selection
    if not isinstance(op.kernel, Sum):
        return f"the kernel is {type(op.kernel).__name__}, not Sum"
    if not isinstance(op.weighting, Softmax):
        return f"weights are {type(op.weighting).__name__}, not Softmax"
    if not isinstance(chosen, KNearest) or not simply_nearest(chosen):
        return "neighbours are not simply the k nearest"
    if not by_mask(op.candidates) or op.target.mask is not None:
        return f"candidates of {type(op.candidates).__name__} are no mask over all sources"
    if not by_rows_of_distances(op):
        return f"search={op.search!r} was asked for"
    if op.bias is not None:
        return "scores are added to: a mask of floats, or a bias; a boolean mask can be served"
    if is_transformed():
        return "torch.func and forward-mode gradients go by gather"
    if chosen.k > op.source.num_points and chosen.short != "pad":
        return f"k={chosen.k} is over the number of sources"
    return None


def _is_one_form(bound: Any) -> bool:
    """Whether distances are those that :class:`Problem` compares, but for a constant a row."""
    if isinstance(bound, Differences):
        return bound.p == 2 and not bound.root and bound.scale is None and bound.wide
    if isinstance(bound, Angular):
        return bound.wide
    return isinstance(bound, BilinearForm) and bound.precision is None


@operator("neighbor_attention")
def _attend(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ``(..., n, c)``, weights before dropout and places ``(..., n, k)``.

    Weights and places are for backward: Triton leaves them empty unless they are ``wanted``.
    """
    if engine == "triton":
        from convnn_geo.gpu import attention

        return attention.attend(q, keys, value, bias, mask, keep, k, scale, temperature, wanted)
    found = compiled.attention(kind, q, keys, value, bias, mask, keep, k, scale, temperature)
    if found is not None:
        return found
    problem = Problem(kind, q, keys, bias, scale, torch.float32, exact=True)
    with full_precision(q.device):
        values, place = by_rows(problem, k, Hidden(mask), _SLAB)
    lead = broadcast_shapes(place.shape[:-2], value.shape[:-2])
    place = place.expand(*lead, *place.shape[-2:]).contiguous()
    score = (-values / temperature).expand(place.shape)
    empty = (score == -torch.inf).all(-1, keepdim=True)
    weight = score.masked_fill(empty, 0.0).softmax(-1).masked_fill(score == -torch.inf, 0.0)
    used = weight if keep is None else weight * keep
    out = empty_result(value, lead, q.shape[-2])
    out.copy_(_weighted(used, gather_rows(value, place)))
    lost = q.sum(-1, keepdim=True).isnan()  # also where a query sees nobody
    return out.masked_fill_(lost, torch.nan), weight, place


def _weighted(weight: Tensor, rows: Tensor) -> Tensor:
    """``sum_j weight_j row_j``, ``(..., c)``; rows without weight have no part, NaN or not."""
    weight = weight.unsqueeze(-1)
    return (weight * rows.masked_fill(weight == 0, 0.0)).sum(-2)


@_attend.register_fake
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
) -> tuple[Tensor, Tensor, Tensor]:
    lead, triton = leading(q, keys, value, bias, mask), engine == "triton"
    shape = (*lead, q.shape[-2], k) if wanted or not triton else (0,)
    weight = q.new_empty(shape, dtype=torch.float32)
    out = empty_result(value, lead, q.shape[-2])
    return out, weight, torch.empty_like(weight, dtype=torch.int32 if triton else torch.long)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to targets, keys, values and bias, in the leading shape of the result.

    That of a bias may be empty unless there is one.
    """
    if engine == "triton":
        from convnn_geo.gpu import attention

        return attention.attend_backward(
            q, keys, value, keep, scale, temperature, grad, weight, place, biased
        )
    found = compiled.attention_backward(
        kind, q, keys, value, keep, scale, temperature, grad, weight, place
    )
    if found is not None:
        return found
    lead, kept = place.shape[:-2], 1.0 if keep is None else keep

    def scattered(rows: Tensor, m: int) -> Tensor:
        """Rows of pairs ``(..., n, k, c)`` summed by key."""
        into = rows.new_zeros(*lead, m, rows.shape[-1])
        index = place.flatten(-2).unsqueeze(-1).expand(*lead, -1, rows.shape[-1])
        return into.scatter_add(-2, index, rows.flatten(-3, -2))

    m, unused = keys.shape[-2], (weight == 0).unsqueeze(-1)
    used = (weight * kept).unsqueeze(-1)
    slope = (grad.unsqueeze(-2) * gather_rows(value, place).masked_fill(used == 0, 0.0)).sum(-1)
    slope = kept * slope.masked_fill(used.squeeze(-1) == 0, 0.0)
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
    return to_q, to_keys, to_value, scattered(of_distance, m).squeeze(-1)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead, m = place.shape[:-2], keys.shape[-2]
    own = [engine == "triton" and t.shape[:-2] == lead for t in (q, keys, value)]
    grads = [
        weight.new_empty((*lead, *t.shape[-2:]), dtype=t.dtype if whole else None)
        for t, whole in zip((q, keys, value), own, strict=True)
    ]
    to_bias = weight.new_empty((*lead, m) if biased or engine != "triton" else 0)
    return grads[0], grads[1], grads[2], to_bias


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
) -> Tensor:
    """The sum over pairs that are chosen already, by operations with gradients of any order."""
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
    seen = weight > 0  # what is hidden, or too far to weigh, has no gradient
    score = (-distance / temperature).masked_fill(~seen, -torch.inf)
    score = score.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weight = score.softmax(-1) * seen
    used = weight if keep is None else weight * keep
    return _weighted(used, gather_rows(value, place)).to(value.dtype)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    kind, q, keys, value, bias, _, keep, _, scale, temperature, engine, _ = inputs
    ctx.kind, ctx.rest = kind, (scale, temperature, engine)
    ctx.save_for_backward(q, keys, value, bias, keep, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward gets zeros as large as these


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 12
    q, keys, value, bias, keep, weight, place = ctx.saved_tensors
    if torch.is_grad_enabled() and not is_traced():  # to be differentiated again
        inputs = [t for t in (q, keys, value, bias) if t is not None]
        wanted = [t for t in inputs if t.requires_grad]
        out = _plain(ctx.kind, q, keys, value, bias, keep, weight, place, *ctx.rest[:2])
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
        grads = [
            None if t is None or not t.requires_grad else next(found)
            for t in (q, keys, value, bias)
        ]
        return (None, *grads, *[None] * 7)
    to_q, to_keys, to_value, to_bias = _attend_backward(
        ctx.kind, q, keys, value, keep, *ctx.rest, grad, weight, place, bias is not None
    )
    return (
        None,
        to_q.sum_to_size(q.shape).to(q.dtype),
        to_keys.sum_to_size(keys.shape).to(keys.dtype),
        to_value.sum_to_size(value.shape).to(value.dtype),
        None if bias is None else to_bias.sum_to_size(bias.shape),
        *[None] * 7,
    )


_attend.register_autograd(_backward, setup_context=_setup)
