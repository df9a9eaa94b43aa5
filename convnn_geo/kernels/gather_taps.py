"""Taps on gathered rows as one operator: neighbours are never copied to ``(n, k, c)``.

In C on the CPU, in Triton on a GPU where it is asked for, by torch tap by tap elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.operators import is_traced, operator

_CACHED = 2**20
"""Bytes of gathered rows that are worked on at a time, on the CPU."""


def gather_taps(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    groups: int = 1,
    triton: bool = False,
) -> Tensor:
    """``out_i = bias + sum_j W_j rho_ij rows[index_ji]``; gathered rows are recomputed in backward.

    Args:
        rows: ``(m, c)``.
        index: ``(k, n)``.
        rho: ``(k, n)`` or None.
        taps: ``(k, d, c // groups)``.
        bias: ``(d,)`` or None.
        groups: groups of channels.
        triton: by the kernels for GPUs.

    Shapes:
        - **output:** :math:`(n, d)`

    Example:
        >>> x = torch.tensor([[1.0], [10.0]])
        >>> gather_taps(x, torch.tensor([[0, 1], [1, 1]]), None, torch.ones(2, 1, 1), None)
        tensor([[11.],
                [20.]])
    """
    return _gather_taps(rows, index, rho, taps, bias, groups, triton)


@operator("gather_taps")
def _gather_taps(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    groups: int,
    triton: bool,
) -> Tensor:
    if triton:
        from convnn_geo.gpu import taps as kernels

        whole = None if rho is None else rho.contiguous()
        parts = (rows.contiguous(), index.contiguous(), whole, taps.contiguous(), bias)
        return kernels.gather_taps(*parts, groups)
    found = compiled.gather_taps(rows, index, rho, taps, bias, groups)
    if found is not None:
        return found
    (k, d), n = taps.shape[:2], index.shape[1]
    out = rows.new_empty(n, d)
    # On the CPU a few targets at a time, so that their sums stay in cache for all taps.
    step = max(1, _CACHED // max(1, rows.shape[1] * rows.element_size())) if rows.is_cpu else n
    for start in range(0, n, max(step, 1)):
        part = slice(start, start + step)
        some = None if rho is None else rho[:, part]
        out[part] = 0.0 if bias is None else bias  # in cache for what follows
        for j in range(k):
            gathered = _weighted(rows, index[:, part], some, j)
            _accumulate(out[part], gathered, taps[j], groups)
    return out


@_gather_taps.register_fake
def _(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    groups: int,
    triton: bool,
) -> Tensor:
    return rows.new_empty(index.shape[1], taps.shape[1])


@_gather_taps.register_flops
def _flops(index: Tensor, taps: Tensor) -> int:
    return 2 * index.shape[1] * taps.numel()


@operator("gather_taps_backward")
def _triton_backward(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    grad: Tensor,
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to rows, rho and taps by the kernels for GPUs; empty where not needed."""
    from convnn_geo.gpu import taps as kernels

    whole = None if rho is None else rho.contiguous()
    parts = (rows.contiguous(), index.contiguous(), whole, taps.contiguous(), grad.contiguous())
    found = kernels.gather_taps_backward(*parts, groups, (needed[0], needed[1]))
    like = (rows, rows if rho is None else rho, taps)
    return tuple(  # type: ignore[return-value]
        kind.new_empty(0) if t is None else t.to(kind.dtype)
        for t, kind in zip(found, like, strict=True)
    )


@_triton_backward.register_fake
def _(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    grad: Tensor,
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    to_rho = rho if rho is not None and needed[0] else None
    return (
        rows.new_empty(rows.shape if needed[0] else 0),
        rows.new_empty(0) if to_rho is None else to_rho.new_empty(to_rho.shape),
        taps.new_empty(taps.shape if needed[1] else 0),
    )


@_triton_backward.register_flops
def _flops_back(index: Tensor, taps: Tensor, needed: Sequence[bool]) -> int:
    return sum(needed) * _flops(index, taps)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    rows, index, rho, taps, _, ctx.groups, ctx.triton = inputs
    ctx.save_for_backward(rows, index, rho, taps)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    rows, index, rho, taps = ctx.saved_tensors
    need_rows, _, need_rho, need_taps, need_bias, *_ = ctx.needs_input_grad
    to_bias = grad.sum(0) if need_bias else None
    grad = grad.contiguous()  # or each product would copy what a sum has spread
    again = torch.is_grad_enabled() and not is_traced()  # to be differentiated once more
    if ctx.triton and not again:
        needed = (need_rows or need_rho, need_taps)
        found = _triton_backward(rows, index, rho, taps, grad, ctx.groups, needed)
        wanted = (need_rows, need_rho, need_taps)
        to_rows, to_rho, to_taps = (t if w else None for t, w in zip(found, wanted, strict=True))
        return to_rows, None, to_rho, to_taps, to_bias, None, None
    grad_rows = torch.zeros_like(rows)
    grad_taps, grad_rho = [], []
    for j in range(taps.shape[0]):
        if need_taps:
            gathered = _weighted(rows, index, rho, j)
            grad_taps.append(_outer(grad, gathered, ctx.groups))
        if need_rows or need_rho:
            back = _transposed(grad, taps[j], ctx.groups)
            if need_rho:
                grad_rho.append((back * rows.index_select(0, index[j])).sum(-1))
            if need_rows:
                if rho is not None:
                    back = back * rho[j].unsqueeze(-1)
                grad_rows.index_add_(0, index[j], back)
    return (
        grad_rows if need_rows else None,
        None,
        torch.stack(grad_rho) if need_rho else None,
        torch.stack(grad_taps) if need_taps else None,
        to_bias,
        None,
        None,
    )


_gather_taps.register_autograd(_backward, setup_context=_setup)


def _weighted(rows: Tensor, index: Tensor, rho: Tensor | None, j: int) -> Tensor:
    gathered = rows.index_select(0, index[j])
    return gathered if rho is None else gathered * rho[j].unsqueeze(-1)


def _accumulate(out: Tensor, x: Tensor, tap: Tensor, groups: int) -> None:
    """``out += x W^T``, group by group."""
    if groups == 1:
        out.addmm_(x, tap.t())
    elif tap.shape[1] == 1:  # depthwise
        grouped = out.view(-1, groups, tap.shape[0] // groups)
        grouped.addcmul_(x.unsqueeze(-1), tap.view(groups, -1))
    else:
        weight = tap.view(groups, -1, tap.shape[1])
        out.view(-1, groups, weight.shape[1]).add_(
            torch.einsum("ngc,gdc->ngd", x.view(-1, groups, tap.shape[1]), weight)
        )


def _transposed(grad: Tensor, tap: Tensor, groups: int) -> Tensor:
    """``grad W``, group by group."""
    if groups == 1:
        return grad @ tap
    weight = tap.view(groups, -1, tap.shape[1])
    grouped = grad.view(-1, groups, weight.shape[1])
    return torch.einsum("ngd,gdc->ngc", grouped, weight).flatten(1)


def _outer(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    """``grad^T x``, group by group: the gradient of one tap."""
    if groups == 1:
        return grad.t() @ x
    grouped = grad.view(grad.shape[0], groups, grad.shape[1] // groups)
    if x.shape[1] == groups:  # depthwise: sums over targets, each of one channel
        return (grouped * x.unsqueeze(-1)).sum(0).view(-1, 1)
    x = x.view(grad.shape[0], groups, x.shape[1] // groups)
    return torch.einsum("ngd,ngc->gdc", grouped, x).flatten(0, 1)
