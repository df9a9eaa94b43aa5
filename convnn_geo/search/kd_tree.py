"""Search by a KD-tree on the CPU: pykdtree, or scipy where that is not installed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from convnn_geo.extras import installed, require
from convnn_geo.search.points import PointEngine, alone, together
from convnn_geo.search.problem import Problem
from convnn_geo.search.query import Query
from convnn_geo.search.rows import Hidden

Ask = Callable[[np.ndarray, int], np.ndarray]


class KDTree(PointEngine):
    """A tree over points of few dimensions, from the extra ``search``."""

    name = "kd_tree"

    def missing(self) -> str | None:
        """Pykdtree or scipy must be installed."""
        if installed("pykdtree") or installed("scipy"):
            return None
        return "neither pykdtree nor scipy is installed: pip install 'convnn-geo[search]'"

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, on the CPU."""
        if query.target.device.type != "cpu":
            return f"the tree is the CPU's, the points are on {query.target.device}"
        return super().refuses(query)

    def nearest(self, problem: Problem, k: int, hidden: Hidden, slab: int) -> tuple[Tensor, Tensor]:
        """Example by example: a tree is grown once, however many slabs there are."""
        if problem.q.ndim == problem.keys.ndim == 2 or not problem.q.numel():
            return super().nearest(problem, k, hidden, slab)
        found = [self.nearest(one, k, Hidden(own=own), slab) for one, own in alone(problem, hidden)]
        return together(found, problem)

    def prepare(self, keys: Tensor) -> list[Ask]:
        """A tree for each example."""
        grow = _pykdtree if installed("pykdtree") and keys.shape[-1] < 128 else _scipy
        return [grow(points.numpy()) for points in keys]

    def propose(self, prepared: list[Ask], q: Tensor, asked: int) -> Tensor:
        """Ask the trees, one after the other."""
        found = [ask(points.numpy(), asked) for ask, points in zip(prepared, q, strict=True)]
        index = np.stack([rows.reshape(-1, asked) for rows in found])
        return torch.from_numpy(index.astype(np.int64))


def _pykdtree(points: np.ndarray) -> Ask:
    tree = require("pykdtree.kdtree", extra="search").KDTree(points)
    return lambda q, k: tree.query(np.ascontiguousarray(q), k=k)[1]


def _scipy(points: np.ndarray) -> Ask:
    tree = require("scipy.spatial", extra="search").cKDTree(points)
    return lambda q, k: tree.query(q, k=k, workers=torch.get_num_threads())[1]
