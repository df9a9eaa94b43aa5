"""The k nearest of long rows: a bound first, then only whom it lets through.

Pass 1 keeps the least distance of each of many groups of sources: one instruction a distance. As
many groups as neighbours are wanted have their least below some bound, so that at least so many
sources are, and few more. Pass 2 lists these survivors, and only lists are sorted. Rows whose list
overflows or stays too short are marked, for the slower search that any row allows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo import gpu
from convnn_geo.gpu.choice import above, below, narrowed, sharpness
from convnn_geo.gpu.exact import exact_of_pairs, rounding
from convnn_geo.gpu.lists import append, join, narrow
from convnn_geo.gpu.pairs import WORST, in_any_order, pairs, place_of, value_of
from convnn_geo.gpu.tiles import (
    PADDING,
    allowed,
    how_many,
    nearer_by,
    ordered,
    squared_differences,
)

_INTERPRETED: tl.constexpr = tl.constexpr(gpu.interpreted())
"""The interpreter neither multiplies nor negates halves."""
_STEPS: tl.constexpr = tl.constexpr(8)
"""Towards a bound: of a million rows of random scores none then lets in twice as many as wanted."""
_TURN: tl.constexpr = tl.constexpr(79)
"""Columns by which groups turn from tile to tile, so that no regular order fills a few of them."""


@triton.jit
def _part(ptr, rows, n, stride, first, d: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """Some axes of rows; ``EVEN``: which are all there."""
    axes = first + tl.arange(0, BLOCK_D)
    there = (axes < d)[None, :]
    if not EVEN:
        there = there & (rows < n)[:, None]
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + axes[None, :], there, other=0.0)


@triton.jit
def _negated_part(
    ptr, rows, n, stride, first, d: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr
):
    """The same with the opposite sign."""
    part = _part(ptr, rows, n, stride, first, d, BLOCK_D, EVEN)
    if _INTERPRETED:
        part = part.to(tl.float32)
    return -part


@triton.jit
def _product(a, b, total, ROUGH: tl.constexpr):
    """``total + a b^T``; ``ROUGH``: on tensor cores even of float32, which they round to TF32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.T, total, input_precision="tf32" if ROUGH else "ieee")


@triton.jit
def _distances(
    q_part,
    q,
    key,
    bias,
    mask,
    less,
    rows,
    columns,
    n,
    m,
    q_row,
    key_row,
    mask_row,
    less_row,
    scale,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIRECT: tl.constexpr,
    ANGLES: tl.constexpr,
    ROUGH: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LESS: tl.constexpr,
):
    """Of a tile; NaN, which no comparison lets through, of what there is not or may not be found.

    ``q_part``: of targets, negated, so that products are distances.

    ``ROUGH``: by products of TF32.
    """
    if DIRECT:
        value = squared_differences(
            q, key, rows, columns, n, m, q_row, key_row, d, tl.float32, ANGLES
        )
    else:
        total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
        if d <= BLOCK_D:
            key_part = _part(key, columns, m, key_row, 0, d, BLOCK_D, EVEN)
            total = _product(q_part, key_part, total, ROUGH)
        else:
            for first in tl.range(0, d, BLOCK_D, num_stages=1):
                part = _negated_part(q, rows, n, q_row, first, d, BLOCK_D, False)
                other = _part(key, columns, m, key_row, first, d, BLOCK_D, EVEN)
                total = _product(part, other, total, ROUGH)
        value = scale * total if HAS_BIAS else total
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=columns < m, other=0.0).to(tl.float32)[None, :]
    if HAS_LESS:
        value -= nearer_by(less, rows, columns, n, m, less_row)
    if not EVEN:
        value += tl.where(columns < m, 0.0, float("nan"))[None, :]
    if HAS_MASK:
        value = tl.where(allowed(mask, rows, columns, n, m, mask_row), value, float("nan"))
    return value


@triton.jit
def _bound(least, need):
    """For each row a distance that ``need`` groups do not exceed, and few more do not.

    Infinity where fewer than ``need`` groups have a finite one.
    """
    near = -least
    top = tl.max(near, 1)
    low = below(tl.min(tl.where(near > -float("inf"), near, top[:, None]), 1), top)
    one = tl.zeros_like(top) + 1.0
    sharp = sharpness(low, top)
    many = tl.sum(above(near, low, sharp), 1)
    low, _, _, _ = narrowed(near, need, low, many, top, 0.5 * one, sharp, _STEPS)
    return tl.where(how_many(near > low[:, None]) >= need, -low, float("inf"))


@triton.jit
def _nearest_survivors(
    q_ptr,
    key_ptr,
    bias_ptr,
    mask_ptr,
    less_ptr,
    own_ptr,
    original_ptr,
    original_key_ptr,
    square_ptr,
    longest_ptr,
    q_start_ptr,
    key_start_ptr,
    value_ptr,
    place_ptr,
    missed_ptr,
    list_ptr,
    blocks,
    examples,
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
    bias_example,
    bias_head,
    mask_example,
    mask_head,
    mask_row,
    less_example,
    less_head,
    less_row,
    scale,
    fine,
    share,
    d: tl.constexpr,
    LISTS: tl.constexpr,
    LENGTH: tl.constexpr,
    LISTED: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    DIRECT: tl.constexpr,
    ANGLES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SETTLE: tl.constexpr,
    ANY_ORDER: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LESS: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """Programs take one block of targets after the other, and list survivors in their own memory.

    ``SETTLE``: products only propose, distances in float64 decide among survivors: squared
    differences, or ``PRODUCTS`` again.
    ``ANY_ORDER``: the nearest may come in any order.
    """
    need = k
    if HAS_OWN:
        need = k + 1  # one may be a target's own
    PIECES: tl.constexpr = BLOCK_M // (2 * LISTS)
    ROOM: tl.constexpr = PIECES if PIECES < 8 else 8
    full: tl.constexpr = LENGTH - ROOM - 1  # no list ever ends where the next begins
    LINE: tl.constexpr = 2 * (AHEAD + LISTS * LENGTH)
    place_list_ptr = list_ptr + LISTED  # once lists are joined, values come before places
    slots = tl.arange(0, LISTED)
    for block in range(tl.program_id(0), blocks * examples, tl.num_programs(0)):
        example = (block // blocks).to(tl.int64)
        outer, head = example // heads, example % heads
        rows = block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        # The program, in a way that keeps addresses from being computed, and kept, for all blocks.
        lines = block % tl.num_programs(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        lists = 2 * (AHEAD + tl.arange(0, LISTS) * LENGTH)
        empty = (list_ptr + lines[:, None] * LINE + lists[None, :]).to(tl.int64)
        survivors = lines[:, None] * LINE + slots[None, :]
        q, key = q_ptr + outer * q_example + head * q_head, key_ptr + outer * key_example
        key += head * key_head
        bias, mask, less, first, start = bias_ptr, mask_ptr, less_ptr, example * n, example * m
        targets, sources = n, m
        if HAS_BIAS:
            bias += outer * bias_example + head * bias_head
        if HAS_MASK:
            mask += outer * mask_example + head * mask_head
        if HAS_LESS:
            less += outer * less_example + head * less_head
        if RAGGED:
            first, start = tl.load(q_start_ptr + example), tl.load(key_start_ptr + example)
            targets = (tl.load(q_start_ptr + example + 1) - first).to(tl.int32)
            sources = (tl.load(key_start_ptr + example + 1) - start).to(tl.int32)
            # Beyond the last target there is nobody to look for sources.
            sources = tl.where(block % blocks * BLOCK_N < targets, sources, 0)
            q, key = q_ptr + first * q_row, key_ptr + start * key_row
            if HAS_BIAS:
                bias = bias_ptr + start
        real = rows < targets
        q_part = rows
        if not DIRECT:
            q_part = _negated_part(q, rows, targets, q_row, 0, d, BLOCK_D, False)
        least = tl.full([BLOCK_N, BLOCK_M], float("inf"), tl.float32)
        for tile in tl.range(0, tl.cdiv(sources, BLOCK_M), num_stages=STAGES):
            columns = tile * BLOCK_M + ((tl.arange(0, BLOCK_M) + tile * _TURN) & (BLOCK_M - 1))
            value = _distances(
                q_part, q, key, bias, mask, less, rows, columns, targets, sources, q_row, key_row,
                mask_row, less_row, scale, d, BLOCK_D, DIRECT, ANGLES, SETTLE, EVEN, HAS_BIAS,
                HAS_MASK, HAS_LESS,
            )  # fmt: skip
            least = tl.minimum(least, value)
        most = _bound(least, need)
        if SETTLE:
            square = tl.load(square_ptr + first + rows, mask=real, other=0.0)
            spare = rounding(square, longest_ptr + example, share, PRODUCTS)
            most = tl.where(spare < float("inf"), most + spare, float("nan"))
        most = tl.where(real, most, float("nan"))  # whom nobody satisfies
        most = tl.broadcast_to(most[:, None], [BLOCK_N, BLOCK_M])
        if not DIRECT:
            most, _ = most.reshape(BLOCK_N, BLOCK_M // 2, 2).split()
        most = narrow(most, LISTS)
        end, last = empty, empty + 8 * full
        for tile in tl.range(0, tl.cdiv(sources, BLOCK_M), num_stages=STAGES):
            columns = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            value = _distances(
                q_part, q, key, bias, mask, less, rows, columns, targets, sources, q_row, key_row,
                mask_row, less_row, scale, d, BLOCK_D, DIRECT, ANGLES, SETTLE, EVEN, HAS_BIAS,
                HAS_MASK, HAS_LESS,
            )  # fmt: skip
            if DIRECT:
                end = append(end, last, value, tile * BLOCK_M, 1, most, ROOM)
            else:  # a thread holds two columns side by side
                even, odd = value.reshape(BLOCK_N, BLOCK_M // 2, 2).split()
                end = append(end, last, even, tile * BLOCK_M, 2, most, ROOM)
                end = append(end, last, odd, tile * BLOCK_M + 1, 2, most, ROOM)
        tl.debug_barrier()  # what one thread has listed, others read
        length = (end - empty).to(tl.int32) // 8
        join(list_ptr, lines * LINE, length, AHEAD, LENGTH, LISTED)
        complete = tl.max(length, 1) < full
        length = tl.sum(length, 1)
        if SETTLE:
            original = original_ptr + first * d
            for j in range(0, tl.minimum(tl.max(length, 0), LISTED)):
                place = tl.load(place_list_ptr + lines * LINE + j, mask=j < length, other=0)
                exact = exact_of_pairs(
                    original, original_key_ptr + start * d, bias, rows, place, j < length, scale,
                    fine, d, BLOCK_D if BLOCK_D < 16 else 16, ANGLES, PRODUCTS, HAS_BIAS,
                )  # fmt: skip
                exact = exact.to(tl.int32, bitcast=True)
                tl.store(list_ptr + lines * LINE + j, exact, mask=j < length)
            tl.debug_barrier()
        listed = slots[None, :] < length[:, None]
        place = tl.load(place_list_ptr + survivors, mask=listed, other=0)
        value = tl.load(list_ptr + survivors, mask=listed, other=0)
        if HAS_OWN:
            own = tl.load(own_ptr + first + rows, mask=real, other=-1).to(tl.int32)
            listed = listed & (place != own[:, None])
        enough = (how_many(listed) >= k) & (length <= LISTED) & complete
        value = value.to(tl.float32, bitcast=True)
        unsettled, before = enough & real, (first + block % blocks * BLOCK_N) * k
        at = (tl.arange(0, BLOCK_N) * k)[:, None] + slots[None, :]
        if ANY_ORDER:
            slot, clear = in_any_order(tl.where(listed, ordered(value), PADDING), k)
            stored = (clear & unsettled)[:, None] & (slots < k)[None, :]
            slot += lines[:, None] * LINE
            found = tl.load(list_ptr + slot, mask=stored).to(tl.float32, bitcast=True)
            tl.store(value_ptr + before + at, found, mask=stored)
            tl.store(
                place_ptr + before + at, tl.load(place_list_ptr + slot, mask=stored), mask=stored
            )
            unsettled = unsettled & (clear == 0)
        if tl.max(unsettled.to(tl.int32), 0) > 0:
            pair = tl.where(listed, pairs(ordered(value), place), WORST)
            pair = tl.sort(pair, dim=1, descending=True)
            stored = unsettled[:, None] & (slots < k)[None, :]
            tl.store(value_ptr + before + at, value_of(pair), mask=stored)
            tl.store(place_ptr + before + at, place_of(pair), mask=stored)
        tl.store(missed_ptr + first + rows, (enough == 0).to(tl.uint8), mask=real)
        tl.debug_barrier()  # the lists are free again
