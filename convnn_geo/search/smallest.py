"""The k smallest of each row, ties to the lowest index, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest of each row in order of (value, index): values and indices.

    ``torch.topk`` breaks ties as it likes. Where it is the fastest (the CPU) it is asked for one
    more: two equal neighbours among ``k + 1`` sorted values are the only sign of a tie that could
    matter, and only such rows are sorted again. Elsewhere rows are sorted by a key that holds the
    value's bits and the index, so that nothing waits for the device.

    Args:
        values: ``(..., m)``; NaN counts as the largest.
        k: at most ``m``.

    Example:
        >>> import torch
        >>> k_smallest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2)[1].tolist()
        [3, 1]
    """
    m = values.shape[-1]
    if k == 0 or values.numel() == 0:
        return values[..., :k], torch.zeros_like(values[..., :k], dtype=torch.long)
    if values.device.type != "cpu":
        return _stable(values, k)
    best, index = values.topk(min(k + 1, m), largest=False)
    tied = (best[..., 1:] == best[..., :-1]).any(-1) | best.isnan().any(-1)
    best, index = best[..., :k], index[..., :k]
    if bool(tied.any()):
        best, index = best.contiguous(), index.contiguous()
        best[tied], index[tied] = _stable(values[tied], k)
    return best, index


def _stable(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if values.dtype != torch.float32 or values.shape[-1] >= 2**31:
        best, index = values.sort(dim=-1, stable=True)
        return best[..., :k], index[..., :k]
    # Float bits, taken as integers, sort like the floats once negatives are mirrored.
    # -0.0 + 0.0 is 0.0, and a NaN's sign is dropped, so equal values have equal bits.
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (bits << 32) | torch.arange(values.shape[-1], device=values.device)
    index = key.topk(k, largest=False).values & 0xFFFFFFFF
    return values.gather(-1, index), index
