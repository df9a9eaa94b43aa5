"""Layers that are told where the tokens of a vision transformer lie."""

from __future__ import annotations

from typing import Any

from torch import nn

from convnn_geo.candidates import Block, Candidates, Congruent, Strided, Window
from convnn_geo.convert.patches import PatchCandidates, PatchConv, Patches
from convnn_geo.convert.positions import (
    PatchPositions,
    UnknownPositions,
    is_of_sequence,
    token_positions,
)
from convnn_geo.convert.tokens import TimmTokens
from convnn_geo.metrics import Interpolation, Metric, Spatial
from convnn_geo.nn import ConvNN1d, ConvNNAttention

_ON_GRID = (Window, Block, Congruent, Strided)


def place_tokens(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Tell a layer that was put into a vision transformer where its tokens lie.

    It was built without the model around it, and takes tokens for a sequence. Metrics between
    positions and features learn the positions of patches; any other stands at the features' end,
    where positions do not count yet. Windows, blocks and strides become those of patches on their
    grid, with the tokens before them, such as the class token, in sight of all.
    """
    place = token_positions(model, name)
    if isinstance(place, Spatial):
        return
    of_tokens = isinstance(layer, TimmTokens)
    for part in [*layer.modules()]:
        if isinstance(part, (ConvNNAttention, ConvNN1d)):
            known = isinstance(part, ConvNNAttention) or _is_placed(part.metric)
            if known:
                _place_metric(part, place)
            if known or of_tokens:
                part.candidates = _placed(part.candidates, place)
        if of_tokens:
            for key, child in [*part.named_children()]:
                if _is_window(child):
                    setattr(part, key, _window(child, place))


def _place_metric(layer: ConvNNAttention | ConvNN1d, place: Patches) -> None:
    metric = layer.metric
    if not isinstance(metric, (Interpolation, Spatial)):
        layer.metric = Interpolation(place, metric, 1.0)
    elif isinstance(metric, Interpolation) and (is_of_sequence(metric.first) or _is_placed(metric)):
        metric.first = place


def _is_placed(metric: Metric) -> bool:
    """Whether a metric knows where patches lie; the model may have another size since."""
    placed = (PatchPositions, UnknownPositions)
    return isinstance(metric, Interpolation) and isinstance(metric.first, placed)


def _placed(candidates: Candidates, place: Patches) -> Candidates:
    """Candidates among patches, where they are of a grid."""
    if isinstance(candidates, PatchCandidates):
        candidates.patches = place  # the model may have been made for another size since
        return candidates
    on_grid = any(isinstance(part, _ON_GRID) for part in candidates.modules())
    return PatchCandidates(candidates, place) if on_grid else candidates


def _is_window(layer: nn.Module) -> bool:
    """Whether a layer is a convolution whose window is not placed yet."""
    if isinstance(layer, PatchConv):
        return isinstance(layer.patches, UnknownPositions)
    return isinstance(layer, ConvNN1d) and layer.kernel_size is not None


def _window(layer: Any, place: Patches) -> PatchConv:
    """The convolution of patches; a window of one number has it for a side along both axes."""
    old: Any = layer.convolution if isinstance(layer, PatchConv) else layer
    sides = layer.kernel_size if isinstance(layer, PatchConv) else layer.kernel_size[0]
    return PatchConv(
        old.in_channels,
        old.out_channels,
        sides,
        place,
        old.bias is not None,
        old.weight.device,
        old.weight.dtype,
    )
