"""Tensors as kernels for attention read them: where they lie, without copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, overload

import torch
from torch import Tensor

from convnn_geo.shapes import broadcast_shapes

Seen: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""What a call follows from, of a tensor: shape, strides, dtype and device."""


def seen(tensor: Tensor) -> Seen:
    """Of a tensor all but its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def leading(
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    less: Tensor | None = None,
) -> torch.Size:
    """Leading axes of the result."""
    return broadcast_shapes(
        *(t.shape[:-2] for t in (q, keys, value, mask, less) if t is not None),
        () if bias is None else bias.shape[:-1],
    )


@overload
def laid_out(tensor: Tensor, lead: torch.Size, axes: int) -> tuple[Tensor, tuple[int, ...]]: ...
@overload
def laid_out(
    tensor: Tensor | None, lead: torch.Size, axes: int
) -> tuple[Tensor | None, tuple[int, ...]]: ...
def laid_out(
    tensor: Tensor | None, lead: torch.Size, axes: int
) -> tuple[Tensor | None, tuple[int, ...]]:
    """A tensor whose last axis is contiguous, and its strides along examples, heads and rows.

    Leading axes that it lacks have stride 0; those before the last one count as one.
    """
    if tensor is None:
        return None, (0,) * (axes + 1)
    shape = tensor.shape[-axes:]
    if tensor.stride(-1) != 1 and shape[-1] > 1:
        tensor = tensor.contiguous()
    wide = tensor.expand(*lead, *shape)
    if len(lead) != 2:
        wide = wide.reshape(*split(lead), *shape)
    return wide, wide.stride()[:-1]


def strides(
    shape: Sequence[int], stride: Sequence[int], lead: torch.Size
) -> tuple[int, int, int] | None:
    """Those of :func:`laid_out` for ``(..., n, c)``; None where it would copy."""
    if len(lead) > 2 or (stride[-1] != 1 and shape[-1] > 1):
        return None
    steps = [0 if size == 1 else step for size, step in zip(shape[:-2], stride[:-2], strict=True)]
    example, head = [0] * (2 - len(steps)) + steps
    return example, head, stride[-2]


def split(lead: torch.Size) -> tuple[int, int]:
    """Examples and heads: the last of the leading axes, and all before it."""
    return math.prod(lead[:-1]), lead[-1] if lead else 1


def result_strides(lead: Sequence[int], n: int, c: int) -> tuple[int, ...]:
    """Those of :func:`empty_result`.

    Example:
        >>> result_strides((2, 3), 5, 8)
        (120, 8, 24, 1)
    """
    if not lead:
        return c, 1
    row = lead[-1] * c
    outer = [n * row * math.prod(lead[axis + 1 : -1]) for axis in range(len(lead) - 1)]
    return *outer, c, row, 1


def empty_result(value: Tensor, lead: torch.Size, n: int) -> Tensor:
    """Memory ``(..., n, c)`` in which heads lie side by side, as who joins them wants it."""
    if not lead:
        return value.new_empty(n, value.shape[-1])
    return value.new_empty(*lead[:-1], n, lead[-1], value.shape[-1]).transpose(-2, -3)
