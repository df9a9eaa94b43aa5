"""Search by ``torch_cluster.knn``: a KD-tree on the CPU, brute force on CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from convnn_geo.extras import importable
from convnn_geo.search.points import PointEngine


class TorchCluster(PointEngine):
    """``torch_cluster.knn``, from the extra ``cluster``."""

    name = "torch_cluster"
    whole = True

    def missing(self) -> str | None:
        """torch_cluster must be importable."""
        if importable("torch_cluster"):
            return None
        return "torch_cluster is not installed: pip install 'convnn-geo[cluster]'"

    def limit(self, device: torch.device) -> int:
        """CUDA finds 100; on the CPU more is slower than looking at all."""
        return 100 if device.type == "cuda" else 256

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """On CUDA points are put into the unit box first, which rounds."""
        slack = super().slack(q, keys, value)
        if not q.is_cuda:
            return slack
        rounding = 2 * (q.shape[-1] + 4) * torch.finfo(q.dtype).eps
        return slack + rounding * _extent(keys) * value.sqrt()

    def propose(self, prepared: Tensor, q: Tensor, asked: int) -> Tensor | None:
        """By example: batches of equal size."""
        keys = prepared
        (examples, n, d), m = q.shape, keys.shape[-2]
        sources, targets = keys.reshape(-1, d), q.reshape(-1, d)
        if q.is_cuda:  # squared distances over 1e10 are dropped
            low = sources.amin(0)
            sources, targets = ((t - low) / _extent(keys) for t in (sources, targets))
        batch = torch.arange(examples, device=q.device)
        edges = self._knn()(
            sources,
            targets,
            asked,
            batch.repeat_interleave(m),
            batch.repeat_interleave(n),
        )
        if edges.shape[1] != examples * n * asked:
            return None  # it left neighbours out
        return edges[1].view(examples, n, asked) % m

    def _knn(self) -> Callable[..., Tensor]:
        return importlib.import_module("torch_cluster").knn


def _extent(points: Tensor) -> Tensor:
    low, high = points.amin((0, 1)), points.amax((0, 1))
    return (high - low).amax().clamp_min(torch.finfo(points.dtype).tiny)
