"""Aggregation in C. Every function returns None where it does not serve."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.compiled import build


def gather_taps(
    rows: Tensor, index: Tensor, rho: Tensor | None, taps: Tensor, bias: Tensor | None
) -> Tensor | None:
    """``out_i = bias + sum_j W_j rho_ij rows[index_ji]``, ``(n, d)``; no copies of neighbours.

    None where that is not served: it is for float32 on the CPU.

    Args:
        rows: ``(m, c)``.
        index: ``(k, n)``; -1 for none.
        rho: ``(k, n)`` or None.
        taps: ``(k, d, c)``.
        bias: ``(d,)`` or None.
    """
    parts = [t for t in (rows, rho, taps, bias) if t is not None]
    here = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in parts)
    if not here or not index.numel() or torch.compiler.is_compiling() or not build.library():
        return None
    (k, n), (d, c) = index.shape, taps.shape[1:]
    out = rows.new_empty(n, d)
    kept = [None if t is None else t.contiguous() for t in (rows, index, rho, taps, bias)]
    served = build.library().gather_taps(  # type: ignore[union-attr]
        *(None if t is None else t.data_ptr() for t in kept),
        *(n, k, c, d, torch.get_num_threads(), out.data_ptr()),
    )
    return out if served else None
