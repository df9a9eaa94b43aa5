"""Distances in float64 that settle who is nearer where products in float32 do not tell."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo.gpu.tiles import axis_of, squared_differences


@triton.jit
def rounding(square, longest_ptr, share, PRODUCTS: tl.constexpr):
    """How far off differences of a row's values may be, by its length and the longest source's.

    Those of squared distances by the square of the lengths' sum, those of ``PRODUCTS`` by their
    product. Products of what is tiny may vanish.
    """
    # The other root takes tiny ones for 0; and what has no square in float32 has a length.
    length = tl.sqrt_rn(square) + 1e-17
    longest = tl.load(longest_ptr) + 1e-17
    size = length * longest if PRODUCTS else (length + longest) * (length + longest)
    return size * share + 1e-34


@triton.jit
def _of_pairs(
    q_ptr,
    key_ptr,
    rows,
    places,
    real,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ANGLES: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Squared differences, or products, of each row and one source."""
    total = tl.zeros([rows.shape[0]], tl.float64)
    q_length, key_length = (
        tl.zeros([rows.shape[0]], tl.float64),
        tl.zeros([rows.shape[0]], tl.float64),
    )
    for start in range(0, d, BLOCK_D):
        axes = start + tl.arange(0, BLOCK_D)
        there = real[:, None] & (axes < d)[None, :]
        at = rows.to(tl.int64)[:, None] * d + axes[None, :]
        q = tl.load(q_ptr + at, mask=there, other=0.0).to(tl.float64)
        at = places.to(tl.int64)[:, None] * d + axes[None, :]
        key = tl.load(key_ptr + at, mask=there, other=0.0).to(tl.float64)
        if PRODUCTS:
            total += tl.sum(q * key, 1)
        else:
            total += tl.sum((q - key) * (q - key), 1)
        q_length += tl.sum(q * q, 1)
        key_length += tl.sum(key * key, 1)
    if ANGLES:
        total = tl.where((q_length < 0.25) | (key_length < 0.25), 2.0, total)
    return total


@triton.jit
def _of_tile(
    q_ptr,
    key_ptr,
    rows,
    columns,
    n,
    m,
    d: tl.constexpr,
    ANGLES: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """The same of rows and columns."""
    if PRODUCTS:
        total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float64)
        for axis in range(0, d):
            q = axis_of(q_ptr, rows, n, d, axis, tl.float64)
            total += q[:, None] * axis_of(key_ptr, columns, m, d, axis, tl.float64)[None, :]
    else:
        total = squared_differences(
            q_ptr, key_ptr, rows, columns, n, m, d, d, d, tl.float64, ANGLES
        )
    return total


@triton.jit
def exact_of_pairs(
    q_ptr,
    key_ptr,
    bias_ptr,
    rows,
    places,
    real,
    scale,
    fine,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ANGLES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Distances of each row and one source, made in float64 and rounded to float32.

    Args:
        q_ptr: ``(n, d)``.
        key_ptr: ``(m, d)``.
        bias_ptr: ``(m,)``, of ``PRODUCTS``.
        rows: targets.
        places: a source of each.
        real: whether a target and its source are there.
        scale: of products.
        fine: what a float32 cannot hold of it.
        d: axes.
        BLOCK_D: axes at once.
        ANGLES: squared differences are 2 from and to zero vectors.
        PRODUCTS: distances are ``bias - scale <q, key>`` instead.
        HAS_BIAS: whether there is a bias.
    """
    total = _of_pairs(q_ptr, key_ptr, rows, places, real, d, BLOCK_D, ANGLES, PRODUCTS)
    if PRODUCTS:
        total *= -(tl.cast(scale, tl.float64) + tl.cast(fine, tl.float64))
        if HAS_BIAS:
            total += tl.load(bias_ptr + places, mask=real, other=0.0).to(tl.float64)
    return total.to(tl.float32)


@triton.jit
def exact_of_tile(
    q_ptr,
    key_ptr,
    bias_ptr,
    rows,
    columns,
    n,
    m,
    scale,
    fine,
    d: tl.constexpr,
    ANGLES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The same of rows and columns, of ``n`` and ``m``."""
    total = _of_tile(q_ptr, key_ptr, rows, columns, n, m, d, ANGLES, PRODUCTS)
    if PRODUCTS:
        total *= -(tl.cast(scale, tl.float64) + tl.cast(fine, tl.float64))
        if HAS_BIAS:
            total += tl.load(bias_ptr + columns, mask=columns < m, other=0.0).to(tl.float64)[
                None, :
            ]
    return total.to(tl.float32)
