"""Engines that may miss neighbours: what they find is measured and ordered as everywhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnn_geo.extras import installed, require
from convnn_geo.metrics import Differences
from convnn_geo.search.nearest import Problem, referee
from convnn_geo.search.points import PointEngine
from convnn_geo.search.query import Query
from convnn_geo.search.smallest import by_value_then_place


class ApproximateEngine(PointEngine):
    """Proposals are taken as they are. Never chosen by ``backend="auto"``."""

    approximate = True

    def unsure(
        self, problem: Problem, q: Tensor, keys: Tensor, farthest: Tensor, last: Tensor
    ) -> Tensor:
        """Only targets for which fewer than k were proposed."""
        return last == torch.inf


class NNDescent(ApproximateEngine):
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


class RandomProjections(ApproximateEngine):
    """Trees that halve the points across random directions; torch alone, on any device.

    A target looks at the keys in its leaf of each tree (Dasgupta and Freund, STOC 2008).
    """

    name = "random_projections"
    trees = 12

    def propose(self, prepared: Tensor, q: Tensor, asked: int) -> Tensor:
        """The nearest of those in the same leaves, each counted once."""
        parts = zip(q, prepared, strict=True)
        index = torch.stack([self._candidates(points, keys, asked) for points, keys in parts])
        index = index.sort(dim=-1).values
        bound = Differences(q, prepared, root=False)
        value = referee(bound, index, 2**23, q.dtype)
        again = torch.nn.functional.pad(index[..., 1:] == index[..., :-1], (1, 0))
        value, index = by_value_then_place(value.masked_fill(again, torch.inf), index)
        return index[..., :asked].where(value[..., :asked] < torch.inf, -1)

    def _candidates(self, q: Tensor, keys: Tensor, asked: int) -> Tensor:
        """Keys ``(n, trees * leaf)``, some of them several times."""
        generator = torch.Generator().manual_seed(0)
        m, d = keys.shape
        depth = max(0, int(math.log2(m / max(16, 2 * asked)))) if m > 2 * asked else 0
        leaf = -(-m // 2**depth)
        found = []
        for _ in range(self.trees):
            member = (torch.arange(leaf * 2**depth, device=q.device) % m).view(1, -1)
            node = torch.zeros(len(q), dtype=torch.long, device=q.device)
            for level in range(depth):
                direction = torch.randn(2**level, d, generator=generator).to(keys)
                across = (keys[member] @ direction.unsqueeze(-1)).squeeze(-1)
                ordered, order = across.sort(dim=-1)
                middle = ordered[:, ordered.shape[-1] // 2]
                member = member.gather(-1, order).view(2 ** (level + 1), -1)
                node = 2 * node + ((q * direction[node]).sum(-1) >= middle[node])
            found.append(member[node])
        return torch.cat(found, -1)
