"""What a convolution may become."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from convnn_geo.convert.weights import NotApplicable, carry, check_plain, check_share
from convnn_geo.nn import Branching
from convnn_geo.nn.branching import PixelAttention
from convnn_geo.nn.by_axes import CONVNN
from convnn_geo.recipes.registry import by_position

_WINDOW = ("stride", "padding", "dilation", "groups", "padding_mode")


def axes_of(conv: Any) -> int:
    """1, 2 or 3."""
    return len(conv.kernel_size)


def _channels(conv: Any) -> tuple[int, int]:
    check_plain(conv, ("weight", "bias"))
    return conv.in_channels, conv.out_channels


def _factory(conv: Any) -> dict[str, Any]:
    return {
        "bias": conv.bias is not None,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }


def _carried(conv: Any, new: Any) -> Any:
    for name in ("weight", "bias"):
        carry(new, name, getattr(conv, name))
    return new


def positional(conv: Any) -> str | None:
    """Why a window is not the nearest positions of its centre; None where it is.

    Example:
        >>> positional(nn.Conv2d(1, 1, 3)), positional(nn.Conv2d(1, 1, 4))
        (None, 'its kernel_size (4, 4) is even')
    """
    if any(side % 2 == 0 for side in conv.kernel_size):
        return f"its kernel_size {tuple(conv.kernel_size)} is even"
    if set(conv.dilation) != {1}:
        return f"its dilation is {tuple(conv.dilation)}"
    if conv.padding_mode != "zeros" and any(_padding(conv)):
        return f"its padding_mode is {conv.padding_mode!r}"
    return None


def _padding(conv: Any) -> tuple[int, ...]:
    """Both sides together, axis by axis."""
    if conv.padding == "valid":
        return (0,) * axes_of(conv)
    if conv.padding == "same":
        sides = zip(conv.dilation, conv.kernel_size, strict=True)
        return tuple(d * (side - 1) for d, side in sides)
    return tuple(2 * p for p in conv.padding)


def _check_size_kept(conv: Any) -> None:
    """Raise unless there is an output at every ``stride``-th pixel, the border included."""
    reach = tuple(d * (side - 1) for d, side in zip(conv.dilation, conv.kernel_size, strict=True))
    if _padding(conv) != reach:
        raise NotApplicable(
            "it changes the image's size by more than its stride: kernel_size "
            f"{tuple(conv.kernel_size)}, padding {conv.padding}; 'exact' keeps such layers"
        )


def _check_same(conv: Any) -> None:
    """Raise unless it is a plain convolution that keeps the image's size."""
    _check_size_kept(conv)
    wrong = positional(conv)
    if set(conv.stride) != {1}:
        wrong = f"its stride is {tuple(conv.stride)}"
    elif conv.groups != 1:
        wrong = f"it has {conv.groups} groups"
    if wrong is not None:
        raise NotApplicable(f"{wrong}; it takes a plain convolution that keeps the image's size")


def exact(conv: Any) -> nn.Module:
    """The window layer: the same convolution with the same parameters."""
    c, d = _channels(conv)
    window = {name: getattr(conv, name) for name in _WINDOW}
    build = CONVNN[axes_of(conv)]
    factory = {**_factory(conv), "device": "meta"}  # its own parameters come from the old layer
    return _carried(conv, build(c, d, conv.kernel_size, **window, **factory))


def convnn(conv: Any, k: int | None = None, metric: Any = "cosine", **options: Any) -> nn.Module:
    """The ``k`` nearest by ``metric``; as many as the window has by default."""
    c, d = _channels(conv)
    _check_size_kept(conv)
    if k is None and "selection" not in options:
        k = math.prod(conv.kernel_size)
    plain = {"stride": conv.stride, "groups": conv.groups, **_factory(conv)}
    build = CONVNN[axes_of(conv)]
    return _carried(conv, build(c, d, k=k, metric=metric, **{**plain, **options}))


def branching(
    conv: Any,
    ratio: float = 0.5,
    k: int | None = 9,
    metric: Any = "cosine",
    other: str = "convolution",
    num_heads: int = 1,
    **options: Any,
) -> nn.Module:
    """ConvNN beside the convolution, or beside attention."""
    c, d = _channels(conv)
    _check_same(conv)
    check_share(d, ratio)
    layer = Branching(
        c,
        d,
        conv.kernel_size,
        ratio=ratio,
        other=other,
        num_heads=num_heads,
        axes=axes_of(conv),
        **_factory(conv),
        **{"k": k, "metric": metric, **options},
    )
    if layer.pointwise is None:  # one branch has all channels, and may have the weights
        _carried(conv, layer.branches[0])
    return layer


def attention(conv: Any, num_heads: int = 1) -> nn.Module:
    """Attention among all pixels."""
    return _attention(conv, num_heads)


def kvt(conv: Any, num_heads: int = 1, k: int | None = 9, **options: Any) -> nn.Module:
    """Attention over the ``k`` nearest pixels."""
    return _attention(conv, num_heads, k=k, **options)


def convnn_attention(
    conv: Any, num_heads: int = 1, k: int | None = 9, kernel: str = "depthwise", **options: Any
) -> nn.Module:
    """Attention over the ``k`` nearest pixels, a tap a rank inside the heads."""
    return _attention(conv, num_heads, k=k, kernel=kernel, **options)


def _attention(conv: Any, num_heads: int, **options: Any) -> nn.Module:
    c, d = _channels(conv)
    _check_same(conv)
    return PixelAttention(c, d, num_heads, axes=axes_of(conv), **_factory(conv), **options)


def by_recipe(recipe: Callable[..., Any], axes: int) -> Callable[..., nn.Module]:
    """A recipe of a convolution, its arguments taken from the layer."""
    parameters = inspect.signature(recipe).parameters

    def build(conv: Any, **options: Any) -> nn.Module:
        c, d = _channels(conv)
        if axes_of(conv) != axes:
            raise NotApplicable(f"it has {axes_of(conv)} axes, the recipe {axes}")
        given: dict[str, Any] = _factory(conv)
        if "kernel_size" in parameters:
            given["kernel_size"] = conv.kernel_size
            given.update({key: getattr(conv, key) for key in _WINDOW})
        else:
            _check_size_kept(conv)
            given["stride"], given["groups"] = conv.stride, conv.groups
        wrong = positional(conv) if by_position(recipe) else None
        if wrong is not None:
            raise NotApplicable(f"{wrong}, so that its window is not the nearest positions")
        if "channels" in parameters:
            if c != d:
                raise NotApplicable(f"it goes from {c} to {d} channels, the recipe keeps them")
            given["channels"] = c
        else:
            given["in_channels"], given["out_channels"] = c, d
        return _carried(conv, recipe(**{**given, **options}))

    return build
