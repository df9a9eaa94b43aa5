"""``torch_cluster.knn`` as it comes: what engines are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.extras import importable, require
from convnn_geo.points import Points

NAME = "torch_cluster.knn"


def installed() -> bool:
    """Whether torch_cluster can be imported."""
    return importable("torch_cluster")


def refuses(metric: str) -> str | None:
    """Why it can't answer for a metric; None where it can."""
    if not installed():
        return "torch_cluster is not installed"
    if metric not in ("euclidean", "cosine", "spatial"):
        return f"torch_cluster has no metric {metric!r}"
    return None


def search(points: Points, metric: str, k: int) -> Callable[[], Tensor]:
    """A call that gives neighbours ``(b, n, k)``; its batch vectors are made beforehand.

    By cosine it searches points of length 1, as its own ``cosine=True`` is for the GPU alone.
    """
    x = points.position if metric == "spatial" else points.features
    x = x if x.ndim == 3 else x.unsqueeze(0)
    b, n, d = x.shape
    rows = x.reshape(-1, d).contiguous()
    batch = torch.arange(b, device=x.device).repeat_interleave(n)
    knn = require("torch_cluster", extra="cluster").knn

    def call() -> Tensor:
        flat = F.normalize(rows, dim=-1) if metric == "cosine" else rows
        edges: Tensor = knn(flat, flat, k, batch, batch)
        return edges[1].view(b, n, k) % n

    return call
