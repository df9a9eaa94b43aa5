"""Pixel unshuffle and shuffle over any number of axes."""

from __future__ import annotations

from torch import Tensor


def check_divides(size: tuple[int, ...], factor: int) -> None:
    """Raise unless the factor divides every axis."""
    if any(s % factor for s in size):
        raise ValueError(f"shuffle={factor} must divide every axis of the input, got size {size}")


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """``(b, c, r h, r w)`` to ``(b, c r r, h, w)``, as ``F.pixel_unshuffle``."""
    axes = x.ndim - 2
    for axis in range(axes):
        x = x.unflatten(2 + 2 * axis, (x.shape[2 + 2 * axis] // factor, factor))
    inner = [2 + 2 * axis for axis in range(axes)]
    outer = [3 + 2 * axis for axis in range(axes)]
    return x.permute(0, 1, *outer, *inner).flatten(1, 1 + axes)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """``(b, c r r, h, w)`` to ``(b, c, r h, r w)``, as ``F.pixel_shuffle``."""
    axes = x.ndim - 2
    x = x.unflatten(1, (x.shape[1] // factor**axes, *(factor,) * axes))
    order = [n for axis in range(axes) for n in (2 + axes + axis, 2 + axis)]
    x = x.permute(0, 1, *order)
    for axis in range(axes):
        x = x.flatten(2 + axis, 3 + axis)
    return x
