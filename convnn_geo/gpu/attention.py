"""Attention over the k nearest: short rows in one kernel, long ones in two."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu import rows as short
from convnn_geo.gpu.backward import attend_backward
from convnn_geo.gpu.found import _combine
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.layout import empty_result, laid_out, leading, split, strides
from convnn_geo.gpu.plans import plan
from convnn_geo.gpu.rows import Tile, _attend_rows, tile
from convnn_geo.gpu.search import nearest
from convnn_geo.shapes import broadcast_shapes

__all__ = ["attend", "attend_backward"]

SHORT = 256
"""Sources up to which whole rows cost less than a search by a bound, which multiplies twice."""


@gpu.on_its_device
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
    wanted: bool = True,
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
        wanted: whether weights and places are; otherwise they are empty.
    """
    alone = bias is None and mask is None and keep is None
    if alone and scale > 0 and keys.shape[-2] <= short.LONGEST:
        plain = _plain(_seen(q), _seen(keys), _seen(value), k, wanted)
        if plain is not None:
            out = empty_result(value, plain.lead, plain.n)
            return _rows(plain, (q, keys, value, None, None, None, out), k, scale, temperature)
    lead = leading(q, keys, value, bias, mask)
    (n, d), (m, c) = q.shape[-2:], value.shape[-2:]
    out, shape = empty_result(value, lead, n), (*lead, n, k)
    if not out.numel():
        weight = value.new_zeros(shape, dtype=torch.float32)
        return out, weight, weight.to(torch.int32)
    chosen = _tile(n, m, d, c, q.dtype, value.dtype, q.device, k, wanted, mask is not None)
    (q, q_at), (keys, keys_at), (value, value_at) = (laid_out(t, lead, 2) for t in (q, keys, value))
    if bias is None and scale <= 0:  # nearness is the product itself, where it may
        bias = keys.new_zeros(m)
    bias, bias_at = laid_out(None if bias is None else bias.float(), lead, 1)
    mask, mask_at = laid_out(None if mask is None else mask.view(torch.uint8), lead, 2)
    if mask is not None and mask.shape[-2] != n:
        mask = mask.expand(*mask.shape[:2], n, m)
        mask_at = mask.stride()[:-1]
    keep = None if keep is None else keep.float().expand(shape).contiguous()
    out_at = laid_out(out, lead, 2)[1]
    if chosen is not None:
        steps = (*q_at, *keys_at, *value_at, *bias_at, *mask_at, *out_at)
        rows = Rows(chosen, lead, n, m, d, c, steps, wanted or q.dtype == torch.float32)
        return _rows(rows, (q, keys, value, bias, mask, keep, out), k, scale, temperature)
    if bias is None:  # what is found are products
        temperature /= scale
    found, place = nearest(q, keys, k, None, n, bias, scale, mask, any_order=True)
    examples, heads = split(lead)
    launch(
        _combine,
        (gpu.cdiv(n, 16) * examples * heads,),
        (found, value, keep, out, found, place),
        (n, k, heads, *value_at, *out_at),
        (temperature,),
        c=c,
        K=max(2, gpu.next_power_of_2(k)),
        BLOCK_N=16,
        BLOCK_C=max(16, min(256, gpu.next_power_of_2(c))),
        HAS_KEEP=keep is not None,
    )
    return out, found.view(shape), place.view(shape)


@dataclass(frozen=True)
class Rows:
    """A call of the kernel for short rows.

    Args:
        tile: of its programs.
        lead: leading axes of the result.
        n: queries.
        m: keys.
        d: channels of both.
        c: channels of values.
        strides: of queries, keys, values, bias, mask and result, along examples, heads and rows.
        stores: whether weights and places are kept.
    """

    tile: Tile
    lead: torch.Size
    n: int
    m: int
    d: int
    c: int
    strides: tuple[int, ...]
    stores: bool


def _rows(
    rows: Rows, tensors: tuple[Tensor | None, ...], k: int, scale: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch it: ``tensors`` are queries, keys, values, bias, mask, kept weights and result."""
    q, _, _, bias, mask, keep, out = tensors
    tile, (examples, heads) = rows.tile, split(rows.lead)
    shape = (*rows.lead, rows.n, k) if rows.stores else 0
    weight = out.new_empty(shape, dtype=torch.float32)  # type: ignore[union-attr]
    place = torch.empty_like(weight, dtype=torch.int32)
    kept = (weight, place) if rows.stores else (None, None)
    launch(
        _attend_rows,
        (gpu.cdiv(rows.n, tile.rows) * examples * heads,),
        (*tensors, *kept),
        (rows.n, rows.m, k, heads, *rows.strides),
        (scale, temperature),
        d=rows.d,
        c=rows.c,
        BLOCK_N=tile.rows,
        M=tile.columns,
        BLOCK_D=tile.axes,
        BLOCK_C=tile.channels,
        HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None,
        HAS_KEEP=keep is not None,
        STORES=rows.stores,
        GATHERS=q.dtype == torch.float32,  # type: ignore[union-attr]  # not for tensor cores
        GROUPS=_groups(rows.m, k) if mask is None else 0,
        FULL=rows.m // 64 * 64,
        num_warps=tile.warps,
    )
    return out, weight, place  # type: ignore[return-value]


Seen: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""What a call follows from, of a tensor: shape, strides, dtype and device."""


def _seen(tensor: Tensor) -> Seen:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@functools.lru_cache(1024)
def _plain(q: Seen, keys: Seen, value: Seen, k: int, wanted: bool) -> Rows | None:
    """The call for tensors that can be read as they lie; None where one can't, or is empty."""
    shapes, (_, _, dtype, device), value_dtype = (q[0], keys[0], value[0]), q, value[2]
    lead = broadcast_shapes(*(shape[:-2] for shape in shapes))
    (n, d), (m, c) = q[0][-2:], value[0][-2:]
    found = [strides(*t[:2], lead) for t in (q, keys, value)]
    if None in found or not math.prod(lead) * n * c:
        return None
    tile = _tile(n, m, d, c, dtype, value_dtype, device, k, wanted, False)
    if tile is None:
        return None
    b, heads = split(lead)
    result = strides((b, heads, n, c), (heads * n * c, c, heads * c, 1), torch.Size((b, heads)))
    nothing = (0,) * 5  # of a bias and a mask
    steps = (*found[0], *found[1], *found[2], *nothing, *result)  # type: ignore[misc]
    return Rows(tile, lead, n, m, d, c, steps, wanted or dtype == torch.float32)


def _tile(
    n: int,
    m: int,
    d: int,
    c: int,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    device: torch.device,
    k: int,
    wanted: bool,
    masked: bool,
) -> Tile | None:
    """That of whole rows; None where they do not fit, or a search by a bound costs less."""
    if m > SHORT and plan(m, k, d, dtype, False) is not None:
        return None
    if dtype not in (torch.float32, value_dtype):  # tensor cores multiply what is alike
        return None
    return tile(n, m, d, c, dtype, gpu.shared_memory(device), wanted, masked)


def _groups(m: int, k: int) -> int:
    """Into how many groups rows of ``m`` are divided, so that more than ``k`` hold somebody."""
    groups = max(64 if m >= 64 else 32, gpu.next_power_of_2(3 * k))
    return groups if groups <= m else 0
