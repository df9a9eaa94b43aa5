"""Approximate search by random projections: torch alone, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convnn_geo.metrics import Differences
from convnn_geo.search.approximate import ApproximateEngine
from convnn_geo.search.nearest import referee
from convnn_geo.search.smallest import by_value_then_place


class RandomProjections(ApproximateEngine):
    """Trees that halve the points across random directions.

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
                direction = torch.randn(2**level, d, generator=generator, device="cpu").to(keys)
                across = (keys[member] @ direction.unsqueeze(-1)).squeeze(-1)
                ordered, order = across.sort(dim=-1)
                middle = ordered[:, ordered.shape[-1] // 2]
                member = member.gather(-1, order).view(2 ** (level + 1), -1)
                node = 2 * node + ((q * direction[node]).sum(-1) >= middle[node])
            found.append(member[node])
        return torch.cat(found, -1)
