"""Pairs of targets and sources by source: lists of who chose each, and sums over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.tiles import dot

_COUNTED, _SETTLED = 1024, 64
"""Pairs of a program that counts or lists them, and of one that brings them into order."""


@triton.jit
def _count(weight_ptr, place_ptr, count_ptr, pairs, m, BLOCK: tl.constexpr):
    """How many pairs with weight choose each source."""
    blocks = tl.cdiv(pairs, BLOCK)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    pair = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = example * pairs + pair
    place = tl.load(place_ptr + at, mask=pair < pairs, other=0)
    used = tl.load(weight_ptr + at, mask=pair < pairs, other=0.0) != 0.0
    # Counted one place further up, so that a running sum of counts is where lists start.
    tl.atomic_add(count_ptr + example * (m + 1) + place + 1, 1, mask=used, sem="relaxed")


@triton.jit
def take_slot(start_ptr, count_ptr, place, used):
    """A slot in the list of each pair's source, given to nobody else: counts run down to 0."""
    left = tl.atomic_add(count_ptr + place + 1, -1, mask=used, sem="relaxed")
    return tl.load(start_ptr + place, mask=used, other=0) + left - 1


@triton.jit
def send(sent_ptr, at, row, of_distance, weight, used, PACKED: tl.constexpr):
    """What pairs tell their sources: a target, the gradient to the distance, and the weight.

    In words of 16 bytes, or ``PACKED``, as bfloat16, of 8.
    """
    if PACKED:
        low = of_distance.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = weight.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        word, field = tl.join(row, high | low), tl.arange(0, 2)[None, :]
        tl.store(sent_ptr + 2 * at[:, None] + field, word, mask=used[:, None])
    else:
        of_distance = of_distance.to(tl.int32, bitcast=True)
        weight = weight.to(tl.int32, bitcast=True)
        word = tl.join(tl.join(row, weight), tl.join(of_distance, of_distance))
        field = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]
        tl.store(sent_ptr + 4 * at[:, None, None] + field, word, mask=used[:, None, None])


@triton.jit
def _told(sent_ptr, at, used, PACKED: tl.constexpr):
    """What pairs have told: a target, the gradient to the distance, and the weight."""
    word = sent_ptr + (2 if PACKED else 4) * at
    row, of_distance = tl.load(word, mask=used, other=0), tl.load(word + 1, mask=used, other=0)
    if PACKED:  # bfloat16 is the upper half of float32
        weight, of_distance = of_distance & -0x10000, of_distance << 16
    else:
        weight = tl.load(word + 2, mask=used, other=0)
    of_distance = of_distance.to(tl.float32, bitcast=True)
    return row.to(tl.int64), of_distance, weight.to(tl.float32, bitcast=True)


@triton.jit
def _list(
    weight_ptr, place_ptr, start_ptr, count_ptr, list_ptr, pairs, m, BLOCK: tl.constexpr
):  # fmt: skip
    """Pairs with weight in the lists of their sources, in any order."""
    blocks = tl.cdiv(pairs, BLOCK)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    pair = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(weight_ptr + example * pairs + pair, mask=pair < pairs, other=0.0) != 0.0
    place = tl.load(place_ptr + example * pairs + pair, mask=used, other=0)
    lists = example * (m + 1)
    at = take_slot(start_ptr + lists, count_ptr + lists, place, used)
    tl.store(list_ptr + example * pairs + at, pair, mask=used)


@triton.jit
def _settle(place_ptr, start_ptr, list_ptr, slot_ptr, pairs, m, BLOCK: tl.constexpr):
    """Slots in the order of targets, whatever that of the lists is: how many come before."""
    blocks = tl.cdiv(pairs, BLOCK)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    place_ptr, list_ptr = place_ptr + example * pairs, list_ptr + example * pairs
    start_ptr += example * (m + 1)
    begin = tl.program_id(0) % blocks * BLOCK
    listed = tl.load(start_ptr + m)
    if begin < listed:
        at = begin + tl.arange(0, BLOCK)
        pair = tl.load(list_ptr + at, mask=at < listed, other=0)
        place = tl.load(place_ptr + pair)
        first = tl.load(start_ptr + place)
        end = tl.load(start_ptr + place + 1)
        within = at < listed
        before = tl.zeros([BLOCK, 32], tl.int32)
        low = tl.min(tl.where(within, first, begin), 0)
        high = tl.max(tl.where(within, end, 0), 0)
        for there in range(low, high, 32):
            other_at = there + tl.arange(0, 32)
            other = tl.load(list_ptr + other_at, mask=other_at < high, other=0)
            same = (other_at[None, :] >= first[:, None]) & (other_at[None, :] < end[:, None])
            before += (same & (other[None, :] < pair[:, None])).to(tl.int32)
        tl.store(slot_ptr + example * pairs + pair, first + tl.sum(before, 1), mask=within)


@triton.jit
def of_sources(
    sent_ptr,
    start_ptr,
    q_ptr,
    grad_ptr,
    to_key_ptr,
    to_value_ptr,
    to_bias_ptr,
    pairs,
    m,
    heads,
    q_example,
    q_head,
    q_row: tl.constexpr,
    grad_example,
    grad_head,
    grad_row: tl.constexpr,
    scale,
    d: tl.constexpr,
    c: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A block of sources, whose pairs lie side by side.

    They are summed as a product of matrices: each pair's weight stands in the row of its source,
    and 0 in the others. Where rows of pairs are infinite or NaN that product is NaN for all: then,
    which is rare, they are added one by one to those that chose them.
    """
    blocks = tl.cdiv(m, S)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    outer, head = example // heads, example % heads
    first = tl.program_id(0) % blocks * S
    sources = first + tl.arange(0, S)
    axes, channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    start_ptr += example * (m + 1)
    start = tl.load(start_ptr + sources, mask=sources < m, other=0)
    end = tl.load(start_ptr + sources + 1, mask=sources < m, other=0)
    begin, finish = tl.load(start_ptr + first), tl.load(start_ptr + tl.minimum(first + S, m))
    queries = q_ptr + outer * q_example + head * q_head + axes
    grads = grad_ptr + outer * grad_example + head * grad_head + channels
    to_key = tl.zeros([S, BLOCK_D], tl.float32)
    to_value = tl.zeros([S, BLOCK_C], tl.float32)
    to_bias = tl.zeros([S], tl.float32)
    for some in range(begin, finish, P):
        at = some + tl.arange(0, P)
        row, of_distance, weight = _told(sent_ptr, example * pairs + at, at < finish, PACKED)
        q = tl.load(
            queries[None, :] + (row * q_row)[:, None],
            mask=(at < finish)[:, None] & (axes < d)[None, :],
            other=0.0,
        )
        grad = tl.load(
            grads[None, :] + (row * grad_row)[:, None],
            mask=(at < finish)[:, None] & (channels < c)[None, :],
            other=0.0,
        )
        own = (at[None, :] >= start[:, None]) & (at[None, :] < end[:, None])
        of_distance = tl.where(own, of_distance[None, :], 0.0)
        to_key = dot(of_distance.to(q.dtype), q, to_key)
        to_value = dot(tl.where(own, weight[None, :], 0.0).to(grad.dtype), grad, to_value)
        if HAS_BIAS:
            to_bias += tl.sum(of_distance, 1)
    if tl.sum(0.0 * to_key) + tl.sum(0.0 * to_value) != 0.0:
        to_key = tl.zeros([S, BLOCK_D], tl.float32)
        to_value = tl.zeros([S, BLOCK_C], tl.float32)
        for at in range(begin, finish):
            row, of_distance, weight = _told(sent_ptr, example * pairs + at, at < finish, PACKED)
            q = tl.load(queries + row * q_row, mask=axes < d, other=0.0).to(tl.float32)
            grad = tl.load(grads + row * grad_row, mask=channels < c, other=0.0)
            grad = tl.where(weight != 0.0, weight * grad.to(tl.float32), 0.0)
            own = ((at >= start) & (at < end))[:, None]
            to_key += tl.where(own, of_distance * q[None, :], 0.0)
            to_value += tl.where(own, grad[None, :], 0.0)
    at = example * m + sources
    tl.store(
        to_key_ptr + at[:, None] * d + axes[None, :],
        (-scale * to_key).to(to_key_ptr.dtype.element_ty),
        mask=(sources < m)[:, None] & (axes < d)[None, :],
    )
    tl.store(
        to_value_ptr + at[:, None] * c + channels[None, :],
        to_value.to(to_value_ptr.dtype.element_ty),
        mask=(sources < m)[:, None] & (channels < c)[None, :],
    )
    if HAS_BIAS:
        tl.store(to_bias_ptr + at, to_bias, mask=sources < m)


@dataclass(frozen=True)
class Lists:
    """For each source the pairs that chose it and have weight, one after the other.

    Args:
        start: ``(examples, m + 1)``, where lists start, from each example's first pair on.
        count: ``(examples, m + 1)``, one place further up: slots that nobody has taken yet.
        slot: ``(..., n, k)``, each pair's slot in the order of targets; None where pairs take
            theirs as they come.
    """

    start: Tensor
    count: Tensor
    slot: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, place: Tensor, examples: int, m: int, fixed: bool) -> Lists:
        """Those of weights and places ``(..., n, k)``; ``fixed``: in the order of targets."""
        pairs, count = place.shape[-2] * place.shape[-1], place.new_zeros(examples, m + 1)
        grid = (gpu.cdiv(pairs, _COUNTED) * examples,)
        launch(_count, grid, (weight, place, count), (pairs, m), BLOCK=_COUNTED)
        start = count.cumsum(-1, dtype=count.dtype)
        if not fixed:
            return cls(start, count, None)
        listed, slot = torch.empty_like(place), torch.empty_like(place)
        launch(_list, grid, (weight, place, start, count, listed), (pairs, m), BLOCK=_COUNTED)
        grid = (gpu.cdiv(pairs, _SETTLED) * examples,)
        launch(_settle, grid, (place, start, listed, slot), (pairs, m), BLOCK=_SETTLED)
        return cls(start, count, slot)
