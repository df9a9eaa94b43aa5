"""What kernels for taps share: a target's j-th neighbour, sums by source in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.launching import launch

_PROGRAMS = 1024
"""Programs that fill a GPU."""
_PART = 512
"""Targets, at least, that are worth a sum of their own."""


@triton.jit
def of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO: tl.constexpr):
    """The j-th neighbour of targets, and its weight."""
    at = tl.cast(j, tl.int64) * n + rows
    index = tl.load(index_ptr + at, mask=rows < n, other=-1)
    if HAS_RHO:
        return index, tl.load(rho_ptr + at, mask=rows < n, other=0.0).to(tl.float32)
    return index, tl.full([rows.shape[0]], 1.0, tl.float32)


@triton.jit
def _sum_by_source(
    back_ptr,
    pair_ptr,
    start_ptr,
    to_x_ptr,
    c: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row that was chosen, which adds what its targets send it, in their order."""
    source = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.load(to_x_ptr + source * c + channels, mask=channels < c, other=0.0)
    for at in range(tl.load(start_ptr + source), tl.load(start_ptr + source + 1)):
        row = tl.load(pair_ptr + at)
        total += tl.load(back_ptr + row * c + channels, mask=channels < c, other=0.0)
    tl.store(to_x_ptr + source * c + channels, total, mask=channels < c)


def by_source(index: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """For each tap its targets by the source that they chose, and where each source's start."""
    chosen, target = index.sort(dim=1, stable=True)
    bounds = torch.arange(m + 1, device=index.device, dtype=index.dtype)
    starts = torch.searchsorted(chosen, bounds.expand(len(index), -1).contiguous())
    return target, starts


def sum_by_source(back: Tensor, order: tuple[Tensor, Tensor], tap: int, total: Tensor) -> None:
    """Add the rows ``back (n, c)`` that targets send by one tap to those of sources, ``(m, c)``."""
    (m, c), block = total.shape, max(16, min(128, gpu.next_power_of_2(total.shape[1])))
    tensors = (back, order[0][tap], order[1][tap], total)
    launch(_sum_by_source, (m, gpu.cdiv(c, block)), tensors, c=c, BLOCK_C=block)


def splits(n: int, programs: int) -> tuple[int, int]:
    """Into how many parts sums over ``n`` targets are split, and targets in each.

    Taps are few: without it nine programs would sum over all pixels of a batch.
    """
    count = max(1, min(_PROGRAMS // max(programs, 1), n // _PART))
    part = gpu.cdiv(gpu.cdiv(n, count), 32) * 32
    return gpu.cdiv(n, part), part
