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
from convnn_geo.gpu.choosers import Lists, send, slot, sum_by_source
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.layout import laid_out, split

ROWS, AT_ONCE, WARPS = 16, (4, 8), 4
"""Targets of a program, neighbours of each read at once in rows of 128 bytes, and warps.

The first number is for up to 16 neighbours, which leave registers to more programs.
"""


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
def _backward_of_targets(
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
        more = _neighbors(
            first, J, grad, values, keys, keep_ptr, weight_ptr, place_ptr, slope_ptr, first_pair,
            k, n - first_row, channels < c, axes < d, value_row, key_row, HAS_KEEP,
        )  # fmt: skip
        mean, by_slope, by_weight = mean + more[0], by_slope + more[1], by_weight + more[2]
    for first in range(k - k % J, k):
        more = _neighbors(
            first, 1, grad, values, keys, keep_ptr, weight_ptr, place_ptr, slope_ptr, first_pair,
            k, n - first_row, channels < c, axes < d, value_row, key_row, HAS_KEEP,
        )  # fmt: skip
        mean, by_slope, by_weight = mean + more[0], by_slope + more[1], by_weight + more[2]
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
            to = slot(start_ptr + example * (m + 1), count_ptr + example * (m + 1), place, listed)
        slope = tl.load(slope_ptr + pair, mask=listed, other=0.0)
        slope = tl.load(mean_ptr + example * n + row, mask=listed, other=0.0) - slope
        of_distance = weight * slope / temperature
        if HAS_KEEP:
            weight *= tl.load(keep_ptr + pair, mask=listed, other=0.0)
        send(sent_ptr, example * n * k + to, row, of_distance, weight, listed, PACKED)


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
    lists = Lists.of(weight, place, examples, m)
    given = (keys, value, keep, grad, weight, place)
    slope, mean = torch.empty_like(weight), weight.new_empty(examples * n)
    # What sums would round to bfloat16 anyway is sent as such.
    packed = not biased and all(t.dtype == torch.bfloat16 for t in (q, keys, value, grad))
    sent = place.new_empty(*place.shape, 2 if packed else 4)
    axes, channels = _block(d), _block(c)
    at_once = AT_ONCE[k > 16]
    wide = max(axes * keys.itemsize, channels * value.itemsize)
    launch(
        _backward_of_targets,
        (gpu.cdiv(n, ROWS) * examples,),
        (*given, lists.slot, lists.start, lists.count, to_q, slope, mean, sent),
        (n, m, k, heads, *keys_at, *value_at, *grad_at),
        (scale, temperature),
        d=d,
        c=c,
        BLOCK_N=ROWS,
        BLOCK_D=axes,
        BLOCK_C=channels,
        J=max(1, min(at_once, at_once * 128 // wide)),
        PAIRS=gpu.next_power_of_2(min(ROWS * k, 64 * WARPS)),
        HAS_KEEP=keep is not None,
        HAS_SLOT=lists.slot is not None,
        PACKED=packed,
        num_warps=WARPS,
    )
    sum_by_source(
        *(sent, lists.start, q, grad, to_keys, to_value, to_bias, n * k, heads),
        *(q_at, grad_at, scale, axes, channels),
    )
    return to_q, to_keys, to_value, to_bias


def _block(size: int) -> int:
    return max(16, gpu.next_power_of_2(size))
