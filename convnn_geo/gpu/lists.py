"""Lists in memory that threads fill each on its own: no thread waits for where others are.

A tile of registers is cut into pieces as narrow as there are lists for a row, piece after piece is
appended. Cut in halves, a tile stays where it is if a thread holds the same place of both; so do
tiles of products but for their lowest bit, which two columns side by side have in one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo import gpu

_INTERPRETED: tl.constexpr = tl.constexpr(gpu.interpreted())
"""The interpreter knows no machine code."""


@triton.jit
def _halves(x):
    """Both halves of the last axis."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).trans(0, 2, 1).split()


@triton.jit
def narrow(x, LISTS: tl.constexpr):
    """The first columns of a half, of a half of it, and so on: where threads hold them already."""
    if x.shape[1] > LISTS:
        left, _ = _halves(x)
        x = narrow(left, LISTS)
    return x


@triton.jit
def _append_each(end, value, column, most):
    """At the end of each list one distance and its column, if it is near enough: the new end.

    Ends are addresses, and no list lies where the lower half of these would overflow.
    """
    if _INTERPRETED:
        near, at = value <= most, end.to(tl.pointer_type(tl.int32))
        tl.store(at, value.to(tl.int32, bitcast=True), mask=near)
        tl.store(at + 1, column, mask=near)
        end = tl.where(near, end + 8, end)
    else:
        end = tl.inline_asm_elementwise(
            """{
            .reg .pred near;
            .reg .b32 low, high, value;
            setp.le.f32 near, $2, $4;
            mov.b32 value, $2;
            @near st.global.v2.b32 [$1], {value, $3};
            mov.b64 {low, high}, $1;
            @near add.u32 low, low, 8;
            mov.b64 $0, {low, high};
            }""",
            "=l,l,f,r,f",
            [end, value, column, most],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    return end


@triton.jit
def append(end, value, first, step: tl.constexpr, most):
    """The same of a tile whose columns are every ``step``-th from the first on."""
    LISTS: tl.constexpr = end.shape[1]
    if value.shape[1] == LISTS:
        columns = first + step * tl.arange(0, LISTS)
        columns = tl.broadcast_to(columns[None, :], value.shape)
        end = _append_each(end, value, columns, most)
    else:
        left, right = _halves(value)
        end = append(end, left, first, step, most)
        first += step * left.shape[1]
        end = append(end, right, first, step, most)
    return end
