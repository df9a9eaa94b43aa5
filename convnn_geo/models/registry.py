"""The list of models, and how one is made by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from convnn_geo.checks import check_int, check_name
from convnn_geo.models.layers import CONVOLUTIONS, Layer, Vocabulary

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

#: What every model is told, if its builder asks.
SHARED = ("num_classes", "in_channels", "image_size")


@dataclass(frozen=True)
class Entry:
    """A model of the list.

    Args:
        build: takes a :class:`~convnn_geo.models.layers.Layer`, then keywords.
        fixed: keywords that make it this model.
        vocabulary: layers that it may be built of.
    """

    build: Callable[..., nn.Module]
    fixed: Mapping[str, Any]
    vocabulary: Vocabulary

    @property
    def asked(self) -> list[str]:
        """Which of the shared arguments the builder asks for."""
        return [name for name in SHARED if name in self._keywords]

    @property
    def options(self) -> list[str]:
        """The model's own options."""
        return [n for n in self._keywords if n not in SHARED and n not in self.fixed]

    @property
    def _keywords(self) -> list[str]:
        parameters = inspect.signature(self.build).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


_MODELS: dict[str, Entry] = {}


def register(
    name: str, vocabulary: Vocabulary = CONVOLUTIONS, **fixed: Any
) -> Callable[[Builder], Builder]:
    """Enter a builder into the list of models.

    Args:
        name: of the model.
        vocabulary: layers that it may be built of.
        **fixed: keywords of the builder that make it this model.
    """

    def enter(build: Builder) -> Builder:
        _MODELS[name] = Entry(build, fixed, vocabulary)
        return build

    return enter


def list_models(filter: str = "") -> list[str]:
    """Names of models, sorted.

    Args:
        filter: a pattern such as ``"vgg*"``; all models by default.

    Example:
        >>> list_models("resnet*")
        ['resnet18', 'resnet34', 'resnet50']
    """
    return sorted(fnmatch.filter(_MODELS, filter or "*"))


def list_layers(name: str) -> list[str]:
    """Names that ``layer=`` of a model takes.

    In vision transformers ``"conv"`` and the attentions of windows, blocks and strides are over
    patches on their grid, and the class token sees, and is seen by, all.

    Args:
        name: of the model.

    Example:
        >>> common = {"conv", "attention", "convnn", "convnn_attention", "kvt", "branching"}
        >>> all(common <= set(list_layers(name)) for name in list_models())
        True
        >>> sorted(set(list_layers("vgg11")) - common)  # doctest: +NORMALIZE_WHITESPACE
        ['conv2d', 'conv2d_by_position', 'exact', 'feature_conv2d', 'interpolated_conv2d',
         'separable_conv2d', 'vig']
    """
    return _entry(name).vocabulary.names()


def create_model(
    name: str,
    layer: str | None = None,
    *,
    num_classes: int | None = 10,
    in_channels: int = 3,
    image_size: int | None = 32,
    **options: Any,
) -> nn.Module:
    """Make a model with new random weights.

    Args:
        name: of the model, one of :func:`list_models`.
        layer: what its layers become, one of :func:`list_layers`. Every model takes ``"conv"``,
            ``"attention"``, ``"convnn"``, ``"convnn_attention"``, ``"kvt"`` and ``"branching"``,
            among pixels, tokens or points, and each the recipes that fit into it: convolutional
            models those of 2-d convolutions from any channels to any, and ``"vig"``; vision
            transformers those of attention, but for the causal one, with windows, blocks and
            strides over the grid of patches (``kernel_size`` 3 is ``(3, 3)``); models of points
            ``"dynamic_edge_conv"``, ``"edge_conv"``, ``"grav_net"``, ``"point_conv"``,
            ``"point_transformer"`` and ``"set_abstraction"``. By default torch's own layers; in
            models of points ``"convnn"``.
        num_classes: of classifiers and segmenters; others don't look at it.
        in_channels: of the images, or axes of the points' positions.
        image_size: side of the images; their shortest side, where they needn't be square. Models
            of points, unet, dncnn and all_conv_net don't look at it.
        **options: of the model (``width``, which multiplies its channels, ``depth``,
            ``patch_size``, ...) and of the layer
            (``k``, ``metric``, ``ratio``, ``lam``, ``kernel``, ``candidates``, ...).

    Raises:
        ValueError: unknown models, layers or options; a layer that can't be there.
        TypeError: options of the wrong type.
        MissingExtraError: torchvision or timm is not installed.

    Example:
        >>> import torch
        >>> model = create_model("unet", "branching", in_channels=1, width=0.125, ratio=0.25, k=5)
        >>> model(torch.zeros(1, 1, 16, 24)).shape
        torch.Size([1, 1, 16, 24])
    """
    entry = check_options(name, layer, options)
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    shared = {key: check_int(key, given[key]) for key in entry.asked}
    own = {key: value for key, value in options.items() if key in entry.options}
    rest = {key: value for key, value in options.items() if key not in own}
    return entry.build(Layer(layer, rest), **entry.fixed, **shared, **own)


def _entry(name: str) -> Entry:
    if name in _MODELS:
        return _MODELS[name]
    hint = _close(name, _MODELS) or f"expected one of: {', '.join(list_models())}"
    raise ValueError(f"unknown model {name!r}; {hint}")


def check_options(name: str, layer: str | None, options: Iterable[str]) -> Entry:
    """The model's entry; an error for a layer or options that it does not take.

    Args:
        name: of the model.
        layer: to build it of, or None.
        options: of the model and the layer, by name.

    Raises:
        ValueError: a name that is unknown.
    """
    entry = _entry(name)
    if layer is not None:
        check_name(f"layer of {name}", layer, entry.vocabulary.names())
    which = entry.vocabulary.native if layer is None else layer
    of_layer = [] if which is None else entry.vocabulary.options(which)
    known = [*entry.options, *of_layer]
    unknown = [option for option in options if option not in known]
    if not unknown:
        return entry
    if "pretrained" in unknown:
        raise ValueError(
            "pretrained: models have random weights; load yours, or convert one of timm's or "
            "torchvision's that has them (convnn_geo.convert.to_convnn)"
        )
    takes = f"{name} takes {', '.join(entry.options)}"
    takes += "; options of a layer need layer=" if which is None else ""
    takes += f"; its layer {which!r} takes {', '.join(of_layer)}" if of_layer else ""
    hint = _close(unknown[0], [*known, *SHARED])
    raise ValueError(
        f"unknown option{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))} of {name}; "
        + (f"{hint} " if hint else "")
        + takes
    )


def _close(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known))
    return f"did you mean {' or '.join(close)}?" if close else ""
