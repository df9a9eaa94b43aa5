"""Candidates and a metric that experiments put into layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convnn_geo.candidates import All, Candidates, Random, Strided, Subset
from convnn_geo.convert import PatchPositions
from convnn_geo.metrics import BilinearForm, Combination, Distances, Feature, Metric
from convnn_geo.metrics.base import between_ends
from convnn_geo.points import Grid, Points


class Sample(Candidates):
    """A sample of the points; all of them where there are no more.

    Args:
        sample: ``"random"`` or ``"strided"``.
        r: points to draw, or an axis of the lattice.
        patches: where the points are tokens of a vision transformer; its prefix is always there.

    Example:
        >>> small = Points.from_image(torch.zeros(1, 1, 2, 2))
        >>> Sample("random", 9)(small, small).index is None
        True
    """

    def __init__(self, sample: str, r: int, patches: PatchPositions | None = None) -> None:
        super().__init__()
        self.sample, self.r, self.patches = sample, r, patches
        self.drawn = Random(r) if sample == "random" else None

    def forward(self, target: Points, source: Points) -> Subset:
        """The sample's indices, ascending."""
        if self.drawn is not None:
            few = source.num_points <= self.r
            return (All() if few else self.drawn)(target, source)
        if self.patches is None:
            side = min(self.r, *source.grid.size)  # type: ignore[union-attr]
            return Strided(side)(target, source)
        grid = Points(grid=Grid(self.patches.size))
        lattice: Any = Strided(self.r)(grid, grid).index
        prefix = torch.arange(self.patches.prefix).unsqueeze(0)
        index = torch.cat([prefix, lattice + self.patches.prefix], 1)
        return Subset(index.to(source.device))


class HeadInterpolation(Metric):
    r"""From the place of patches to scaled dot product, with a learned :math:`\lambda` a head.

    .. math:: d_h = (1 - \lambda_h) |p_i - p_j|^2 - \lambda_h q_i \cdot k_j / \sqrt{d}

    Args:
        patches: where tokens lie.
        heads: of the attention.
        lam: where learning starts.
    """

    def __init__(self, patches: PatchPositions, heads: int, lam: float) -> None:
        super().__init__()
        self.patches, self.feature = patches, Feature("scaled_dot")
        self.lam = nn.Parameter(torch.full((heads,), lam))

    def distances(self, target: Points, source: Points) -> Distances:
        """Both are bilinear: the weights of a head scale its queries."""
        lam = between_ends(self.lam).reshape(-1, 1, 1)
        near: Any = self.patches.distances(target, source)
        scaled = target.with_x(lam * target.features)
        parts: list[tuple[float | Tensor, Distances]] = [
            (1.0, BilinearForm((1 - lam) * near.q, near.k)),
            (1.0, self.feature.distances(scaled, source)),
        ]
        return Combination(parts)
