"""``out_i = sum_j W_j rho_ij x[index_ji]``: neighbours are read where they lie, forward and back.

Groups are an axis of the grid: channels of a group meet those of the same group alone. Where each
channel is a group of its own there are no products of matrices: see depthwise.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu import depthwise
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.scatter import by_source, of_rank, splits, sum_by_source
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
        index, rho = of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
        for start in range(0, c_group, BLOCK_C):
            channels = start + tl.arange(0, BLOCK_C)
            x = _rows(x_ptr, index, rho, group * c_group, channels, c_group, c, rows < n)
            out = tl.cast(j, tl.int64) * d + group * d_group + outs
            tap = tl.load(
                tap_ptr + out[None, :] * c_group + channels[:, None],
                mask=(outs < d_group)[None, :] & (channels < c_group)[:, None],
                other=0.0,
            )
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
    first_tap,
    c: tl.constexpr,
    d: tl.constexpr,
    c_group: tl.constexpr,
    d_group: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """What each pair's row receives, ``W_j^T grad_i``: added where the row lies, or left by pair.

    Each group has its own sums for ``rho``.
    """
    group, j = tl.program_id(2), (tl.program_id(1) + first_tap).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    index, rho = of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
    real = (rows < n) & (index >= 0)
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
        channel = (group * c_group + channels)[None, :]
        at = index.to(tl.int64)[:, None] * c + channel
        stored = real[:, None] & (channels < c_group)[None, :]
        if HAS_RHO:
            x = tl.load(x_ptr + at, mask=stored, other=0.0).to(tl.float32)
            of_rho += tl.sum(back * x, 1)
        if ATOMIC:
            tl.atomic_add(to_x_ptr + at, back * rho[:, None], mask=stored, sem="relaxed")
        else:
            tl.store(to_x_ptr + rows[:, None] * c + channel, back * rho[:, None], mask=stored)
    if HAS_RHO:
        tl.store(to_rho_ptr + (tl.cast(group, tl.int64) * k + j) * n + rows, of_rho, mask=rows < n)


@triton.jit
def _backward_of_taps(
    x_ptr,
    index_ptr,
    rho_ptr,
    grad_ptr,
    to_tap_ptr,
    n,
    k,
    part,
    c: tl.constexpr,
    d: tl.constexpr,
    c_group: tl.constexpr,
    d_group: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One tile of one tap's gradient, ``sum_i grad_i (rho_ij x)^T``, over ``part`` targets."""
    group, j = tl.program_id(2), tl.program_id(1).to(tl.int64)
    tile, split = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    outs = tile // CHANNEL_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = tile % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    first = tl.cast(split, tl.int64) * part
    for start in range(0, part, BLOCK_N):
        rows = first + start + tl.arange(0, BLOCK_N)
        index, rho = of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
        x = _rows(x_ptr, index, rho, group * c_group, channels, c_group, c, rows < n)
        grad = tl.load(
            grad_ptr + rows[None, :] * d + (group * d_group + outs)[:, None],
            mask=(rows < n)[None, :] & (outs < d_group)[:, None],
            other=0.0,
        )
        total = dot(grad, x, total)
    row = (tl.cast(split, tl.int64) * k + j) * d + group * d_group + outs
    tl.store(
        to_tap_ptr + row[:, None] * c_group + channels[None, :],
        total,
        mask=(outs < d_group)[:, None] & (channels < c_group)[None, :],
    )


@gpu.on_its_device
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
    if not out.numel():
        return out
    if c_group == 1:
        return depthwise.forward(rows, index, rho, taps, bias, out)
    block_n, block_d = 32, _block(d // groups)
    launch(
        _forward,
        (gpu.cdiv(n, block_n), gpu.cdiv(d // groups, block_d), groups),
        (rows, index, rho, taps, bias, out),
        (n, k),
        **_sizes(c, d, c_group, groups),
        BLOCK_N=block_n,
        BLOCK_C=_block(c_group),
        BLOCK_D=block_d,
        HAS_RHO=rho is not None,
        HAS_BIAS=bias is not None,
    )
    return out


@gpu.on_its_device
def gather_taps_backward(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    grad: Tensor,
    groups: int,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to rows, rho and taps, in float32; ``needed``: of rows or rho, and of taps.

    Under ``torch.use_deterministic_algorithms`` sums have a fixed order, tap by tap.
    """
    (k, n), (d, c_group), c = index.shape, taps.shape[1:], rows.shape[1]
    if not grad.numel() or not k:
        return tuple(  # type: ignore[return-value]
            torch.zeros_like(t, dtype=torch.float32) if t is not None and asked else None
            for t, asked in zip((rows, rho, taps), (needed[0], *needed), strict=True)
        )
    if c_group == 1:
        return depthwise.backward(rows, index, rho, taps, grad, needed)
    sizes = _sizes(c, d, c_group, groups)
    blocks: dict[str, Any] = {
        "BLOCK_N": 32,
        "BLOCK_C": _block(c_group),
        "BLOCK_D": _block(d // groups),
    }
    to_rows = to_rho = to_taps = None
    if needed[0]:
        atomic = not torch.are_deterministic_algorithms_enabled()
        to_rows = torch.zeros_like(rows, dtype=torch.float32)
        of_rho = None if rho is None else rho.new_empty(groups, k, n, dtype=torch.float32)
        order = None if atomic else by_source(index, len(rows))
        for tap in range(1 if atomic else k):
            back = to_rows if atomic else to_rows.new_empty(n, c)
            launch(
                _backward_of_rows,
                (gpu.cdiv(n, 32), k if atomic else 1, groups),
                (rows, index, rho, taps, grad, back, of_rho),
                (n, k, tap),
                **sizes,
                **blocks,
                HAS_RHO=rho is not None,
                ATOMIC=atomic,
            )
            if order is not None:
                sum_by_source(back, order, tap, to_rows)
        to_rho = None if of_rho is None else of_rho.sum(0)
    if needed[1]:
        channel_blocks = gpu.cdiv(c_group, blocks["BLOCK_C"])
        tiles = channel_blocks * gpu.cdiv(d // groups, blocks["BLOCK_D"])
        count, part = splits(n, tiles * k * groups)
        of_taps = taps.new_empty(count, *taps.shape, dtype=torch.float32)
        launch(
            _backward_of_taps,
            (tiles * count, k, groups),
            (rows, index, rho, grad, of_taps),
            (n, k, part),
            **sizes,
            **blocks,
            HAS_RHO=rho is not None,
            CHANNEL_BLOCKS=channel_blocks,
            TILES=tiles,
        )
        to_taps = of_taps.sum(0)
    return to_rows, to_rho, to_taps


def _sizes(c: int, d: int, c_group: int, groups: int) -> dict[str, Any]:
    return {"c": c, "d": d, "c_group": c_group, "d_group": d // groups}


def _block(size: int) -> int:
    return max(16, min(64, gpu.next_power_of_2(size)))
