"""The table of names: what a layer of each kind may become, and the options that this takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from torch import nn

from convnn_geo import recipes
from convnn_geo.convert import attention, convolution, edge, tokens
from convnn_geo.nn import ConvNN1d, ConvNN2d, ConvNNAttention, PointConvNN
from convnn_geo.nn.by_axes import CONVNN

_OF_CONVOLUTIONS = (
    *("in_channels", "out_channels", "channels", "kernel_size", "stride", "padding"),
    *("groups", "bias", "padding_mode", "device", "dtype"),
)
_OF_ATTENTIONS = ("embed_dim", "num_heads", "device", "dtype")
"""Arguments that the old layer brings."""


@dataclass(frozen=True)
class Choice:
    """How a layer becomes what a name says.

    Args:
        build: from the layer and the options to the new layer.
        options: names of the options.
        required: those of them that have no default.
        axes: of the image; None for any.
        keeps_channels: whether it takes layers of as many channels out as in alone.
    """

    build: Callable[..., nn.Module]
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    axes: int | None = None
    keeps_channels: bool = False


def check_options(
    name: str, options: Iterable[str], accepted: Sequence[str], required: Iterable[str]
) -> None:
    """Raise for options that are unknown, and for those that lack."""
    for option in options:
        if option not in accepted:
            takes = f"expected one of: {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"unknown option {option!r} of spec {name!r}; {takes}")
    lacking = [option for option in required if option not in options]
    if lacking:
        raise ValueError(f"spec {name!r} needs {', '.join(lacking)}; pass {lacking[0]}=...")


def _arguments(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _names(parameters: list[inspect.Parameter], *more: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*(p.name for p in parameters), *more]))


def _keywords(layer: type[nn.Module]) -> list[str]:
    """Options of a layer of ours: its keyword-only arguments."""
    return [p.name for p in _arguments(layer) if p.kind is p.KEYWORD_ONLY]


def _own(function: Callable[..., Any], *more: str) -> Choice:
    """A function of ours: all its arguments but the first, the layer, are options."""
    return Choice(function, _names(_arguments(function)[1:], *more))


def _recipes(layer: type[nn.Module], brought: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Recipes that give a layer of this class from what the old layer brings."""
    found = {name: getattr(recipes, name) for name in recipes.names()}
    return {
        name: recipe
        for name, recipe in found.items()
        if get_type_hints(recipe)["return"] is layer
        and _arguments(recipe)[0].name in (*brought[:1], "channels", "embed_dim")
    }


def _recipe(
    recipe: Callable[..., Any],
    build: Callable[..., nn.Module],
    layer: type[nn.Module],
    brought: tuple[str, ...],
    **defaults: Any,
) -> Choice:
    own = [p for p in _arguments(recipe) if p.name not in brought]
    options = tuple(name for name in _names(own, *_keywords(layer)) if name not in brought)
    required = (p.name for p in own if p.default is p.empty and p.name not in defaults)
    return Choice(build, options, tuple(required))


def _convolutions() -> dict[str, Choice]:
    more = ("padding", "dilation", *_keywords(ConvNN2d))
    of_attention = [name for name in _keywords(ConvNNAttention) if name != "axes"]
    choices = {
        "exact": Choice(convolution.exact),
        "conv": Choice(convolution.exact),
        "convnn": _own(convolution.convnn, *more),
        "branching": _own(convolution.branching, *more),
        "attention": _own(convolution.attention),
        "kvt": _own(convolution.kvt, *of_attention),
        "convnn_attention": _own(convolution.convnn_attention, *of_attention),
    }
    for axes, layer in CONVNN.items():
        for name, recipe in _recipes(layer, _OF_CONVOLUTIONS).items():
            build = convolution.by_recipe(recipe, axes)
            keeps = _arguments(recipe)[0].name == "channels"
            choice = _recipe(recipe, build, layer, _OF_CONVOLUTIONS)
            choices[name] = replace(choice, axes=axes, keeps_channels=keeps)
    return choices


def _attentions() -> dict[str, Choice]:
    taps = {"k": 9, "kernel": "depthwise"}
    choices = {
        "exact": Choice(attention.exact),
        "attention": Choice(attention.exact),
        "convnn_attention": Choice(
            attention.by_recipe(ConvNNAttention, **taps), tuple(_keywords(ConvNNAttention))
        ),
        "conv": _own(tokens.conv),
        "convnn": _own(tokens.convnn, *_keywords(ConvNN1d)),
        "branching": _own(tokens.branching, *_keywords(ConvNN1d)),
    }
    for name, recipe in _recipes(ConvNNAttention, _OF_ATTENTIONS).items():
        defaults = {"k": 9} if name == "kvt" else {}
        build = attention.by_recipe(recipe, **defaults)
        choices[name] = _recipe(recipe, build, ConvNNAttention, _OF_ATTENTIONS, **defaults)
    return choices


def _edge_convolutions() -> dict[str, Choice]:
    return {
        "exact": Choice(edge.exact),
        "dynamic_edge_conv": _own(edge.edge, *_keywords(PointConvNN)),
    }


CHOICES: dict[str, dict[str, Choice]] = {
    "convolution": _convolutions(),
    "attention": _attentions(),
    "edge_convolution": _edge_convolutions(),
}
"""By kind of layer, then by name."""
