"""Attention over the k nearest keys as one operator: no scores of size n m, no copies of keys.

What :class:`Gather` does in four steps (search, distances of the chosen pairs, softmax, product)
is done here a few rows at a time, in C; by torch where that is not served. Backward goes over the
chosen pairs alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo import compiled, gpu
from convnn_geo.kernels import Sum
from convnn_geo.kernels.base import is_transformed
from convnn_geo.lowering.attention import by_mask
from convnn_geo.lowering.rules import Rule
from convnn_geo.metrics import Angular, BilinearForm, Differences, full_precision
from convnn_geo.operation import Operation, show_nan
from convnn_geo.points import gather_rows
from convnn_geo.search.nearest import Problem, by_rows
from convnn_geo.search.rows import Hidden
from convnn_geo.selection import KNearest
from convnn_geo.shapes import broadcast_shapes
from convnn_geo.weighting import Softmax

_SLAB = 2**23


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


class TritonAttention(Rule):
    """The same by Triton: scores pass through registers; any bilinear metric, half precision."""

    name = "triton_attention"
    backend = "triton"

    def refuses(self, op: Operation) -> str | None:
        """Needs softmax over the k nearest by a bilinear metric, and a GPU."""
        reason = _refuses(op) or gpu.refuses(op.value.device)
        if reason is not None:
            return reason
        if op.bound.bilinear() is None:
            return "the metric is not bilinear"
        if op.value.dtype == torch.float64:
            return "values are torch.float64"
        return _over(op, gpu.LARGEST_K)

    def run(self, op: Operation) -> Tensor:
        """Attend."""
        form = op.bound.bilinear()
        if form is None:
            raise TypeError("triton_attention needs a bilinear metric")
        return _run(op, "products", form.q, form.k, form.b, form.scale, "triton")


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
    selection: KNearest = op.selection  # type: ignore[assignment]
    keep, mask = None, op.query().subset.mask
    if weighting.training and weighting.dropout:  # of weights in the shape that gather has them
        lead = broadcast_shapes(op.bound.shape[:-2], () if mask is None else mask.shape[:-2])
        ones = op.value.new_ones(*lead, op.bound.shape[-2], selection.k)
        keep = F.dropout(ones, weighting.dropout)
    out, _, _ = torch.ops.convnn_geo.neighbor_attention(
        *(kind, q, keys, op.value, bias, mask, keep, selection.k),
        *(float(scale), weighting.temperature, engine),
    )
    # Of queries that are not finite the compiled operator makes NaN by itself.
    return out if engine == "compiled" and op.target.pos is None else show_nan(out, op)


def _over(op: Operation, limit: int) -> str | None:
    selection: KNearest = op.selection  # type: ignore[assignment]
    return None if selection.k <= limit else f"k={selection.k} is over {limit}"


def _refuses(op: Operation) -> str | None:
    """Why an operation is no attention over the k nearest that runs as one operator."""
    chosen = op.selection
    if not isinstance(op.kernel, Sum):
        return f"the kernel is {type(op.kernel).__name__}, not Sum"
    if not isinstance(op.weighting, Softmax):
        return f"weights are {type(op.weighting).__name__}, not Softmax"
    if type(chosen) is not KNearest or chosen.dilation != 1 or chosen.self_point != "natural":
        return "neighbours are not simply the k nearest"
    if not by_mask(op.candidates) or op.target.mask is not None:
        return f"candidates of {type(op.candidates).__name__} are no mask over all sources"
    if op.search not in ("auto", "dense"):
        return f"search={op.search!r} was asked for"
    if op.bias is not None:
        return "scores are added to"
    if is_transformed():
        return "torch.func and forward-mode gradients go by gather"
    if chosen.k > op.source.num_points:
        return f"k={chosen.k} is over the number of sources"
    return None


def _is_one_form(bound: Any) -> bool:
    """Whether distances are those that :class:`Problem` compares, but for a constant a row."""
    if isinstance(bound, Differences):
        return bound.p == 2 and not bound.root and bound.scale is None and bound.wide
    if isinstance(bound, Angular):
        return bound.wide
    return isinstance(bound, BilinearForm) and bound.precision is None


@torch.library.custom_op("convnn_geo::neighbor_attention", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ``(..., n, c)``, weights before dropout and places ``(..., n, k)``."""
    if engine == "triton":
        from convnn_geo.gpu import attention

        return attention.attend(q, keys, value, bias, mask, keep, k, scale, temperature)
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
    out = _empty(value, lead, q.shape[-2])
    out.copy_((used.unsqueeze(-1) * gather_rows(value, place)).sum(-2))
    lost = q.sum(-1, keepdim=True).isnan()  # also where a query sees nobody
    return out.masked_fill_(lost, torch.nan), weight, place


def _empty(value: Tensor, lead: torch.Size, n: int) -> Tensor:
    """Memory ``(..., n, c)`` in which heads lie side by side, as who joins them wants it."""
    if not lead:
        return value.new_empty(n, value.shape[-1])
    return value.new_empty(*lead[:-1], n, lead[-1], value.shape[-1]).transpose(-2, -3)


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
) -> tuple[Tensor, Tensor, Tensor]:
    lead = broadcast_shapes(
        *(q.shape[:-2], keys.shape[:-2], value.shape[:-2]),
        () if bias is None else bias.shape[:-1],
        () if mask is None else mask.shape[:-2],
    )
    weight = q.new_empty(*lead, q.shape[-2], k, dtype=torch.float32)
    if engine == "triton":
        out = value.new_empty(*lead, q.shape[-2], value.shape[-1])
        return out, weight, torch.empty_like(weight, dtype=torch.int32)
    out = _empty(value, lead, q.shape[-2])
    return out, weight, torch.empty_like(weight, dtype=torch.long)


@torch.library.custom_op("convnn_geo::neighbor_attention_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to targets, keys, values and bias, in the leading shape of the result."""
    if engine == "triton":
        from convnn_geo.gpu import attention

        return attention.attend_backward(
            q, keys, value, keep, scale, temperature, grad, weight, place
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

    m = keys.shape[-2]
    slope = kept * (grad.unsqueeze(-2) * gather_rows(value, place)).sum(-1)
    to_value = scattered((weight * kept).unsqueeze(-1) * grad.unsqueeze(-2), m)
    mean = (weight * slope).sum(-1, keepdim=True)
    of_distance = (weight * (mean - slope) / temperature).unsqueeze(-1)
    own = {"points": 2.0, "angles": 1.0, "products": 0.0}[kind]
    other = -scale if kind == "products" else -own
    there, here = gather_rows(keys, place), q.unsqueeze(-2)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead, m = place.shape[:-2], keys.shape[-2]
    grads = [weight.new_empty(*lead, *t.shape[-2:]) for t in (q, keys, value)]
    return grads[0], grads[1], grads[2], weight.new_empty(*lead, m)


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
    place = place.long()
    here, there = q.unsqueeze(-2), gather_rows(keys, place)
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
    return (used.unsqueeze(-1) * gather_rows(value, place)).sum(-2)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    kind, q, keys, value, bias, _, keep, _, scale, temperature, engine = inputs
    ctx.kind, ctx.rest = kind, (scale, temperature, engine)
    ctx.save_for_backward(q, keys, value, bias, keep, *output[1:])


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    q, keys, value, bias, keep, weight, place = ctx.saved_tensors
    tracing = torch._C._len_torch_dispatch_stack() > 0
    if torch.is_grad_enabled() and not tracing:  # to be differentiated again
        inputs = [t for t in (q, keys, value, bias) if t is not None]
        wanted = [t for t in inputs if t.requires_grad]
        out = _plain(ctx.kind, q, keys, value, bias, keep, weight, place, *ctx.rest[:2])
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
        grads = [
            None if t is None or not t.requires_grad else next(found)
            for t in (q, keys, value, bias)
        ]
        return (None, *grads, *[None] * 6)
    to_q, to_keys, to_value, to_bias = torch.ops.convnn_geo.neighbor_attention_backward(
        ctx.kind, q, keys, value, keep, *ctx.rest, grad, weight, place
    )
    return (
        None,
        to_q.sum_to_size(q.shape).to(q.dtype),
        to_keys.sum_to_size(keys.shape).to(keys.dtype),
        to_value.sum_to_size(value.shape).to(value.dtype),
        None if bias is None else to_bias.sum_to_size(bias.shape),
        *[None] * 6,
    )


_attend.register_autograd(_backward, setup_context=_setup)
