"""Networks that classify digits as point clouds, alike but for who is whose neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import global_max_pool, global_mean_pool

from convnn_geo.demo.training import Network
from convnn_geo.kernels import MaxRelative
from convnn_geo.metrics import Feature, Spatial, interpolate
from convnn_geo.nn import PointConvNN

SIDE = 8
WIDTH = 32
NEIGHBORS = 9


class CloudNet(nn.Module):
    """Two layers of PointConvNN and pooling over each cloud.

    Args:
        k: neighbours; 1 leaves each point alone.
        lam: share of feature distance in the metric.
        width: channels.

    Shapes:
        - **pos:** :math:`(N, 3)`
        - **batch:** :math:`(N)`, sorted
        - **output:** a row of 10 for each cloud

    Example:
        >>> pos, batch = torch.rand(20, 3), torch.tensor([0] * 9 + [1] * 11)
        >>> CloudNet(k=9, lam=0.5)(pos, batch).shape
        torch.Size([2, 10])
    """

    def __init__(self, k: int, lam: float, width: int = WIDTH) -> None:
        super().__init__()
        # No bias where BatchNorm follows, as in the network for images.
        self.stem = nn.Sequential(nn.Linear(3, width, bias=False), nn.BatchNorm1d(width))
        self.layers = nn.ModuleList(_layer(width, k, lam) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, pos: Tensor, batch: Tensor) -> Tensor:
        """Classify."""
        x = self.stem(pos / SIDE)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x, pos, batch)))
        pooled = torch.cat([global_max_pool(x, batch), global_mean_pool(x, batch)], 1)
        return self.head(pooled)


def _layer(width: int, k: int, lam: float) -> PointConvNN:
    """The largest difference to any neighbour, channel by channel, beside the point itself."""
    kernel = MaxRelative(nn.Linear(2 * width, width, bias=False))
    metric = interpolate(Spatial("l2", scale=1 / SIDE), Feature("cosine"), lam)
    return PointConvNN(width, width, k, metric=metric, kernel=kernel)


def networks(lams: Sequence[float]) -> list[Network]:
    """A network whose points stand alone, and one at each point of the spectrum."""
    return [
        Network("points alone (k = 1)", partial(CloudNet, 1, 0.0)),
        *(
            Network(f"PointConvNN, λ = {lam:g}", partial(CloudNet, NEIGHBORS, lam), lam)
            for lam in lams
        ),
    ]
