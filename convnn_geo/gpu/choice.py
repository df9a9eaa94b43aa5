"""Whom rows of scores choose: the k largest, by a threshold; ties to the lowest column."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo import gpu
from convnn_geo.gpu.tiles import PADDING, how_many, ordered, unordered

_INTERPRETED: tl.constexpr = tl.constexpr(gpu.interpreted())
"""The interpreter knows no assembly."""
_BY_VALUE: tl.constexpr = tl.constexpr(12)
"""Steps between values, which part those near one another soonest; the rest go between bits."""
_NOTHING: tl.constexpr = tl.constexpr(float("-inf"))
_LARGEST: tl.constexpr = tl.constexpr(0x7F7FFFFF)
"""The code of the largest finite float."""


@triton.jit
def _middle(low, high, step):
    """A code between two others, the higher one excluded: by value where both are finite."""
    most = tl.minimum(high, _LARGEST)
    least = tl.minimum(tl.maximum(low, -_LARGEST), most)
    value = ordered(0.5 * unordered(least) + 0.5 * unordered(most))
    value = tl.minimum(tl.maximum(value, low), high - 1)
    bits = (low & high) + ((low ^ high) >> 1)
    return tl.where(step < _BY_VALUE, tl.where(high <= _LARGEST, value, bits), bits)


@triton.jit
def bound(code, k):
    """For each row a code that ``k`` are not above; where more are not, the k-th smallest.

    Over as soon as every row of the tile has found one.
    """
    low = tl.min(code, 1)
    high = tl.max(tl.where(code == PADDING, low[:, None], code), 1)
    step = tl.zeros_like(low)
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = tl.where(low < high, _middle(low, high, step), low)
        step += tl.where(high <= _LARGEST, 1, 0)
        count = how_many(code <= middle[:, None])
        high = tl.where(count >= k, middle, high)
        low = tl.where(count == k, middle, tl.where(count > k, low, middle + 1))
    return high


@triton.jit
def last_tie(code, most, columns, k):
    """The column up to which codes equal to the bound ``most`` are chosen, one for each row.

    Together with all that is below it, ``k`` are. Ties past the k-th are rare: looked for where
    there are some.
    """
    last = tl.full([code.shape[0]], code.shape[1] - 1, tl.int32)
    if tl.max(how_many(code <= most[:, None]), 0) > k:
        first = tl.zeros_like(last)
        spare = k - how_many(code < most[:, None])
        while tl.max((first < last).to(tl.int32), 0) > 0:
            middle = (first + last) >> 1
            within = (code == most[:, None]) & (columns[None, :] <= middle[:, None])
            enough = how_many(within) >= spare
            last = tl.where(enough, middle, last)
            first = tl.where(enough, first, tl.minimum(middle + 1, last))
    return last


@triton.jit
def _add_halves(a, b):
    return tl.inline_asm_elementwise(
        "add.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _halves(a, b):
    """Two numbers as halves in one register."""
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _shares_of_halves(value, least):
    """How many halves of each row are not below ``least``: two at once."""
    ones = tl.inline_asm_elementwise(
        "set.ge.f16x2.f16x2 $0, $1, $2;",
        "=r,r,r",
        [value, _halves(least, least)[:, None]],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return tl.inline_asm_elementwise(
        "{.reg .f16 a, b; mov.b32 {a, b}, $1; add.f16 a, a, b; cvt.f32.f16 $0, a;}",
        "=f,r",
        [tl.reduce(ones, 1, _add_halves)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _logarithm(count):
    """Of a float, to one digit and with three instructions."""
    return count.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _narrowed(value, k, low, many, high, few, STEPS: tl.constexpr, HALVES: tl.constexpr):
    """Bounds that ``many`` and ``few`` of each row are not below, around the one that ``k`` are.

    Counts of scores fall about exponentially towards the largest: that gives two guesses, then
    intervals are halved, or nearly so.
    """
    wanted = _logarithm(tl.zeros_like(low) + k + 0.5)
    for step in range(STEPS):
        apart = tl.maximum(_logarithm(many) - _logarithm(few), 1.0)
        share = tl.fdiv(_logarithm(many) - wanted, apart)
        margin = tl.where(step < 2, 0.05, 0.4)
        share = tl.minimum(tl.maximum(share, margin), 1.0 - margin)
        guess = tl.where(many == k, low, low + (high - low) * share)
        count = _shares_of_halves(value, guess) if HALVES else how_many(value >= guess[:, None])
        enough = count >= k
        low, many = tl.where(enough, guess, low), tl.where(enough, count, many)
        high, few = tl.where(enough, high, guess), tl.where(enough, few, count)
    return low, many, high, few


@triton.jit
def _by_halves(value, k, low, top):
    """A better guess than ``low``: values as halves lie densest about it, which tells them apart.

    Two are counted at once.
    """
    R: tl.constexpr = value.shape[0]
    M: tl.constexpr = value.shape[1]
    zero = tl.zeros_like(top)
    scale = 1.0 / tl.where(top > low, top - low, 1.0)
    even, odd = tl.split(
        tl.reshape(value * scale[:, None] - (low * scale)[:, None], [R, M // 2, 2])
    )
    halves = _halves(even, odd)
    many = _shares_of_halves(halves, zero)
    about, _, _, _ = _narrowed(halves, k, zero, many, zero + 1.0, zero + 1.0, 12, True)
    about = about.to(tl.float16).to(tl.float32)
    ulp = (about.to(tl.int32, bitcast=True) & 0x7F800000) - (11 << 23)  # half of one
    ulp = tl.maximum(ulp, 0x33000000).to(tl.float32, bitcast=True)
    return tl.where(about > 0.0, low + (top - low) * (about - ulp), low)


@triton.jit
def threshold(value, k, real, GROUPS: tl.constexpr):
    """For each row what ``k`` are not below, whether there is none, and its largest value.

    Groups of columns, if there are more than ``k`` in all rows, give a first bound: of their
    largest values ``k`` are not below it, hardly more of the rest are. Ties and infinities may
    leave no threshold. Rows that are not ``real`` are not looked for.
    """
    if GROUPS:
        first = tl.max(tl.reshape(value, [value.shape[0], value.shape[1] // GROUPS, GROUPS]), 1)
        low, top = tl.min(first, 1), tl.max(first, 1)
        one = tl.zeros_like(top) + 1.0
        low, many, high, few = _narrowed(first, k, low, one * GROUPS, top, one, 4, False)
    else:
        low, top = tl.min(tl.where(value > _NOTHING, value, -_NOTHING), 1), tl.max(value, 1)
        one = tl.zeros_like(top) + 1.0
    guess = low
    if not _INTERPRETED:
        guess = _by_halves(value, k, low, top)
    count = how_many(value >= guess[:, None])
    if tl.max(((count != k) & real).to(tl.int32), 0) > 0:
        enough = count >= k
        many = tl.where(enough, count, how_many(value >= low[:, None]))
        low, high = tl.where(enough, guess, low), tl.where(enough, top, guess)
        few = tl.where(enough, one, count)
        guess, count, high, few = _narrowed(value, k, low, many, high, few, 12, False)
    return guess, (count != k) & real, top
