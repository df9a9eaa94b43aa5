"""Attention over the k nearest: short rows in one kernel, long ones in two."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.backward import attend_backward
from convnn_geo.gpu.found import _combine
from convnn_geo.gpu.layout import empty_result, laid_out, leading, split
from convnn_geo.gpu.plans import plan
from convnn_geo.gpu.rows import _attend_rows, tile
from convnn_geo.gpu.search import nearest

__all__ = ["attend", "attend_backward"]

SHORT = 256
"""Sources up to which whole rows cost less than a search by a bound, which multiplies twice."""


@gpu.on_its_device
def attend(
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    k: int,
    scale: float,
    temperature: float,
    wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ``(..., n, c)``, weights and places ``(..., n, k)`` in float32 and int32.

    Args:
        q: ``(..., n, d)``; leading axes broadcast.
        keys: ``(..., m, d)``.
        value: ``(..., m, c)``.
        bias: ``(..., m)`` or None.
        mask: ``(..., n | 1, m)``, True where choice is allowed, or None.
        keep: ``(..., n, k)``, factors of the weights, or None.
        k: keys for each query.
        scale: distances are ``bias - scale <q, key>``.
        temperature: weights are ``softmax(-distance / temperature)``.
        wanted: whether weights and places are; otherwise they are empty.
    """
    lead = leading(q, keys, value, bias, mask)
    (n, d), (m, c) = q.shape[-2:], value.shape[-2:]
    out = empty_result(value, lead, n)
    shape = (*lead, n, k)
    gathers = q.dtype == torch.float32  # no tensor core multiplies it
    alike = gathers or q.dtype == value.dtype
    bounded = m > SHORT and plan(m, k, d, q.dtype, False) is not None
    chosen, shared = None, gpu.shared_memory(q.device)
    if alike and not bounded:
        chosen = tile(n, m, d, c, q.dtype, shared, wanted, mask is not None)
    stores = wanted or chosen is None or gathers
    weight = value.new_empty(shape if stores else 0, dtype=torch.float32)
    place = torch.empty_like(weight, dtype=torch.int32)
    if not out.numel():
        return out, weight.zero_(), place.zero_()
    (q, q_at), (keys, keys_at), (value, value_at) = (laid_out(t, lead, 2) for t in (q, keys, value))
    if bias is None and scale <= 0:  # nearness is the product itself, where it may
        bias = keys.new_zeros(m)
    bias, bias_at = laid_out(None if bias is None else bias.float(), lead, 1)
    mask, mask_at = laid_out(mask, lead, 2)
    if mask is not None and mask.shape[-2] != n:
        mask = mask.expand(*mask.shape[:2], n, m)
        mask_at = mask.stride()[:-1]
    keep = None if keep is None else keep.float().expand(shape).contiguous()
    out_at = laid_out(out, lead, 2)[1]
    examples, heads = split(lead)
    if chosen is not None:
        _attend_rows[(gpu.cdiv(n, chosen.rows) * examples * heads,)](
            *(q, keys, value, bias, None if mask is None else mask.view(torch.uint8), keep, out),
            *((weight, place) if stores else (None, None)),
            *(n, m, k, heads, *q_at, *keys_at, *value_at, *bias_at, *mask_at, *out_at),
            *(scale, temperature),
            d=d,
            c=c,
            BLOCK_N=chosen.rows,
            M=chosen.columns,
            BLOCK_D=chosen.axes,
            BLOCK_C=chosen.channels,
            HAS_BIAS=bias is not None,
            HAS_MASK=mask is not None,
            HAS_KEEP=keep is not None,
            STORES=stores,
            GATHERS=gathers,
            GROUPS=_groups(m, k) if mask is None else 0,
            FULL=m // 64 * 64,
            num_warps=chosen.warps,
        )
        return out, weight, place
    found, place = nearest(q, keys, k, None, n, bias, scale, mask)
    _combine[(gpu.cdiv(n, 16) * examples * heads,)](
        *(found, value, keep, out, found, place, n, k, heads, *value_at, *out_at, temperature),
        c=c,
        K=max(2, gpu.next_power_of_2(k)),
        BLOCK_N=16,
        BLOCK_C=max(16, min(256, gpu.next_power_of_2(c))),
        HAS_KEEP=keep is not None,
    )
    return out, found.view(shape), place.view(shape)


def _groups(m: int, k: int) -> int:
    """Into how many groups rows of ``m`` are divided, so that more than ``k`` hold somebody."""
    groups = max(32, gpu.next_power_of_2(3 * k))
    return groups if groups <= m else 0
