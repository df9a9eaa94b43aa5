"""Attention over neighbours that a search has found, for rows that do not fit in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo.gpu.values import gathered


@triton.jit
def _combine(
    distance_ptr,
    value_ptr,
    keep_ptr,
    out_ptr,
    weight_ptr,
    place_ptr,
    n,
    k,
    heads,
    value_example,
    value_head,
    value_row,
    out_example,
    out_head,
    out_row,
    temperature,
    c: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """Softmax over distances, and the sum of gathered values. Weights may overwrite distances."""
    blocks = tl.cdiv(n, BLOCK_N)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    outer, head = example // heads, example % heads
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.arange(0, K)
    pair = (example * n + rows) * k
    here = (rows < n)[:, None] & (slots < k)[None, :]
    at = pair[:, None] + slots[None, :]
    distance = tl.load(distance_ptr + at, mask=here, other=float("inf"))
    least = tl.min(tl.where(distance == distance, distance, float("inf")), 1)
    least = tl.where(least == float("inf"), 0.0, least)  # who sees nobody
    # Infinite distances weigh nothing; NaN makes the row NaN.
    weight = tl.exp2((least[:, None] - distance) * (1.4426950408889634 / temperature))
    total = tl.sum(weight, 1)
    weight *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.debug_barrier()  # all have read what is overwritten
    tl.store(weight_ptr + at, weight, mask=here)
    tl.debug_barrier()  # what one warp has stored, others read
    value = value_ptr + outer * value_example + head * value_head
    out = out_ptr + outer * out_example + head * out_head
    for first in tl.static_range(0, c, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        total = gathered(
            value, weight_ptr, place_ptr, keep_ptr, pair, rows < n, k, value_row, channels, c,
            BLOCK_N, BLOCK_C, HAS_KEEP,
        )  # fmt: skip
        tl.store(
            out + rows[:, None].to(tl.int64) * out_row + channels[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(rows < n)[:, None] & (channels < c)[None, :],
        )
