"""Cases of convolution, pooling and filters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo import recipes
from convnn_geo.verify import naive
from convnn_geo.verify.case import add, call

_SIZE = {1: (11,), 2: (6, 9), 3: (4, 5, 6)}
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _conv(
    recipe: str, axes: int, name: str, *, batch: int = 2, c: int = 4, d: int = 6, **kw: Any
) -> None:
    """A convolution recipe against ``nn.Conv*d`` on the same parameters."""
    kernel_size = kw.pop("kernel_size")
    build = getattr(recipes, recipe)
    depthwise = recipe.startswith("depthwise")
    channels = (c,) if depthwise else (c, d)
    groups: dict[str, Any] = {"groups": c} if depthwise else {}
    peer = _CONV[axes](c, c if depthwise else d, kernel_size, **groups, **kw)
    add(
        recipe,
        name,
        f"nn.Conv{axes}d",
        partial(build, *channels, kernel_size, **kw),
        [(batch, c, *_SIZE[axes])],
        lambda layer, x: call(peer, layer, x),
    )


for _axes in (1, 2, 3):
    for _mode in ("zeros", "reflect", "replicate", "circular"):
        _conv(
            f"conv{_axes}d",
            _axes,
            f"odd, padding {_mode}",
            kernel_size=3,
            padding=1,
            padding_mode=_mode,
        )
    _conv(f"conv{_axes}d", _axes, "even, stride 2", kernel_size=2, stride=2, batch=1)
    _conv(f"conv{_axes}d", _axes, "groups", kernel_size=3, padding=2, groups=2)
    _conv(f"conv{_axes}d", _axes, "k = 1, no bias", kernel_size=1, bias=False)
    _conv(f"depthwise_conv{_axes}d", _axes, "stride 2", kernel_size=3, padding=1, stride=2)
    _conv(f"conv{_axes}d_by_position", _axes, "3, padding 1", kernel_size=3, padding=1)
    _conv(f"conv{_axes}d_by_position", _axes, "3, stride 2", kernel_size=3, padding=1, stride=2)
_conv("conv1d", 1, "dilation, same", kernel_size=4, padding="same", dilation=3)
_conv(
    "conv2d",
    2,
    "stride 2, dilation 2, reflect",
    kernel_size=3,
    padding=2,
    stride=2,
    dilation=2,
    padding_mode="reflect",
)
_conv(
    "conv2d",
    2,
    "4 x 3, same, circular",
    kernel_size=(4, 3),
    padding="same",
    padding_mode="circular",
)
_conv("conv2d", 2, "dilation (1, 2)", kernel_size=(3, 2), dilation=(1, 2), padding=(1, 0))
_conv("conv2d", 2, "k = n", kernel_size=_SIZE[2])
_conv("depthwise_conv2d", 2, "even, dilation", kernel_size=2, dilation=2, batch=1)
_conv("conv2d_by_position", 2, "5, groups", kernel_size=5, padding=2, groups=2)
_conv("conv2d_by_position", 2, "3 x 5, no padding", kernel_size=(3, 5), batch=1)
add(
    "conv2d_by_position",
    "7 on 6 x 16",
    "nn.Conv2d",
    partial(recipes.conv2d_by_position, 2, 3, 7, padding=3),
    [(1, 2, 6, 16)],
    lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=3),
)


def _separable(layer: Any, x: Tensor, **kw: Any) -> Tensor:
    axes = x.ndim - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    first = conv(x, layer.weight, None, groups=x.shape[1], **kw)
    return conv(first, layer.pointwise[(...,) + (None,) * axes], layer.bias)


for _axes in (1, 2, 3):
    add(
        f"separable_conv{_axes}d",
        "stride 2, padding 1",
        f"nn.Conv{_axes}d twice",
        partial(getattr(recipes, f"separable_conv{_axes}d"), 4, 6, 3, stride=2, padding=1),
        [(2, 4, *_SIZE[_axes])],
        partial(_separable, stride=2, padding=1),
    )


def _pool(
    recipe: str, peer: nn.Module, name: str, *args: Any, shape: tuple[int, ...], **kw: Any
) -> None:
    add(
        recipe,
        name,
        f"nn.{type(peer).__name__}",
        partial(getattr(recipes, recipe), *args, **kw),
        [shape],
        lambda layer, x: peer(x),
    )


for _axes in (1, 2, 3):
    _shape = (2, 3, *_SIZE[_axes])
    _avg = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[_axes - 1]
    _max = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[_axes - 1]
    _pool(f"avg_pool{_axes}d", _avg(3, 2, 1), "3, stride 2, padding 1", 3, 2, 1, shape=_shape)
    _pool(
        f"avg_pool{_axes}d",
        _avg(2, padding=1, count_include_pad=False),
        "even, border not counted",
        2,
        padding=1,
        count_include_pad=False,
        shape=_shape,
    )
    _pool(f"max_pool{_axes}d", _max(2), "even", 2, shape=_shape)
    _pool(
        f"max_pool{_axes}d",
        _max(3, 1, 1, 1),
        "3, stride 1, padding 1",
        3,
        1,
        1,
        shape=(1, *_shape[1:]),
    )
_pool(
    "max_pool2d",
    nn.MaxPool2d((2, 3), 2, (1, 0), (1, 2)),
    "2 x 3, dilation",
    (2, 3),
    2,
    (1, 0),
    (1, 2),
    shape=(2, 3, 6, 9),
)

for _metric, _distance in (("cosine", naive.cosine), ("euclidean", naive.euclidean)):
    for _k in (1, 5, 20):
        add(
            "feature_conv2d",
            f"{_metric}, k = {'n' if _k == 20 else _k}",
            "double loop",
            partial(recipes.feature_conv2d, 3, 4, _k, _metric),
            [(2 if _k == 5 else 1, 3, 4, 5)],
            lambda layer, x, f=_distance: naive.knn_convolution(x, layer.weight, layer.bias, f),
        )

for _size in (3, (3, 5)):
    add(
        "interpolated_conv2d",
        f"lam = 0, {_size}",
        "nn.Conv2d",
        partial(recipes.interpolated_conv2d, 3, 4, _size, 0.0),
        [(2, 3, 6, 9)],
        lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding="same"),
    )
add(
    "interpolated_conv2d",
    "lam = 1",
    "double loop",
    partial(recipes.interpolated_conv2d, 3, 4, 3, 1.0, "euclidean", padding=0),
    [(1, 3, 5, 6)],
    lambda layer, x: naive.knn_convolution(
        x, layer.weight.flatten(2), layer.bias, naive.euclidean, raster=True
    )[:, :, 1:-1, 1:-1],
)


def _smooth(layer: Any, x: Tensor, radius: int | None, likeness: Any) -> Tensor:
    """A normalised mean over all pixels, or over those within ``radius``, by a double loop."""
    b, _, h, w = x.shape
    out = torch.zeros_like(x)
    for e in range(b):
        for i in range(h * w):
            r, c = divmod(i, w)
            near = [
                (s, t)
                for s in range(h)
                for t in range(w)
                if radius is None or (abs(s - r) <= radius and abs(t - c) <= radius)
            ]
            weights = torch.stack([likeness(x[e], (r, c), place) for place in near]).exp()
            weights = weights / weights.sum()
            out[e, :, r, c] = sum(
                a * x[e, :, s, t] for a, (s, t) in zip(weights, near, strict=True)
            )
    return out


def _patches(sigma: float, size: int) -> Any:
    def likeness(image: Tensor, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        half = size // 2
        padded = F.pad(image, (half,) * 4)
        one, two = (padded[:, r : r + size, c : c + size] for r, c in (i, j))
        return -(one - two).square().sum() / (2 * sigma**2)

    return likeness


def _bilateral(space: float, color: float) -> Any:
    def likeness(image: Tensor, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        place = (i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2
        likes = (image[:, i[0], i[1]] - image[:, j[0], j[1]]).square().sum()
        return -place / (2 * space**2) - likes / (2 * color**2)

    return likeness


for _window in (None, 3):
    add(
        "non_local_means",
        "all" if _window is None else "window",
        "double loop",
        partial(recipes.non_local_means, 2.0, 3, _window),
        [(1, 2, 4, 5)],
        partial(_smooth, radius=None if _window is None else 1, likeness=_patches(2.0, 3)),
    )
add(
    "bilateral_filter",
    "window",
    "double loop",
    partial(recipes.bilateral_filter, 1.0, 0.7, 5),
    [(2, 2, 4, 5)],
    partial(_smooth, radius=2, likeness=_bilateral(1.0, 0.7)),
)
