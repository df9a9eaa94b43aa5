"""What ``layer=`` puts into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convnn_geo.convert import Rule, spec, spec_names, spec_options, to_convnn
from convnn_geo.selection import KNearest


@dataclass(frozen=True)
class Layer:
    """A layer by name, and its options.

    Args:
        name: from the model's vocabulary; None for the layer that the model has natively.
        options: of the layer.
    """

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Vocabulary:
    """Layers that a model may be built of.

    Args:
        names: of all of them.
        options: of one of them, by its name.
        native: what ``layer=None`` is called in it; None where that is no layer of ours.
    """

    names: Callable[[], list[str]]
    options: Callable[[str], list[str]]
    native: str | None = None


#: What :func:`convnn_geo.convert.spec` knows.
CONVERTED = Vocabulary(spec_names, spec_options)


#: Specs over the k nearest pixels of the whole image.
_NEAREST = ("convnn", "branching", "feature_conv2d")


def replace_convolutions(model: nn.Module, layer: Layer) -> nn.Module:
    """The model with the layer for every 3 x 3 convolution of stride 1.

    Where a layer of k neighbours sees fewer than k pixels, its last taps are empty, as some taps of
    a 3 x 3 convolution are on 2 x 2 pixels.

    Args:
        model: changed in place.
        layer: to put in.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
        >>> [type(m).__name__ for m in replace_convolutions(model, Layer("convnn"))]
        ['ConvNN2d', 'Conv2d']
    """
    if layer.name is None:
        return model
    options = _padded(layer.options) if layer.name in _NEAREST else layer.options
    become = spec(layer.name, **options)
    return to_convnn(model, [Rule(become, type=nn.Conv2d, where=_is_plain)])


def _padded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with a selection for k that gives empty slots where there are fewer pixels."""
    if "selection" in options:
        return {"k": None, **options}
    chosen = {key: options[key] for key in ("k", "dilation", "self_point") if key in options}
    rest = {key: value for key, value in options.items() if key not in chosen}
    return {**rest, "k": None, "selection": KNearest(**{"k": 9, **chosen}, short="pad")}


def _is_plain(name: str, layer: Any) -> bool:
    return layer.kernel_size == (3, 3) and layer.stride == (1, 1)


def replace_attention(model: nn.Module, layer: Layer) -> nn.Module:
    """The model with the layer for the attention of every block.

    Args:
        model: timm's vision transformer, changed in place.
        layer: to put in.
    """
    if layer.name is None:
        return model
    become = spec(layer.name, **layer.options)
    return to_convnn(model, [Rule(become, name="blocks.*.attn")])
