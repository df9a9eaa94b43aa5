"""The k nearest by insertion: tiles pass through registers, the nearest so far stay there.

Distances are compared as integers in their order. Sources come by index, so that whoever is as
near as the k-th so far comes too late. At the end pairs are one integer each, the distance above
the index, inverted: sorting them, the largest first, breaks ties.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo.gpu.exact import exact_of_pairs, exact_of_tile, rounding
from convnn_geo.gpu.pairs import WORST, pairs, place_of, value_of
from convnn_geo.gpu.tiles import (
    HIDDEN,
    PADDING,
    allowed,
    nearer_by,
    ordered,
    products,
    squared_differences,
)

_FILLED: tl.constexpr = tl.constexpr(-0x7FFFFFFF - 1)


@triton.jit
def _none_yet(k, BLOCK_N: tl.constexpr, K: tl.constexpr):
    """Empty places for ``k``, all different, so that one at a time is replaced."""
    slot = tl.arange(0, K)
    code = tl.where(slot < k, PADDING, _FILLED)
    code = tl.broadcast_to(code[None, :], [BLOCK_N, K])
    return code, tl.broadcast_to(0x7FFFFFFF - slot[None, :], [BLOCK_N, K])


@triton.jit
def _keep_nearest(best, place, kth, code, columns):
    """Of a tile those that are nearer than the k-th so far take its place, one after the other."""
    nearest_left = tl.min(code, 1)
    while tl.max((nearest_left < kth).to(tl.int32), 0) > 0:
        who = tl.min(tl.where(code == nearest_left[:, None], columns[None, :], PADDING), 1)
        last = tl.max(tl.where(best == kth[:, None], place, -1), 1)
        replaced = (best == kth[:, None]) & (place == last[:, None])
        replaced = replaced & (nearest_left < kth)[:, None]
        best = tl.where(replaced, nearest_left[:, None], best)
        place = tl.where(replaced, who[:, None], place)
        code = tl.where(columns[None, :] == who[:, None], PADDING, code)
        kth = tl.max(best, 1)
        nearest_left = tl.min(code, 1)
    return best, place, kth


@triton.jit
def _sorted(best, place, k, K: tl.constexpr):
    """Pairs, the nearest first; what is over ``k`` last."""
    kept = tl.where((tl.arange(0, K) < k)[None, :], pairs(best, place), WORST)
    return tl.sort(kept, dim=1, descending=True)


@triton.jit
def _slot(best, j, K: tl.constexpr):
    """Column ``j``."""
    return tl.sum(tl.where((tl.arange(0, K) == j)[None, :], best, 0), 1)


@triton.jit
def _settled(
    best,
    q,
    key,
    bias,
    rows,
    wanted,
    own,
    square,
    slack,
    n,
    m,
    k,
    kept,
    scale,
    fine,
    d: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ANGLES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """Rows with neighbours closer to one another than rounding, by distances in float64.

    Those that were kept are measured again; where one that was not may be nearer, all are. Nobody
    waits for the other rows, nor the host for the device.

    ``square``: what makes values distances, the same for a whole row.
    ``EXACT``: the values of all rows are such distances.
    """
    available = tl.zeros_like(rows) + m
    if HAS_OWN:
        available -= (own >= 0).to(tl.int32)
    unclear = tl.where(kept > k, rows < 0, available > kept)  # who is next may not be kept
    before = value_of(_slot(best, 0, K))
    for j in range(1, k + 1):  # where nobody is left to be next, it does not matter what is seen
        value = value_of(_slot(best, j, K))
        apart = value - before > slack
        unclear = unclear | (apart == 0)  # NaN is not apart
        before = value
    unclear = unclear & wanted
    measured, value = unclear, value_of(best) + square[:, None]
    if EXACT:
        measured = wanted
    if tl.max(measured.to(tl.int32), 0) > 0:
        code, places = _none_yet(kept, BLOCK_N, K)
        for j in range(0, kept):
            place = place_of(_slot(best, j, K))
            seen = tl.where(j < k, measured, unclear)
            exact = exact_of_pairs(
                q, key, bias, rows, place, seen, scale, fine, d, BLOCK_D, ANGLES, PRODUCTS, HAS_BIAS
            )
            exact = tl.where(seen, ordered(exact), PADDING)
            here = (tl.arange(0, K) == j)[None, :]
            code = tl.where(here, exact[:, None], code)
            places = tl.where(here, place[:, None], places)
        again = _sorted(code, places, kept, K)
        beyond = value_of(_slot(best, kept - 1, K)) + square - slack
        found = (value_of(_slot(again, k - 1, K)) < beyond) | (kept >= available)
        lost = unclear & (found == 0)
        if tl.max(lost.to(tl.int32), 0) > 0:
            every, where = _none_yet(k, BLOCK_N, K)
            kth = tl.max(every, 1)
            for start in range(0, m, BLOCK_M):
                columns = start + tl.arange(0, BLOCK_M)
                exact = exact_of_tile(
                    q, key, bias, rows, columns, n, m, scale, fine, d, ANGLES, PRODUCTS, HAS_BIAS
                )
                seen = lost[:, None] & (columns < m)[None, :]
                if HAS_OWN:
                    seen = seen & (columns[None, :] != own[:, None])
                tile = tl.where(seen, ordered(exact), PADDING)
                every, where, kth = _keep_nearest(every, where, kth, tile, columns)
            again = tl.where(lost[:, None], _sorted(every, where, k, K), again)
        best = tl.where(measured[:, None], again, best)
        value = tl.where(measured[:, None], value_of(again), value)
    return value, best


@triton.jit
def _nearest(
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
    blocks,
    kept,
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
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    DIRECT: tl.constexpr,
    ANGLES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SETTLE: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LESS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    MISSED: tl.constexpr,
):
    """One block of targets of one example against all its sources; most tiles hold no neighbour.

    ``MISSED``: only of those targets that a bound did not help.
    ``SETTLE``: whom products do not tell apart, distances of the originals in float64 do: squared
    differences, or ``PRODUCTS`` again.
    ``EXACT``: values are such distances.
    """
    example = (tl.program_id(0) // blocks).to(tl.int64)
    outer, head = example // heads, example % heads
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    q, key = q_ptr + outer * q_example + head * q_head, key_ptr + outer * key_example
    key += head * key_head
    bias, first, start = bias_ptr, example * n, example * m
    if HAS_BIAS:
        bias += outer * bias_example + head * bias_head
    if RAGGED:
        first, start = tl.load(q_start_ptr + example), tl.load(key_start_ptr + example)
        n = (tl.load(q_start_ptr + example + 1) - first).to(tl.int32)
        m = (tl.load(key_start_ptr + example + 1) - start).to(tl.int32)
        q, key = q_ptr + first * q_row, key_ptr + start * key_row
        if HAS_BIAS:
            bias = bias_ptr + start
    kept = tl.minimum(kept, m)
    if HAS_OWN:
        kept = tl.minimum(kept, m - 1)
    wanted = rows < n
    if MISSED:
        wanted = tl.load(missed_ptr + first + rows, mask=wanted, other=0) != 0
    if MISSED or RAGGED:
        some = tl.max(wanted.to(tl.int32), 0)
        if some == 0:
            return
    own = rows
    if HAS_OWN:
        own = tl.load(own_ptr + first + rows, mask=rows < n, other=-1).to(tl.int32)
    best, place = _none_yet(kept, BLOCK_N, K)
    kth = tl.max(best, 1)
    for tile in range(0, m, BLOCK_M):
        columns = tile + tl.arange(0, BLOCK_M)
        if DIRECT:
            value = squared_differences(
                q, key, rows, columns, n, m, q_row, key_row, d, tl.float32, ANGLES
            )
        else:
            product = products(q, key, rows, columns, n, m, q_row, key_row, d, BLOCK_D)
            value = -scale * product if HAS_BIAS else -product
            if HAS_BIAS:
                value += tl.load(bias + columns, mask=columns < m, other=0.0).to(tl.float32)[
                    None, :
                ]
        if HAS_LESS:
            less = less_ptr + outer * less_example + head * less_head
            value -= nearer_by(less, rows, columns, n, m, less_row)
        code = ordered(value)
        if HAS_MASK:
            mask = mask_ptr + outer * mask_example + head * mask_head
            code = tl.where(allowed(mask, rows, columns, n, m, mask_row), code, HIDDEN)
        if MISSED:
            code = tl.where(wanted[:, None], code, 0)  # which the first sources satisfy
        real = tl.broadcast_to((columns < m)[None, :], [BLOCK_N, BLOCK_M])
        if HAS_OWN:
            real = real & (columns[None, :] != own[:, None])
        code = tl.where(real, code, PADDING)
        best, place, kth = _keep_nearest(best, place, kth, code, columns)
    pair = _sorted(best, place, kept, K)
    value = value_of(pair)
    if SETTLE:
        square = tl.load(square_ptr + first + rows, mask=rows < n, other=0.0)
        slack = rounding(square, longest_ptr + example, share, PRODUCTS)
        if PRODUCTS:
            square = tl.zeros_like(square)
        value, pair = _settled(
            pair, original_ptr + first * d, original_key_ptr + start * d, bias, rows, wanted, own,
            square, slack, n, m, k, kept, scale, fine, d, K, BLOCK_N, BLOCK_M, BLOCK_D, ANGLES,
            PRODUCTS, EXACT, HAS_BIAS, HAS_OWN,
        )  # fmt: skip
    slot = tl.arange(0, K)
    at = (first + rows)[:, None].to(tl.int64) * k + slot[None, :]
    stored = wanted[:, None] & (slot < k)[None, :]
    tl.store(value_ptr + at, value, mask=stored)
    tl.store(place_ptr + at, place_of(pair), mask=stored)
