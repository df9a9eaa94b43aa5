"""Search by torchbvh: a hierarchy of boxes on a GPU, for points in two and three dimensions."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from convnn_geo.extras import installed, require
from convnn_geo.search.points import PointEngine, unlike_a_gpu
from convnn_geo.search.query import Query

_COUNTS = (4, 8, 16)
"""Neighbours that its kernels are compiled for."""


class TorchBVH(PointEngine):
    """``torchbvh.BVH(points).knn(...)``, from the extra ``gpu``; compiled when first used."""

    name = "torchbvh"
    whole = True

    def missing(self) -> str | None:
        """Torchbvh must be installed, and have a compiler and a GPU."""
        if not installed("torchbvh"):
            return "torchbvh is not installed: pip install 'convnn-geo[gpu]'"
        if not torch.cuda.is_available():
            return "torchbvh is for GPUs, and torch sees none"
        from torch.utils.cpp_extension import CUDA_HOME

        return None if CUDA_HOME else "torchbvh compiles its kernels, and there is no CUDA toolkit"

    def limit(self, device: torch.device) -> int:
        """The most of its counts."""
        return _COUNTS[-1]

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, of float32 on a GPU in two or three dimensions."""
        reason = unlike_a_gpu("torchbvh", query) or super().refuses(query)
        if reason is None and query.dimension not in (2, 3):
            return f"torchbvh is for 2 and 3 dimensions, the metric has {query.dimension}"
        return reason

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """Numbers below the normal ones count as zero."""
        return super().slack(q, keys, value) + torch.finfo(q.dtype).tiny

    def prepare(self, keys: Tensor) -> Any:
        """A hierarchy for each example, all at once."""
        return require("torchbvh", extra="gpu").BVH(keys)

    def propose(self, prepared: Any, q: Tensor, asked: int) -> Tensor:
        """As many as the next of its counts; -1 where there are fewer points."""
        return prepared.knn(q.contiguous(), k=_COUNTS[bisect_left(_COUNTS, asked)])[0]
