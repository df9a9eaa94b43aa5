"""Approximate search by pynndescent, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnn_geo.extras import installed, require
from convnn_geo.search.approximate import ApproximateEngine
from convnn_geo.search.query import Query


class PyNNDescent(ApproximateEngine):
    """``pynndescent.NNDescent``: a graph that neighbours of neighbours refine."""

    name = "pynndescent"

    def missing(self) -> str | None:
        """Pynndescent must be installed."""
        if installed("pynndescent"):
            return None
        return "pynndescent is not installed: pip install 'convnn-geo[approximate]'"

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, on the CPU."""
        if query.target.device.type != "cpu":
            return f"pynndescent is for the CPU, the points are on {query.target.device}"
        return super().refuses(query)

    def prepare(self, keys: Tensor) -> list[Any]:
        """A graph for each example, from one seed."""
        make = require("pynndescent", extra="approximate").NNDescent
        return [
            make(points.numpy().astype(np.float32), n_neighbors=30, random_state=0)
            for points in keys
        ]

    def propose(self, prepared: list[Any], q: Tensor, asked: int) -> Tensor:
        """Walk the graphs, one after the other."""
        found = [
            graph.query(points.numpy().astype(np.float32), k=asked)[0]
            for graph, points in zip(prepared, q, strict=True)
        ]
        return torch.from_numpy(np.stack(found).astype(np.int64))
