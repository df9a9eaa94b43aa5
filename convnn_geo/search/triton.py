"""Our own kernel for GPUs: tiles of sources stream past targets, the nearest stay in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.search.points import PointEngine
from convnn_geo.search.query import Query


class Triton(PointEngine):
    """Brute force in one kernel, without a matrix of distances; up to 256 neighbours.

    By differences in up to eight dimensions, by products of centred points in more.
    """

    name = "triton"
    whole = True

    def missing(self) -> str | None:
        """Triton must be installed, and have something to run on."""
        return gpu.refuses(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def limit(self, device: torch.device) -> int | None:
        """What fits into registers."""
        return gpu.LARGEST_K

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, of float32 on a GPU."""
        reason = gpu.refuses(query.target.device)
        if reason is None and query.problem is not None and query.problem.q.dtype != torch.float32:
            return "its distances are float32, and these need float64"
        return super().refuses(query) if reason is None else reason

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """That of ``|k|^2 - 2 <q, k>`` about the keys' mean, or of differences."""
        if self._direct(q):
            return super().slack(q, keys, value)
        center = keys.mean(-2, keepdim=True)
        length = (q - center).norm(dim=-1) + (keys - center).norm(dim=-1).amax(-1, keepdim=True)
        return 2 * (q.shape[-1] + 4) * torch.finfo(torch.float32).eps * length.square()

    def propose(self, prepared: Tensor, q: Tensor, asked: int) -> Tensor:
        """All examples in one launch."""
        from convnn_geo.gpu.search import nearest

        (examples, n, _), m = q.shape, prepared.shape[1]
        starts = tuple(torch.arange(examples + 1, device=q.device) * size for size in (n, m))
        direct, bias = self._direct(q), None
        keys = prepared
        if not direct:
            center = prepared.mean(-2, keepdim=True)
            q, keys = q - center, prepared - center
            bias = keys.square().sum(-1).flatten()
        rows = (q.flatten(0, 1).contiguous(), keys.flatten(0, 1).contiguous())
        places = nearest(*rows, asked, starts, n, bias, 2.0, direct=direct)[1]  # type: ignore[arg-type]
        return places.view(examples, n, asked).long()

    @staticmethod
    def _direct(q: Tensor) -> bool:
        return q.shape[-1] <= 8
