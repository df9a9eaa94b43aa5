"""Depthwise taps, ``out_ic = sum_j w_jc rho_ij x[index_ji]_c``: channels meet no others.

Several results may come of one channel: result ``o`` looks at channel ``o // (d / c)``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.scatter import by_source, of_rank, splits, sum_by_source

_ROWS = 32


@triton.jit
def _forward_depthwise(
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    outs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = (rows < n)[:, None] & (outs < d)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + outs, mask=outs < d, other=0.0).to(tl.float32)[None, :]
    for j in range(k):
        index, rho = of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
        at = index.to(tl.int64)[:, None] * c + (outs // (d // c))[None, :]
        x = tl.load(x_ptr + at, mask=here & (index >= 0)[:, None], other=0.0).to(tl.float32)
        tap = tl.load(tap_ptr + j * d + outs, mask=outs < d, other=0.0).to(tl.float32)
        total += x * rho[:, None] * tap[None, :]
    tl.store(out_ptr + rows[:, None] * d + outs[None, :], total, mask=here)


@triton.jit
def _backward_depthwise_rows(
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """What each pair's row receives: added where the row lies, or left by pair and result."""
    j = (tl.program_id(1) + first_tap).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(2)
    outs = block * BLOCK_D + tl.arange(0, BLOCK_D)
    index, rho = of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
    here = ((rows < n) & (index >= 0))[:, None] & (outs < d)[None, :]
    place = rows[:, None] * d + outs[None, :]
    grad = tl.load(grad_ptr + place, mask=here, other=0.0).to(tl.float32)
    tap = tl.load(tap_ptr + j * d + outs, mask=outs < d, other=0.0).to(tl.float32)
    back = grad * tap[None, :]
    at = index.to(tl.int64)[:, None] * c + (outs // (d // c))[None, :]
    if ATOMIC:
        tl.atomic_add(to_x_ptr + at, back * rho[:, None], mask=here, sem="relaxed")
    else:
        tl.store(to_x_ptr + place, back * rho[:, None], mask=here)
    if HAS_RHO:
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        to_rho = to_rho_ptr + (tl.cast(block, tl.int64) * k + j) * n
        tl.store(to_rho + rows, tl.sum(back * x, 1), mask=rows < n)


@triton.jit
def _backward_depthwise_taps(
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RHO: tl.constexpr,
):
    """Some results of one tap, over ``part`` targets."""
    split, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    outs = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, part, BLOCK_N):
        rows = split * part + start + tl.arange(0, BLOCK_N)
        index, rho = of_rank(index_ptr, rho_ptr, j, rows, n, HAS_RHO)
        here = ((rows < n) & (index >= 0))[:, None] & (outs < d)[None, :]
        at = index.to(tl.int64)[:, None] * c + (outs // (d // c))[None, :]
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * d + outs[None, :], mask=here, other=0.0)
        total += x * rho[:, None] * grad.to(tl.float32)
    at = (split * k + j) * d + outs
    tl.store(to_tap_ptr + at, tl.sum(total, 0), mask=outs < d)


def forward(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Fill ``out (n, d)``; arguments are those of :func:`convnn_geo.gpu.taps.gather_taps`."""
    (k, n), d, block = index.shape, taps.shape[1], _block(taps.shape[1])
    launch(
        _forward_depthwise,
        (gpu.cdiv(n, _ROWS), gpu.cdiv(d, block)),
        (rows, index, rho, taps, bias, out),
        (n, k),
        c=rows.shape[1],
        d=d,
        BLOCK_N=_ROWS,
        BLOCK_D=block,
        HAS_RHO=rho is not None,
        HAS_BIAS=bias is not None,
    )
    return out


def backward(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    grad: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to rows, rho and taps, as of :func:`convnn_geo.gpu.taps.gather_taps_backward`."""
    (k, n), d, (m, c) = index.shape, taps.shape[1], rows.shape
    block = _block(d)
    blocks = gpu.cdiv(d, block)
    sizes: dict[str, Any] = {"c": c, "d": d, "BLOCK_N": _ROWS, "BLOCK_D": block}
    sizes["HAS_RHO"] = rho is not None
    to_rows = to_rho = to_taps = None
    if needed[0]:
        atomic = not torch.are_deterministic_algorithms_enabled()
        to_rows = rows.new_zeros(m, c if atomic else d, dtype=torch.float32)
        of_rho = None if rho is None else rho.new_empty(blocks, k, n, dtype=torch.float32)
        order = None if atomic else by_source(index, m)
        for tap in range(1 if atomic else k):
            back = to_rows if atomic else to_rows.new_empty(n, d)
            launch(
                _backward_depthwise_rows,
                (gpu.cdiv(n, _ROWS), k if atomic else 1, blocks),
                (rows, index, rho, taps, grad, back, of_rho),
                (n, k, tap),
                **sizes,
                ATOMIC=atomic,
            )
            if order is not None:
                sum_by_source(back, order, tap, to_rows)
        to_rows = to_rows if atomic else to_rows.view(m, c, -1).sum(-1)
        to_rho = None if of_rho is None else of_rho.sum(0)
    if needed[1]:
        count, part = splits(n, k * blocks)
        of_taps = taps.new_empty(count, *taps.shape, dtype=torch.float32)
        launch(
            _backward_depthwise_taps,
            (count, k, blocks),
            (rows, index, rho, grad, of_taps),
            (n, k, part),
            **sizes,
        )
        to_taps = of_taps.sum(0)
    return to_rows, to_rho, to_taps


def _block(d: int) -> int:
    return max(16, min(64, gpu.next_power_of_2(d)))
