"""Exact search by faiss on the CPU: brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnn_geo.extras import installed, require
from convnn_geo.search.points import PointEngine
from convnn_geo.search.query import Query


class Faiss(PointEngine):
    """``faiss.IndexFlatL2``: a matrix product and a heap for each query."""

    name = "faiss"

    def missing(self) -> str | None:
        """Faiss must be installed."""
        if installed("faiss"):
            return None
        return "faiss is not installed: pip install 'convnn-geo[search]'"

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, of float32 on the CPU."""
        if query.target.device.type != "cpu":
            return f"faiss-cpu, and the points are on {query.target.device}"
        if query.problem is not None and query.problem.q.dtype != torch.float32:
            return "faiss has float32 only, and these distances need float64"
        return super().refuses(query)

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """That of ``|q|^2 + |k|^2 - 2 <q, k>``, whatever is left of it."""
        length = q.norm(dim=-1) + keys.norm(dim=-1).amax(-1, keepdim=True)
        return (q.shape[-1] + 4) * torch.finfo(torch.float32).eps * length.square()

    def prepare(self, keys: Tensor) -> list[Any]:
        """An index for each example."""
        return [filled(require("faiss", extra="search").IndexFlatL2, k) for k in keys]

    def propose(self, prepared: list[Any], q: Tensor, asked: int) -> Tensor | None:
        """Ask the indices, one after the other."""
        found = [
            index.search(np.ascontiguousarray(points.numpy()), asked)[1]
            for index, points in zip(prepared, q, strict=True)
        ]
        return torch.from_numpy(np.stack(found))


def filled(make: Any, points: Tensor) -> Any:
    """An index by ``make(dimension)``, trained where it learns, that holds ``points (m, d)``."""
    faiss = require("faiss", extra="search")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = make(points.shape[-1])
    rows = points.numpy()
    if not index.is_trained:
        index.train(rows)
    index.add(rows)
    return index
