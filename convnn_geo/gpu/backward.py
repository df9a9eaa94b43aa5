"""Backward of attention over the k nearest: over the chosen pairs alone.

Targets gather from the sources that they chose; then sources sum over the targets that chose them,
of which they have lists. Pairs without weight, hidden or dropped ones, have no part in it, whatever
their values are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.layout import laid_out, split
from convnn_geo.gpu.pairs import lists, sum_by_source

ROWS, AT_ONCE, WARPS = 16, 4, 4
"""Targets of a program, neighbours of each that are read at once, and warps."""


@triton.jit
def _backward_of_targets(
    key_ptr,
    value_ptr,
    keep_ptr,
    grad_ptr,
    weight_ptr,
    place_ptr,
    rank_ptr,
    start_ptr,
    to_q_ptr,
    of_distance_ptr,
    sent_ptr,
    n,
    m,
    k,
    heads,
    key_example,
    key_head,
    key_row,
    value_example,
    value_head,
    value_row,
    grad_example,
    grad_head,
    grad_row,
    scale,
    temperature,
    d: tl.constexpr,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    J: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """Gradients of a block of targets; what they send to sources goes into the sources' lists.

    Neighbours are read ``J`` at once, of all targets of the block: many loads are on their way.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    outer, head = example // heads, example % heads
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    axes, channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    real = rows < n
    grad = tl.load(
        grad_ptr + outer * grad_example + head * grad_head
        + rows[:, None].to(tl.int64) * grad_row + channels[None, :],
        mask=real[:, None] & (channels < c)[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    values = value_ptr + outer * value_example + head * value_head
    keys = key_ptr + outer * key_example + head * key_head
    first_pair = (example * n + rows) * k
    mean = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, k, J):
        slot = first + tl.arange(0, J)
        there = real[:, None] & (slot < k)[None, :]
        pair = first_pair[:, None] + slot[None, :]
        place = tl.load(place_ptr + pair, mask=there, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + pair, mask=there, other=0.0)
        kept = weight
        if HAS_KEEP:
            keep = tl.load(keep_ptr + pair, mask=there, other=0.0)
            kept *= keep
        value = tl.load(
            values + place[:, :, None] * value_row + channels[None, None, :],
            mask=(kept != 0.0)[:, :, None] & (channels < c)[None, None, :],
            other=0.0,
        )
        slope = tl.sum(grad[:, None, :] * value.to(tl.float32), 2)
        if HAS_KEEP:
            slope *= keep
        slope = tl.where(kept != 0.0, slope, 0.0)
        mean += tl.sum(tl.where(weight != 0.0, weight * slope, 0.0), 1)
        tl.store(of_distance_ptr + pair, slope, mask=there)
    tl.debug_barrier()  # slopes that one warp has stored others read
    to_q = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    colder = 1.0 / temperature
    for first in range(0, k, J):
        slot = first + tl.arange(0, J)
        there = real[:, None] & (slot < k)[None, :]
        pair = first_pair[:, None] + slot[None, :]
        place = tl.load(place_ptr + pair, mask=there, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + pair, mask=there, other=0.0)
        slope = tl.load(of_distance_ptr + pair, mask=there, other=0.0)
        used = weight != 0.0
        of_distance = tl.where(used, weight * colder * (mean[:, None] - slope), 0.0)
        key = tl.load(
            keys + place[:, :, None] * key_row + axes[None, None, :],
            mask=used[:, :, None] & (axes < d)[None, None, :],
            other=0.0,
        )
        to_q += tl.sum(of_distance[:, :, None] * key.to(tl.float32), 1)
        tl.store(of_distance_ptr + pair, of_distance, mask=there)
    tl.store(
        to_q_ptr + (example * n + rows)[:, None] * d + axes[None, :],
        (-scale * to_q).to(to_q_ptr.dtype.element_ty),
        mask=real[:, None] & (axes < d)[None, :],
    )
    tl.debug_barrier()
    before, begin = example * n * k, tl.program_id(0) % blocks * BLOCK_N * k
    for some in range(begin, tl.minimum(begin + BLOCK_N * k, n * k), 128):
        pair = some + tl.arange(0, 128)
        there = pair < tl.minimum(begin + BLOCK_N * k, n * k)
        rank = tl.load(rank_ptr + before + pair, mask=there, other=-1)
        listed = rank >= 0
        place = tl.load(place_ptr + before + pair, mask=listed, other=0)
        at = rank + tl.load(start_ptr + example * (m + 1) + place, mask=listed, other=0)
        weight = tl.load(weight_ptr + before + pair, mask=listed, other=0.0)
        if HAS_KEEP:
            weight *= tl.load(keep_ptr + before + pair, mask=listed, other=0.0)
        of_distance = tl.load(of_distance_ptr + before + pair, mask=listed, other=0.0)
        row = (pair // k).to(tl.float32, bitcast=True)
        sent = tl.join(tl.join(row, weight), tl.join(of_distance, of_distance))
        field = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]
        tl.store(
            sent_ptr + 4 * (before + at)[:, None, None] + field[None, :, :],
            sent,
            mask=listed[:, None, None],
        )  # in one word of 16 bytes: row, of_distance, weight, of_distance


@gpu.on_its_device
def attend_backward(
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    temperature: float,
    grad: Tensor,
    weight: Tensor,
    place: Tensor,
    biased: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to queries, keys, values and bias in the result's leading shape.

    They have their tensors' types; float32, to be summed, where leading axes were broadcast. That
    of a bias is in float32, and empty unless ``biased``. Under
    ``torch.use_deterministic_algorithms`` sums over pairs have a fixed order.
    """
    lead, (n, k) = place.shape[:-2], place.shape[-2:]
    (m, d), c = keys.shape[-2:], value.shape[-1]
    nothing = not grad.numel()
    new = weight.new_zeros if nothing else weight.new_empty
    to_q, to_keys, to_value = (
        new((*lead, *t.shape[-2:]), dtype=t.dtype if t.shape[:-2] == lead else torch.float32)
        for t in (q, keys, value)
    )
    to_bias = new((*lead, m) if biased else 0)
    if nothing:
        return to_q, to_keys, to_value, to_bias
    (q, q_at), (keys, keys_at), (value, value_at), (grad, grad_at) = (
        laid_out(t, lead, 2) for t in (q, keys, value, grad)
    )
    weight, place = weight.contiguous(), place.contiguous()
    keep = None if keep is None else keep.expand(weight.shape).contiguous()
    outer, heads = split(lead)
    examples = outer * heads
    rank, start = lists(weight, place, examples, m)
    of_distance, sent = torch.empty_like(weight), weight.new_empty(*weight.shape, 4)
    axes, channels = _block(d), _block(c)
    _backward_of_targets[(triton.cdiv(n, ROWS) * examples,)](
        *(keys, value, keep, grad, weight, place, rank, start, to_q, of_distance, sent),
        *(n, m, k, heads, *keys_at, *value_at, *grad_at, scale, temperature),
        d=d,
        c=c,
        BLOCK_N=ROWS,
        BLOCK_D=axes,
        BLOCK_C=channels,
        J=max(1, min(AT_ONCE, AT_ONCE * 64 // max(axes, channels))),
        HAS_KEEP=keep is not None,
        num_warps=WARPS,
    )
    sum_by_source(
        *(sent, start, q, grad, to_keys, to_value, to_bias, n * k, heads),
        *(q_at, grad_at, scale, axes, channels),
    )
    return to_q, to_keys, to_value, to_bias


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
