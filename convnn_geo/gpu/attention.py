"""Attention over the k nearest: short rows in one kernel, long ones in two."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.calls import Found, Rows, Shapes
from convnn_geo.gpu.gradients import attend_backward
from convnn_geo.gpu.layout import (
    Seen,
    empty_result,
    laid_out,
    leading,
    result_strides,
    seen,
    split,
    strides,
)
from convnn_geo.gpu.plans import plan
from convnn_geo.gpu.rows import tile
from convnn_geo.shapes import broadcast_shapes

__all__ = ["alone", "attend", "attend_backward"]

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
    less: Tensor | None = None,
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
        less: ``(..., n | 1, m)``, what distances are less by, or None.
    """
    if bias is None and mask is None and less is None and keep is None and scale > 0:
        call = _plain(seen(q), seen(keys), seen(value), k, wanted)
        if call is not None:
            out = call.shapes.result(value)
            found = call((q, keys, value, None, None, None, None), out, scale, temperature)
            return _results(out, found, wanted)
    lead = leading(q, keys, value, bias, mask, less)
    (n, d), (m, c) = q.shape[-2:], value.shape[-2:]
    out, shape = empty_result(value, lead, n), (*lead, n, k)
    if not out.numel():
        weight = value.new_zeros(shape, dtype=torch.float32)
        return out, weight, weight.to(torch.int32)
    (q, q_at), (keys, keys_at), (value, value_at) = (laid_out(t, lead, 2) for t in (q, keys, value))
    # Nearness is the product itself, where it may.
    if bias is None and (scale <= 0 or less is not None):
        bias = keys.new_zeros(m)
    bias, bias_at = laid_out(None if bias is None else bias.float(), lead, 1)
    mask, mask_at = laid_out(None if mask is None else mask.view(torch.uint8), lead, 2)
    less, less_at = laid_out(None if less is None else less.float(), lead, 2)
    mask_at, less_at = (
        (*at[:2], 0) if pairs is not None and pairs.shape[-2] == 1 else at
        for pairs, at in ((mask, mask_at), (less, less_at))
    )
    keep = None if keep is None else keep.float().expand(shape).contiguous()
    steps = (*q_at, *keys_at, *value_at, *bias_at, *mask_at, *less_at)
    steps += laid_out(out, lead, 2)[1]
    kinds = (q.dtype, keys.dtype, value.dtype, q.device)
    given = (bias is not None, mask is not None, less is not None, keep is not None)
    call = _call(Shapes(lead, n, m, k, d, c, steps, kinds, given), wanted)
    found = call((q, keys, value, bias, mask, less, keep), out, scale, temperature)
    return _results(out, found, wanted)


@gpu.on_its_device
def alone(
    q: Tensor, keys: Tensor, value: Tensor, k: int, scale: float, temperature: float
) -> Tensor:
    """The sum of :func:`attend` alone, with neither bias nor mask and no weight dropped."""
    call = _plain(seen(q), seen(keys), seen(value), k, False) if scale > 0 else None
    if call is None:
        return attend(q, keys, value, None, None, None, k, scale, temperature, False)[0]
    out = call.shapes.result(value)
    call((q, keys, value, None, None, None, None), out, scale, temperature)
    return out


def _results(
    out: Tensor, found: tuple[Tensor | None, Tensor | None], wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """With weights and places, or with nothing in their place."""
    if wanted:
        return out, *found  # type: ignore[return-value]
    nothing = out.new_empty(0, dtype=torch.float32)
    return out, nothing, torch.empty_like(nothing, dtype=torch.int32)


@functools.lru_cache(1024)
def _plain(q: Seen, keys: Seen, value: Seen, k: int, wanted: bool) -> Rows | Found | None:
    """The call for tensors that can be read as they lie; None where one can't, or is empty."""
    shapes = (q[0], keys[0], value[0])
    lead = broadcast_shapes(*(shape[:-2] for shape in shapes))
    (n, d), (m, c) = q[0][-2:], value[0][-2:]
    found = [strides(*t[:2], lead) for t in (q, keys, value)]
    if None in found or not math.prod(lead) * n * c:
        return None
    b, heads = split(lead)
    result = strides((b, heads, n, c), result_strides((b, heads), n, c), torch.Size((b, heads)))
    nothing = (0,) * 8  # of a bias, a mask, and what is less
    steps = (*found[0], *found[1], *found[2], *nothing, *result)  # type: ignore[misc]
    kinds = (q[2], keys[2], value[2], q[3])
    return _call(Shapes(lead, n, m, k, d, c, steps, kinds, (False,) * 4), wanted)


@functools.lru_cache(1024)
def _call(shapes: Shapes, wanted: bool) -> Rows | Found:
    """The same for the same arguments, so that what follows from these is found but once.

    Whole rows where they fit and a search by a bound costs no less.
    """
    n, m, d, c, k = shapes.n, shapes.m, shapes.d, shapes.c, shapes.k
    dtype, _, value_dtype, device = shapes.kinds
    searched = plan(m, k, d, dtype, False)
    # Tensor cores multiply what is alike.
    if (m <= SHORT or searched is None) and dtype in (torch.float32, value_dtype):
        room, masked = gpu.shared_memory(device), shapes.given[1] or shapes.given[2]
        fitting = tile(n, m, d, c, dtype, room, wanted, masked)
        if fitting is not None:
            return Rows(shapes, fitting, wanted or dtype == torch.float32)
    return Found(shapes, searched)
