"""Aggregation in C. Every function returns None where it does not serve."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from convnn_geo.compiled import build
from convnn_geo.compiled.problem import AttentionLayout, Described, one_outer

_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p


class TapsLayout(ctypes.Structure):
    """``Taps`` of taps.c."""

    _fields_ = (
        *((name, _LONG) for name in ("n", "k", "c", "d")),
        *((name, _POINTER) for name in ("rows", "index", "rho")),
        *((name, _LONG) for name in ("index_tap", "index_target", "rho_tap", "rho_target")),
        *((name, _POINTER) for name in ("panel", "bias")),  # filled in there
    )


def gather_taps(
    rows: Tensor,
    index: Tensor,
    rho: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    groups: int = 1,
) -> Tensor | None:
    """``out_i = bias + sum_j W_j rho_ij rows[index_ji]``, ``(n, d)``; no copies of neighbours.

    None where that is not served: it is for float32 on the CPU, all channels in one group or each
    in its own.

    Args:
        rows: ``(m, c)``.
        index: ``(k, n)``.
        rho: ``(k, n)`` or None.
        taps: ``(k, d, c // groups)``.
        bias: ``(d,)`` or None.
        groups: groups of channels.
    """
    parts = [t for t in (rows, rho, taps, bias) if t is not None]
    here = all(build.here(t) for t in parts)
    (k, n), c, d = index.shape, rows.shape[1], taps.shape[1]
    depthwise = 1 < groups == c == d
    if not here or not index.numel() or (groups > 1 and not depthwise) or not build.library():
        return None
    out = rows.new_empty(n, d)
    rows, taps, bias = (None if t is None else t.contiguous() for t in (rows, taps, bias))  # type: ignore[assignment]
    steps = (*index.stride(), *((0, 0) if rho is None else rho.stride()))
    layout = TapsLayout(n, k, c, d, *map(_address, (rows, index, rho)), *steps)
    given = (ctypes.addressof(layout), _address(taps), _address(bias))
    threads, library = build.threads(n * taps.numel()), build.library()
    if depthwise:
        library.gather_depthwise(*given, threads, out.data_ptr())  # type: ignore[union-attr]
        return out
    served = library.gather_taps(*given, threads, out.data_ptr())  # type: ignore[union-attr]
    return out if served else None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _attention(
    problem: Described, value: Tensor, keep: Tensor | None, temperature: float
) -> AttentionLayout:
    at, strides = problem.spread(value, 2)
    kept = None
    if keep is not None:
        k = problem.layout.k
        kept = problem.flat(keep.expand(*problem.lead, problem.n, k))
    return AttentionLayout(problem.layout, value.shape[-1], at, *strides, kept, temperature)


def attention(
    kind: str,
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    k: int,
    scale: float,
    temperature: float,
    less: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``sum_j keep_ij w_ij value_j`` over the k nearest, ``w = softmax(-distance / temperature)``.

    None where that is not served; see :func:`products_nearest`, whose arguments these are.

    Args:
        value: ``(..., m, c)``.
        keep: ``(..., n, k)`` or None.
        less: ``(..., n | 1, m)`` or None, what each pair's distance is less by.

    Returns:
        The sum ``(..., n, c)``, weights and places ``(..., n, k)``.
    """
    # Dropout is of ranks; and of differences rounding spares little.
    wanted = "values" if kind != "products" else "set" if keep is None else "order"
    lead = value.shape[:-2]
    problem = Described(kind, q, keys, k, bias, scale, mask, None, wanted, lead, less)
    if not problem.served or not build.here(value) or not one_outer(value, 2, problem.lead):
        return None
    layout = _attention(problem, value, keep, temperature)
    shape = problem.lead
    weight = q.new_empty(*shape, problem.n, k)
    place = torch.empty_like(weight, dtype=torch.long)
    # Heads lie side by side, as who joins them wants it.
    heads = shape[-1:] or (1,)
    out = q.new_empty(*shape[:-1], problem.n, *heads, value.shape[-1]).transpose(-2, -3)
    flat = out.flatten(0, -4) if out.ndim > 4 else out
    strides = [0] * (4 - out.ndim) + list(flat.stride()[:-1])
    gathered = weight.numel() * value.shape[-1]
    served = build.library().attention_forward(  # type: ignore[union-attr]
        *(ctypes.addressof(layout), build.threads(problem.products + gathered)),
        *(weight.data_ptr(), place.data_ptr(), out.data_ptr(), *strides),
    )
    return (out if shape else out.squeeze(0), weight, place) if served else None


def attention_backward(
    kind: str,
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    temperature: float,
    grad: Tensor,
    weight: Tensor,
    place: Tensor,
    of_pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Gradients of :func:`attention` to targets, keys, values and bias, in the result's shape.

    And, ``of_pairs``, to distances ``(..., n, k)``; otherwise this is empty.
    """
    lead, k = place.shape[:-2], place.shape[-1]
    problem = Described(kind, q, keys, k, None, scale, lead=lead)
    here = build.here(value) and build.here(grad) and one_outer(value, 2, problem.lead)
    if not problem.served or not here:
        return None
    layout = _attention(problem, value, keep, temperature)
    grads = [q.new_zeros(*lead, *t.shape[-2:]) for t in (q, keys, value)]
    grads.append(q.new_zeros(*lead, problem.m))
    grads.append(weight.new_empty(weight.shape) if of_pairs else q.new_empty(0))
    products = 2 * place.numel() * (problem.d + value.shape[-1])
    if problem.lead.numel() == 1:  # each example is one thread's
        products = 0
    served = build.library().attention_backward(  # type: ignore[union-attr]
        *(ctypes.addressof(layout), build.threads(products)),
        *(problem.flat(t) for t in (grad, weight, place)),
        *(t.data_ptr() if t.numel() else None for t in grads),
    )
    return tuple(grads) if served else None  # type: ignore[return-value]
