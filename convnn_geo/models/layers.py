"""What ``layer=`` puts into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convnn_geo.convert import Rule, spec, to_convnn
from convnn_geo.convert.choices import CHOICES, Choice


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


def _specs(kind: str, fits: Callable[[str, Choice], bool]) -> Vocabulary:
    """Specs of :func:`convnn_geo.convert.spec` for one kind of layer."""
    choices = {name: choice for name, choice in CHOICES[kind].items() if fits(name, choice)}
    return Vocabulary(lambda: list(choices), lambda name: list(choices[name].options))


#: What convolutions of images become, whatever their channels.
CONVOLUTIONS = _specs("convolution", lambda _, c: c.axes in (None, 2) and not c.keeps_channels)

#: What the attention of timm's vision transformers becomes. Their class token is the first, and by
#: causal attention would see itself alone, and nothing of the image.
ATTENTIONS = _specs("attention", lambda name, _: name != "causal_attention")


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
    return _replace(model, layer, type=nn.Conv2d, where=_is_plain)


def _is_plain(name: str, layer: Any) -> bool:
    return layer.kernel_size == (3, 3) and layer.stride == (1, 1)


def replace_attention(model: nn.Module, layer: Layer) -> nn.Module:
    """The model with the layer for the attention of every block.

    Fewer than k tokens leave the last neighbours empty, too.

    Args:
        model: timm's vision transformer, changed in place.
        layer: to put in.
    """
    return _replace(model, layer, name="blocks.*.attn")


def _replace(model: nn.Module, layer: Layer, **conditions: Any) -> nn.Module:
    """The model with the layer wherever a rule of these conditions holds."""
    if layer.name is None:
        return model
    return to_convnn(model, Rule(spec(layer.name, **layer.options), **conditions))
