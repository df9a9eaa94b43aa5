"""Convolution, pooling and image filters as choices of neighbours."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from convnn_geo.candidates import All
from convnn_geo.checks import check_int, check_number, check_tuple
from convnn_geo.encodings import Encoding
from convnn_geo.kernels import Mean
from convnn_geo.metrics import Feature, Metric, Spatial, as_metric, interpolate
from convnn_geo.nn import ConvNN1d, ConvNN2d, ConvNN3d
from convnn_geo.nn.by_axes import CONVNN
from convnn_geo.points import Points
from convnn_geo.recipes.registry import recipe, recipe_by_position
from convnn_geo.selection import Every
from convnn_geo.typing import Size
from convnn_geo.weighting import Gaussian, MeanOneSoftmax, Softmax, Weighting

Pooled = TypeVar("Pooled", ConvNN1d, ConvNN2d, ConvNN3d)


@recipe
def conv1d(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN1d:
    """``nn.Conv1d``: all points of the window, weight 1, one tap a place; arguments as there."""
    return ConvNN1d(in_channels, out_channels, kernel_size, *args, **kwargs)


@recipe
def conv2d(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN2d:
    """``nn.Conv2d``: all points of the window, weight 1, one tap a place; arguments as there.

    Example:
        >>> import torch
        >>> from convnn_geo import recipes
        >>> layer = recipes.conv2d(3, 64, 7, stride=2, padding=3, padding_mode="reflect")
        >>> layer(torch.zeros(1, 3, 16, 20)).shape
        torch.Size([1, 64, 8, 10])
    """
    return ConvNN2d(in_channels, out_channels, kernel_size, *args, **kwargs)


@recipe
def conv3d(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN3d:
    """``nn.Conv3d``: all points of the window, weight 1, one tap a place; arguments as there."""
    return ConvNN3d(in_channels, out_channels, kernel_size, *args, **kwargs)


@recipe
def depthwise_conv1d(channels: int, kernel_size: Size, *args: Any, **kwargs: Any) -> ConvNN1d:
    """``nn.Conv1d`` with ``groups=channels``."""
    return ConvNN1d(channels, channels, kernel_size, *args, kernel="depthwise", **kwargs)


@recipe
def depthwise_conv2d(channels: int, kernel_size: Size, *args: Any, **kwargs: Any) -> ConvNN2d:
    """``nn.Conv2d`` with ``groups=channels``."""
    return ConvNN2d(channels, channels, kernel_size, *args, kernel="depthwise", **kwargs)


@recipe
def depthwise_conv3d(channels: int, kernel_size: Size, *args: Any, **kwargs: Any) -> ConvNN3d:
    """``nn.Conv3d`` with ``groups=channels``."""
    return ConvNN3d(channels, channels, kernel_size, *args, kernel="depthwise", **kwargs)


@recipe
def separable_conv1d(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN1d:
    """A depthwise ``nn.Conv1d`` without bias, then a 1 x 1 convolution with it."""
    return ConvNN1d(in_channels, out_channels, kernel_size, *args, kernel="separable", **kwargs)


@recipe
def separable_conv2d(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN2d:
    """A depthwise ``nn.Conv2d`` without bias, then a 1 x 1 convolution with it."""
    return ConvNN2d(in_channels, out_channels, kernel_size, *args, kernel="separable", **kwargs)


@recipe
def separable_conv3d(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN3d:
    """A depthwise ``nn.Conv3d`` without bias, then a 1 x 1 convolution with it."""
    return ConvNN3d(in_channels, out_channels, kernel_size, *args, kernel="separable", **kwargs)


def nearest_in_window(sides: tuple[int, ...]) -> Spatial:
    """The metric whose ``prod(sides)`` nearest are a window of odd sides: Chebyshev, each axis
    scaled by the window's side, so that windows need not be square.
    """
    square = len(set(sides)) == 1
    return Spatial("chebyshev", scale=None if square else tuple(2 / side for side in sides))


def _odd(kernel_size: Size, axes: int) -> tuple[int, ...]:
    """The sides of a window, if they are odd."""
    sides = check_tuple("kernel_size", kernel_size, axes)
    if any(side % 2 == 0 for side in sides):
        raise ValueError(
            f"kernel_size: a window is the nearest points of its centre for odd sides only, "
            f"got {sides}; use the plain convolution recipe for even ones"
        )
    return sides


def _by_position(
    axes: int, in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> Any:
    metric = nearest_in_window(_odd(kernel_size, axes))
    return CONVNN[axes](
        in_channels, out_channels, kernel_size, *args, metric=metric, candidates=All(), **kwargs
    )


@recipe_by_position
def conv1d_by_position(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN1d:
    """``nn.Conv1d`` (odd kernels, zero padding) by the k nearest positions of all points."""
    return _by_position(1, in_channels, out_channels, kernel_size, *args, **kwargs)


@recipe_by_position
def conv2d_by_position(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN2d:
    """``nn.Conv2d`` (odd kernels, zero padding) by the k nearest positions of all points.

    No window anywhere: the ``prod(kernel_size)`` nearest points of the padded image by Chebyshev
    distance in pixels, in raster order.

    Example:
        >>> import torch
        >>> from convnn_geo import recipes
        >>> conv = torch.nn.Conv2d(2, 3, 7, padding=3)
        >>> layer = recipes.conv2d_by_position(2, 3, 7, padding=3)
        >>> _ = layer.load_state_dict(conv.state_dict())
        >>> x = torch.randn(1, 2, 6, 16)
        >>> torch.allclose(layer(x), conv(x), atol=1e-5)
        True
    """
    return _by_position(2, in_channels, out_channels, kernel_size, *args, **kwargs)


@recipe_by_position
def conv3d_by_position(
    in_channels: int, out_channels: int, kernel_size: Size, *args: Any, **kwargs: Any
) -> ConvNN3d:
    """``nn.Conv3d`` (odd kernels, zero padding) by the k nearest positions of all points."""
    return _by_position(3, in_channels, out_channels, kernel_size, *args, **kwargs)


@recipe
def feature_conv2d(
    in_channels: int, out_channels: int, k: int = 9, metric: Metric | str = "cosine", **kwargs: Any
) -> ConvNN2d:
    """Convolution over the ``k`` nearest by feature, taps by rank: the ConvNN layer of
    https://arxiv.org/abs/2606.14725.
    """
    return ConvNN2d(in_channels, out_channels, k=k, metric=metric, **kwargs)


@recipe_by_position
def interpolated_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size = 3,
    lam: float = 0.5,
    metric: Metric | str = "cosine",
    *,
    padding: Size | str = "same",
    learnable: bool = False,
    **kwargs: Any,
) -> ConvNN2d:
    """The spectrum: the convolution at ``lam = 0``, the feature k-NN convolution at ``lam = 1``.

    Taps are in raster order throughout, and zero padding takes part, so ``lam = 0`` is
    ``nn.Conv2d`` exactly and ``lam = 1`` is ``feature_conv2d(..., k=prod(kernel_size),
    order="raster", padding=...)`` exactly.

    Positions count in steps of a pixel, the larger of both axes. Cosine distances of non-negative
    features, as after a ReLU, stay below one such step, so that nothing moves up to ``lam = 0.5``
    and the spectrum lies beyond; those of any sign stay below two, and ``lam = 1 / 3``.

    ``learnable`` makes ``lam`` a parameter. It learns through weights, so that neighbours then
    count by :class:`~convnn_geo.weighting.MeanOneSoftmax` unless told otherwise.
    """
    if learnable:
        kwargs.setdefault("weighting", MeanOneSoftmax())
    near = nearest_in_window(_odd(kernel_size, 2))
    return ConvNN2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=padding,
        metric=interpolate(near, as_metric(metric), lam, learnable),
        candidates=All(),
        **kwargs,
    )


def _pool(
    layer: type[Pooled],
    kernel: str | Mean,
    kernel_size: Size,
    stride: Size | None,
    *window: Any,
    **kwargs: Any,
) -> Pooled:
    """A layer without weights over whole windows, which do not overlap unless told."""
    stride = kernel_size if stride is None else stride
    return layer(None, None, kernel_size, stride, *window, kernel=kernel, **kwargs)


@recipe
def avg_pool1d(
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    *,
    count_include_pad: bool = True,
    **kwargs: Any,
) -> ConvNN1d:
    """``nn.AvgPool1d``: the mean over the window."""
    kernel = Mean(count_empty=count_include_pad)
    return _pool(ConvNN1d, kernel, kernel_size, stride, padding, **kwargs)


@recipe
def avg_pool2d(
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    *,
    count_include_pad: bool = True,
    **kwargs: Any,
) -> ConvNN2d:
    """``nn.AvgPool2d``: the mean over the window."""
    kernel = Mean(count_empty=count_include_pad)
    return _pool(ConvNN2d, kernel, kernel_size, stride, padding, **kwargs)


@recipe
def avg_pool3d(
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    *,
    count_include_pad: bool = True,
    **kwargs: Any,
) -> ConvNN3d:
    """``nn.AvgPool3d``: the mean over the window."""
    kernel = Mean(count_empty=count_include_pad)
    return _pool(ConvNN3d, kernel, kernel_size, stride, padding, **kwargs)


@recipe
def max_pool1d(
    kernel_size: int, stride: int | None = None, padding: int = 0, dilation: int = 1, **kwargs: Any
) -> ConvNN1d:
    """``nn.MaxPool1d``: the maximum over the window."""
    return _pool(ConvNN1d, "max", kernel_size, stride, padding, dilation, **kwargs)


@recipe
def max_pool2d(
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    **kwargs: Any,
) -> ConvNN2d:
    """``nn.MaxPool2d``: the maximum over the window."""
    return _pool(ConvNN2d, "max", kernel_size, stride, padding, dilation, **kwargs)


@recipe
def max_pool3d(
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    **kwargs: Any,
) -> ConvNN3d:
    """``nn.MaxPool3d``: the maximum over the window."""
    return _pool(ConvNN3d, "max", kernel_size, stride, padding, dilation, **kwargs)


class Patches(Encoding):
    """In the metric, a pixel is the patch around it, zeros beyond the border.

    Args:
        size: odd side of the patch.
    """

    on = "metric"

    def __init__(self, size: int) -> None:
        super().__init__()
        if check_int("patch_size", size) % 2 == 0:
            raise ValueError(f"patch_size: expected an odd number, got {size}")
        self.size = size

    def forward(self, points: Points) -> Points:
        """Unfold the patches."""
        patches: Tensor = F.unfold(points.to_image(), self.size, padding=self.size // 2)
        return points.with_x(patches.transpose(1, 2))


def _filter(metric: Metric, weighting: Weighting, window: int | None, **kwargs: Any) -> ConvNN2d:
    if window is None:
        return ConvNN2d(
            None,
            None,
            selection=Every(),
            metric=metric,
            weighting=weighting,
            kernel="sum",
            **kwargs,
        )
    if check_int("window", window) % 2 == 0:
        raise ValueError(f"window: expected an odd number, got {window}")
    return ConvNN2d(
        None,
        None,
        window,
        padding=window // 2,
        metric=metric,
        weighting=weighting,
        kernel="sum",
        **kwargs,
    )


@recipe
def non_local_means(
    sigma: float, patch_size: int = 3, window: int | None = None, **kwargs: Any
) -> ConvNN2d:
    r"""Non-local means (Buades et al., 2005): a mean weighted by the likeness of patches.

    .. math:: y_i = \sum_j \mathrm{softmax}_j(-|P_i - P_j|^2 / (2 \sigma^2))\, x_j

    Args:
        sigma: deviation of patch distances.
        patch_size: odd side of the patches.
        window: odd side of the search window; None for the whole image.
        **kwargs: of :class:`~convnn_geo.nn.ConvNN2d`.
    """
    return _filter(
        Feature("squared_euclidean"),
        Softmax(2 * check_number("sigma", sigma, exclusive=True) ** 2),
        window,
        encoding=Patches(patch_size),
        **kwargs,
    )


@recipe
def bilateral_filter(
    sigma_space: float, sigma_color: float, window: int | None = None, **kwargs: Any
) -> ConvNN2d:
    r"""The bilateral filter (Tomasi and Manduchi, 1998): near in place and in colour.

    .. math:: y_i = \sum_j \mathrm{softmax}_j\Big(-\frac{|p_i - p_j|^2}{2 \sigma_s^2}
              - \frac{|x_i - x_j|^2}{2 \sigma_c^2}\Big)\, x_j

    Args:
        sigma_space: deviation of positions, in pixels.
        sigma_color: deviation of features.
        window: odd side of the window; six deviations of position by default.
        **kwargs: of :class:`~convnn_geo.nn.ConvNN2d`.
    """
    space = check_number("sigma_space", sigma_space, exclusive=True)
    color = check_number("sigma_color", sigma_color, exclusive=True)
    metric = space**-2 * Spatial(squared=True) + color**-2 * Feature("squared_euclidean")
    side = 2 * math.ceil(3 * space) + 1 if window is None else window
    return _filter(metric, Gaussian(1.0, normalize=True), side, **kwargs)
