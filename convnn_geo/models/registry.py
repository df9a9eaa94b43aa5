"""The list of models, and how one is made by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from convnn_geo.checks import check_int, check_name, same_code
from convnn_geo.models.layers import CONVOLUTIONS, Layer, Vocabulary

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

#: What every model is told, if its builder asks, and the least that each may be.
SHARED = {"num_classes": 0, "in_channels": 1, "image_size": 1}


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


def register_model(
    name: str, vocabulary: Vocabulary = CONVOLUTIONS, **fixed: Any
) -> Callable[[Builder], Builder]:
    """Enter a builder into the list of models, as a decorator.

    The builder takes a :class:`~convnn_geo.models.layers.Layer`, what it is to be built of, then
    keywords alone: those of ``num_classes`` (0 for features), ``in_channels`` and ``image_size``
    that it needs, and its own options.

    Args:
        name: of the model, which no other has.
        vocabulary: layers that it may be built of; those of 2-d convolutions by default.
        **fixed: keywords of the builder that make it this model.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> from convnn_geo.models.layers import Layer, replace_convolutions
        >>> @register_model("smoother")
        ... def smoother(layer: Layer, *, in_channels: int) -> nn.Module:
        ...     convolution = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        ...     return replace_convolutions(nn.Sequential(convolution), layer)
        >>> type(create_model("smoother", "convnn", k=4)[0]).__name__
        'ConvNN2d'
        >>> del _MODELS["smoother"]  # here alone, as other examples list all models
    """

    def enter(build: Builder) -> Builder:
        if name in _MODELS and not same_code(_MODELS[name].build, build):
            raise ValueError(
                f"expected a new name of a model, got {name!r}; choose another, as taken are: "
                f"{', '.join(list_models())}"
            )
        _MODELS[name] = Entry(build, fixed, vocabulary)
        return build

    return enter


def list_models(filter: str | Sequence[str] = "") -> list[str]:
    """Names of models, sorted.

    Args:
        filter: a pattern such as ``"vgg*"``, or several, one of which a name must match; all models
            by default.

    Raises:
        TypeError: anything but patterns.

    Example:
        >>> list_models("resnet*")
        ['resnet18', 'resnet34', 'resnet50']
        >>> list_models(["unet", "vit*"])
        ['unet', 'vit_base', 'vit_small', 'vit_tiny']
    """
    patterns = [filter] if isinstance(filter, str) else filter
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"filter: expected a pattern such as 'vgg*', or several, got {filter!r}")
    every = patterns or ["*"]
    return sorted({name for p in every for name in fnmatch.filter(_MODELS, p or "*")})


def is_model(name: str) -> bool:
    """Whether there is a model of this name.

    Args:
        name: to look up, the same as for :func:`create_model`.

    Example:
        >>> is_model("vgg11"), is_model("vgg12")
        (True, False)
    """
    return isinstance(name, str) and name in _MODELS


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
    pretrained: bool = False,
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
        num_classes: of classifiers and segmenters; others don't look at it. With 0 a classifier
            gives the pooled features that its last layer would see, and a segmenter those of each
            point; ``nn.Identity`` is in that layer's place.
        in_channels: of the images, or axes of the points' positions.
        image_size: side of the images; their shortest side, where they needn't be square. Models
            of points, unet, dncnn and all_conv_net don't look at it.
        pretrained: False, as weights are not published. Train them (:func:`convnn_geo.train.train`)
            and bring the model back by :func:`convnn_geo.train.load_model`.
        **options: of the model (``width``, which multiplies its channels, ``depth``,
            ``patch_size``, ...) and of the layer
            (``k``, ``metric``, ``ratio``, ``lam``, ``kernel``, ``candidates``, ...).

    Raises:
        ValueError: unknown models, layers or options; a layer that can't be there; pretrained
            weights; no classes in a model that has none to leave out.
        TypeError: options of the wrong type.
        MissingExtraError: torchvision or timm is not installed.

    Example:
        >>> import torch
        >>> model = create_model("unet", "branching", in_channels=1, width=0.125, ratio=0.25, k=5)
        >>> model(torch.zeros(1, 1, 16, 24)).shape
        torch.Size([1, 1, 16, 24])
        >>> create_model("all_conv_net", num_classes=0)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 192])
    """
    entry = check_options(name, layer, options)
    if pretrained:
        raise ValueError(
            f"pretrained: expected False, got {pretrained!r}; no weights are published. Train a "
            "model and bring it back by convnn_geo.train.load_model, load a checkpoint of yours by "
            "load_state_dict, or convert a model of timm or torchvision that has weights "
            "(convnn_geo.convert.to_convnn)"
        )
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    shared = {key: check_int(key, given[key], SHARED[key]) for key in entry.asked}
    if num_classes == 0 and "num_classes" not in shared:
        raise ValueError(
            f"num_classes: 0 is for features in place of classes, and {name} has none; leave it "
            "out, or choose a classifier"
        )
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
    known = [*entry.options, *of_layer, "pretrained"]  # whose value create_model looks at
    unknown = [option for option in options if option not in known]
    if not unknown:
        return entry
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
