"""The k nearest by tiles: distances pass through registers, the nearest stay there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo.gpu.tiles import ordered, products, squared_differences, unordered

DIRECT_DIMENSIONS = 8
"""Up to here distances are summed from differences."""


@triton.jit
def _nearest(
    q_ptr,
    key_ptr,
    bias_ptr,
    mask_ptr,
    q_start_ptr,
    key_start_ptr,
    value_ptr,
    place_ptr,
    k,
    heads,
    mask_example,
    mask_head,
    mask_row,
    scale,
    d: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIRECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """One block of targets of one example against all its sources.

    A pair is one integer, its distance's bits above its index, inverted: the largest is the
    nearest, no two are equal, and sorting them breaks ties. Of each tile those that are nearer
    than the k-th so far take its place, one after the other; most tiles have none.
    """
    example = tl.program_id(1)
    q_start, key_start = tl.load(q_start_ptr + example), tl.load(key_start_ptr + example)
    n, m = tl.load(q_start_ptr + example + 1) - q_start, tl.load(key_start_ptr + example + 1)
    m -= key_start
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    worst = -0x7FFFFFFFFFFFFFFF - 1
    slot = tl.arange(0, K)
    empty = worst + slot.to(tl.int64)  # all different, so that one at a time is replaced
    empty = tl.where(slot < k, empty, 0x7FFFFFFFFFFFFFFF)
    best = tl.broadcast_to(empty[None, :], [BLOCK_N, K])
    kth = tl.full([BLOCK_N], worst, tl.int64)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        q, key = q_ptr + q_start * d, key_ptr + key_start * d
        if DIRECT:
            value = squared_differences(q, key, rows, columns, n, m, d)
        else:
            value = -scale * products(q, key, rows, columns, n, m, d, BLOCK_D)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + key_start + columns, mask=columns < m, other=0.0)
                value += bias[None, :]
        if HAS_MASK:
            at = example // heads * mask_example + example % heads * mask_head
            seen = tl.load(
                mask_ptr + at + rows[:, None].to(tl.int64) * mask_row + columns[None, :],
                mask=(rows < n)[:, None] & (columns < m)[None, :],
                other=0,
            )
            value = tl.where(seen != 0, value, float("inf"))
        pair = (ordered(value).to(tl.int64) << 32) | columns[None, :].to(tl.int64)
        pair = tl.where((columns < m)[None, :], ~pair, worst)
        nearest_left = tl.max(pair, 1)
        while tl.max((nearest_left > kth).to(tl.int32), 0) > 0:
            replaced = (best == kth[:, None]) & (nearest_left > kth)[:, None]
            best = tl.where(replaced, nearest_left[:, None], best)
            pair = tl.where(pair == nearest_left[:, None], worst, pair)
            kth = tl.min(best, 1)
            nearest_left = tl.max(pair, 1)
    pair = ~tl.sort(tl.where((slot < k)[None, :], best, worst), dim=1, descending=True)
    at = (q_start + rows)[:, None].to(tl.int64) * k + slot[None, :]
    stored = (rows < n)[:, None] & (slot < k)[None, :]
    tl.store(value_ptr + at, unordered((pair >> 32).to(tl.int32)), mask=stored)
    tl.store(place_ptr + at, (pair & 0x7FFFFFFF).to(tl.int32), mask=stored)


def nearest(
    q: Tensor,
    keys: Tensor,
    k: int,
    starts: tuple[Tensor, Tensor],
    longest: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    heads: int = 1,
    direct: bool = False,
) -> tuple[Tensor, Tensor]:
    """Values and places ``(n, k)`` of the nearest in each example, in order, ties by place.

    Args:
        q: ``(n, d)``, examples one after the other; float32, bfloat16 or float16.
        keys: ``(m, d)``.
        k: at most what the smallest example has, and 256.
        starts: ``(b + 1,)`` each, where examples start in ``q`` and in ``keys``, int64.
        longest: targets of the largest example.
        bias: ``(m,)`` or None; distances are ``bias - scale <q, key>``.
        scale: of the product.
        mask: ``(b / heads, heads, n, m)`` for examples of equal size, True where allowed.
        heads: examples that share the mask's first axis.
        direct: by squared differences instead; for few axes.

    Returns:
        float32 and int32; places count within the example. What is hidden has value infinity.
    """
    d, width = q.shape[-1], max(16, triton.next_power_of_2(k))
    values = q.new_empty(q.shape[0], k, dtype=torch.float32)
    places = q.new_empty(q.shape[0], k, dtype=torch.int32)
    block = 16 if width > 64 else 32
    strides = (0, 0, 0) if mask is None else mask.stride()[:-1]
    grid = (triton.cdiv(longest, block), len(starts[0]) - 1)
    _nearest[grid](
        *(q, keys, bias, None if mask is None else mask.view(torch.uint8), *starts),
        *(values, places, k, heads, *strides, scale),
        d=d,
        K=width,
        BLOCK_N=block,
        BLOCK_M=max(64, width),
        BLOCK_D=max(16, min(64, triton.next_power_of_2(d))),
        DIRECT=direct,
        HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None,
        enable_fp_fusion=not direct,  # sums of squares round as torch's do
    )
    return values, places
