"""What is done to a new model where no option of its layers says it: each a value with a repr."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convnn_geo.candidates import All, Candidates, Random, Strided, Subset
from convnn_geo.checks import check_int
from convnn_geo.convert import PatchPositions, set_interpolation
from convnn_geo.convert.positions import token_positions
from convnn_geo.metrics import PaperMix
from convnn_geo.nn import ConvNN2d, ConvNNAttention
from convnn_geo.points import Grid, Points
from convnn_geo.selection import KNearest


@dataclass(frozen=True)
class Interpolate:
    """Moves every layer to a place between positions and features.

    Args:
        lam: the place, or where learning starts.
        weighted: weigh neighbours by a softmax over distances, as learning does.
        learnable: learn ``lam``, one a layer.
    """

    lam: float
    weighted: bool = False
    learnable: bool = False

    def __call__(self, model: nn.Module) -> None:
        """Move the layers."""
        set_interpolation(model, self.lam, learnable=self.weighted or self.learnable)
        for name, parameter in model.named_parameters():
            if name.endswith("metric.lam"):
                parameter.requires_grad_(self.learnable)


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
            layer.metric = PaperMix(self.lam)


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
        for name, layer in attentions(model):
            layer.candidates = PatchWindow(_patches(model, name, layer), self.size, self.shift)


class Sample(Candidates):
    """A sample of the points; all of them where there are no more.

    Args:
        sample: ``"random"`` or ``"strided"``.
        r: points to draw, or an axis of the lattice.
        patches: where the points are tokens of a vision transformer; its prefix is always there.

    Example:
        >>> small = Points.from_image(torch.zeros(1, 1, 2, 2))
        >>> Sample("random", 9)(small, small).index is None
        True
    """

    def __init__(self, sample: str, r: int, patches: PatchPositions | None = None) -> None:
        super().__init__()
        self.sample, self.r, self.patches = sample, r, patches
        self.drawn = Random(r) if sample == "random" else None

    def forward(self, target: Points, source: Points) -> Subset:
        """The sample's indices, ascending."""
        if self.drawn is not None:
            few = source.num_points <= self.r
            return (All() if few else self.drawn)(target, source)
        if self.patches is None:
            side = min(self.r, *source.grid.size)  # type: ignore[union-attr]
            return Strided(side)(target, source)
        grid = Points(grid=Grid(self.patches.size))
        lattice: Any = Strided(self.r)(grid, grid).index
        prefix = torch.arange(self.patches.prefix).unsqueeze(0)
        index = torch.cat([prefix, lattice + self.patches.prefix], 1)
        return Subset(index.to(source.device))


class PatchWindow(Candidates):
    """A square of patches around each patch, and the tokens before the patches, which see all.

    Args:
        patches: how many there are along each axis, and how many tokens before them.
        size: odd side of the square.
        shift: move squares inward at the border, rather than cut them.

    Example:
        >>> tokens = Points.from_tokens(torch.zeros(1, 10, 4))
        >>> window = PatchWindow(PatchPositions((3, 3), prefix=1), 3)
        >>> window(tokens, tokens).mask[1].int().tolist()
        [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    """

    def __init__(self, patches: PatchPositions, size: int, shift: bool = False) -> None:
        super().__init__()
        self.patches, self.size, self.shift = patches, check_int("size", size), shift

    def forward(self, target: Points, source: Points) -> Subset:
        """A mask ``(n, n)``."""
        reach = self.size // 2
        place = Grid(self.patches.size).positions(source.device, torch.float32)
        centre = place
        if self.shift:
            last = torch.tensor(self.patches.size, device=source.device) - 1 - reach
            centre = place.clamp_min(reach).minimum(last.to(place.dtype))
        near = (centre.unsqueeze(1) - place).abs().amax(-1) <= reach
        before = self.patches.prefix
        mask = near.new_ones(before + len(near), before + len(near))
        mask[before:, before:] = near
        return Subset(mask=mask)


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
