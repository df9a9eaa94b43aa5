"""A classifier and a segmenter of point clouds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.nn import global_max_pool, global_mean_pool
from torch_geometric.utils import scatter

from convnn_geo.checks import check_int, check_tensor
from convnn_geo.models.head import linear_head
from convnn_geo.models.layers import Layer
from convnn_geo.models.point_layers import POINT_LAYERS, Build, point_layer
from convnn_geo.models.registry import register_model
from convnn_geo.models.width import scaled


class PointFeatures(nn.Module):
    """Layers over neighbours; the features of every one of them, side by side.

    Each cloud is centred and scaled to a mean squared distance of 1 from its centre, so that
    distances of positions mean the same in every unit.

    Args:
        in_channels: axes of the positions, and channels of ``x``.
        channels: of each layer.
        depth: layers.
        build: a layer from its channels in and out.

    Shapes:
        - **pos:** :math:`(N, p)`
        - **batch:** :math:`(N)`, sorted
        - **x:** :math:`(N, c)`, or None
        - **output:** :math:`(N, depth * channels)`
    """

    def __init__(self, in_channels: int, channels: int, depth: int, build: Build) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.stem = dense(in_channels, channels)
        count = range(check_int("depth", depth))
        self.layers = nn.ModuleList(build(channels, channels) for _ in count)
        self.norms = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(channels), nn.ReLU(inplace=True)) for _ in count
        )

    def forward(self, pos: Tensor, batch: Tensor, x: Tensor | None = None) -> Tensor:
        """Features of every point."""
        pos = normalized(check_tensor("pos", pos, 2), batch)
        x = pos if x is None else torch.cat([pos, x], 1)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected {self.in_channels} axes and features a point, got {x.shape[1]}; give "
                "the model in_channels (axes of pos) and feature_channels (of x)"
            )
        x = self.stem(x)
        found = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x, pos, batch))
            found.append(x)
        return torch.cat(found, 1)


class PointClassifier(nn.Module):
    """Features of all points, pooled over each cloud, and a linear head.

    Args:
        features: of points.
        channels: what they are brought to before they are pooled: twice, the largest and the mean.
        num_classes: of the data; 0 for what is pooled.
        dropout: of what is pooled, in training.

    Shapes:
        - **pos:** :math:`(N, p)`
        - **batch:** :math:`(N)`, sorted; None for one cloud
        - **x:** :math:`(N, c)`, or None
        - **output:** :math:`(b, classes)`
    """

    def __init__(
        self, features: PointFeatures, channels: tuple[int, int], num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = features
        self.embed = dense(*channels)
        self.head = nn.Sequential(nn.Dropout(dropout), linear_head(2 * channels[1], num_classes))

    def forward(self, pos: Tensor, batch: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """Classify clouds."""
        batch = _one_cloud(pos) if batch is None else batch
        out: Tensor = self.head(_pooled(self.embed(self.features(pos, batch, x)), batch))
        return out


class PointSegmenter(nn.Module):
    """Features of each point beside those pooled over its cloud, and a linear head.

    Args:
        features: of points.
        channels: what they are brought to before they are pooled: twice, the largest and the mean.
        num_classes: of the data; 0 for what the head would see of each point.
        dropout: before the head, in training.

    Shapes:
        - **pos:** :math:`(N, p)`
        - **batch:** :math:`(N)`, sorted; None for one cloud
        - **x:** :math:`(N, c)`, or None
        - **output:** :math:`(N, classes)`
    """

    def __init__(
        self, features: PointFeatures, channels: tuple[int, int], num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        own, wide = channels
        self.features = features
        self.embed = dense(own, wide)
        self.join = dense(own + 2 * wide, wide)
        self.head = nn.Sequential(nn.Dropout(dropout), linear_head(wide, num_classes))

    def forward(self, pos: Tensor, batch: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """Classify points."""
        batch = _one_cloud(pos) if batch is None else batch
        own = self.features(pos, batch, x)
        whole = _pooled(self.embed(own), batch)[batch]
        out: Tensor = self.head(self.join(torch.cat([own, whole], 1)))
        return out


def dense(in_channels: int, out_channels: int) -> nn.Sequential:
    """A linear layer, BatchNorm and ReLU, point by point."""
    linear = nn.Linear(in_channels, out_channels, bias=False)  # BatchNorm has its own
    return nn.Sequential(linear, nn.BatchNorm1d(out_channels), nn.ReLU(inplace=True))


def normalized(pos: Tensor, batch: Tensor) -> Tensor:
    """Each cloud centred, its mean squared distance from the centre 1.

    Example:
        >>> normalized(torch.tensor([[1.0], [5.0]]), torch.tensor([0, 0])).flatten().tolist()
        [-1.0, 1.0]
    """
    centred = pos - scatter(pos, batch, reduce="mean")[batch]
    square = scatter(centred.square().sum(1, keepdim=True), batch, reduce="mean")
    return centred * square.clamp_min(torch.finfo(pos.dtype).tiny).rsqrt()[batch]


def _pooled(x: Tensor, batch: Tensor) -> Tensor:
    return torch.cat([global_max_pool(x, batch), global_mean_pool(x, batch)], 1)


def _one_cloud(pos: Tensor) -> Tensor:
    return torch.zeros(pos.shape[0], dtype=torch.long, device=pos.device)


@register_model("point_classifier", POINT_LAYERS, network=PointClassifier)
@register_model("point_segmenter", POINT_LAYERS, network=PointSegmenter)
def point_network(
    layer: Layer,
    *,
    network: Callable[..., nn.Module],
    num_classes: int,
    in_channels: int,
    feature_channels: int = 0,
    width: float = 1.0,
    depth: int = 3,
    dropout: float = 0.0,
) -> nn.Module:
    """A network of ``depth`` layers over neighbours, which all are the layer.

    A cloud of fewer than k points leaves the last neighbours empty.

    Args:
        layer: to build it of; ``"convnn"`` by default.
        network: :class:`PointClassifier` or :class:`PointSegmenter`.
        num_classes: of the data; 0 for features, pooled or of each point.
        in_channels: axes of the positions.
        feature_channels: of ``x``; 0 for clouds without.
        width: multiplies the 64 channels of a layer, and the 256 before pooling.
        depth: layers.
        dropout: before the head, in training.
    """
    inner, wide = scaled([64, 256], width)
    build = point_layer(layer.name or "convnn", in_channels, layer.options)
    seen = in_channels + check_int("feature_channels", feature_channels, 0)
    features = PointFeatures(seen, inner, depth, build)
    return network(features, (depth * inner, wide), num_classes, dropout)
