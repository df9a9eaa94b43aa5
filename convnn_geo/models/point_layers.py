"""Layers that a network of points may be built of, by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from convnn_geo import recipes
from convnn_geo.metrics import Metric, Spatial, as_metric, interpolate
from convnn_geo.models.layers import Vocabulary
from convnn_geo.nn import Branching, PointConvNN
from convnn_geo.nn.branching import neighbor_channels
from convnn_geo.nn.point_attention import PointAttention

Build = Callable[[int, int], nn.Module]


def conv(
    in_channels: int,
    out_channels: int,
    *,
    k: int | None = 9,
    kernel: Any = "standard",
    weighting: Any = "ones",
    groups: int = 1,
    bias: bool = True,
    **options: Any,
) -> PointConvNN:
    """The ``k`` nearest by position alone, a tap a rank."""
    given = (in_channels, out_channels, k, "spatial", kernel, weighting, groups, bias)
    return PointConvNN(*given, **options)


def convnn(
    in_channels: int,
    out_channels: int,
    *,
    k: int | None = 9,
    metric: Metric | str = "cosine",
    lam: float = 0.5,
    learnable: bool = False,
    kernel: Any = "standard",
    weighting: Any = "ones",
    groups: int = 1,
    bias: bool = True,
    **options: Any,
) -> PointConvNN:
    """The ``k`` nearest by ``(1 - lam)`` distance of positions ``+ lam`` distance of features.

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output.
        k: neighbours.
        metric: of features.
        lam: 0 for positions, 1 for features.
        learnable: make ``lam`` a parameter. Its gradient comes through weights of distances alone:
            give a ``weighting`` such as ``"softmax"``.
        kernel: as in :class:`~convnn_geo.nn.PointConvNN`, as are the other options.

    Example:
        >>> convnn(8, 16, k=3, lam=1.0)
        PointConvNN(
          8, 16, k=3
          ...
    """
    measure = interpolate(Spatial(), as_metric(metric), lam, learnable)
    given = (in_channels, out_channels, k, measure, kernel, weighting, groups, bias)
    return PointConvNN(*given, **options)


def branching(
    in_channels: int,
    out_channels: int,
    *,
    ratio: float = 0.5,
    k: int | None = 9,
    metric: Metric | str = "cosine",
    kernel: Any = "standard",
    weighting: Any = "ones",
    **options: Any,
) -> Branching:
    """The ``k`` nearest by feature beside the ``k`` nearest by position, then a linear layer.

    Args:
        in_channels: channels of ``x``, which both branches see whole.
        out_channels: channels of the output.
        ratio: share of the branch by feature, in [0, 1]; at 0 and 1 there is one branch alone, and
            between them both have a channel at least.
        k: neighbours of both.
        metric: of features.
        kernel: of both branches, as in :class:`~convnn_geo.nn.PointConvNN`, as are the other
            options.

    Raises:
        ValueError: a ratio outside [0, 1], or inside and of too few channels for two branches.
    """
    share = neighbor_channels(out_channels, ratio)
    rest = out_channels - share
    both = {"kernel": kernel, "weighting": weighting, **options}
    near = PointConvNN(in_channels, share, k, metric, **both) if share else None
    both = copy.deepcopy(both)  # what learns, an encoding say, is not shared
    other = PointConvNN(in_channels, rest, k, "spatial", **both) if rest else None
    mixed = nn.Linear(out_channels, out_channels) if share and rest else None
    return Branching.of(near, other, mixed, channel_axis=-1)


def attention(
    in_channels: int,
    out_channels: int,
    *,
    num_heads: int = 1,
    backend: str = "auto",
    search: str = "auto",
) -> PointAttention:
    """Attention among all points of a cloud."""
    return PointAttention(in_channels, out_channels, num_heads, backend=backend, search=search)


def kvt(
    in_channels: int,
    out_channels: int,
    *,
    k: int = 9,
    num_heads: int = 1,
    self_point: str = "natural",
    backend: str = "auto",
    search: str = "auto",
) -> PointAttention:
    """Attention over the ``k`` nearest points of a cloud by scaled dot product."""
    given = (in_channels, out_channels, num_heads, k, self_point)
    return PointAttention(*given, backend=backend, search=search)


def convnn_attention(
    in_channels: int,
    out_channels: int,
    *,
    k: int = 9,
    num_heads: int = 1,
    kernel: str = "depthwise",
    taps_per_head: bool = False,
    self_point: str = "natural",
    backend: str = "auto",
    search: str = "auto",
) -> PointAttention:
    """The same with a tap a rank inside the heads."""
    given = (in_channels, out_channels, num_heads, k, self_point)
    taps: dict[str, Any] = {"kernel": kernel, "taps_per_head": taps_per_head}
    return PointAttention(*given, **taps, backend=backend, search=search)


def point_conv(
    in_channels: int, out_channels: int, k: Any = 16, axes: int = 3, **options: Any
) -> PointConvNN:
    """:func:`convnn_geo.recipes.point_conv`, which keeps channels."""
    if in_channels != out_channels:
        raise ValueError(
            f"point_conv keeps channels: expected out_channels={in_channels}, got {out_channels}"
        )
    return recipes.point_conv(in_channels, k, axes=axes, **options)


def grav_net(
    in_channels: int,
    out_channels: int,
    k: Any = 40,
    space_dimensions: int = 4,
    propagate_dimensions: int = 22,
    **options: Any,
) -> PointConvNN:
    """:func:`convnn_geo.recipes.grav_net`, with its paper's sizes by default."""
    dimensions = (space_dimensions, propagate_dimensions)
    return recipes.grav_net(in_channels, out_channels, *dimensions, k, **options)


def set_abstraction(
    in_channels: int,
    out_channels: int,
    r: float = 0.5,
    max_k: int = 64,
    axes: int = 3,
    *,
    candidates: Any = None,
    backend: str = "auto",
    search: str = "auto",
) -> PointConvNN:
    """:func:`convnn_geo.recipes.set_abstraction` at every point.

    The radius is in the unit of the network, in which a cloud's mean squared distance from its
    centre is 1.
    """
    given = {"candidates": candidates, "backend": backend, "search": search}
    return recipes.set_abstraction(in_channels, out_channels, r, max_k, axes=axes, **given)


_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": conv,
    "attention": attention,
    "convnn": convnn,
    "convnn_attention": convnn_attention,
    "kvt": kvt,
    "branching": branching,
    "dynamic_edge_conv": recipes.dynamic_edge_conv,
    "edge_conv": recipes.edge_conv,
    "grav_net": grav_net,
    "point_conv": point_conv,
    "point_transformer": recipes.point_transformer,
    "set_abstraction": set_abstraction,
}

_OF_NETWORK = ("axes", "mlp", "pos_nn", "attn_nn")
"""Arguments that are the network's to give, and networks of its own that a recipe makes."""

_OF_TAPS = ("order", "encoding")
"""Arguments without use for a recipe, which has no taps, and networks as wide as its input."""


def _takes(name: str) -> list[str]:
    """All that a layer takes by name beside its channels."""
    parameters = inspect.signature(_LAYERS[name]).parameters.values()
    own = [p.name for p in parameters if p.default is not p.empty]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        more = inspect.signature(PointConvNN).parameters.values()
        own += [p.name for p in more if p.kind is p.KEYWORD_ONLY]
    return list(dict.fromkeys(own))


def _options(name: str) -> list[str]:
    left = (*_OF_NETWORK, *_OF_TAPS) if name in recipes.names() else _OF_NETWORK
    return [option for option in _takes(name) if option not in left]


#: Layers of networks of points.
POINT_LAYERS = Vocabulary(lambda: list(_LAYERS), _options, native="convnn")


def point_layer(name: str, axes: int, options: Mapping[str, Any]) -> Build:
    """How a layer is built from its channels, clouds of fewer than k points with empty slots.

    Args:
        name: from :data:`POINT_LAYERS`.
        axes: of the positions.
        options: of the layer.

    Example:
        >>> point_layer("kvt", 3, {"k": 4})(8, 8)
        PointAttention(
          ...
    """
    shared: dict[str, Any] = {"axes": axes, "short": "pad"}
    if "selection" in options:  # which says itself what short clouds get
        shared = {"axes": axes, "k": None}
    taken = _takes(name)
    given = {**{key: value for key, value in shared.items() if key in taken}, **options}

    def build(in_channels: int, out_channels: int) -> nn.Module:
        own = copy.deepcopy(given)  # a metric, say, that learns is not shared between layers
        return _LAYERS[name](in_channels, out_channels, **own)

    return build
