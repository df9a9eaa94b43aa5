"""Weights that go over from a layer to the one that takes its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from convnn_geo.checks import check_number
from convnn_geo.nn.branching import neighbor_channels


class NotApplicable(ValueError):  # noqa: N818 - a verdict on a layer, read as one
    """A layer can't become what was asked for; the message says why."""


def check_plain(layer: nn.Module, names: tuple[str, ...]) -> None:
    """Raise unless the layer's weights are parameters of its own, and there already.

    Nor may it have more than these.
    """
    for name in names:
        weight = getattr(layer, name, None)
        if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
            raise NotApplicable(f"its {name} is of {weight.dtype}, and ours is of real numbers")
        if name not in layer._parameters and getattr(layer, name, None) is not None:
            raise NotApplicable(
                f"its {name} is computed from other parameters; remove the parametrization, or "
                "the weight norm, first"
            )
        if isinstance(layer._parameters.get(name), UninitializedParameter):
            raise NotApplicable(f"its {name} has no shape yet; run the model once first")
    extra = [
        name
        for held in (layer._parameters, layer._buffers, layer._modules)
        for name, value in held.items()
        if value is not None and name not in (*names, "out_proj")
    ]
    if extra:
        raise NotApplicable(f"it has parts of its own, which would be lost: {', '.join(extra)}")


def check_forward(layer: nn.Module) -> None:
    """Raise where a forward was put on the object, as some do to change a model that they have."""
    for name in ("forward", "_conv_forward"):
        own = vars(layer).get(name)
        if own is None:
            continue
        again = getattr(own, "__self__", None) is layer  # a hook that was removed leaves its own
        if not again or own.__func__ is not getattr(type(layer), name, None):
            raise NotApplicable(
                f"its {name} was replaced, and would be lost; convert before that, or undo it "
                "(where a hook did it, remove the hook)"
            )


def carry(new: nn.Module, name: str, old: nn.Parameter | None) -> None:
    """Give ``new`` the parameter of an old layer, where the shapes allow.

    The same Parameter where shapes are equal, so that optimizers go on; its values where only the
    axes of the taps are flattened, ``(d, c, 3, 3)`` to ``(d, c, 9)``.
    """
    fresh: Any = getattr(new, name, None)
    if old is None or not isinstance(fresh, nn.Parameter):
        return
    if fresh.shape == old.shape:
        setattr(new, name, old)
    elif fresh.numel() == old.numel() and fresh.shape[:2] == old.shape[:2]:
        with torch.no_grad():
            fresh.copy_(old.reshape(fresh.shape))
        fresh.requires_grad_(old.requires_grad)


def set_mode(layer: nn.Module, known: Iterable[nn.Module], training: bool) -> None:
    """Let parts of a layer that were not known before train, or not."""
    known = set(known)
    for part in layer.modules():
        if part not in known:
            part.training = training


def check_share(channels: int, ratio: float) -> None:
    """Raise where a share, which is one, leaves one of two branches no channel."""
    check_number("ratio", ratio, maximum=1)
    try:
        neighbor_channels(channels, ratio)
    except ValueError as error:
        raise NotApplicable(str(error)) from error
