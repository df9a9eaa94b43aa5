"""What is done to a new model where no option of its layers says it: each a value with a repr."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from convnn_geo.candidates import Window
from convnn_geo.convert import PatchCandidates, set_interpolation
from convnn_geo.convert.positions import token_positions
from convnn_geo.experiments.parts import HeadInterpolation, Sample
from convnn_geo.metrics import Feature, PaperMix
from convnn_geo.nn import ConvNN2d, ConvNNAttention
from convnn_geo.selection import KNearest


@dataclass(frozen=True)
class Interpolate:
    """Moves every layer to a place between positions and features, neighbours weighed by distance.

    Args:
        lam: the place, or where learning starts.
        learnable: learn ``lam``, one a layer.
    """

    lam: float
    learnable: bool

    def __call__(self, model: nn.Module) -> None:
        """Move the layers."""
        set_interpolation(model, self.lam, learnable=True)  # which brings the weights
        for name, parameter in model.named_parameters():
            if name.endswith("metric.lam"):
                parameter.requires_grad_(self.learnable)


@dataclass(frozen=True)
class InterpolateHeads:
    """Lets every head of a vision transformer learn a place of its own.

    Args:
        lam: where learning starts.
    """

    lam: float

    def __call__(self, model: nn.Module) -> None:
        """Replace the metric of every attention."""
        for name, layer in attentions(model):
            layer.metric = HeadInterpolation(
                _patches(model, name, layer), layer.num_heads, self.lam
            )


@dataclass(frozen=True)
class PublishedMix:
    """Gives layers that choose the mixed distance of the paper.

    Args:
        lam: 0 for positions, 1 for features.
    """

    lam: float

    def __call__(self, model: nn.Module) -> None:
        """Replace their metrics."""
        for _, layer in choosing(model):
            # Of features alone, the same neighbours, found faster.
            layer.metric = PaperMix(self.lam) if self.lam < 1 else Feature("euclidean")


@dataclass(frozen=True)
class LookAmong:
    """Lets layers choose among a sample of all points.

    Args:
        sample: ``"random"`` or ``"strided"``.
        r: points to draw, or an axis of the lattice.
    """

    sample: str
    r: int

    def __call__(self, model: nn.Module) -> None:
        """Replace their candidates."""
        for name, layer in choosing(model):
            layer.candidates = Sample(self.sample, self.r, _patches(model, name, layer))


@dataclass(frozen=True)
class LookAround:
    """Lets patches of a vision transformer look at a square of patches, and at the class token.

    Args:
        size: odd side of the square, in patches.
        shift: move squares inward at the border, rather than cut them.
    """

    size: int
    shift: bool = False

    def __call__(self, model: nn.Module) -> None:
        """Replace the candidates of every attention."""
        cut = Window(self.size, padding="same")
        window = Window(self.size, border="shift") if self.shift else cut
        for name, layer in attentions(model):
            layer.candidates = PatchCandidates(window, _patches(model, name, layer))


def choosing(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that choose their nearest, with their names."""
    for name, layer in model.named_modules():
        if isinstance(layer, (ConvNN2d, ConvNNAttention)) and isinstance(layer.selection, KNearest):
            yield name, layer


def attentions(model: nn.Module) -> Iterator[tuple[str, ConvNNAttention]]:
    """Every attention of ours, with its name."""
    for name, layer in model.named_modules():
        if isinstance(layer, ConvNNAttention):
            yield name, layer


def _patches(model: nn.Module, name: str, layer: nn.Module) -> Any:
    """Where the tokens of an attention lie; None for the layers of images."""
    return token_positions(model, name) if isinstance(layer, ConvNNAttention) else None
