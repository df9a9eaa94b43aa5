"""A distance and a place as one integer: sorting such pairs, the largest first, breaks ties."""

from __future__ import annotations

import triton
import triton.language as tl

from convnn_geo.gpu.tiles import unordered

WORST: tl.constexpr = tl.constexpr(-0x7FFFFFFFFFFFFFFF - 1)
"""Comes after every pair."""


@triton.jit
def pairs(code, places):
    """Distances, by their codes, above places, inverted: the nearest is the largest."""
    return ~((code.to(tl.int64) << 32) | places.to(tl.int64))


@triton.jit
def value_of(pair):
    """The distance in a pair."""
    return unordered((~pair >> 32).to(tl.int32))


@triton.jit
def place_of(pair):
    """The place in a pair."""
    return (~pair & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def in_any_order(code, k):
    """Columns by their codes, the least first, and whether the first ``k`` surely are the least.

    A column takes the place of a code's last bits, so that half as much is sorted: of codes that
    differ by these alone it is not clear which is less.
    """
    M: tl.constexpr = code.shape[1]
    columns = tl.arange(0, M)[None, :]
    sorted_ = tl.sort((code & -M) | columns, dim=1)
    last = tl.max(tl.where(columns == k - 1, sorted_, -0x7FFFFFFF - 1), 1)
    beyond = tl.max(tl.where(columns == k, sorted_, -0x7FFFFFFF - 1), 1)
    return sorted_ & (M - 1), ((last ^ beyond) & -M) != 0
