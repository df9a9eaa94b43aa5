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
