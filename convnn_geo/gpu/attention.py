"""Attention over the k nearest: short rows in one kernel, long ones in two; backward over pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo.gpu.search import nearest
from convnn_geo.gpu.tiles import dot, ordered, products
from convnn_geo.shapes import broadcast_shapes

ROW = 512
"""Sources, at most, whose scores one kernel keeps in registers."""


@triton.jit
def _attend_rows(
    q_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    keep_ptr,
    out_ptr,
    weight_ptr,
    place_ptr,
    n,
    m,
    k,
    heads,
    mask_example,
    mask_head,
    mask_row,
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
    HAS_KEEP: tl.constexpr,
):
    """Rows of scores that fit: the k-th by bisection on its bits, softmax over the chosen."""
    example = tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, M)
    here = (rows < n)[:, None] & (columns < m)[None, :]
    q, key = q_ptr + example * n * d, key_ptr + example * m * d
    distance = -scale * products(q, key, q, rows, columns, n, m, d, BLOCK_D, False)
    if HAS_BIAS:
        distance += tl.load(bias_ptr + example * m + columns, mask=columns < m, other=0.0)[None, :]
    if HAS_MASK:
        at = example // heads * mask_example + example % heads * mask_head
        seen = tl.load(
            mask_ptr + at + rows[:, None].to(tl.int64) * mask_row + columns[None, :],
            mask=here,
            other=0,
        )
        distance = tl.where(seen != 0, distance, float("inf"))
    distance = tl.where(here, distance, float("inf"))
    code = ordered(distance)
    low = tl.min(code, 1)
    high = tl.max(code, 1)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum((code <= middle[:, None]).to(tl.int32), 1) >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    nearer = code < high[:, None]
    tied = code == high[:, None]
    spare = k - tl.sum(nearer.to(tl.int32), 1)
    chosen = nearer | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= spare[:, None]))
    seen = chosen & (distance < float("inf"))
    score = tl.where(seen, -distance / temperature, float("-inf"))
    most = tl.max(score, 1)
    most = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.where(seen, tl.exp(score - most[:, None]), 0.0)
    total = tl.sum(weight, 1)
    weight /= tl.where(total == 0.0, 1.0, total)[:, None]
    slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
    at = (example * n + rows)[:, None] * k + slot
    stored = chosen & (rows < n)[:, None]
    tl.store(place_ptr + at, tl.broadcast_to(columns[None, :], [BLOCK_N, M]), mask=stored)
    tl.store(weight_ptr + at, weight, mask=stored)
    if HAS_KEEP:
        weight *= tl.load(keep_ptr + at, mask=stored, other=0.0)
    for first in tl.static_range(0, c, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        value = tl.load(
            value_ptr + (example * m + columns)[:, None] * c + channels[None, :],
            mask=(columns < m)[:, None] & (channels < c)[None, :],
            other=0.0,
        )
        out = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        out = dot(weight.to(value.dtype), value, out)
        tl.store(
            out_ptr + (example * n + rows)[:, None] * c + channels[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=(rows < n)[:, None] & (channels < c)[None, :],
        )


@triton.jit
def _combine(
    distance_ptr,
    value_ptr,
    keep_ptr,
    out_ptr,
    weight_ptr,
    place_ptr,
    n,
    m,
    k,
    temperature,
    c: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """Softmax over what a search has found, and the sum of gathered values."""
    example = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots, channels = tl.arange(0, K), tl.arange(0, BLOCK_C)
    at = (example * n + rows)[:, None] * k + slots[None, :]
    here = (rows < n)[:, None] & (slots < k)[None, :]
    distance = tl.load(distance_ptr + at, mask=here, other=float("inf"))
    seen = distance < float("inf")
    score = tl.where(seen, -distance / temperature, float("-inf"))
    most = tl.max(score, 1)
    most = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.where(seen, tl.exp(score - most[:, None]), 0.0)
    total = tl.sum(weight, 1)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(weight_ptr + at, weight / total[:, None], mask=here)
    out = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for j in range(k):
        pair = (example * n + rows) * k + j
        place = tl.load(place_ptr + pair, mask=rows < n, other=0)
        one = tl.load(distance_ptr + pair, mask=rows < n, other=float("inf"))
        weight_j = tl.where(one < float("inf"), tl.exp(-one / temperature - most), 0.0) / total
        if HAS_KEEP:
            weight_j *= tl.load(keep_ptr + pair, mask=rows < n, other=0.0)
        value = tl.load(
            value_ptr + (example * m + place)[:, None] * c + channels[None, :],
            mask=(rows < n)[:, None] & (channels < c)[None, :],
            other=0.0,
        )
        out += weight_j[:, None] * value.to(tl.float32)
    tl.store(
        out_ptr + (example * n + rows)[:, None] * c + channels[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(rows < n)[:, None] & (channels < c)[None, :],
    )


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
    scale,
    temperature,
    d: tl.constexpr,
    c: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Gradients of a block of targets; those of sources are added to, or left to a second pass."""
    example = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    axes, channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    real = rows < n
    row = example * n + rows
    grad = tl.load(
        grad_ptr + row[:, None] * c + channels[None, :],
        mask=real[:, None] & (channels < c)[None, :],
        other=0.0,
    ).to(tl.float32)
    q = tl.load(
        q_ptr + row[:, None] * d + axes[None, :],
        mask=real[:, None] & (axes < d)[None, :],
        other=0.0,
    ).to(tl.float32)
    mean = tl.zeros([BLOCK_N], tl.float32)
    for j in range(k):
        place = tl.load(place_ptr + row * k + j, mask=real, other=0)
        weight = tl.load(weight_ptr + row * k + j, mask=real, other=0.0)
        value = tl.load(
            value_ptr + (example * m + place)[:, None] * c + channels[None, :],
            mask=real[:, None] & (channels < c)[None, :],
            other=0.0,
        ).to(tl.float32)
        slope = tl.sum(grad * value, 1)
        kept = weight
        if HAS_KEEP:
            keep = tl.load(keep_ptr + row * k + j, mask=real, other=0.0)
            slope *= keep
            kept *= keep
        mean += weight * slope
        tl.store(of_distance_ptr + row * k + j, slope, mask=real)
        if ATOMIC:
            tl.atomic_add(
                to_value_ptr + (example * m + place)[:, None] * c + channels[None, :],
                kept[:, None] * grad,
                mask=real[:, None] & (channels < c)[None, :],
                sem="relaxed",
            )
    to_q = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for j in range(k):
        place = tl.load(place_ptr + row * k + j, mask=real, other=0)
        weight = tl.load(weight_ptr + row * k + j, mask=real, other=0.0)
        slope = tl.load(of_distance_ptr + row * k + j, mask=real, other=0.0)
        of_distance = weight * (mean - slope) / temperature
        tl.store(of_distance_ptr + row * k + j, of_distance, mask=real)
        key = tl.load(
            key_ptr + (example * m + place)[:, None] * d + axes[None, :],
            mask=real[:, None] & (axes < d)[None, :],
            other=0.0,
        ).to(tl.float32)
        to_q -= scale * of_distance[:, None] * key
        if ATOMIC:
            tl.atomic_add(
                to_key_ptr + (example * m + place)[:, None] * d + axes[None, :],
                -scale * of_distance[:, None] * q,
                mask=real[:, None] & (axes < d)[None, :],
                sem="relaxed",
            )
            tl.atomic_add(to_bias_ptr + example * m + place, of_distance, mask=real, sem="relaxed")
    tl.store(
        to_q_ptr + row[:, None] * d + axes[None, :],
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
    k,
    scale,
    d: tl.constexpr,
    c: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """One source, which sums over the pairs that chose it, in their order: the same every time."""
    source = tl.program_id(0).to(tl.int64)
    axes, channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    to_key = tl.zeros([BLOCK_D], tl.float32)
    to_value = tl.zeros([BLOCK_C], tl.float32)
    to_bias = 0.0
    for at in range(tl.load(start_ptr + source), tl.load(start_ptr + source + 1)):
        pair = tl.load(pair_ptr + at)
        target = pair // k
        kept = tl.load(weight_ptr + pair)
        if HAS_KEEP:
            kept *= tl.load(keep_ptr + pair)
        of_distance = tl.load(of_distance_ptr + pair)
        q = tl.load(q_ptr + target * d + axes, mask=axes < d, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + target * c + channels, mask=channels < c, other=0.0)
        to_key -= scale * of_distance * q
        to_value += kept * grad.to(tl.float32)
        to_bias += of_distance
    tl.store(to_key_ptr + source * d + axes, to_key, mask=axes < d)
    tl.store(to_value_ptr + source * c + channels, to_value, mask=channels < c)
    tl.store(to_bias_ptr + source, to_bias)


def attend(
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    k: int,
    scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ``(..., n, c)``, weights and places ``(..., n, k)`` in float32 and int32.

    Args:
        q: ``(..., n, d)``; leading axes broadcast.
        keys: ``(..., m, d)``.
        value: ``(..., m, c)``.
        bias: ``(..., m)`` or None.
        mask: ``(..., n | 1, m)``, True where choice is allowed, or None.
        keep: ``(..., n, k)``, factors of the weights, or None.
        k: keys for each query.
        scale: distances are ``bias - scale <q, key>``.
        temperature: weights are ``softmax(-distance / temperature)``.
    """
    lead = _lead(q, keys, value, bias, mask)
    (n, d), (m, c) = q.shape[-2:], value.shape[-2:]
    q, keys, value = (_flat(t, lead, 2) for t in (q, keys, value))
    bias = None if bias is None else _flat(bias, lead, 1).float()
    keep = None if keep is None else _flat(keep, lead, 2).float()
    heads = lead[-1] if lead else 1
    if mask is not None:
        mask = mask.contiguous().expand(*lead, n, m)
        mask = mask.reshape(-1, heads, n, m) if mask.ndim != 4 else mask
    strides = (0, 0, 0) if mask is None else mask.stride()[:-1]
    examples = len(q)
    out = value.new_empty(examples, n, c)
    # Products of float32 are not done by tensor cores, and take registers: scores fit without keep.
    if m <= ROW and (keep is None or q.dtype != torch.float32):
        weight = q.new_empty(examples, n, k, dtype=torch.float32)
        place = torch.empty_like(weight, dtype=torch.int32)
        # As many scores as registers hold: eight warps, and few rows where they are long or wide.
        block = 16 if m > 256 or q.dtype == torch.float32 else 32
        _attend_rows[(triton.cdiv(n, block), examples)](
            *(q, keys, value, bias, None if mask is None else mask.view(torch.uint8), keep),
            *(out, weight, place, n, m, k, heads, *strides, scale, temperature),
            d=d,
            c=c,
            BLOCK_N=block,
            M=max(16, triton.next_power_of_2(m)),
            BLOCK_D=_block(d, 64),
            BLOCK_C=_block(c, 64),
            HAS_BIAS=bias is not None,
            HAS_MASK=mask is not None,
            HAS_KEEP=keep is not None,
            num_warps=8,
        )
    else:
        starts = tuple(torch.arange(examples + 1, device=q.device) * size for size in (n, m))
        distance, place = nearest(
            *(q.flatten(0, 1), keys.flatten(0, 1), k, starts, n),  # type: ignore[arg-type]
            *(None if bias is None else bias.flatten(), scale, mask, heads),
        )
        place, weight = place.view(examples, n, k), torch.empty_like(distance)
        weight = weight.view(examples, n, k)
        _combine[(triton.cdiv(n, 16), examples)](
            *(distance, value, keep, out, weight, place, n, m, k, temperature),
            c=c,
            K=triton.next_power_of_2(k),
            BLOCK_N=16,
            BLOCK_C=_block(c),
            HAS_KEEP=keep is not None,
        )
    return out.view(*lead, n, c), weight.view(*lead, n, k), place.view(*lead, n, k)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to queries, keys, values and bias, in float32 and the result's leading shape.

    Under ``torch.use_deterministic_algorithms`` sums over pairs have a fixed order.
    """
    lead, (n, k) = place.shape[:-2], place.shape[-2:]
    (m, d), c = keys.shape[-2:], value.shape[-1]
    parts = (q, keys, value, grad, weight, place)
    q, keys, value, grad, weight, place = (_flat(t, lead, 2) for t in parts)
    keep = None if keep is None else _flat(keep, lead, 2).float()
    examples, atomic = len(q), not torch.are_deterministic_algorithms_enabled()
    to_q, of_distance = weight.new_empty(examples, n, d), torch.empty_like(weight)
    new = weight.new_zeros if atomic else weight.new_empty
    to_keys, to_value, to_bias = (new(examples, m, *size) for size in ((d,), (c,), ()))
    blocks = {"d": d, "c": c, "BLOCK_D": _block(d), "BLOCK_C": _block(c)}
    _backward[(triton.cdiv(n, 16), examples)](
        *(q, keys, value, keep, grad, weight, place, to_q, to_keys, to_value, to_bias),
        *(of_distance, n, m, k, scale, temperature),
        **blocks,
        BLOCK_N=16,
        HAS_KEEP=keep is not None,
        ATOMIC=atomic,
    )
    if not atomic:
        source = (
            place.long() + m * torch.arange(examples, device=q.device)[:, None, None]
        ).flatten()
        chosen, pair = source.sort(stable=True)
        bounds = torch.arange(examples * m + 1, device=q.device)
        _backward_of_sources[(examples * m,)](
            *(q, keep, grad, weight, of_distance, pair, torch.searchsorted(chosen, bounds)),
            *(to_keys, to_value, to_bias, k, scale),
            **blocks,
            HAS_KEEP=keep is not None,
        )
    shapes = ((n, d), (m, d), (m, c), (m,))
    grads = (to_q, to_keys, to_value, to_bias)
    return tuple(t.view(*lead, *s) for t, s in zip(grads, shapes, strict=True))  # type: ignore[return-value]


def _lead(
    q: Tensor, keys: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None
) -> torch.Size:
    return broadcast_shapes(
        *(t.shape[:-2] for t in (q, keys, value)),
        () if bias is None else bias.shape[:-1],
        () if mask is None else mask.shape[:-2],
    )


def _flat(tensor: Tensor, lead: torch.Size, axes: int) -> Tensor:
    """``(examples, ...)``, contiguous."""
    shape = tensor.shape[-axes:]
    return tensor.expand(*lead, *shape).reshape(-1, *shape).contiguous()


def _block(size: int, most: int = 2**30) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))
