"""Backward of attention over the k nearest: over the chosen pairs alone.

Pairs without weight, hidden or dropped ones, have no part in it, whatever their values are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.layout import laid_out, split


@triton.jit
def _backward(
    q_ptr,
    key_ptr,
    value_ptr,
    keep_ptr,
    grad_ptr,
    weight_ptr,
    place_ptr,
    to_q_ptr,
    to_key_ptr,
    to_value_ptr,
    to_bias_ptr,
    of_distance_ptr,
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
    HAS_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Gradients of a block of targets; those of sources are added to, or left to a second pass."""
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
    q = tl.load(
        q_ptr + outer * q_example + head * q_head
        + rows[:, None].to(tl.int64) * q_row + axes[None, :],
        mask=real[:, None] & (axes < d)[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    values = value_ptr + outer * value_example + head * value_head
    keys = key_ptr + outer * key_example + head * key_head
    pair = (example * n + rows) * k
    mean = tl.zeros([BLOCK_N], tl.float32)
    for j in range(k):
        place = tl.load(place_ptr + pair + j, mask=real, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + pair + j, mask=real, other=0.0)
        kept = weight
        if HAS_KEEP:
            keep = tl.load(keep_ptr + pair + j, mask=real, other=0.0)
            kept *= keep
        used = (kept != 0.0)[:, None] & (channels < c)[None, :]
        value = tl.load(
            values + place[:, None] * value_row + channels[None, :], mask=used, other=0.0
        )
        slope = tl.sum(tl.where(used, grad * value.to(tl.float32), 0.0), 1)
        if HAS_KEEP:
            slope = tl.where(kept != 0.0, slope * keep, 0.0)
        mean += tl.where(weight != 0.0, weight * slope, 0.0)
        tl.store(of_distance_ptr + pair + j, slope, mask=real)
        if ATOMIC:
            tl.atomic_add(
                to_value_ptr + (example * m + place)[:, None] * c + channels[None, :],
                kept[:, None] * grad,
                mask=used,
                sem="relaxed",
            )
    tl.debug_barrier()  # slopes that one warp has stored others read
    to_q = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for j in range(k):
        place = tl.load(place_ptr + pair + j, mask=real, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + pair + j, mask=real, other=0.0)
        slope = tl.load(of_distance_ptr + pair + j, mask=real, other=0.0)
        of_distance = tl.where(weight != 0.0, weight * (mean - slope) / temperature, 0.0)
        used = (weight != 0.0)[:, None] & (axes < d)[None, :]
        key = tl.load(keys + place[:, None] * key_row + axes[None, :], mask=used, other=0.0)
        to_q -= tl.where(used, scale * of_distance[:, None] * key.to(tl.float32), 0.0)
        if ATOMIC:
            tl.atomic_add(
                to_key_ptr + (example * m + place)[:, None] * d + axes[None, :],
                -scale * of_distance[:, None] * q,
                mask=used,
                sem="relaxed",
            )
            if HAS_BIAS:
                at = to_bias_ptr + example * m + place
                tl.atomic_add(at, of_distance, mask=weight != 0.0, sem="relaxed")
        else:
            tl.store(of_distance_ptr + pair + j, of_distance, mask=real)
    tl.store(
        to_q_ptr + (example * n + rows)[:, None] * d + axes[None, :],
        to_q,
        mask=real[:, None] & (axes < d)[None, :],
    )


@triton.jit
def _backward_of_sources(
    q_ptr,
    keep_ptr,
    grad_ptr,
    weight_ptr,
    of_distance_ptr,
    pair_ptr,
    start_ptr,
    to_key_ptr,
    to_value_ptr,
    to_bias_ptr,
    n,
    m,
    k,
    heads,
    q_example,
    q_head,
    q_row,
    grad_example,
    grad_head,
    grad_row,
    scale,
    d: tl.constexpr,
    c: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """One source, which sums over the pairs that chose it, in their order: the same every time."""
    source = tl.program_id(0).to(tl.int64)
    example = source // m
    outer, head = example // heads, example % heads
    axes, channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    to_key = tl.zeros([BLOCK_D], tl.float32)
    to_value = tl.zeros([BLOCK_C], tl.float32)
    to_bias = 0.0
    for at in range(tl.load(start_ptr + source), tl.load(start_ptr + source + 1)):
        pair = tl.load(pair_ptr + at)
        row = pair // k - example * n
        weight = tl.load(weight_ptr + pair)
        kept = weight
        if HAS_KEEP:
            kept *= tl.load(keep_ptr + pair)
        of_distance = tl.load(of_distance_ptr + pair)
        q = q_ptr + outer * q_example + head * q_head + row * q_row
        q = tl.load(q + axes, mask=axes < d, other=0.0).to(tl.float32)
        grad = grad_ptr + outer * grad_example + head * grad_head + row * grad_row
        grad = tl.load(grad + channels, mask=channels < c, other=0.0).to(tl.float32)
        to_key -= tl.where(weight != 0.0, scale * of_distance * q, 0.0)
        to_value += tl.where(kept != 0.0, kept * grad, 0.0)
        to_bias += of_distance
    tl.store(to_key_ptr + source * d + axes, to_key, mask=axes < d)
    tl.store(to_value_ptr + source * c + channels, to_value, mask=channels < c)
    if HAS_BIAS:
        tl.store(to_bias_ptr + source, to_bias)


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
    """Gradients to queries, keys, values and bias, in float32 and the result's leading shape.

    That of a bias is empty unless ``biased``. Under ``torch.use_deterministic_algorithms`` sums
    over pairs have a fixed order.
    """
    lead, (n, k) = place.shape[:-2], place.shape[-2:]
    (m, d), c = keys.shape[-2:], value.shape[-1]
    examples, heads = split(lead)
    examples *= heads
    atomic = not torch.are_deterministic_algorithms_enabled()
    to_q, of_distance = weight.new_empty(*lead, n, d), torch.empty_like(weight)
    nothing = not grad.numel()
    new = weight.new_zeros if atomic or nothing else weight.new_empty
    to_keys, to_value = new(*lead, m, d), new(*lead, m, c)
    to_bias = new(*lead, m) if biased else new(0)
    if nothing:
        return to_q.zero_(), to_keys, to_value, to_bias
    (q, q_at), (keys, keys_at), (value, value_at), (grad, grad_at) = (
        laid_out(t, lead, 2) for t in (q, keys, value, grad)
    )
    weight, place = weight.contiguous(), place.contiguous()
    keep = None if keep is None else keep.expand(weight.shape).contiguous()
    sizes = {
        **{"d": d, "c": c, "BLOCK_D": _block(d), "BLOCK_C": _block(c)},
        **{"HAS_BIAS": biased, "HAS_KEEP": keep is not None},
    }
    _backward[(triton.cdiv(n, 16) * examples,)](
        *(q, keys, value, keep, grad, weight, place, to_q, to_keys, to_value, to_bias),
        *(of_distance, n, m, k, heads, *q_at, *keys_at, *value_at, *grad_at, scale, temperature),
        **sizes,
        BLOCK_N=16,
        ATOMIC=atomic,
    )
    if not atomic:
        first = m * torch.arange(examples, device=place.device)[:, None]
        chosen, pair = (place.view(examples, -1) + first).flatten().sort(stable=True)
        bounds = torch.arange(examples * m + 1, device=place.device)
        _backward_of_sources[(examples * m,)](
            *(q, keep, grad, weight, of_distance, pair, torch.searchsorted(chosen, bounds)),
            *(to_keys, to_value, to_bias, n, m, k, heads, *q_at, *grad_at, scale),
            **sizes,
        )
    return to_q, to_keys, to_value, to_bias


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
