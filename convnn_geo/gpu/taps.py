"""``out_i = sum_j W_j rho_ij x[index_ji]``: neighbours are read where they lie, forward and back.

Groups are an axis of the grid: channels of a group meet those of the same group alone, so that a
standard kernel has one group and a depthwise one as many as channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo.gpu.tiles import dot


@triton.jit
def _rows(x_ptr, index, rho, first, channels, width: tl.constexpr, c: tl.constexpr, real):
    """Channels of gathered, weighted rows ``(BLOCK_N, BLOCK_C)``; zeros where there is none."""
    x = tl.load(
        x_ptr + index.to(tl.int64)[:, None] * c + (first + channels)[None, :],
        mask=(real & (index >= 0))[:, None] & (channels < width)[None, :],
        other=0.0,
    )
    return (x.to(tl.float32) * rho[:, None]).to(x.dtype)


@triton.jit
def _of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO: tl.constexpr):
    """The j-th neighbour of targets, and its weight."""
    index = tl.load(index_ptr + j * n + rows, mask=rows < n, other=-1)
    if HAS_RHO:
        return index, tl.load(rho_ptr + j * n + rows, mask=rows < n, other=0.0).to(tl.float32)
    return index, tl.full([rows.shape[0]], 1.0, tl.float32)


@triton.jit
def _forward(
    x_ptr,
    index_ptr,
    rho_ptr,
    tap_ptr,
    bias_ptr,
    out_ptr,
    n,
    k,
    c: tl.constexpr,
    d: tl.constexpr,
    c_group: tl.constexpr,
    d_group: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    group = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    outs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for j in range(k):
        index, rho = _of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
        for start in range(0, c_group, BLOCK_C):
            channels = start + tl.arange(0, BLOCK_C)
            x = _rows(x_ptr, index, rho, group * c_group, channels, c_group, c, rows < n)
            tap = tl.load(
                tap_ptr + (j * d + group * d_group + outs)[None, :] * c_group + channels[:, None],
                mask=(outs < d_group)[None, :] & (channels < c_group)[:, None],
                other=0.0,
            )
            if c_group == 1:
                total += x.to(tl.float32) * tap.to(tl.float32)
            else:
                total = dot(x, tap, total)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + group * d_group + outs, mask=outs < d_group, other=0.0)
        total += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * d + (group * d_group + outs)[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(rows < n)[:, None] & (outs < d_group)[None, :],
    )


@triton.jit
def _backward_of_rows(
    x_ptr,
    index_ptr,
    rho_ptr,
    tap_ptr,
    grad_ptr,
    to_x_ptr,
    to_rho_ptr,
    n,
    k,
    c: tl.constexpr,
    d: tl.constexpr,
    c_group: tl.constexpr,
    d_group: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
):
    """What each pair's row receives, ``W_j^T grad_i``, added where the row lies."""
    group, j = tl.program_id(2), tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    index, rho = _of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
    of_rho = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, c_group, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        back = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first in range(0, d_group, BLOCK_D):
            outs = first + tl.arange(0, BLOCK_D)
            grad = tl.load(
                grad_ptr + rows[:, None] * d + (group * d_group + outs)[None, :],
                mask=(rows < n)[:, None] & (outs < d_group)[None, :],
                other=0.0,
            )
            tap = tl.load(
                tap_ptr + (j * d + group * d_group + outs)[:, None] * c_group + channels[None, :],
                mask=(outs < d_group)[:, None] & (channels < c_group)[None, :],
                other=0.0,
            )
            back = dot(grad, tap, back)
        real = (rows < n) & (index >= 0)
        at = index.to(tl.int64)[:, None] * c + (group * c_group + channels)[None, :]
        stored = real[:, None] & (channels < c_group)[None, :]
        if HAS_RHO:
            x = tl.load(x_ptr + at, mask=stored, other=0.0).to(tl.float32)
            of_rho += tl.sum(back * x, 1)
        tl.atomic_add(to_x_ptr + at, back * rho[:, None], mask=stored, sem="relaxed")
    if HAS_RHO:
        tl.atomic_add(to_rho_ptr + j * n + rows, of_rho, mask=rows < n, sem="relaxed")


@triton.jit
def _backward_of_taps(
    x_ptr,
    index_ptr,
    rho_ptr,
    grad_ptr,
    to_tap_ptr,
    n,
    k,
    c: tl.constexpr,
    d: tl.constexpr,
    c_group: tl.constexpr,
    d_group: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
):
    """One tile of one tap's gradient, ``sum_i grad_i (rho_ij x)^T``, over all targets in order."""
    group, j = tl.program_id(2), tl.program_id(1)
    outs = tl.program_id(0) // CHANNEL_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        index, rho = _of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
        x = _rows(x_ptr, index, rho, group * c_group, channels, c_group, c, rows < n)
        grad = tl.load(
            grad_ptr + rows[None, :] * d + (group * d_group + outs)[:, None],
            mask=(rows < n)[None, :] & (outs < d_group)[:, None],
            other=0.0,
        )
        total = dot(grad, x, total)
    tl.store(
        to_tap_ptr + (j * d + group * d_group + outs)[:, None] * c_group + channels[None, :],
        total,
        mask=(outs < d_group)[:, None] & (channels < c_group)[None, :],
    )


def gather_taps(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    """The sum over neighbours, ``(n, d)``.

    Args:
        rows: ``(m, c)``.
        index: ``(k, n)``; -1 for none.
        rho: ``(k, n)`` or None.
        taps: ``(k, d, c // groups)``.
        bias: ``(d,)`` or None.
        groups: of channels.
    """
    (k, n), (d, c_group), c = index.shape, taps.shape[1:], rows.shape[1]
    out = rows.new_empty(n, d)
    block_n, block_d = 32, _block(d // groups)
    _forward[(triton.cdiv(n, block_n), triton.cdiv(d // groups, block_d), groups)](
        *(rows, index, rho, taps, bias, out, n, k),
        **_sizes(c, d, c_group, groups),
        BLOCK_N=block_n,
        BLOCK_C=1 if c_group == 1 else _block(c_group),
        BLOCK_D=block_d,
        HAS_RHO=rho is not None,
        HAS_BIAS=bias is not None,
    )
    return out


def gather_taps_backward(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    grad: Tensor,
    groups: int,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to rows, rho and taps, in float32; ``needed``: of rows or rho, and of taps."""
    (k, n), (d, c_group), c = index.shape, taps.shape[1:], rows.shape[1]
    sizes = _sizes(c, d, c_group, groups)
    blocks = {"BLOCK_N": 32, "BLOCK_C": _block(c_group), "BLOCK_D": _block(d // groups)}
    to_rows = to_rho = to_taps = None
    if needed[0]:
        to_rows = torch.zeros_like(rows, dtype=torch.float32)
        to_rho = None if rho is None else torch.zeros_like(rho, dtype=torch.float32)
        _backward_of_rows[(triton.cdiv(n, 32), k, groups)](
            *(rows, index, rho, taps, grad, to_rows, to_rho, n, k),
            **sizes,
            **blocks,
            HAS_RHO=rho is not None,
        )
    if needed[1]:
        to_taps = torch.empty_like(taps, dtype=torch.float32)
        channel_blocks = triton.cdiv(c_group, blocks["BLOCK_C"])
        tiles = channel_blocks * triton.cdiv(d // groups, blocks["BLOCK_D"])
        _backward_of_taps[(tiles, k, groups)](
            *(rows, index, rho, grad, to_taps, n, k),
            **sizes,
            **blocks,
            HAS_RHO=rho is not None,
            CHANNEL_BLOCKS=channel_blocks,
        )
    return to_rows, to_rho, to_taps


def _sizes(c: int, d: int, c_group: int, groups: int) -> dict[str, int]:
    return {"c": c, "d": d, "c_group": c_group, "d_group": d // groups}


def _block(size: int) -> int:
    return max(16, min(64, triton.next_power_of_2(size)))
