"""Attention over the k nearest where a row of scores fits in registers: one kernel."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from convnn_geo import gpu
from convnn_geo.gpu.choice import bound, last_tie, threshold
from convnn_geo.gpu.tiles import HIDDEN, PADDING, allowed, nearer_by, ordered, products
from convnn_geo.gpu.values import gathered, weighted

LONGEST = 1024
"""Sources, at most, whose scores one kernel keeps in registers."""
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _attend_rows(
    q_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    less_ptr,
    keep_ptr,
    out_ptr,
    weight_ptr,
    place_ptr,
    n,
    m,
    k,
    heads,
    q_example,
    q_head,
    q_row,
    key_example,
    key_head,
    key_row,
    value_example,
    value_head,
    value_row,
    bias_example,
    bias_head,
    mask_example,
    mask_head,
    mask_row,
    less_example,
    less_head,
    less_row,
    out_example,
    out_head,
    out_row,
    scale,
    temperature,
    d: tl.constexpr,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LESS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STORES: tl.constexpr,
    GATHERS: tl.constexpr,
    GROUPS: tl.constexpr,
    FULL: tl.constexpr,
):
    """A tile of targets: all scores, whom to choose, softmax over the chosen, and their sum."""
    blocks = tl.cdiv(n, BLOCK_N)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    outer, head = example // heads, example % heads
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, M)
    q = q_ptr + outer * q_example + head * q_head
    key = key_ptr + outer * key_example + head * key_head
    value = value_ptr + outer * value_example + head * value_head
    product = products(q, key, rows, columns, n, m, q_row, key_row, d, BLOCK_D)
    near = product
    if HAS_BIAS:
        bias = bias_ptr + outer * bias_example + head * bias_head
        near = scale * product - tl.load(bias + columns, mask=columns < m, other=0.0)[None, :]
    if HAS_LESS:
        less = less_ptr + outer * less_example + head * less_head
        near += nearer_by(less, rows, columns, n, m, less_row)
    if HAS_MASK:
        mask = mask_ptr + outer * mask_example + head * mask_head
        near = tl.where(allowed(mask, rows, columns, n, m, mask_row), near, float("-inf"))
    inside = (columns < FULL) | (columns < m)  # the first half is known when it is compiled
    near = tl.where(inside[None, :], near, float("-inf"))
    least, unsettled, top = threshold(near, k, rows < n, GROUPS)
    lost = tl.zeros_like(top)
    if tl.max(unsettled.to(tl.int32), 0) > 0:
        code = ordered(-near)
        if HAS_MASK:
            code = tl.where(allowed(mask, rows, columns, n, m, mask_row), code, HIDDEN)
        code = tl.where(inside[None, :], code, PADDING)
        most = bound(code, k)
        last = last_tie(code, most, columns, k)
        tied = (code == most[:, None]) & (columns[None, :] <= last[:, None])
        chosen = (code < most[:, None]) | tied
        lost = tl.sum(tl.where(chosen & (near != near), near, 0.0), 1)  # NaN
        near = tl.where(chosen, tl.where(near > _LOWEST, near, _LOWEST), float("-inf"))
        least = tl.zeros_like(least) - float("inf")
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    chosen = near > least[:, None]
    step = 1.4426950408889634 / temperature
    if not HAS_BIAS:
        step *= scale
    weight = tl.where(chosen, tl.exp2(near * step - (top * step)[:, None]), 0.0)
    total = tl.sum(weight, 1)
    share = 1.0 / tl.where(total == 0.0, 1.0, total) + lost
    pair, before = rows * k, example * n * k
    if STORES:
        weight_ptr, place_ptr = weight_ptr + before, place_ptr + before
    if HAS_KEEP:
        keep_ptr += before
    if STORES or HAS_KEEP:
        at = pair[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        stored = chosen & (rows < n)[:, None]
        if STORES:
            tl.store(place_ptr + at, tl.broadcast_to(columns[None, :], [BLOCK_N, M]), mask=stored)
            tl.store(weight_ptr + at, weight * share[:, None], mask=stored)
        if HAS_KEEP:
            weight *= tl.load(keep_ptr + at, mask=stored, other=0.0)
    if GATHERS:
        tl.debug_barrier()  # what one warp has stored, others read
    for first in tl.static_range(0, c, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        if GATHERS:
            out = gathered(
                value, weight_ptr, place_ptr, keep_ptr, pair, rows < n, k, value_row, channels, c,
                BLOCK_N, BLOCK_C, HAS_KEEP,
            )  # fmt: skip
        else:
            out = weighted(value, weight, columns, m, value_row, channels, c, BLOCK_N, BLOCK_C)
            out *= share[:, None]
        tl.store(
            out_ptr + outer * out_example + head * out_head + rows[:, None].to(tl.int64) * out_row
            + channels[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=(rows < n)[:, None] & (channels < c)[None, :],
        )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """How much a program works on: what registers and shared memory hold."""

    rows: int
    columns: int
    axes: int
    channels: int
    warps: int


def tile(
    n: int, m: int, d: int, c: int, dtype: torch.dtype, shared: int, stores: bool, masked: bool
) -> Tile | None:
    """The tile for ``n`` rows of ``m`` scores, ``shared`` bytes a block at most; None if none fits.

    Registers decide: many rows share what is read, but weights to be stored, and a mask beside
    them, crowd these out; float32 is multiplied by threads, which hold parts of both factors.
    """
    return None if m > LONGEST else _tile(n, m, d, c, dtype, shared, stores, masked)


@functools.lru_cache(1024)
def _tile(
    n: int, m: int, d: int, c: int, dtype: torch.dtype, shared: int, stores: bool, masked: bool
) -> Tile | None:
    columns = max(16, gpu.next_power_of_2(m))
    half = dtype != torch.float32
    if not half and columns * max(d, 64) > 512 * 64:
        return None
    size, wide = dtype.itemsize, max(16, gpu.next_power_of_2(c))
    rows, warps = 16, 4 if half and columns <= 512 else 8
    if half and columns <= 256 and not masked:
        rows, warps = (32, 4) if stores else (128, 8)
    while rows > 16 and rows >= 2 * n:
        rows, warps = rows // 2, max(4, warps // 2)
    axes = max(16, min(64 if half else 32, gpu.next_power_of_2(d)))
    channels = min(64, wide)
    weights = rows * columns * size  # on their way to the second product
    while columns * max(axes, channels) * size + weights > shared:
        if max(axes, channels) <= 16:
            return None
        axes, channels = (
            min(axes, max(axes, channels) // 2),
            min(channels, max(axes, channels) // 2),
        )
    return Tile(rows, columns, axes, channels, warps)
