"""The k smallest of each row, ties to the lowest index, on every device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.operators import operator

GROUPS = 128
"""Groups into which long rows are cut."""
SPARE = 8
"""Values of float64 beyond the k-th that are looked at, as some may round to what that does."""


def k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest of each row in order of (value, index): values and indices.

    ``torch.topk`` breaks ties as it likes. Here float32 values become integer keys that hold the
    value's bits above the index: no two keys are equal, so every way of sorting them agrees.

    Args:
        values: ``(..., m)``; NaN counts as the largest.
        k: at most ``m``.

    Raises:
        ValueError: k is negative or over ``m``.

    Example:
        >>> import torch
        >>> k_smallest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2)[1].tolist()
        [3, 1]
    """
    if not 0 <= k <= values.shape[-1]:
        raise ValueError(f"k_smallest: expected k from 0 to {values.shape[-1]}, got {k}")
    return _k_smallest(values.detach(), k)


@operator("k_smallest")
def _k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return select(values, k)


def select(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same without the operator around it, for use within another."""
    m = values.shape[-1]
    if k == 0 or values.numel() == 0:
        return _shapes(values, k)
    found = compiled.k_smallest(values, k)
    if found is not None:
        return found
    here = values.device.type == "cpu"
    if here and values.dtype == torch.float64 and k + SPARE < m:
        return _of_rounded(values, k)
    if values.dtype != torch.float32 or m >= 2**31:
        return _sorted(values, k)
    if here and 2 * k < m:
        index = _short(values, k)
    else:
        index = _first(_keys(values, torch.arange(m, device=values.device)), k) & 0xFFFFFFFF
    return values.gather(-1, index), index


def _sorted(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By sorting all."""
    best, index = values.sort(dim=-1, stable=True)
    return best[..., :k].clone(), index[..., :k].clone()


def _of_rounded(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of float64: rounding to float32 keeps the order; a few more than ``k`` are sorted.

    Rows where what rounds to the k-th may go on beyond these are sorted whole.
    """
    rounded, index = select(values.float(), k + SPARE)
    best, index = (t[..., :k].clone() for t in by_value_then_place(values.gather(-1, index), index))
    unsure = ~(rounded[..., k - 1] < rounded[..., -1])
    if bool(unsure.any()):
        best[unsure], index[unsure] = _sorted(values[unsure], k)
    return best, index


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


def by_value_then_place(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``(..., k)`` and their places, below 2^31, sorted by value, ties by place; NaN last.

    Example:
        >>> import torch
        >>> by_value_then_place(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0, 7, 3]))
        (tensor([1., 1., 2.]), tensor([3, 7, 0]))
    """
    if values.dtype != torch.float32:
        order = order_by_value_then_place(values, places)
        return values.gather(-1, order), places.gather(-1, order)
    keys = _first(_keys(values, places), values.shape[-1])
    bits = (keys >> 32).to(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.view(torch.float32), keys & 0xFFFFFFFF


def order_by_value_then_place(values: Tensor, places: Tensor) -> Tensor:
    """The order that sorts each row by value, ties by place."""
    order = places.argsort(dim=-1)
    return order.gather(-1, values.gather(-1, order).argsort(dim=-1, stable=True))


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


def _short(values: Tensor, k: int) -> Tensor:
    """Columns of the ``k`` smallest, from few keys of half the size.

    Rows where these leave the choice unsure are looked at whole.
    """
    index, unsure, total = _listed(values, k)
    if bool(total.isnan()):
        index, unsure, _ = _listed(values.nan_to_num(torch.inf, torch.inf, -torch.inf), k)
    if bool(unsure.any()):
        columns = torch.arange(values.shape[-1], device=values.device)
        index[unsure] = _first(_keys(values[unsure], columns), k) & 0xFFFFFFFF
    return index


def _listed(values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the ``k`` smallest, NaN aside, rows where that is not sure, and a sum that is NaN
    if any value is.

    Of long rows only the groups with the smallest minima are looked at. Column ``j`` is in group
    ``j % GROUPS``, so that minima are plain vector minima.
    """
    depth, rest = divmod(values.shape[-1], GROUPS)
    if depth < 4 or 2 * k > GROUPS:
        column, beyond = _shortlist(values, k + 1)
        total = values.sum()
    else:
        whole = values[..., : depth * GROUPS].unflatten(-1, (depth, GROUPS))
        minima = whole.amin(-2)
        group, far = _shortlist(minima, k + 1)
        shape = (*whole.shape[:-1], k + 1)
        chosen = whole.gather(-1, group.unsqueeze(-2).expand(shape)).flatten(-2)
        if rest:
            chosen = torch.cat([values[..., depth * GROUPS :], chosen], -1)
        place, beyond = _shortlist(chosen, k + 1)
        level = place.sub_(rest).div(k + 1, rounding_mode="floor")
        column = group.gather(-1, place - level * (k + 1)).add_(level, alpha=GROUPS)
        total = minima.sum()  # a NaN is the minimum of its group
        if rest:
            column = column.where(place >= 0, place + values.shape[-1])
            total = total + values[..., depth * GROUPS :].sum()
        beyond = torch.minimum(beyond, far)
    keys = _first(_keys(values.gather(-1, column), column), k)
    return keys & 0xFFFFFFFF, (keys[..., -1] >> 32) >= beyond, total


def _shortlist(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places of about the ``count`` smallest, NaN aside, and a bound.

    The last bits of a value give way to its place: keys of half the size, no two equal. The bound
    is the upper half of a key of :func:`_keys`: no value that is left out lies under it.
    """
    low = 1 << (values.shape[-1] - 1).bit_length()
    bits = values.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).bitwise_and_(-low)
    keys.bitwise_or_(torch.arange(values.shape[-1], dtype=torch.int32, device=values.device))
    keys.numpy().partition(count - 1, axis=-1)
    return (keys[..., :count] & (low - 1)).long(), keys[..., count - 1] & -low
