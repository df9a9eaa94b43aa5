"""Search by KeOps: brute force in kernels that it compiles when first used, on CPU and GPU."""

from __future__ import annotations

from torch import Tensor

from convnn_geo.extras import installed, require
from convnn_geo.search.points import PointEngine


class KeOps(PointEngine):
    """``pykeops.torch.LazyTensor.argKmin``, from the extra ``keops``."""

    name = "keops"

    def missing(self) -> str | None:
        """Pykeops must be installed."""
        if installed("pykeops"):
            return None
        return "pykeops is not installed: pip install 'convnn-geo[keops]'"

    def propose(self, prepared: Tensor, q: Tensor, asked: int) -> Tensor:
        """Squared distances are never written; each query keeps its nearest."""
        lazy = require("pykeops.torch", extra="keops").LazyTensor
        x, y = lazy(q.contiguous().unsqueeze(2)), lazy(prepared.unsqueeze(1))
        return ((x - y) ** 2).sum(-1).argKmin(asked, dim=2)
