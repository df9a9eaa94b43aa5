"""Tap kernels: one weight matrix a neighbour, by rank or raster order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.kernels.base import Kernel, flat_index, lowered, spread
from convnn_geo.pairs import Pairs


@dataclass(frozen=True, eq=False)
class Taps(Kernel):
    """``y_i = sum_j W_j rho_ij v_j + b``: standard, grouped and depthwise convolution kernels.

    Args:
        weight: ``(d, c // groups, k)`` or with several axes of taps, as a convolution's weight
            ``(d, c // groups, *kernel_size)``. ``groups = c`` is depthwise.
        bias: ``(d,)`` or None.
        groups: groups of channels.

    Example:
        >>> import torch
        >>> Taps(torch.zeros(8, 4, 3, 3)).k
        9
    """

    weight: Tensor
    bias: Tensor | None = None
    groups: int = 1

    @property
    def k(self) -> int:
        """Number of taps."""
        return math.prod(self.weight.shape[2:])

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """All taps at once, from slots ``(..., n, k, c)``."""
        self.check_slots(messages.shape[-2])
        if mask is not None:
            messages = messages * mask.unsqueeze(-1)
        weight = self.weight.flatten(2).unflatten(0, (self.groups, -1))
        grouped = messages.unflatten(-1, (self.groups, -1))
        out = torch.einsum("...kgc,gdck->...gd", grouped, weight).flatten(-2)
        return self._biased(out)

    def _biased(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def check_slots(self, k: int) -> None:
        """Raise unless there is one tap a neighbour."""
        if k != self.k:
            raise ValueError(f"the kernel has {self.k} taps, but targets have {k} neighbours")

    def gather(self, pairs: Pairs, weight: Tensor | None, triton: bool = False) -> Tensor:
        """Tap by tap: rows selected and multiplied, never ``(b, n, k, c)``; backward too."""
        hood, value = pairs.neighborhood, pairs.value
        self.check_slots(hood.k)
        if weight is not None and weight.ndim == value.ndim + 1:
            return super().gather(pairs, weight)
        lead = torch.broadcast_shapes(
            value.shape[:-2],
            hood.index.shape[:-2],
            () if weight is None else weight.shape[:-2],
            () if hood.mask is None else hood.mask.shape[:-2],
        )
        m, c = value.shape[-2:]
        rows = lowered(value).expand(*lead, m, c).reshape(-1, c)
        index = flat_index(hood.index, lead, m)
        if hood.mask is not None:  # empty slots look at one more row, of zeros
            index = index.where(
                hood.mask.expand(*lead, *hood.mask.shape[-2:]).flatten(0, -2), len(rows)
            )
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        index = index.t().contiguous()
        rho = None if weight is None else spread(weight.to(rows.dtype), lead).t()
        taps = self.weight.flatten(2).permute(2, 0, 1)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        out = _GatherTaps.apply(rows, index, rho, taps.to(rows.dtype), bias, self.groups, triton)
        return out.view(*lead, hood.num_targets, out.shape[-1])


_CACHED = 2**20
"""Bytes of gathered rows that are worked on at a time, on the CPU."""


class _GatherTaps(torch.autograd.Function):
    """``out_i = b + sum_j W_j rho_ij x[index_ji]``, gathered rows recomputed in backward."""

    @staticmethod
    def forward(rows, index, rho, taps, bias, groups, triton):  # type: ignore[no-untyped-def]
        if triton:
            from convnn_geo.gpu import taps as kernels

            return kernels.gather_taps(
                rows.contiguous(), index, _whole(rho), taps.contiguous(), bias, groups
            )
        found = compiled.gather_taps(rows, index, rho, taps, bias) if groups == 1 else None
        if found is not None:
            return found
        (k, d), n = taps.shape[:2], index.shape[1]
        out = rows.new_empty(n, d)
        # On the CPU a few targets at a time, so that their sums stay in cache for all taps.
        step = max(1, _CACHED // max(1, rows.shape[1] * rows.element_size()))
        if not rows.is_cpu or torch.compiler.is_compiling():  # a loop would fix the batch's size
            step = n
        for start in range(0, n, max(step, 1)):
            part = slice(start, start + step)
            some = None if rho is None else rho[:, part]
            out[part] = 0.0 if bias is None else bias  # in cache for what follows
            for j in range(k):
                gathered = _weighted(rows, index[:, part], some, j)
                _accumulate(out[part], gathered, taps[j], groups)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        rows, index, rho, taps, _, ctx.groups, ctx.triton = inputs
        ctx.save_for_backward(rows, index, rho, taps)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, index, rho, taps = ctx.saved_tensors
        need_rows, _, need_rho, need_taps, need_bias, *_ = ctx.needs_input_grad
        if ctx.triton and not torch.are_deterministic_algorithms_enabled():
            from convnn_geo.gpu import taps as kernels

            needed = (need_rows or need_rho, need_taps)
            parts = (rows.contiguous(), index, _whole(rho), taps.contiguous(), grad.contiguous())
            found = kernels.gather_taps_backward(*parts, ctx.groups, needed)
            to_rows, to_rho, to_taps = (
                None if t is None else t.to(like.dtype)
                for t, like in zip(found, (rows, rho, taps), strict=True)
            )
            to_bias = grad.sum(0) if need_bias else None
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
            grad.sum(0) if need_bias else None,
            None,
            None,
        )


def _whole(rho: Tensor | None) -> Tensor | None:
    return None if rho is None else rho.contiguous()


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
    n = grad.shape[0]
    grouped, x = (
        grad.view(n, groups, grad.shape[1] // groups),
        x.view(n, groups, x.shape[1] // groups),
    )
    return torch.einsum("ngd,ngc->gdc", grouped, x).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Separable(Kernel):
    """A depthwise kernel, then one matrix over channels: ``y_i = P sum_j w_j rho_ij v_j + b``.

    Args:
        depthwise: ``(c, 1, k)`` or ``(c, 1, *kernel_size)``.
        pointwise: ``(d, c)``, or a 1 x 1 convolution's ``(d, c, 1, ...)``.
        bias: ``(d,)`` or None.
    """

    depthwise: Tensor
    pointwise: Tensor
    bias: Tensor | None = None

    @property
    def first(self) -> Taps:
        """The depthwise part."""
        return Taps(self.depthwise, None, self.depthwise.shape[0])

    def _mix(self, reduced: Tensor) -> Tensor:
        return torch.nn.functional.linear(reduced, self.pointwise.flatten(1), self.bias)

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Depthwise taps, then the mix."""
        return self._mix(self.first.reduce(messages, mask))

    def gather(self, pairs: Pairs, weight: Tensor | None, triton: bool = False) -> Tensor:
        """Likewise, without gathered copies."""
        return self._mix(self.first.gather(pairs, weight, triton))


@dataclass(frozen=True, eq=False)
class HeadTaps(Kernel):
    """Taps that differ from head to head: ``y_hi = sum_j W_hj rho_hij v_hj``.

    Args:
        weight: ``(heads, d, c, k)``, or ``(heads, c, 1, k)`` for depthwise taps.
    """

    weight: Tensor

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Taps of each head on slots ``(..., heads, n, k, c)``."""
        if mask is not None:
            messages = messages * mask.unsqueeze(-1)
        if self.weight.shape[-2] == 1:
            return torch.einsum("...hnkc,hck->...hnc", messages, self.weight.squeeze(-2))
        return torch.einsum("...hnkc,hdck->...hnd", messages, self.weight)
