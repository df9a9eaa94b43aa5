"""Lists of the nearest, in order, of which each thread keeps one in registers.

A pair is one integer, the code of a distance above a place: so the least is the nearest, and ties
go to the lowest place.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOBODY: tl.constexpr = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""Comes after every pair."""


@triton.jit
def also(found, one):
    """A tuple with one more."""
    return found + (one,)  # noqa: RUF005


@triton.jit
def nobody(K: tl.constexpr, LANES: tl.constexpr):
    """Lists of ``K`` without neighbours."""
    best = (tl.full([LANES], NOBODY, tl.int64),)
    for _ in tl.static_range(1, K):
        best = also(best, best[0])
    return best


@triton.jit
def emptied(best, which, K: tl.constexpr):
    """Lists, those of some targets without neighbours."""
    found = (tl.where(which, NOBODY, best[0]),)
    for i in tl.static_range(1, K):
        found = also(found, tl.where(which, NOBODY, best[i]))
    return found


@triton.jit
def inserted(best, pair, K: tl.constexpr):
    """Lists with one more pair each; the last drops out."""
    nearer = pair < best[0]
    found = (tl.where(nearer, pair, best[0]),)
    for i in tl.static_range(1, K):
        pair = tl.where(nearer, best[i - 1], pair)
        nearer = pair < best[i]
        found = also(found, tl.where(nearer, pair, best[i]))
    return found


@triton.jit
def any_of(chosen):
    """Whether a target is among those chosen."""
    return tl.max(chosen.to(tl.int32), 0) > 0
