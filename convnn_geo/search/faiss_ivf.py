"""Approximate search by faiss on the CPU: inverted lists."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convnn_geo.extras import require
from convnn_geo.search.approximate import ApproximateEngine
from convnn_geo.search.faiss import Faiss, filled


class FaissIVF(ApproximateEngine, Faiss):
    """``faiss.IndexIVFFlat``: keys in clusters, the nearest few of which are looked through.

    As many clusters as four roots of the number of keys; each query looks into 16.
    """

    name = "faiss_ivf"

    def prepare(self, keys: Tensor) -> list[Any]:
        """Cluster the keys of each example."""
        faiss = require("faiss", extra="search")

        def clustered(dimension: int) -> Any:
            lists = max(1, min(int(4 * keys.shape[-2] ** 0.5), keys.shape[-2] // 39))
            index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, lists)
            index.nprobe = 16
            return index

        return [filled(clustered, points) for points in keys]
