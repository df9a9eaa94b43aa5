"""What kernels share: products of tiles, and floats as integers in the same order."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo import gpu

_WIDEN: tl.constexpr = tl.constexpr(gpu.interpreted())
"""The interpreter multiplies no halves."""
_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
HIDDEN: tl.constexpr = tl.constexpr(0x7FFFFFFE)
"""The code of a source that a mask hides."""
PADDING: tl.constexpr = tl.constexpr(0x7FFFFFFF)
"""The code of what only fills a tile up."""


@triton.jit
def dot(a, b, total):
    """``total + a b`` in float32. No TF32: it would choose other neighbours; halves are exact."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def ordered(value):
    """Integers in the order of floats; -0.0 counts as 0.0, NaN comes after infinity.

    ``HIDDEN`` and ``PADDING`` come after both.
    """
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)


@triton.jit
def unordered(code):
    """The floats again; infinity for what is hidden."""
    value = (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(code > _NAN, float("inf"), value)


@triton.jit
def products(
    q_ptr,
    key_ptr,
    rows,
    columns,
    n,
    m,
    q_row,
    key_row,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``<q, key>`` of rows and columns of two arrays ``(n, d)`` and ``(m, d)``, in float32.

    Rows lie ``q_row`` and ``key_row`` numbers apart.
    """
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in tl.range(0, d, BLOCK_D, num_stages=1):
        axes = start + tl.arange(0, BLOCK_D)
        q = tl.load(
            q_ptr + rows[:, None].to(tl.int64) * q_row + axes[None, :],
            mask=(rows < n)[:, None] & (axes < d)[None, :],
            other=0.0,
        )
        key = tl.load(
            key_ptr + columns[None, :].to(tl.int64) * key_row + axes[:, None],
            mask=(columns < m)[None, :] & (axes < d)[:, None],
            other=0.0,
        )
        total = dot(q, key, total)
    return total


@triton.jit
def axis_of(ptr, rows, n, stride, axis, KIND: tl.constexpr):
    """One axis of rows, as a ``KIND`` of float."""
    return tl.load(ptr + rows.to(tl.int64) * stride + axis, mask=rows < n, other=0.0).to(KIND)


@triton.jit
def squared_differences(
    q_ptr,
    key_ptr,
    rows,
    columns,
    n,
    m,
    q_row,
    key_row,
    d: tl.constexpr,
    KIND: tl.constexpr,
    ANGLES: tl.constexpr,
):
    """``|q - key|^2`` as a ``KIND`` of float, summed in the order of axes.

    Of ``ANGLES`` it is 2 from and to a zero vector; all others have length one.
    """
    total = tl.zeros([rows.shape[0], columns.shape[0]], KIND)
    q_length, key_length = tl.zeros([rows.shape[0]], KIND), tl.zeros([columns.shape[0]], KIND)
    if d <= 8:
        for axis in tl.static_range(0, d):
            q = axis_of(q_ptr, rows, n, q_row, axis, KIND)
            key = axis_of(key_ptr, columns, m, key_row, axis, KIND)
            total += (q[:, None] - key[None, :]) * (q[:, None] - key[None, :])
            q_length, key_length = q_length + q * q, key_length + key * key
    else:
        for axis in range(0, d):
            q = axis_of(q_ptr, rows, n, q_row, axis, KIND)
            key = axis_of(key_ptr, columns, m, key_row, axis, KIND)
            total += (q[:, None] - key[None, :]) * (q[:, None] - key[None, :])
            q_length, key_length = q_length + q * q, key_length + key * key
    if ANGLES:
        total = tl.where((q_length < 0.25)[:, None] | (key_length < 0.25)[None, :], 2.0, total)
    return total


@triton.jit
def allowed(mask_ptr, rows, columns, n, m, mask_row):
    """Whether a mask allows the pairs of a tile."""
    seen = tl.load(
        mask_ptr + rows[:, None].to(tl.int64) * mask_row + columns[None, :],
        mask=(rows < n)[:, None] & (columns < m)[None, :],
        other=1,
    )
    return seen != 0


@triton.jit
def nearer_by(less_ptr, rows, columns, n, m, less_row):
    """What distances of the pairs of a tile are less by."""
    less = tl.load(
        less_ptr + rows[:, None].to(tl.int64) * less_row + columns[None, :],
        mask=(rows < n)[:, None] & (columns < m)[None, :],
        other=0.0,
    )
    return less.to(tl.float32)


@triton.jit
def how_many(chosen):
    """Of each row: in floats, as sums of bits would be packed bit by bit."""
    return tl.sum(tl.where(chosen, 1.0, 0.0), 1)
