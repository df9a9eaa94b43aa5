"""Of chosen pairs, in C; see pairs.c."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from convnn_geo.compiled import build

KINDS = ("products", "squares")
_LONG, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32


class Layout(ctypes.Structure):
    """``Pairs`` of pairs.c."""

    _fields_ = (
        *((name, _INT) for name in ("kind", "threads")),
        *((name, _LONG) for name in ("examples", "n", "m", "d", "k")),
        *((name, _POINTER) for name in ("q", "keys", "index")),
        ("index_example", _LONG),
    )


def serves_pairs(q: Tensor, keys: Tensor, index: Tensor) -> bool:
    """Whether what follows serves: float32 on the CPU, of examples that share no points."""
    here = build.here(q) and build.here(keys) and index.dtype == torch.long and index.is_cpu
    like = q.shape[:-2] == keys.shape[:-2] and index.shape[:-2] in (q.shape[:-2], ())
    like = like and q.shape[-1] == keys.shape[-1] and q.shape[-2] == index.shape[-2]
    return here and like and min(q.numel(), keys.numel()) > 0 and build.library() is not None


def _laid_out(kind: str, q: Tensor, keys: Tensor, index: Tensor) -> tuple[Layout, list[Tensor]]:
    """And the tensors that the layout points to."""
    (n, d), m, k = q.shape[-2:], keys.shape[-2], index.shape[-1]
    parts = [t.resolve_neg().contiguous() for t in (q, keys, index)]
    examples = q.shape[:-2].numel()
    layout = Layout(
        *(KINDS.index(kind), build.threads(examples * n * k * d), examples, n, m, d, k),
        *(t.data_ptr() for t in parts),
        n * k if index.ndim > 2 else 0,
    )
    return layout, parts


def pairs(kind: str, q: Tensor, keys: Tensor, index: Tensor, double: bool = False) -> Tensor:
    """``<q_i, keys_j>`` or ``|q_i - keys_j|^2`` of pairs, summed in float64: ``(..., n, k)``.

    Args:
        kind: ``"products"`` or ``"squares"``.
        q: ``(..., n, d)``.
        keys: ``(..., m, d)``.
        index: ``(..., n, k)``, or ``(n, k)`` that all examples share.
        double: not rounded to float32.

    Raises:
        IndexError: an index is negative, or ``m`` or more.
    """
    layout, parts = _laid_out(kind, q, keys, index)
    out = q.new_empty(*q.shape[:-1], layout.k, dtype=torch.float64 if double else torch.float32)
    at = (out.data_ptr(), None) if double else (None, out.data_ptr())
    sound = build.library().pairs_measure(ctypes.addressof(layout), *at)  # type: ignore[union-attr]
    del parts  # which the layout points to
    if not sound:
        raise IndexError(f"index: expected sources from 0 to {layout.m - 1}, got others")
    return out


def pairs_gradients(
    kind: str, q: Tensor, keys: Tensor, index: Tensor, grad: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`pairs` to ``q`` and ``keys``, where they are wanted."""
    layout, parts = _laid_out(kind, q, keys, index)
    parts.append(grad.resolve_neg().contiguous())
    to_q, to_keys = wanted
    found = (
        q.new_zeros(q.shape) if to_q else None,
        keys.new_zeros(keys.shape) if to_keys else None,
    )
    build.library().pairs_gradient(  # type: ignore[union-attr]
        *(ctypes.addressof(layout), parts[-1].data_ptr()),
        *(None if t is None else t.data_ptr() for t in found),
    )
    return found
