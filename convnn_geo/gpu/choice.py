"""The k smallest of each row of codes: a bound by bisection, ties to the lowest column."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo.gpu.tiles import PADDING, ordered, unordered

_BY_VALUE: tl.constexpr = tl.constexpr(12)
"""Steps between values, which part those near one another soonest; the rest go between bits."""
_LARGEST: tl.constexpr = tl.constexpr(0x7F7FFFFF)
"""The code of the largest finite float."""


@triton.jit
def _count(chosen):
    """How many of each row: in floats, as sums of bits would be packed bit by bit."""
    return tl.sum(tl.where(chosen, 1.0, 0.0), 1)


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
        count = _count(code <= middle[:, None])
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
    if tl.max(_count(code <= most[:, None]), 0) > k:
        first = tl.zeros_like(last)
        spare = k - _count(code < most[:, None])
        while tl.max((first < last).to(tl.int32), 0) > 0:
            middle = (first + last) >> 1
            within = (code == most[:, None]) & (columns[None, :] <= middle[:, None])
            enough = _count(within) >= spare
            last = tl.where(enough, middle, last)
            first = tl.where(enough, first, tl.minimum(middle + 1, last))
    return last
