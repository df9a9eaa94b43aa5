"""What kernels share: products of tiles, and floats as integers in the same order."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo import gpu

_WIDEN: tl.constexpr = tl.constexpr(gpu.interpreted())
"""The interpreter multiplies no halves."""


@triton.jit
def dot(a, b, total):
    """``total + a b`` in float32. No TF32: it would choose other neighbours; halves are exact."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def ordered(value):
    """Integers in the order of floats; -0.0 counts as 0.0, NaN as the largest."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def unordered(code):
    """The floats again."""
    return (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def products(q_ptr, key_ptr, rows, columns, n, m, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """``<q, key>`` of rows and columns of two arrays ``(n, d)`` and ``(m, d)``, in float32."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in tl.static_range(0, d, BLOCK_D):
        axes = start + tl.arange(0, BLOCK_D)
        q = tl.load(
            q_ptr + rows[:, None].to(tl.int64) * d + axes[None, :],
            mask=(rows < n)[:, None] & (axes < d)[None, :],
            other=0.0,
        )
        key = tl.load(
            key_ptr + columns[None, :].to(tl.int64) * d + axes[:, None],
            mask=(columns < m)[None, :] & (axes < d)[:, None],
            other=0.0,
        )
        total = dot(q, key, total)
    return total


@triton.jit
def squared_differences(q_ptr, key_ptr, rows, columns, n, m, d: tl.constexpr):
    """``|q - key|^2``, summed in the order of axes."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for axis in tl.static_range(0, d):
        q = tl.load(q_ptr + rows.to(tl.int64) * d + axis, mask=rows < n, other=0.0)
        key = tl.load(key_ptr + columns.to(tl.int64) * d + axis, mask=columns < m, other=0.0)
        difference = q.to(tl.float32)[:, None] - key.to(tl.float32)[None, :]
        total += difference * difference
    return total
