"""Layers that can be converted, and where a model holds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch_geometric.nn import DynamicEdgeConv

from convnn_geo.nn import Branching, ConvNNAttention, NeighborConv
from convnn_geo.nn.branching import PixelAttention
from convnn_geo.nn.point_attention import PointAttention
from convnn_geo.nn.taps import TapLayer

CONVOLUTIONS: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OURS = (TapLayer, ConvNNAttention, Branching, PixelAttention, PointAttention, NeighborConv)
_TIMM = ("timm.layers", "timm.models.vision_transformer")

KNOWN = (
    "nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, "
    "timm's Attention (of vision_transformer), DynamicEdgeConv"
)


def kind(layer: nn.Module) -> str | None:
    """``"convolution"``, ``"attention"`` or ``"edge_convolution"``; None for all other layers.

    A subclass with a forward of its own is another layer.

    Example:
        >>> kind(nn.Conv1d(2, 3, 1)), kind(nn.ReLU())
        ('convolution', None)
    """
    for base in CONVOLUTIONS:
        if isinstance(layer, base):
            same = _same(layer, base, "forward") and _same(layer, base, "_conv_forward")
            return "convolution" if same else None
    if isinstance(layer, nn.MultiheadAttention):
        return "attention" if _same(layer, nn.MultiheadAttention, "forward") else None
    if is_timm_attention(layer):
        return "attention"
    if isinstance(layer, DynamicEdgeConv):
        same = _same(layer, DynamicEdgeConv, "forward") and _same(layer, DynamicEdgeConv, "message")
        return "edge_convolution" if same else None
    return None


def is_timm_attention(layer: nn.Module) -> bool:
    """Whether a layer is timm's ``Attention``; timm is not imported to find out."""
    classes = [getattr(sys.modules.get(name), "Attention", None) for name in _TIMM]
    return any(
        isinstance(layer, base) and _same(layer, base, "forward")
        for base in classes
        if base is not None
    )


def _same(layer: nn.Module, base: type[Any], method: str) -> bool:
    names = (method, "__call__")
    return all(getattr(type(layer), name) is getattr(base, name) for name in names)


def is_ours(layer: nn.Module) -> bool:
    """Whether a layer is one of ours, or stands for one that was converted."""
    return isinstance(layer, OURS) or hasattr(layer, "converted_from")


def places(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> list[tuple[nn.Module, list[str]]]:
    """The wanted layers in the model's order, each with all names that it has there.

    The inside of a wanted layer is not looked at.
    """
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, layer in _walk("", model, wanted):
        found.setdefault(id(layer), (layer, []))[1].append(name)
    return list(found.values())


def _walk(
    name: str, module: nn.Module, wanted: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module]]:
    if wanted(module):
        yield name, module
        return
    for part, child in module._modules.items():
        if child is not None:
            yield from _walk(f"{name}.{part}" if name else part, child, wanted)
