"""The k smallest of each row, ties to the lowest index, on every device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUPS = 128
"""Groups into which long rows are cut before keys are made."""


def k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest of each row in order of (value, index): values and indices.

    ``torch.topk`` breaks ties as it likes. Here float32 values become integer keys that hold the
    value's bits above the index: no two keys are equal, so every way of sorting them agrees.

    Args:
        values: ``(..., m)``; NaN counts as the largest.
        k: at most ``m``.

    Example:
        >>> import torch
        >>> k_smallest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2)[1].tolist()
        [3, 1]
    """
    return _k_smallest(values.detach(), k)


@torch.library.custom_op("convnn_geo::k_smallest", mutates_args=())
def _k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    m = values.shape[-1]
    if k == 0 or values.numel() == 0:
        return _shapes(values, k)
    if values.dtype != torch.float32 or m >= 2**31:
        best, index = values.sort(dim=-1, stable=True)
        return best[..., :k].clone(), index[..., :k].clone()
    if values.device.type == "cpu" and k * 8 <= GROUPS <= m // 4:
        index = _grouped(values, k)
    else:
        index = _first(_keys(values, torch.arange(m, device=values.device)), k)
    return values.gather(-1, index), index


@_k_smallest.register_fake
def _shapes(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*values.shape[:-1], k)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.long)


def _keys(values: Tensor, index: Tensor) -> Tensor:
    """Integers in the order of (value, index).

    Float bits, taken as integers, sort like the floats once those of negatives are mirrored.
    Adding 0.0 makes -0.0 a 0.0.
    """
    bits = (values + 0.0).view(torch.int32)
    bits = torch.where(values.isnan(), 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.long() << 32) | index


def _first(keys: Tensor, k: int, ordered: bool = True) -> Tensor:
    """Indices of the ``k`` smallest keys of each row.

    On the CPU by numpy's partition, which is vectorised and twice as fast as ``torch.topk``.
    """
    if keys.device.type == "cpu":
        rows = keys.numpy()
        if k < rows.shape[-1]:
            rows.partition(k - 1, axis=-1)  # the keys are ours to change
        first = torch.from_numpy(np.sort(rows[..., :k], axis=-1) if ordered else rows[..., :k])
    else:
        first = keys.topk(k, largest=False).values
    return first & 0xFFFFFFFF


def _grouped(values: Tensor, k: int) -> Tensor:
    """The same from few keys: the k smallest lie in the k groups whose smallest are smallest.

    Column ``j`` is in group ``j % GROUPS``, so that group minima are plain vector minima. One
    more than k is looked for: equal values at the boundary, or a NaN, make the choice of groups
    unsure, and such rows are looked at whole.
    """
    m = values.shape[-1]
    depth = m // GROUPS
    whole = values[..., : depth * GROUPS].unflatten(-1, (depth, GROUPS))
    rest = values[..., depth * GROUPS :]
    minima = whole.amin(-2)
    group = torch.arange(GROUPS)
    groups = _first(_keys(minima, group), k + 1, ordered=False).unsqueeze(-2)
    chosen = whole.gather(-1, groups.expand(*whole.shape[:-1], k + 1)).flatten(-2)
    column = (groups + (torch.arange(depth) * GROUPS).unsqueeze(-1)).flatten(-2)
    if rest.shape[-1]:
        tail = torch.arange(depth * GROUPS, m).expand(rest.shape)
        chosen, column = torch.cat([chosen, rest], -1), torch.cat([column, tail], -1)
    index = _first(_keys(chosen, column), k + 1)
    last = values.gather(-1, index[..., k - 1 :])
    unsure = (last[..., 0] == last[..., 1]) | minima.isnan().any(-1)
    index = index[..., :k].contiguous()  # as the operator's fake says
    if bool(unsure.any()):
        index[unsure] = _first(_keys(values[unsure], torch.arange(m)), k)
    return index
