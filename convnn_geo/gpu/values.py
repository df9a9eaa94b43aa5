"""Sums of values by weights, in which what weighs nothing has no part, be it infinite or NaN."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo.gpu.tiles import dot


@triton.jit
def gathered(
    value_ptr,
    weight_ptr,
    place_ptr,
    keep_ptr,
    pair,
    real,
    k,
    value_row,
    channels,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """One neighbour of each target after the other; what has no weight is not even read."""
    out = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for j in range(k):
        place = tl.load(place_ptr + pair + j, mask=real, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + pair + j, mask=real, other=0.0)
        if HAS_KEEP:
            weight *= tl.load(keep_ptr + pair + j, mask=real, other=0.0)
        value = tl.load(
            value_ptr + place[:, None] * value_row + channels[None, :],
            mask=(weight != 0.0)[:, None] & (channels < c)[None, :],
            other=0.0,
        )
        out += weight[:, None] * value.to(tl.float32)
    return out


@triton.jit
def weighted(
    value_ptr,
    weight,
    columns,
    m,
    value_row,
    channels,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All values by weights of which most are 0, on tensor cores.

    Where a value is infinite or NaN that product is NaN for all: then, which is rare, they are
    added one by one to those that give them weight.
    """
    value = tl.load(
        value_ptr + columns[:, None].to(tl.int64) * value_row + channels[None, :],
        mask=(columns < m)[:, None] & (channels < c)[None, :],
        other=0.0,
    )
    out = dot(weight.to(value.dtype), value, tl.zeros([BLOCK_N, BLOCK_C], tl.float32))
    if tl.max(tl.max((out - out != 0.0).to(tl.int32), 1), 0) > 0:
        out = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for place in range(m):
            one = tl.sum(tl.where(columns[None, :] == place, weight, 0.0), 1)[:, None]
            at = value_ptr + tl.cast(place, tl.int64) * value_row + channels
            row = tl.load(at, mask=channels < c, other=0.0).to(tl.float32)
            out += tl.where(one != 0.0, one * row[None, :], 0.0)
    return out
