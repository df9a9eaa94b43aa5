"""Graph layers and point-cloud layers as choices of neighbours."""

from __future__ import annotations

from typing import Any

from torch import nn

from convnn_geo.checks import check_int
from convnn_geo.kernels import EdgeMLP, GravNet, MaxRelative, VectorAttention
from convnn_geo.metrics import Feature
from convnn_geo.nn import ConvNN2d, PointConvNN
from convnn_geo.recipes.registry import recipe
from convnn_geo.selection import KNearest, Radius
from convnn_geo.weighting import Gaussian, PositionMLP


def _mlp(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(in_channels, out_channels), nn.ReLU(), nn.Linear(out_channels, out_channels)
    )


@recipe
def vig(
    in_channels: int,
    out_channels: int | None = None,
    k: int = 9,
    dilation: int = 1,
    update: nn.Module | None = None,
    **kwargs: Any,
) -> ConvNN2d:
    """The max-relative graph convolution of ViG's Grapher, on images
    (https://arxiv.org/abs/2206.00272).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, as many by default.
        k: neighbours, by L2-normalised features.
        dilation: every ``dilation``-th of the ``k * dilation`` nearest.
        update: from ``2 in_channels`` to ``out_channels``; a linear layer by default.
        **kwargs: of :class:`~convnn_geo.nn.ConvNN2d`.
    """
    out = in_channels if out_channels is None else out_channels
    if update is None:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        update = nn.Linear(2 * in_channels, out, device=device, dtype=dtype)
    kernel = MaxRelative(update)
    chosen = KNearest(k, dilation)
    return ConvNN2d(in_channels, out, metric="cosine", selection=chosen, kernel=kernel, **kwargs)


@recipe
def edge_conv(
    in_channels: int, out_channels: int, k: int = 20, mlp: nn.Module | None = None, **kwargs: Any
) -> PointConvNN:
    """EdgeConv on the ``k`` nearest by position (https://arxiv.org/abs/1801.07829).

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output.
        k: neighbours.
        mlp: from ``2 in_channels``, (x_i, x_j - x_i), to ``out_channels``.
        **kwargs: of :class:`~convnn_geo.nn.PointConvNN`.
    """
    check_int("in_channels", in_channels)
    kernel = EdgeMLP(_mlp(2 * in_channels, out_channels) if mlp is None else mlp)
    options = {"metric": "spatial", **kwargs}
    return PointConvNN(in_channels, out_channels, k, kernel=kernel, **options)


@recipe
def dynamic_edge_conv(
    in_channels: int, out_channels: int, k: int = 20, mlp: nn.Module | None = None, **kwargs: Any
) -> PointConvNN:
    """EdgeConv on the ``k`` nearest by feature: the layer of DGCNN, PyG's DynamicEdgeConv."""
    return edge_conv(in_channels, out_channels, k, mlp, metric="euclidean", **kwargs)


@recipe
def point_transformer(
    in_channels: int,
    out_channels: int,
    k: int = 16,
    pos_nn: nn.Module | None = None,
    attn_nn: nn.Module | None = None,
    axes: int = 3,
    **kwargs: Any,
) -> PointConvNN:
    """Vector attention of Point Transformer (https://arxiv.org/abs/2012.09164).

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output.
        k: neighbours by position.
        pos_nn: from relative positions to channels; a linear layer by default.
        attn_nn: from channels to channels; the identity by default.
        axes: of positions.
        **kwargs: of :class:`~convnn_geo.nn.PointConvNN`.
    """
    check_int("in_channels", in_channels)

    def linear() -> nn.Linear:
        return nn.Linear(in_channels, out_channels, bias=False)

    position = nn.Linear(axes, out_channels) if pos_nn is None else pos_nn
    kernel = VectorAttention(linear(), linear(), linear(), position, attn_nn)
    return PointConvNN(in_channels, out_channels, k, "spatial", kernel, **kwargs)


@recipe
def set_abstraction(
    in_channels: int,
    out_channels: int,
    r: float,
    max_k: int = 64,
    mlp: nn.Module | None = None,
    axes: int = 3,
    **kwargs: Any,
) -> PointConvNN:
    """The local network of PointNet++ (https://arxiv.org/abs/1706.02413).

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output.
        r: radius of the ball.
        max_k: the most neighbours in it; the nearest are kept.
        mlp: from ``in_channels + axes``, (x_j, p_j - p_i), to ``out_channels``.
        axes: of positions.
        **kwargs: of :class:`~convnn_geo.nn.PointConvNN`.
    """
    check_int("in_channels", in_channels)
    network = _mlp(in_channels + axes, out_channels) if mlp is None else mlp
    kernel = EdgeMLP(network, inputs=("source", "offset"))
    ball = Radius(r, max_k)
    return PointConvNN(in_channels, out_channels, kernel=kernel, selection=ball, **kwargs)


@recipe
def grav_net(
    in_channels: int,
    out_channels: int,
    space_dimensions: int,
    propagate_dimensions: int,
    k: int,
    **kwargs: Any,
) -> PointConvNN:
    """GravNet: nearest in a learned space, weights ``exp(-10 d^2)``, mean and maximum
    (https://arxiv.org/abs/1902.07987).

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output.
        space_dimensions: of the learned space.
        propagate_dimensions: channels that neighbours send.
        k: neighbours.
        **kwargs: of :class:`~convnn_geo.nn.PointConvNN`.
    """
    check_int("in_channels", in_channels)
    space = nn.Linear(in_channels, space_dimensions)
    kernel = GravNet(
        nn.Linear(in_channels, propagate_dimensions),
        nn.Linear(in_channels, out_channels, bias=False),
        nn.Linear(2 * propagate_dimensions, out_channels),
    )
    metric = Feature("squared_euclidean", query=space, key=space)
    weighting = Gaussian(sigma=20**-0.5)
    return PointConvNN(in_channels, out_channels, k, metric, kernel, weighting, **kwargs)


@recipe
def point_conv(
    channels: int, k: int = 16, mlp: nn.Module | None = None, axes: int = 3, **kwargs: Any
) -> PointConvNN:
    """A continuous depthwise convolution, weights from relative positions, as in PointConv
    (https://arxiv.org/abs/1811.07246).

    Args:
        channels: in and out.
        k: neighbours by position.
        mlp: from relative positions to ``channels``.
        axes: of positions.
        **kwargs: of :class:`~convnn_geo.nn.PointConvNN`.
    """
    weighting = PositionMLP(_mlp(axes, channels) if mlp is None else mlp)
    return PointConvNN(channels, channels, k, "spatial", "sum", weighting, **kwargs)
