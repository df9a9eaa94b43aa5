"""Where layers stand between positions and features, and how they are moved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from convnn_geo.candidates import All
from convnn_geo.checks import check_number
from convnn_geo.convert.attention import TimmAttention
from convnn_geo.convert.convolution import positional
from convnn_geo.convert.known import KNOWN, is_ours, places
from convnn_geo.convert.placing import place_tokens
from convnn_geo.convert.positions import PatchPositions, UnknownPositions, token_positions
from convnn_geo.convert.weights import set_mode
from convnn_geo.metrics import Feature, Interpolation, Metric, Spatial
from convnn_geo.nn import Branching, ConvNN1d, ConvNN2d, ConvNN3d, ConvNNAttention
from convnn_geo.nn.branching import PixelAttention
from convnn_geo.nn.point_attention import PointAttention
from convnn_geo.recipes.convolution import nearest_in_window
from convnn_geo.selection import Every, KNearest
from convnn_geo.weighting import MeanOneSoftmax, Ones


def set_interpolation(model: nn.Module, lam: float, learnable: bool = False) -> list[str]:
    r"""Move every layer of ours along the spectrum, from positions to features.

    .. math:: d = (1 - \lambda)\, d_{position} + \lambda\, d_{feature}

    At 0 a convolution is the convolution that it was, at 1 an attention the attention. A
    convolution chooses among all pixels of the padded image, zeros included, as many as its window
    has, by Chebyshev distance and cosine, taps in raster order
    (:func:`~convnn_geo.recipes.interpolated_conv2d`). A layer that chooses by features moves from
    those to positions. An attention adds the squared distance of its tokens' positions: on the grid
    of patches in timm's and torchvision's vision transformers, whose class token is near to all,
    on that of pixels where it took a convolution's place, and along the sequence elsewhere. ConvNN
    in the place of timm's attention moves to positions on the grid of patches, too. Of a
    :class:`~convnn_geo.nn.Branching` the ConvNN branch moves.

    Distances of positions of a convolution are steps of a pixel. After a ReLU cosine distances stay
    below one, so that convolutions with square windows stay what they are up to ``lam = 0.5`` and
    move beyond; of other windows a step counts two over the side along its axis.

    Parameters stay the same objects, so that optimizers stay valid. A fixed ``lam`` is no part of
    the state_dict: move a model again before its weights are loaded, and after timm's
    ``set_input_size``, so that patches are placed anew; convolutions of patches are not, so convert
    after that. Layers that can't move stay: windows of even size, of one pixel, dilated, or padded
    by anything but zeros, attention with keys that have no position, and layers of clouds of
    points.

    Args:
        model: with converted layers, or any layers of ours.
        lam: in [0, 1].
        learnable: make ``lam`` a parameter of each layer, kept in [0, 1] by clamping, that starts
            there. Since selection has no gradient, a convolution then weighs its neighbours by a
            softmax over distances times k, so that it equals no convolution at 0.

    Returns:
        Names of the layers that moved.

    Raises:
        ValueError: lam outside [0, 1], no layer that can move, or patches whose grid is not known
            (``dynamic_img_size``) anywhere but at 1.

    Example:
        >>> from convnn_geo import convert
        >>> conv = nn.Conv2d(2, 3, 3, padding=1)
        >>> model, x = convert.to_convnn(nn.Sequential(conv)), torch.randn(1, 2, 5, 5)
        >>> convert.set_interpolation(model, 0.5), torch.allclose(model(x), conv(x))
        (['0'], False)
        >>> convert.set_interpolation(model, 0), torch.allclose(model(x), conv(x), atol=1e-6)
        (['0'], True)
    """
    check_number("lam", lam, maximum=1)
    movable = _movable(model)
    if not movable:
        raise ValueError(
            "set_interpolation: the model has no layer that can move; convert it by to_convnn, "
            "with convolutions that are odd, undilated and zero-padded, or with attention; known "
            f"are {KNOWN}{_left(model)}"
        )
    ends = {name: _ends(model, name, layer) for name, layer in movable.items()}
    for name, layer in movable.items():
        place = _place(layer, ends[name][0])
        if isinstance(place, UnknownPositions) and (lam < 1 or learnable):
            raise ValueError(
                f"set_interpolation: {name} can't leave lam=1: {place.reason}, so that the grid of "
                "its patches is unknown; build the model for images of one size"
            )
    for name, layer in movable.items():
        before = [*layer.modules()]
        if not isinstance(layer.metric, Interpolation):
            layer.metric = Interpolation(*ends[name], lam)
        else:  # it may have been moved outside of its model, or the model given another size
            place_tokens(model, name, layer)
        _set_lam(layer.metric, lam, learnable, next(layer.parameters()))
        if not isinstance(layer, ConvNNAttention):
            _settle(layer)
        set_mode(layer, before, layer.training)
    return list(movable)


def _left(model: nn.Module) -> str:
    """Layers that look like attention and are not known."""
    ours = {id(part) for layer, _ in places(model, is_ours) for part in layer.modules()}
    kinds = {type(part) for part in model.modules() if id(part) not in ours}
    left = sorted(
        f"{kind.__module__}.{kind.__name__}"
        for kind in kinds
        if "Attention" in kind.__name__ or kind.__name__.endswith("Attn")
    )
    return f", not {', '.join(left)}" if left else ""


def interpolation(model: nn.Module) -> dict[str, float]:
    """Where each layer that can move stands: 0 for positions, 1 for features.

    Example:
        >>> from convnn_geo import convert
        >>> model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 4), nn.Linear(2, 2))
        >>> convert.interpolation(convert.to_convnn(model))
        {'0': 0.0}
    """
    return {name: _stands(layer) for name, layer in _movable(model).items()}


def _stands(layer: Any) -> float:
    metric = layer.metric
    if isinstance(metric, Interpolation):
        lam = metric.lam.item() if isinstance(metric.lam, Tensor) else metric.lam
        return min(max(lam, 0.0), 1.0)
    return 0.0 if isinstance(metric, Spatial) else 1.0


def _movable(model: nn.Module) -> dict[str, Any]:
    """Layers that can move, by name."""
    found: dict[str, Any] = {}
    for part, names in places(model, lambda m: isinstance(m, (*_LAYERS, *_HOLDERS))):
        name, layer = names[0], part
        if isinstance(part, Branching):
            if part.neighbors is None:
                continue
            name, layer = f"{name}.neighbors".lstrip("."), part.neighbors
        if isinstance(part, (TimmAttention, PixelAttention)):
            layer = part.attention
        if isinstance(layer, _LAYERS) and _can_move(layer):
            found[name] = layer
    return found


_LAYERS = (ConvNN1d, ConvNN2d, ConvNN3d, ConvNNAttention)
_HOLDERS = (Branching, PixelAttention, PointAttention, TimmAttention)
"""Layers whose parts are looked at here; that of points stays, which knows no positions."""


def _can_move(layer: Any) -> bool:
    if not any(True for _ in layer.parameters()) or isinstance(layer.metric, PatchPositions):
        return False
    if isinstance(layer, ConvNNAttention) and (layer.bias_k is not None or layer.add_zero_attn):
        return False
    if isinstance(layer, ConvNNAttention):
        return not isinstance(layer.metric, Spatial)
    if isinstance(layer.metric, Spatial) or isinstance(layer.selection, Every):
        return _spans_window(layer)
    return True


def _spans_window(layer: Any) -> bool:
    """Whether a layer takes all of a window that is the nearest positions of its centre."""
    size = math.prod(layer.kernel_size or (1,))
    plain = isinstance(layer.weighting, (Ones, MeanOneSoftmax)) and layer.order == "raster"
    return size > 1 and layer.k == size and plain and positional(layer) is None


def _ends(model: nn.Module, name: str, layer: Any) -> tuple[Metric, Metric]:
    """The metrics at 0 and at 1."""
    if isinstance(layer, ConvNNAttention):
        return token_positions(model, name), layer.metric
    if isinstance(layer, ConvNN1d) and not isinstance(layer.metric, Spatial):
        place = token_positions(model, name)
        if not isinstance(place, Spatial):  # the sequence is of patches
            return place, layer.metric
    near = nearest_in_window(layer.kernel_size or (1,))
    return near, Feature("cosine") if isinstance(layer.metric, Spatial) else layer.metric


def _place(layer: Any, found: Metric) -> Metric:
    """The metric at 0; a layer that is asked for outside of its model keeps what it knows."""
    known = isinstance(layer.metric, Interpolation) and isinstance(found, Spatial)
    return layer.metric.first if known else found


def _set_lam(metric: Interpolation, lam: float, learnable: bool, like: Tensor) -> None:
    metric.start = lam
    if learnable and isinstance(metric.lam, nn.Parameter):
        with torch.no_grad():
            metric.lam.fill_(lam)
        return
    del metric.lam  # a parameter takes no number, nor the other way round
    metric.lam = nn.Parameter(like.new_tensor(float(lam))) if learnable else float(lam)


def _settle(layer: Any) -> None:
    """Candidates, selection and weighting of a convolution that go with its metric."""
    learns = isinstance(layer.metric.lam, Tensor)
    if learns and isinstance(layer.weighting, Ones):
        layer.weighting = MeanOneSoftmax()
    elif not learns and isinstance(layer.weighting, MeanOneSoftmax):
        layer.weighting = Ones()
    first = layer.metric.first
    if not _spans_window(layer) or not isinstance(first, Spatial) or first.p != math.inf:
        return
    at_window = not learns and layer.metric.lam == 0
    layer.candidates = layer.window if at_window else All()
    layer.selection = Every() if at_window else KNearest(layer.k)
