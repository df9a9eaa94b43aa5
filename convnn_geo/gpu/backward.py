"""Backward of attention over the k nearest: over the chosen pairs alone.

Targets gather from the sources that they chose; then sources sum over the targets that chose them,
of which they have lists. Pairs without weight, hidden or dropped ones, have no part in it, whatever
their values are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo.gpu.choosers import send, take_slot


@triton.jit
def _neighbors(
    first,
    J: tl.constexpr,
    grad,
    values,
    keys,
    keep_ptr,
    weight_ptr,
    place_ptr,
    slope_ptr,
    first_pair,
    k,
    count,
    in_value,
    in_key,
    value_row: tl.constexpr,
    key_row: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """What ``J`` neighbours of each target add to the sums of all; their slopes are stored.

    All targets' first, then all targets' second, and so on, lie below one another, so that a
    thread holds the same channels of all neighbours of a target.
    """
    BLOCK_N: tl.constexpr = grad.shape[0]
    row = tl.arange(0, J * BLOCK_N) % BLOCK_N
    pair = first_pair + row * k + first + tl.arange(0, J * BLOCK_N) // BLOCK_N
    place = tl.load(place_ptr + pair, mask=row < count, other=0).to(tl.int64)
    weight = tl.load(weight_ptr + pair, mask=row < count, other=0.0)
    kept = weight
    if HAS_KEEP:
        keep = tl.load(keep_ptr + pair, mask=row < count, other=0.0)
        kept *= keep
    value = tl.load(
        values[None, :] + (place * value_row)[:, None],
        mask=(kept != 0.0)[:, None] & in_value[None, :],
        other=0.0,
    )
    key = tl.load(
        keys[None, :] + (place * key_row)[:, None],
        mask=(weight != 0.0)[:, None] & in_key[None, :],
        other=0.0,
    )
    value = value.reshape(J, BLOCK_N, in_value.shape[0]).to(tl.float32)
    key = key.reshape(J, BLOCK_N, in_key.shape[0]).to(tl.float32)
    slope = tl.sum(grad[None, :, :] * value, 2).reshape(J * BLOCK_N)
    if HAS_KEEP:
        slope *= keep
    slope = tl.where(kept != 0.0, slope, 0.0)
    tl.store(slope_ptr + pair, slope, mask=row < count)
    slope = tl.where(weight != 0.0, weight * slope, 0.0).reshape(J, BLOCK_N)
    weight = weight.reshape(J, BLOCK_N)
    by_slope = tl.sum(slope[:, :, None] * key, 0)
    return tl.sum(slope, 0), by_slope, tl.sum(weight[:, :, None] * key, 0)


@triton.jit
def of_targets(
    key_ptr,
    value_ptr,
    keep_ptr,
    grad_ptr,
    weight_ptr,
    place_ptr,
    slot_ptr,
    start_ptr,
    count_ptr,
    to_q_ptr,
    slope_ptr,
    mean_ptr,
    sent_ptr,
    n,
    m,
    k,
    heads,
    key_example,
    key_head,
    key_row: tl.constexpr,
    value_example,
    value_head,
    value_row: tl.constexpr,
    grad_example,
    grad_head,
    grad_row: tl.constexpr,
    scale,
    temperature,
    d: tl.constexpr,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    J: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of a block of targets; what they send to sources goes into the sources' lists.

    Neighbours are read ``J`` at once, of all targets of the block: many loads are on their way.

    A target's gradient is a sum over its slopes less their mean, known only after the last: one of
    slopes and one of weights, multiplied by the mean at the end, spare a second pass.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    outer, head = example // heads, example % heads
    first_row = tl.program_id(0) % blocks * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    axes, channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    real = rows < n
    grad = tl.load(
        grad_ptr + outer * grad_example + head * grad_head
        + rows[:, None].to(tl.int64) * grad_row + channels[None, :],
        mask=real[:, None] & (channels < c)[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    values = value_ptr + outer * value_example + head * value_head + channels
    keys = key_ptr + outer * key_example + head * key_head + axes
    first_pair = (example * n + first_row) * k
    mean = tl.zeros([BLOCK_N], tl.float32)
    by_slope = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    by_weight = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, k - k % J, J):
        slopes, of_slopes, of_weights = _neighbors(
            first, J, grad, values, keys, keep_ptr, weight_ptr, place_ptr, slope_ptr, first_pair,
            k, n - first_row, channels < c, axes < d, value_row, key_row, HAS_KEEP,
        )  # fmt: skip
        mean, by_slope, by_weight = mean + slopes, by_slope + of_slopes, by_weight + of_weights
    for first in range(k - k % J, k):
        slopes, of_slopes, of_weights = _neighbors(
            first, 1, grad, values, keys, keep_ptr, weight_ptr, place_ptr, slope_ptr, first_pair,
            k, n - first_row, channels < c, axes < d, value_row, key_row, HAS_KEEP,
        )  # fmt: skip
        mean, by_slope, by_weight = mean + slopes, by_slope + of_slopes, by_weight + of_weights
    tl.store(
        to_q_ptr + (example * n + rows)[:, None] * d + axes[None, :],
        (scale / temperature * (by_slope - mean[:, None] * by_weight)).to(
            to_q_ptr.dtype.element_ty
        ),
        mask=real[:, None] & (axes < d)[None, :],
    )
    tl.store(mean_ptr + example * n + rows, mean, mask=real)
    tl.debug_barrier()  # what one warp has stored others read
    begin = first_row * k
    end = tl.minimum(begin + BLOCK_N * k, n * k)
    for some in range(begin, end, PAIRS):
        at = some + tl.arange(0, PAIRS)
        pair = example * n * k + at
        weight, row = tl.load(weight_ptr + pair, mask=at < end, other=0.0), at // k
        listed = weight != 0.0
        if HAS_SLOT:
            to = tl.load(slot_ptr + pair, mask=listed, other=0)
        else:
            place = tl.load(place_ptr + pair, mask=listed, other=0)
            lists = example * (m + 1)
            to = take_slot(start_ptr + lists, count_ptr + lists, place, listed)
        slope = tl.load(slope_ptr + pair, mask=listed, other=0.0)
        slope = tl.load(mean_ptr + example * n + row, mask=listed, other=0.0) - slope
        of_distance = weight * slope / temperature
        if HAS_KEEP:
            weight *= tl.load(keep_ptr + pair, mask=listed, other=0.0)
        send(sent_ptr, example * n * k + to, row, of_distance, weight, listed, PACKED)
