"""Search in C. Every function returns None where it does not serve."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.compiled import build
from convnn_geo.compiled.problem import LARGEST_K, Described, Runs

_VISITED = 128
"""Products for each neighbour that is found among cells, and what else is done for it."""


def k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The ``k`` smallest of each row of ``(..., m)`` in order of (value, index), NaN last.

    None where that is not served: it is for float32 on the CPU, and k up to :data:`LARGEST_K`.
    """
    here = values.dtype == torch.float32 and values.device.type == "cpu"
    if not here or not 0 < k <= LARGEST_K or build.library() is None:
        return None
    values = values.contiguous()
    best = values.new_empty(*values.shape[:-1], k)
    index = torch.empty_like(best, dtype=torch.long)
    m = values.shape[-1]
    build.library().k_smallest(  # type: ignore[union-attr]
        *(values.data_ptr(), values.numel() // m, m, k, build.threads(values.numel())),
        *(best.data_ptr(), index.data_ptr()),
    )
    return best, index


def cells_nearest(
    q: Tensor, keys: Tensor, k: int, own: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Squared distances and places ``(n, k)`` of the nearest of ``keys (m, d)``, in order.

    None where that is not served: it is for finite float32 on the CPU, up to three dimensions,
    and for points that do not lie in tight clusters.

    Args:
        own: ``(n,)``, a key that each query is not to find; -1 for none.
    """
    here = q.dtype == torch.float32 and q.device.type == "cpu" and q.shape[-1] <= 3
    if not here or len(keys) >= 2**31 or build.library() is None:
        return None
    q, keys = q.contiguous(), keys.contiguous()
    own = None if own is None else own.contiguous()
    values = q.new_empty(len(q), k)
    places = torch.empty_like(values, dtype=torch.long)
    status = build.library().cells_nearest(  # type: ignore[union-attr]
        *(keys.data_ptr(), len(keys), q.data_ptr(), len(q), q.shape[-1], k),
        *(None if own is None else own.data_ptr(), build.threads(_VISITED * k * len(q))),
        *(values.data_ptr(), places.data_ptr()),
    )
    return (values, places) if status == 0 else None


def products_nearest(
    kind: str,
    q: Tensor,
    keys: Tensor,
    k: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    own: Tensor | None = None,
    exact: bool = True,
    runs: Runs | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Values and places ``(..., n, k)`` of the nearest, in order of (value, place), ties exact.

    None where that is not served: it is for finite float32 on the CPU, and for rows that are not
    too long to stay in cache.

    Args:
        kind: ``"points"``, by squared distances; ``"angles"``; or ``"products"``.
        q: ``(..., n, d)``.
        keys: ``(..., m, d)``.
        k: at most ``m``.
        bias: ``(..., m)``, of ``"products"``.
        scale: of ``"products"``.
        mask: ``(..., n | 1, m)``, True where choice is allowed.
        own: ``(n,)``, a source that each target is not to find; -1 for none.
        exact: whether values are wanted as they are compared; otherwise good to rounding.
        runs: examples of unequal size, among the rows of ``q (n, d)`` and ``keys (m, d)``. Places
            then count the sources of the example; what it lacks of ``k`` is infinite, at -1.
    """
    wanted = "values" if exact else "order"
    problem = Described(kind, q, keys, k, bias, scale, mask, own, wanted, runs=runs)
    if not problem.served:
        return None
    values = q.new_empty(*problem.lead, problem.n, k)
    places = torch.empty_like(values, dtype=torch.long)
    served = build.library().products_nearest(  # type: ignore[union-attr]
        *(problem.address, build.threads(problem.products)),
        *(values.data_ptr(), places.data_ptr()),
    )
    return (values, places) if served else None


def windows_nearest(
    kind: str,
    q: Tensor,
    keys: Tensor,
    k: int,
    index: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of each target's own candidates the nearest: values, places, and which are there.

    ``(..., n, k)`` each, in order of (value, source); what a target lacks of ``k`` is infinite.
    None where that is not served; see :func:`products_nearest`, whose arguments these are.

    Args:
        index: candidates ``(n, w)``, none of them twice.
        mask: ``(n, w)``, True where choice is allowed.
    """
    (n, width), like = index.shape, mask is None or (mask.ndim == 2 and mask.dtype == torch.bool)
    like = like and all(t is None or t.dtype == torch.long for t in (index, own))
    problem = Described(kind, q, keys, k, bias, scale, own=own)
    like = like and n == problem.n and (mask is None or mask.shape == index.shape)
    if not (problem.served and like and index.device.type == "cpu"):
        return None
    values = q.new_empty(*problem.lead, n, k)
    places = torch.empty_like(values, dtype=torch.long)
    kept = torch.empty_like(values, dtype=torch.bool)
    products = problem.lead.numel() * index.numel() * (problem.d + 16)
    served = build.library().windows_nearest(  # type: ignore[union-attr]
        *(problem.address, problem.flat(index), None if mask is None else problem.flat(mask)),
        *(width, build.threads(products)),
        *(t.data_ptr() for t in (values, places, kept)),
    )
    return (values, places, kept) if served else None
