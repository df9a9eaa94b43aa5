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

    Ends are addresses within their lists, which lie at multiples of their size: the lower half of
    such an address never overflows.
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
def _held(end, last):
    """No end beyond the last that leaves room: the lower halves of both are compared."""
    if _INTERPRETED:
        end = tl.minimum(end, last)
    else:
        end = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, most, other;
            mov.b64 {low, high}, $1;
            mov.b64 {most, other}, $2;
            min.u32 low, low, most;
            mov.b64 $0, {low, high};
            }""",
            "=l,l,l",
            [end, last],
            dtype=tl.int64,
            is_pure=True,
            pack=1,
        )
    return end


@triton.jit
def append(end, last, value, first, step: tl.constexpr, most, ROOM: tl.constexpr):
    """The same of a tile whose columns are every ``step``-th from the first on.

    ``ROOM``: pieces of which all entries find place after the ``last`` end; what lies there is
    overwritten by the pieces that follow.
    """
    LISTS: tl.constexpr = end.shape[1]
    if value.shape[1] == LISTS * ROOM:
        end = _held(end, last)
    if value.shape[1] == LISTS:
        columns = first + step * tl.arange(0, LISTS)
        columns = tl.broadcast_to(columns[None, :], value.shape)
        end = _append_each(end, value, columns, most)
    else:
        left, right = _halves(value)
        end = append(end, last, left, first, step, most, ROOM)
        first += step * left.shape[1]
        end = append(end, last, right, first, step, most, ROOM)
    return end


@triton.jit
def join(ptr, line, length, AHEAD: tl.constexpr, LENGTH: tl.constexpr, LISTED: tl.constexpr):
    """Entries of all lists of a row side by side where its line begins: values, then places.

    Of more than ``LISTED`` entries some are lost.

    Args:
        ptr: of all lines.
        line: where each row's begins.
        length: of each of its lists.
        AHEAD: entries of a line before the first list: 0 where lists are few, or ``LISTED``.
        LENGTH: of each list, at most.
    """
    LISTS: tl.constexpr = length.shape[1]
    lists, slots = tl.arange(0, LISTS)[None, :], tl.arange(0, LISTED)[None, :]
    if AHEAD:  # one entry of each list after the other looks for its slot
        before = tl.cumsum(length, 1) - length
        for j in range(0, tl.max(tl.max(length, 1), 0)):
            listed = (j < length) & (before + j < LISTED)
            at = ptr + line[:, None] + 2 * (AHEAD + lists * LENGTH + j)
            value, place = tl.load(at, mask=listed), tl.load(at + 1, mask=listed)
            to = ptr + line[:, None] + before + j
            tl.store(to, value, mask=listed)
            tl.store(to + LISTED, place, mask=listed)
    else:  # each slot looks for its entry, farther on by what lists before it leave empty
        at, end = line[:, None] // 2 + slots, tl.zeros_like(line)
        for one in tl.static_range(LISTS - 1):
            held = tl.sum(tl.where(lists == one, length, 0), 1)
            end += held
            at += tl.where(slots >= end[:, None], LENGTH - held[:, None], 0)
        listed = slots < tl.sum(length, 1)[:, None]
        entry = tl.load(ptr.to(tl.pointer_type(tl.int64)) + at, mask=listed)
        tl.debug_barrier()  # all have read what is overwritten
        to = ptr + line[:, None] + slots
        tl.store(to, entry.to(tl.int32), mask=listed)
        tl.store(to + LISTED, (entry >> 32).to(tl.int32), mask=listed)
    tl.debug_barrier()  # what one warp has stored, others read
