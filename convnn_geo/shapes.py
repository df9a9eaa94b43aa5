"""Shapes that meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """:func:`torch.broadcast_shapes`, in a part of its time where nobody traces sizes.

    Example:
        >>> broadcast_shapes((2, 3), (), (2, 3)), broadcast_shapes((2, 1), (3,))
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if torch.compiler.is_compiling():
        return torch.Size(torch.broadcast_shapes(*shapes))
    first = max(shapes, key=len, default=())
    if all(not shape or shape == first for shape in shapes):
        return torch.Size(first)
    met = []
    for sizes in zip_longest(*map(reversed, shapes), fillvalue=1):
        size = next((size for size in sizes if size != 1), 1)
        if any(other not in (1, size) for other in sizes):
            return torch.Size(torch.broadcast_shapes(*shapes))  # which has words for it
        met.append(size)
    return torch.Size(met[::-1])
