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
_OF_GROUPS: tl.constexpr = tl.constexpr(6)
"""Steps towards a threshold among the largest of groups, which are few."""
_AT_ONCE: tl.constexpr = tl.constexpr(3)
"""Steps among all, before it is asked whether all rows have found theirs."""
_ROUNDS: tl.constexpr = tl.constexpr(6)
_FEW: tl.constexpr = tl.constexpr(8)
"""More than are wanted, at most, that drop out one by one."""
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
def above(value, least, sharp):
    """1 where a value is above ``least``, 0 where it is not, by one instruction.

    A difference is made ``sharp`` times as large and cut off at 0 and 1: where it is tiny even so,
    what comes out is between.
    """
    if _INTERPRETED:
        above = tl.where(value > least[:, None], 1.0, 0.0)
    else:
        above = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [value, sharp[:, None], -(least * sharp)[:, None]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return above


@triton.jit
def below(low, top):
    """Somewhat less than the least of each row, so that this one, too, is above it."""
    return low - ((top - low) * 0.0009765625 + tl.abs(low) * 2.384185791015625e-07 + 1e-37)


@triton.jit
def sharpness(low, top):
    """For :func:`above`: 2^30 over about the range of values, a power of two."""
    exponent = 284 - ((top - low).to(tl.int32, bitcast=True) >> 23 & 255)
    exponent = tl.maximum(tl.minimum(exponent, 254), 1)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _logarithm(count):
    """Of a float, to one digit and with three instructions."""
    return count.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def narrowed(value, k, low, many, high, few, sharp, STEPS: tl.constexpr):
    """Bounds that ``many`` and ``few`` of each row are above, around one that ``k`` are.

    Counts of scores fall about exponentially towards the largest, which gives guesses that are
    kept away from what is known already.
    """
    wanted = _logarithm(tl.zeros_like(low) + k + 0.5)
    for _ in tl.range(STEPS, loop_unroll_factor=1):  # a longer kernel is fetched more slowly
        apart = tl.maximum(_logarithm(many) - _logarithm(few), 1.0)
        share = tl.fdiv(_logarithm(many) - wanted, apart)
        share = tl.minimum(tl.maximum(share, 0.3), 0.7)
        guess = tl.where(many == k, low, low + (high - low) * share)
        count = tl.sum(above(value, guess, sharp), 1)
        enough = count >= k
        low, many = tl.where(enough, guess, low), tl.where(enough, count, many)
        high, few = tl.where(enough, high, guess), tl.where(enough, few, tl.maximum(count, 0.5))
    return low, many, high, few


@triton.jit
def _next(value, low):
    """The least of each row that is above ``low``.

    As integers, negative numbers come before all others, and the smallest of them first: two
    instructions find the least, where floats take four.
    """
    below = tl.min((low[:, None] - value).to(tl.int32, bitcast=True), 1)
    return low - below.to(tl.float32, bitcast=True)


@triton.jit
def _most(spare, real):
    """Of all rows that are real; at least 0."""
    return tl.max(tl.where(real, tl.maximum(spare, 0.0), 0.0), 0)


@triton.jit
def threshold(value, k, real, GROUPS: tl.constexpr):
    """For each row what ``k`` are above, whether there is none, and its largest value.

    Groups of columns, if there are more than ``k`` in all rows, give a first bound: of their
    largest values ``k`` are above it, hardly more of the rest are. The last of these drop out one
    by one. Ties and infinities may leave no threshold. Rows that are not ``real`` are not looked
    for.
    """
    if GROUPS:
        first = tl.max(tl.reshape(value, [value.shape[0], value.shape[1] // GROUPS, GROUPS]), 1)
        low, top = tl.min(first, 1), tl.max(first, 1)
    else:
        low, top = tl.min(tl.where(value > _NOTHING, value, -_NOTHING), 1), tl.max(value, 1)
    low, one = below(low, top), tl.zeros_like(top) + 1.0
    sharp = sharpness(low, top)
    if GROUPS:
        low, many, high, few = narrowed(
            first, k, low, one * GROUPS, top, 0.5 * one, sharp, _OF_GROUPS
        )
    many, high, few = tl.sum(above(value, low, sharp), 1), top, 0.5 * one
    if _most(many - k, real) > _FEW:
        for _ in range(_ROUNDS):
            if _most(many - k, real) > _FEW:
                low, many, high, few = narrowed(value, k, low, many, high, few, sharp, _AT_ONCE)
    spare = many - k
    for dropped in range(tl.minimum(_most(spare, real), _FEW).to(tl.int32)):
        low = tl.where(spare > dropped, _next(value, low), low)
    count = how_many(value > low[:, None])
    return low, (count != k) & real, top
