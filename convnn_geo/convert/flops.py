"""Floating-point operations of an operation: two a multiply-add, counted from shapes."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnn_geo.convert.positions import PatchPositions
from convnn_geo.kernels import HeadTaps, Kernel, Max, Mean, Separable, Sum, Taps
from convnn_geo.metrics import Encoded, Interpolation, Metric, Spatial
from convnn_geo.metrics import Sum as MetricSum
from convnn_geo.nn import ConvNNAttention
from convnn_geo.operation import Operation
from convnn_geo.selection import Every, Given


def bound_operation(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    """The operation of a layer's call of ``forward``."""
    call = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    takes = inspect.signature(layer.operation).parameters
    return layer.operation(**{name: value for name, value in call.items() if name in takes})


def layer_flops(layer: nn.Module, op: Operation) -> int:
    """Operations of a layer of ours: search, weights, kernel, and projections of attention.

    Example:
        >>> import torch
        >>> from convnn_geo.nn import ConvNN2d
        >>> layer, x = ConvNN2d(3, 8, k=9, metric="cosine"), torch.zeros(2, 3, 4, 5)
        >>> layer_flops(layer, layer.operation(x)) == 2 * 2 * (20 * 20 * 3 + 20 * 9 * 3 * 8)
        True
    """
    total = _search(op) + _kernel(op)
    if isinstance(layer, ConvNNAttention):
        b, _, n, _ = op.target.features.shape
        m = op.source.num_points - (layer.bias_k is not None) - layer.add_zero_attn
        query, key, value = layer.widths
        out = layer.out_proj.weight.numel()
        total += 2 * b * (n * (layer.embed_dim * query + out) + m * layer.embed_dim * (key + value))
    return total


def looks_at_features(metric: Metric) -> bool:
    """Whether a metric looks at features; positions alone are searched without products."""
    if isinstance(metric, Interpolation):
        parts = [metric.first, metric.second] if metric.end is None else [metric.end]
        return any(looks_at_features(part) for part in parts)
    if isinstance(metric, MetricSum):
        pairs = zip(metric.weights, metric.metrics, strict=True)
        return any(weight > 0 and looks_at_features(part) for weight, part in pairs)  # type: ignore[arg-type]
    if isinstance(metric, Encoded):
        return looks_at_features(metric.metric)
    return not isinstance(metric, (Spatial, PatchPositions))


def _targets(op: Operation) -> int:
    """Targets of all examples and heads, without those that only fill a batch up."""
    if op.target.mask is not None:
        return int(op.target.mask.sum())
    return math.prod(op.value.shape[:-2]) * op.target.num_points


def _candidates(op: Operation) -> int:
    """Sources that a target may choose from."""
    index = op.query().subset.index
    return op.source.num_points if index is None else index.shape[-1]


def _pairs(op: Operation) -> int:
    """Pairs of targets and candidates."""
    if op.target.mask is not None and op.source.mask is not None:
        return int((op.target.mask.sum(-1) * op.source.mask.sum(-1)).sum())
    return _targets(op) * _candidates(op)


def _search(op: Operation) -> int:
    """Products of queries and keys; none where nobody asks, or the graph is given."""
    asked = op.weighting.uses_distance or not op.whole
    if not asked or isinstance(op.selection, Given) or not looks_at_features(op.metric):
        return 0
    return 2 * _pairs(op) * op.bound.width


def _kernel(op: Operation) -> int:
    kernel, targets = op.kernel, _targets(op)
    if isinstance(kernel, Taps):
        return 2 * targets * kernel.weight.numel()
    if isinstance(kernel, Separable):
        return 2 * targets * (kernel.depthwise.numel() + kernel.pointwise.numel())
    if isinstance(kernel, HeadTaps):
        return 2 * targets * kernel.weight[0].numel()
    if isinstance(kernel, (Sum, Mean, Max)):
        k = _candidates(op) if isinstance(op.selection, Every) else getattr(op.selection, "k", 0)
        return 2 * targets * k * op.value.shape[-1] if op.weighting.uses_distance else 0
    return _measured(op, kernel)


def _measured(op: Operation, kernel: Kernel) -> int:
    """A kernel with networks of its own: what they are seen to do."""
    pairs = op.pairs()
    weight = op.weighting(pairs)
    with FlopCounterMode(display=False) as counter:
        kernel.gather(pairs, weight)
    return counter.get_total_flops()
