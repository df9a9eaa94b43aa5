"""The k smallest of each row, ties to the lowest index, on every device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUPS = 128
"""Groups into which long rows are cut."""


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
    if values.device.type == "cpu" and 2 * k < m:
        index = _short(values, k)
    else:
        index = _first(_keys(values, torch.arange(m, device=values.device)), k) & 0xFFFFFFFF
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


def _first(keys: Tensor, k: int) -> Tensor:
    """The ``k`` smallest keys of each row, in order; the keys are lost.

    On the CPU by numpy's partition, which is vectorised and twice as fast as ``torch.topk``.
    """
    if keys.device.type != "cpu":
        return keys.topk(k, largest=False).values
    rows = keys.numpy()
    if 2 * k < rows.shape[-1]:
        rows.partition(k - 1, axis=-1)
        rows = rows[..., :k]
    return torch.from_numpy(np.sort(rows, axis=-1)[..., :k])


def _shortlist(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places of about the ``count`` smallest, by keys of half the size.

    The last bits of a value give way to its place. Also returned is a bound, as the upper half of
    a key of :func:`_keys`: what is left out does not lie under it.
    """
    low = 1 << (values.shape[-1] - 1).bit_length()
    bits = values.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).bitwise_and_(-low)
    keys.bitwise_or_(torch.arange(values.shape[-1], dtype=torch.int32))
    keys.numpy().partition(count - 1, axis=-1)
    return (keys[..., :count] & (low - 1)).long(), keys[..., count - 1] & -low


def _short(values: Tensor, k: int) -> Tensor:
    """The same from few keys: of long rows, then of short lists.

    Rows where the short lists leave the choice unsure, or that hold a NaN, are looked at whole.
    """
    m = values.shape[-1]
    chosen, column, limit, total = values, torch.arange(m), None, values
    if 2 * k <= GROUPS <= m // 4:
        chosen, column, limit, total = _from_groups(values, k + 1)
    place, beyond = _shortlist(chosen, k + 1)
    column = column.expand(chosen.shape).gather(-1, place)
    keys = _first(_keys(chosen.gather(-1, place), column), k)
    index = keys & 0xFFFFFFFF
    beyond = beyond if limit is None else torch.minimum(beyond, limit)
    unsure = ((keys[..., -1] >> 32) >= beyond) | total.sum(-1).isnan()
    if bool(unsure.any()):
        index[unsure] = _first(_keys(values[unsure], torch.arange(m)), k) & 0xFFFFFFFF
    return index


def _from_groups(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values of the ``count`` groups whose smallest are smallest, their columns, a bound of the
    rest, and the groups' minima.

    Column ``j`` is in group ``j % GROUPS``, so that minima are plain vector minima.
    """
    m = values.shape[-1]
    depth = m // GROUPS
    whole = values[..., : depth * GROUPS].unflatten(-1, (depth, GROUPS))
    minima = whole.amin(-2)
    group, beyond = _shortlist(minima, count)
    group = group.unsqueeze(-2)
    chosen = whole.gather(-1, group.expand(*whole.shape[:-1], count)).flatten(-2)
    column = (group + (torch.arange(depth) * GROUPS).unsqueeze(-1)).flatten(-2)
    rest = values[..., depth * GROUPS :]
    if rest.shape[-1]:
        tail = torch.arange(depth * GROUPS, m).expand(rest.shape)
        chosen, column = torch.cat([chosen, rest], -1), torch.cat([column, tail], -1)
        minima = torch.cat([minima, rest], -1)
    return chosen, column, beyond, minima
