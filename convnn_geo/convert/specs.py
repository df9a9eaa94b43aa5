"""Specs: what a layer is to become, by name and options."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convnn_geo import recipes
from convnn_geo.checks import check_name
from convnn_geo.convert.choices import CHOICES, Choice, check_options
from convnn_geo.convert.known import KNOWN, OURS, kind
from convnn_geo.convert.weights import NotApplicable, check_forward
from convnn_geo.selection import KNearest


@dataclass(frozen=True)
class Spec:
    """What a layer is to become: called with the layer, it gives the new one.

    Args:
        name: of a spec, or of a function.
        options: of the new layer.
        build: from the layer and the options to the new layer; None for the specs by name.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    build: Callable[..., nn.Module] | None = None

    def __call__(self, layer: nn.Module) -> nn.Module:
        """The layer's replacement; the layer itself for ``"keep"``.

        Raises:
            NotApplicable: a layer of this kind, or this one, can't become what is asked for.
            ValueError: an option is wrong.
        """
        new = self._build(layer)
        if not isinstance(new, nn.Module):
            raise TypeError(f"{self.name}: expected an nn.Module in return, got {new!r}")
        if new is not layer:
            new.train(layer.training)
            new.converted_from = type(layer).__name__  # type: ignore[assignment]
        return new

    def _build(self, layer: nn.Module) -> nn.Module:
        if self.build is not None:
            return self.build(layer, **self.options)
        if self.name == "keep":
            return layer
        which = kind(layer)
        if which is None:
            raise NotApplicable(f"{type(layer).__name__} is not among the layers known: {KNOWN}")
        check_forward(layer)
        choices = CHOICES[which]
        if self.name not in choices:
            raise NotApplicable(
                f"{type(layer).__name__} can't become {self.name!r}; expected one of: "
                f"{', '.join(['keep', *choices])}"
            )
        choice = choices[self.name]
        check_options(self.name, self.options, choice.options, choice.required)
        options = self._own_options()
        chosen = options.get("selection") is not None
        if chosen and "k" in choice.options:
            options.setdefault("k", None)  # which else has a default
        new = choice.build(layer, **options)
        if not chosen:  # a model's last maps may be of fewer pixels than k
            for part in new.modules():
                if isinstance(part, KNearest):
                    part.short = "pad"
        return new

    def _own_options(self) -> dict[str, Any]:
        """Options for one layer: a metric, say, that learns is not shared between layers."""
        return {
            name: copy.deepcopy(value) if isinstance(value, nn.Module) else value
            for name, value in self.options.items()
        }


def spec(become: str | Callable[..., nn.Module], **options: Any) -> Spec:
    """What a layer is to become.

    ======================  ==================================================================
    name                    a layer becomes
    ======================  ==================================================================
    ``exact``               the layer of ours that equals it, with its weights
    ``keep``                itself
    ``conv``                of a convolution: the same as ``exact``; of timm's attention: a
                            convolution of ``kernel_size`` 3 over the patches
    ``convnn``              ConvNN over the ``k`` nearest by ``metric``, pixels or timm's tokens
    ``branching``           ConvNN beside the convolution, or beside timm's attention, which keeps
                            its projections: ``ratio``, ``other``, ...
    ``attention``           attention among all pixels; of an attention: the same as ``exact``
    ``kvt``                 attention over the ``k`` nearest keys, or pixels
    ``convnn_attention``    attention over the ``k`` nearest with taps inside the heads
    any recipe              of a convolution, an attention or DynamicEdgeConv
    ======================  ==================================================================

    Windows, blocks and strides among the tokens of a vision transformer are those of its patches on
    their grid, a number for both axes or one for each; tokens before the patches, such as the class
    token, see all and are seen by all. Tokens of other models are a sequence.

    Where a layer of k neighbours sees fewer than k pixels or tokens, its last taps are empty, as
    some taps of a convolution are at borders; ``selection=KNearest(k)`` makes it an error.

    Weights are carried over where their shapes allow; others are drawn anew. ``conv``, ``convnn``
    and ``branching`` in the place of an attention take no masks, and ``nn.MultiheadAttention``,
    whose keys may be others than its queries, can't become them.

    Args:
        become: a name, a recipe, which is a name, too, or any function from a layer (and the
            options) to a layer.
        **options: of the new layer; :func:`spec_options` lists those of a name.

    Raises:
        ValueError: an unknown name, or an option that it does not take.
        TypeError: a layer, or a class of ours, which says not how one is made of another.

    Example:
        >>> spec("convnn", k=5)(nn.Conv2d(3, 8, 3, padding=1)).k
        5
        >>> type(spec("kvt", k=4)(nn.MultiheadAttention(8, 2))).__name__
        'ConvNNAttention'
    """
    name = getattr(become, "__name__", type(become).__name__)
    if getattr(recipes, name, None) is become:
        become = name
    if not isinstance(become, str):
        _check_makes(become, name)
        return Spec(name, options, become)
    required = [option for choice in _choices(become) for option in choice.required]
    check_options(become, options, spec_options(become), required)
    return Spec(become, options)


def _check_makes(become: Any, name: str) -> None:
    """Raise for a layer, and for a class of ours: neither makes a layer out of the old one."""
    of_ours = isinstance(become, type) and issubclass(become, OURS)
    if isinstance(become, nn.Module) or of_ours:
        raise TypeError(
            "spec: expected a name such as 'convnn', or a function from the old layer to a new "
            f"one, got {'' if of_ours else 'a '}{name}, which is made without looking at the old; "
            "write convert.spec('convnn', k=9), say, or lambda old: ..."
        )
    if not callable(become):
        raise TypeError(f"spec: expected a name, or a function of a layer, got {become!r}")


def spec_names() -> list[str]:
    """Names that :func:`spec` knows.

    Example:
        >>> {"exact", "branching", "kvt", "interpolated_conv2d"} <= set(spec_names())
        True
    """
    return list(dict.fromkeys(["keep", *(name for some in CHOICES.values() for name in some)]))


def spec_options(name: str) -> list[str]:
    """Options that a spec takes, for any kind of layer.

    Example:
        >>> spec_options("attention"), spec_options("branching")[:3]
        (['num_heads'], ['ratio', 'k', 'metric'])
    """
    check_name("spec", name, spec_names())
    return list(dict.fromkeys(option for choice in _choices(name) for option in choice.options))


def _choices(name: str) -> list[Choice]:
    """A name's choices, one a kind of layer that may become it."""
    return [some[name] for some in CHOICES.values() if name in some]
