"""The k nearest by tiles: distances pass through registers, the nearest stay there.

Distances are compared as integers in their order. Sources come by index, so that whoever is as
near as the k-th so far comes too late. At the end pairs are one integer each, the distance above
the index, inverted: sorting them, the largest first, breaks ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.pairs import WORST, pairs, place_of, value_of
from convnn_geo.gpu.survivors import _nearest_survivors, multiprocessors, plan
from convnn_geo.gpu.tiles import (
    PADDING,
    hidden,
    ordered,
    products,
    squared_differences,
    squared_differences_of_pairs,
)

SPARE = 4
"""Neighbours more than k, at least, that are kept where their order is to be settled."""
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
    rows,
    wanted,
    own,
    square,
    slack,
    n,
    m,
    q_row,
    key_row,
    k,
    kept,
    d: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ANGLES: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """Rows with neighbours closer to one another than rounding, by differences in float64.

    Those that were kept are measured again; where one that was not may be nearer, all are. Nobody
    waits for the other rows, nor the host for the device.
    """
    unclear = rows < 0
    before = value_of(_slot(best, 0, K))
    for j in range(1, k + 1):  # where nobody is left to be next, it does not matter what is seen
        value = value_of(_slot(best, j, K))
        apart = value - before > slack
        unclear = unclear | (apart == 0)  # NaN is not apart
        before = value
    unclear = unclear & wanted
    value = value_of(best) + square[:, None]
    if tl.max(unclear.to(tl.int32), 0) > 0:
        code, places = _none_yet(kept, BLOCK_N, K)
        for j in range(0, kept):
            place = place_of(_slot(best, j, K))
            exact = squared_differences_of_pairs(
                q, key, rows, place, unclear, q_row, key_row, d, BLOCK_D, ANGLES
            )
            here = (tl.arange(0, K) == j)[None, :]
            code = tl.where(here, ordered(exact.to(tl.float32))[:, None], code)
            places = tl.where(here, place[:, None], places)
        again = _sorted(code, places, kept, K)
        beyond = value_of(_slot(best, kept - 1, K)) + square - slack
        everybody = kept == m
        if HAS_OWN:
            everybody = kept == m - 1
        found = (value_of(_slot(again, k - 1, K)) < beyond) | everybody
        lost = unclear & (found == 0)
        if tl.max(lost.to(tl.int32), 0) > 0:
            every, where = _none_yet(k, BLOCK_N, K)
            kth = tl.max(every, 1)
            for start in range(0, m, BLOCK_M):
                columns = start + tl.arange(0, BLOCK_M)
                exact = squared_differences(
                    q, key, rows, columns, n, m, q_row, key_row, d, tl.float64, ANGLES
                )
                seen = lost[:, None] & (columns < m)[None, :]
                if HAS_OWN:
                    seen = seen & (columns[None, :] != own[:, None])
                tile = tl.where(seen, ordered(exact.to(tl.float32)), PADDING)
                every, where, kth = _keep_nearest(every, where, kth, tile, columns)
            again = tl.where(lost[:, None], _sorted(every, where, k, K), again)
        best = tl.where(unclear[:, None], again, best)
        value = tl.where(unclear[:, None], value_of(again), value)
    return value, best


@triton.jit
def _nearest(
    q_ptr,
    key_ptr,
    bias_ptr,
    mask_ptr,
    own_ptr,
    center_ptr,
    square_ptr,
    slack_ptr,
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
    scale,
    d: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    DIRECT: tl.constexpr,
    ANGLES: tl.constexpr,
    CENTERED: tl.constexpr,
    SETTLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_OWN: tl.constexpr,
    MISSED: tl.constexpr,
):
    """One block of targets of one example against all its sources; most tiles hold no neighbour.

    ``MISSED``: only of those targets that a bound did not help.
    """
    example = (tl.program_id(0) // blocks).to(tl.int64)
    outer, head = example // heads, example % heads
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    q, key = q_ptr + outer * q_example + head * q_head, key_ptr + outer * key_example
    key += head * key_head
    bias, first = bias_ptr, example * n
    if HAS_BIAS:
        bias += outer * bias_example + head * bias_head
    if RAGGED:
        first, start = tl.load(q_start_ptr + example), tl.load(key_start_ptr + example)
        n = (tl.load(q_start_ptr + example + 1) - first).to(tl.int32)
        m = (tl.load(key_start_ptr + example + 1) - start).to(tl.int32)
        q, key = q_ptr + first * q_row, key_ptr + start * key_row
        if HAS_BIAS:
            bias = bias_ptr + start
    wanted = rows < n
    if MISSED:
        wanted = tl.load(missed_ptr + first + rows, mask=wanted, other=0) != 0
        if tl.max(wanted.to(tl.int32), 0) == 0:
            return
    own = rows
    if HAS_OWN:
        own = tl.load(own_ptr + first + rows, mask=rows < n, other=-1).to(tl.int32)
    best, place = _none_yet(kept, BLOCK_N, K)
    kth = tl.max(best, 1)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        if DIRECT:
            value = squared_differences(
                q, key, rows, columns, n, m, q_row, key_row, d, tl.float32, ANGLES
            )
        else:
            center = q
            if CENTERED:
                center = center_ptr + example * d
            product = products(
                q, key, center, rows, columns, n, m, q_row, key_row, d, BLOCK_D, CENTERED
            )
            value = -scale * product
            if HAS_BIAS:
                value += tl.load(bias + columns, mask=columns < m, other=0.0)[None, :]
        code = ordered(value)
        if HAS_MASK:
            mask = mask_ptr + outer * mask_example + head * mask_head
            code = hidden(code, mask, rows, columns, n, m, mask_row)
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
        slack = tl.load(slack_ptr + first + rows, mask=rows < n, other=0.0)
        value, pair = _settled(
            pair, q, key, rows, wanted, own, square, slack, n, m, q_row, key_row, k, kept, d, K,
            BLOCK_N, BLOCK_M, BLOCK_D, ANGLES, HAS_OWN,
        )  # fmt: skip
    slot = tl.arange(0, K)
    at = (first + rows)[:, None].to(tl.int64) * k + slot[None, :]
    stored = wanted[:, None] & (slot < k)[None, :]
    tl.store(value_ptr + at, value, mask=stored)
    tl.store(place_ptr + at, place_of(pair), mask=stored)


@dataclass(frozen=True)
class Rounding:
    """How products stand for squared differences, so that what they can't tell apart is settled.

    Args:
        center: ``(b, d)``, that products are taken about.
        q: ``(n, d)``, less the center.
        keys: ``(m, d)``, less the center.
        square: ``(n,)``, what is to be added to a product's value.
        slack: ``(n,)``, how far off differences of values may be.
        rough: how many times as far where factors are rounded to TF32.
        least: sources of the smallest example.
    """

    center: Tensor
    q: Tensor
    keys: Tensor
    square: Tensor
    slack: Tensor
    rough: float
    least: int


@gpu.on_its_device
def nearest(
    q: Tensor,
    keys: Tensor,
    k: int,
    starts: tuple[Tensor, Tensor] | None,
    longest: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    heads: int = 1,
    direct: bool = False,
    own: Tensor | None = None,
    angles: bool = False,
    rounding: Rounding | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and places ``(n, k)`` of the nearest in each example, in order, ties by place.

    Args:
        q: ``(n, d)``, examples one after the other; float32, bfloat16 or float16. Without starts
            ``(b, heads, n, d)``, and places of all heads come one after the other.
        keys: ``(m, d)``, or ``(b, heads, m, d)``.
        k: at most what the smallest example has, and 256.
        starts: ``(b + 1,)`` each, where examples start in ``q`` and in ``keys``, int64; None where
            examples are of equal size.
        longest: targets of the largest example.
        bias: ``(m,)``, or ``(b, heads, m)``, or None; distances are ``bias - scale <q, key>``.
        scale: of the product.
        mask: ``(b, heads, n, m)`` for examples of equal size, True where allowed.
        heads: examples that share the mask's first axis.
        direct: by squared differences instead; for few axes.
        own: ``(n,)``, a source that each target is not to find; -1 for none.
        angles: vectors have length one, or zero: these have squared distance 2 from all.
        rounding: neighbours that products do not tell apart come in the order of their squared
            differences, summed in float64 and rounded to float32.

    Returns:
        float32 and int32; places count within the example. What is hidden has value infinity and
        comes last, after NaN.
    """
    d, counted = q.shape[-1], k + (own is not None)
    if starts is None:
        examples, heads = q.shape[0] * q.shape[1], q.shape[1]
        n, m = q.shape[-2], keys.shape[-2]
        strides = [*q.stride()[:-1], *keys.stride()[:-1]]
        strides += (0, 0) if bias is None else bias.stride()[:-1]
    else:
        examples, n, m, strides = len(starts[0]) - 1, 0, 0, [0, 0, d, 0, 0, d, 0, 0]
    strides += (0, 0, 0) if mask is None else mask.stride()[:-1]
    values = q.new_empty(q.shape[:-1].numel(), k, dtype=torch.float32)
    places, missed = torch.empty_like(values, dtype=torch.int32), None
    if not values.numel():
        return values, places
    mask = None if mask is None else mask.view(torch.uint8)
    numbers = (n, m, k, heads, *strides, scale)
    kinds = {
        "RAGGED": starts is not None,
        "DIRECT": direct,
        "ANGLES": angles,
        "SETTLE": rounding is not None,
        "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None,
        "HAS_OWN": own is not None,
    }
    chosen = plan(m or len(keys) // examples, counted, d, q.dtype, direct)
    if chosen is not None:
        missed = values.new_empty(len(values), dtype=torch.uint8)
        blocks = triton.cdiv(longest, chosen.rows)
        programs = min(blocks * examples, chosen.programs * multiprocessors(q.device))
        lines = programs * chosen.rows
        lists = places.new_empty(lines * chosen.lists * chosen.length * 2)
        survivors = places.new_empty(2, lines * chosen.listed)
        near, slack, rough = (q, keys), None, 1.0
        if rounding is not None:
            near, slack, rough = (rounding.q, rounding.keys), rounding.slack, rounding.rough
        _nearest_survivors[(programs,)](
            *(*near, bias, mask, own, q, keys, slack, *(starts or (None, None)), values, places),
            *(missed, lists, *survivors, blocks, examples, *numbers, rough),
            d=d,
            LISTS=chosen.lists,
            LENGTH=chosen.length,
            LISTED=chosen.listed,
            BLOCK_N=chosen.rows,
            BLOCK_M=chosen.columns,
            BLOCK_D=chosen.axes,
            STAGES=chosen.stages,
            EVEN=m % chosen.columns == 0 and starts is None,
            **kinds,
            num_warps=chosen.warps,
            maxnreg=chosen.registers,
            enable_fp_fusion=not direct,  # sums of squares round as torch's do
        )
    kept = k
    center = square = slack = None
    if rounding is not None:
        center, square, slack = rounding.center, rounding.square, rounding.slack
        roomy = max(16, triton.next_power_of_2(k + SPARE))
        kept = min(
            roomy if roomy <= gpu.LARGEST_K else k + SPARE, rounding.least - (own is not None)
        )
    width = max(16, triton.next_power_of_2(kept))
    wide = width > (64 if rounding is None else 32)  # so that registers hold what is kept
    block = 16 if wide else 32
    blocks = triton.cdiv(longest, block)
    _nearest[(blocks * examples,)](
        *(q, keys, bias, mask, own, center, square, slack, *(starts or (None, None))),
        *(values, places, missed, blocks, kept, *numbers),
        d=d,
        K=width,
        BLOCK_N=block,
        BLOCK_M=64,
        BLOCK_D=max(16, min(64 if q.dtype != torch.float32 else 32, triton.next_power_of_2(d))),
        CENTERED=rounding is not None,
        MISSED=missed is not None,
        **kinds,
        num_warps=8 if width >= (256 if rounding is None else 64) else 4,
        enable_fp_fusion=not direct,
    )
    return values, places
