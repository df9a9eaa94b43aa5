"""Metrics with parameters: Mahalanobis, bilinear, and a table of relative positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convnn_geo.checks import check_alike, check_int, check_tuple
from convnn_geo.metrics.base import Metric, of_both, precise
from convnn_geo.metrics.bilinear import BilinearForm
from convnn_geo.metrics.combined import Pairwise
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import Distances
from convnn_geo.points import Points, gather_rows
from convnn_geo.shapes import broadcast_shapes


def _features(metric: str, points: Points, channels: int, parameter: Tensor) -> Tensor:
    """Features that a metric's parameter was made for."""
    x = precise(points.features)
    if x.shape[-1] != channels:
        raise ValueError(f"{metric}: expected features of {channels} channels, got {x.shape[-1]}")
    check_alike("the input", x, f"the metric {metric}", parameter)
    return x


class Mahalanobis(Metric):
    """Learned squared Mahalanobis distance, ``|L (x_i - x_j)|^2`` with ``M = L^T L``.

    Args:
        channels: of the features.
        rank: rows of ``L``; as many as channels by default. Starts at the identity.

    Example:
        >>> import torch
        >>> from convnn_geo.metrics import Mahalanobis
        >>> from convnn_geo.points import Points
        >>> Mahalanobis(2)(Points(torch.eye(2))).tolist()
        [[0.0, 2.0], [2.0, 0.0]]
    """

    def __init__(self, channels: int, rank: int | None = None) -> None:
        super().__init__()
        self.channels = check_int("channels", channels)
        self.factor = nn.Parameter(
            torch.empty(check_int("rank", channels if rank is None else rank), channels)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the Euclidean distance."""
        nn.init.eye_(self.factor)

    def distances(self, target: Points, source: Points) -> Distances:
        """Squared Euclidean distance of ``L x``."""
        factor = precise(self.factor)

        def moved(points: Points) -> Tensor:
            return _features("Mahalanobis", points, self.channels, factor) @ factor.T

        return Differences(*of_both(moved, target, source), 2.0, root=False)

    def extra_repr(self) -> str:
        return f"{self.channels}, rank={self.factor.shape[0]}"


class Bilinear(Metric):
    """Learned bilinear similarity, ``d(i, j) = -x_i^T W x_j``.

    Args:
        target_channels: channels of targets.
        source_channels: channels of sources; the same by default. ``W`` starts at the identity.
    """

    def __init__(self, target_channels: int, source_channels: int | None = None) -> None:
        super().__init__()
        if source_channels is None:
            source_channels = target_channels
        shape = (
            check_int("target_channels", target_channels),
            check_int("source_channels", source_channels),
        )
        self.weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the dot product."""
        nn.init.eye_(self.weight)

    def distances(self, target: Points, source: Points) -> Distances:
        """Dot product of ``W^T x_i`` and ``x_j``."""
        weight = precise(self.weight)
        q = _features("Bilinear", target, weight.shape[0], weight)
        return BilinearForm(q @ weight, _features("Bilinear", source, weight.shape[1], weight))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class PositionBias(Metric):
    """A learned table over relative offsets that enters the metric, so it changes who is chosen.

    ``d(i, j) = -table[p_j - p_i]``: a larger bias is nearer, as a bias on attention scores is.

    Args:
        size: the largest grid, one number an axis; offsets reach ``size - 1`` either way.
        heads: one table a head; None for one table.

    Example:
        >>> import torch
        >>> from convnn_geo.metrics import PositionBias
        >>> from convnn_geo.points import Points
        >>> PositionBias((4, 5), heads=2)(Points.from_image(torch.zeros(1, 1, 4, 5))).shape
        torch.Size([2, 20, 20])
    """

    def __init__(self, size: int | tuple[int, ...], heads: int | None = None) -> None:
        super().__init__()
        self.size = check_tuple("size", size, 1 if isinstance(size, int) else len(size))
        entries = 1
        for s in self.size:
            entries *= 2 * s - 1
        lead = () if heads is None else (check_int("heads", heads),)
        self.table = nn.Parameter(torch.empty(*lead, entries))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random biases, as relative position tables start."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def _lookup(self, offset: Tensor) -> Tensor:
        entry = torch.zeros(offset.shape[:-1], dtype=torch.long, device=offset.device)
        for axis, s in enumerate(self.size):
            entry = entry * (2 * s - 1) + offset[..., axis].round().long() + (s - 1)
        return entry

    def distances(self, target: Points, source: Points) -> Distances:
        """Look offsets up; positions must be whole pixels inside ``size``."""
        for points in (target, source):
            if points.grid is None or len(points.grid.size) != len(self.size):
                raise ValueError(
                    f"PositionBias of {len(self.size)} axes needs points on a grid of as many axes"
                )
            if any(s > t for s, t in zip(points.grid.size, self.size, strict=True)):
                raise ValueError(
                    f"PositionBias has a table for grids up to {self.size}, "
                    f"got a grid of {points.grid.size}"
                )
        q, k = target.position, source.position
        table = precise(self.table)

        def evaluate(start: int, stop: int | None, index: Tensor | None) -> Tensor:
            if index is None:
                entry = self._lookup(k.unsqueeze(-3) - q[..., start:stop, :].unsqueeze(-2))
                return -table[..., entry]
            entry = self._lookup(gather_rows(k, index) - q[..., start:stop, :].unsqueeze(-2))
            if table.ndim == 1 or entry.ndim == 2:
                return -table[..., entry]
            lead = broadcast_shapes(entry.shape[:-2], table.shape[:1])
            entry = entry.expand(*lead, *entry.shape[-2:])
            rows = table.expand(*lead, table.shape[-1])
            return -rows.gather(-1, entry.flatten(-2)).view(entry.shape)

        lead = tuple(self.table.shape[:-1])
        return Pairwise(torch.Size((*lead, target.num_points, source.num_points)), evaluate)

    def extra_repr(self) -> str:
        heads = f", heads={self.table.shape[0]}" if self.table.ndim == 2 else ""
        return f"{self.size}{heads}"
