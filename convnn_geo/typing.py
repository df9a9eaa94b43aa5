"""The names of axes that shapes are written with, and the aliases for arguments.

=====  =============================================================================
axis   meaning
=====  =============================================================================
``b``  batch; further leading axes (heads, say) may stand beside it, written ``...``
``n``  targets: the points that receive
``m``  sources: the points that give
``k``  neighbours of one target, nearest first unless said otherwise
``c``  channels in
``d``  channels out, or the dimension of a query and a key
``p``  axes of a position, in pixels for images: (row, col), row 0 on top
=====  =============================================================================

A shape such as ``(..., n, k)`` may have any leading axes, and they broadcast.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Size: TypeAlias = int | tuple[int, ...]

BACKENDS: tuple[str, ...] = ("auto", "native", "compiled", "gather", "message_passing", "triton")
ORDERS: tuple[str, ...] = ("rank", "raster")
SELF_POINTS: tuple[str, ...] = ("natural", "first", "excluded")

__all__ = ["BACKENDS", "ORDERS", "SELF_POINTS", "Size", "Tensor"]
