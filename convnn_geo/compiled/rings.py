"""Search ring by ring on a grid, in C; see rings.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from convnn_geo.compiled import build

KINDS = ("angles", "squares", "roots")
_LONG, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
_AXES = 3
_VISITED = 64
"""Sources for each neighbour that is found, and what else is done for it."""


class Layout(ctypes.Structure):
    """``Rings`` of rings.c."""

    _fields_ = (
        *((name, _INT) for name in ("kind", "k", "threads")),
        *((name, _LONG) for name in ("examples", "n", "m", "c")),
        ("size", _LONG * _AXES),
        *((name, _POINTER) for name in ("q", "keys", "zero_q", "zero_key", "at", "own")),
        *((name, _POINTER) for name in ("offset", "far")),
        ("count", _LONG),
        *((name, ctypes.c_double) for name in ("border", "weight")),
    )


def rings_nearest(
    kind: str,
    q: Tensor,
    keys: Tensor,
    zeros: tuple[Tensor, Tensor],
    size: Sequence[int],
    at: Tensor,
    offset: Tensor,
    far: Tensor,
    border: float,
    weight: float,
    k: int,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Values and places ``(b, n, k)`` by ``far + weight * features``, in order, ties exact.

    For finite float32 on the CPU, where there is a compiler; nobody else may ask. None where places
    tell so little that all pairs are looked at sooner, and for 2^31 sources or more.

    Args:
        kind: of features: ``"angles"``, of vectors of length one or zero, ``"squares"`` of
            differences, or ``"roots"`` of these.
        q: ``(b, n, c)``.
        keys: ``(b, m, c)``, in raster order.
        zeros: ``(b, n)`` and ``(b, m)``, which vectors are zero.
        size: of the grid of sources, up to three axes.
        at: ``(n,)``, the place of each target on it.
        offset: ``(3, count)`` in int32, what can lead from a target to a source.
        far: ``(count,)`` in float64, how far each of them leads, in order.
        border: how far what is no offset leads, at least.
        weight: of features.
        k: at most the number of sources, without the own.
        own: ``(n,)``, a source that each target is not to find.
    """
    (b, n, c), m = q.shape, keys.shape[1]
    if m >= 2**31:
        return None
    parts = [t.contiguous() for t in (q, keys, *zeros, at)]
    own = None if own is None else own.contiguous()
    layout = Layout(
        *(KINDS.index(kind), k, build.threads(_VISITED * k * b * n * c), b, n, m, c),
        (_LONG * _AXES)(*[1] * (_AXES - len(size)), *size),
        *(t.data_ptr() for t in parts),
        *(None if own is None else own.data_ptr(), offset.data_ptr(), far.data_ptr()),
        *(len(far), border, weight),
    )
    values = q.new_empty(b, n, k)
    places = torch.empty_like(values, dtype=torch.long)
    served = build.library().rings_nearest(  # type: ignore[union-attr]
        ctypes.addressof(layout), values.data_ptr(), places.data_ptr()
    )
    return (values, places) if served else None
