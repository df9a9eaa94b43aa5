"""Products and squared differences of chosen pairs, keys not copied for each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.operators import is_mapped, is_watched
from convnn_geo.points import gather_rows, row_starts


def of_pairs(
    kind: str, q: Tensor, keys: Tensor, index: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """``<q_i, key_j>`` or ``|q_i - key_j|^2`` of the pairs chosen, ``(..., n, k)``.

    In C where that serves, without a copy of each pair's key; by torch elsewhere.

    Args:
        kind: ``"products"`` or ``"squares"``.
        q: ``(..., n, d)``; leading axes broadcast.
        keys: ``(..., m, d)``.
        index: ``(..., n, k)``.
        dtype: to compute in, that of ``q`` by default.
    """
    dtype = q.dtype if dtype is None else dtype
    if dtype in (torch.float32, torch.float64) and not is_watched():
        learns = torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad)
        double = dtype == torch.float64
        if not (learns and double) and compiled.serves_pairs(q, keys, index):
            if learns:
                return _Chosen.apply(kind, q, keys, index)
            return compiled.pairs(kind, q, keys, index, double)
    return _by_copies(kind, q.to(dtype), keys, index)


def _by_copies(kind: str, q: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    near = gather_rows(keys, index).to(q.dtype)
    if kind == "products":
        return (near * q.unsqueeze(-2)).sum(-1)
    return (q.unsqueeze(-2) - near).square().sum(-1)


class _Chosen(torch.autograd.Function):
    """In float32, with gradients; by torch where these are to be differentiated once more."""

    @staticmethod
    def forward(ctx: Any, kind: str, q: Tensor, keys: Tensor, index: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(q, keys, index)
        return compiled.pairs(kind, q, keys, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, keys, index = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:3]
        if torch.is_grad_enabled() or is_watched() or is_mapped(grad):
            found = _back_by_copies(ctx.kind, q, keys, index, grad)
            return None, *(t if w else None for t, w in zip(found, wanted, strict=True)), None
        return None, *compiled.pairs_gradients(ctx.kind, q, keys, index, grad, wanted), None


def _back_by_copies(
    kind: str, q: Tensor, keys: Tensor, index: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """What pairs with these gradients give targets and sources, to be differentiated again."""
    (m, d), lead = keys.shape[-2:], keys.shape[:-2]
    near, own, grad = gather_rows(keys, index), q.unsqueeze(-2), grad.unsqueeze(-1)
    if kind == "products":
        to_targets, to_sources = grad * near, grad * own
    else:
        to_targets = 2 * grad * (own - near)
        to_sources = -to_targets
    starts = row_starts(lead.numel(), m, index.device).view(*lead, 1, 1)
    to_keys = keys.new_zeros(lead.numel() * m, d)
    to_keys = to_keys.index_add(0, (index + starts).flatten(), to_sources.reshape(-1, d))
    return to_targets.sum(-2), to_keys.view(keys.shape)
