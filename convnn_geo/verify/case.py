"""A case: a recipe, an input, and a peer that computes the same by other means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """One check of a recipe.

    Args:
        recipe: its name.
        name: what is special about this case.
        peer: what it is compared with.
        build: the layer, given ``backend=``.
        shapes: of the inputs; they are drawn from a standard normal.
        reference: the same result from the layer's own parameters and the inputs, by the peer.
        forward: how the layer is called; ``layer(*inputs)`` by default.
    """

    recipe: str
    name: str
    peer: str
    build: Callable[..., nn.Module]
    shapes: Sequence[tuple[int, ...]]
    reference: Callable[..., Tensor]
    forward: Callable[..., Any] = field(default=lambda layer, *inputs: layer(*inputs))


CASES: list[Case] = []


def add(*args: Any, **kwargs: Any) -> None:
    """Enter a case into the list."""
    CASES.append(Case(*args, **kwargs))


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters, to call a peer of the same names with."""
    return dict(layer.named_parameters())


def call(peer: nn.Module, layer: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
    """The peer on the layer's own parameters, so that gradients can be compared."""
    return torch.func.functional_call(peer, parameters(layer), inputs, kwargs, strict=True)
