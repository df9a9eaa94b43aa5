"""Floating-point operations of a layer's call: two a multiply-add, whichever lowering runs it.

Counted from shapes:

- the search, two a channel for each pair of target and candidate, where the metric looks at
  features and somebody asks: a choice among candidates, or weights that depend on distances;
- taps, two a number of theirs for each target;
- weights on what neighbours send, for each pair and channel: two where ``Sum`` and ``Mean`` add
  the products up, as ``VectorAttention`` does, and one before any other kernel;
- the projections of attention.

Counted as torch's counter sees them, run once and by themselves: encodings, what a metric makes of
each point (projections, ``Mahalanobis``, ``Bilinear``), networks of weightings and of kernels. A
network on positions that all examples of a batch share runs once for all.

Pairs behind a mask and empty slots count, as a convolution's padded border does. Points that fill
clouds up to one size count in networks that run once a point, and nowhere else.

Not counted: the search by positions alone, biases and other additions (of positions, of scores
that are given), functions of a number (norms, softmax, activations), comparisons (top k, sorting,
maxima), resampling, and distances of chosen pairs, which the search has counted. Of a metric made
by a function of pairs, such as ``Custom``, nobody knows what it does: it counts as one channel.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnn_geo.convert.positions import PatchPositions
from convnn_geo.kernels import HeadTaps, Max, Mean, Separable, Sum, Taps, VectorAttention
from convnn_geo.lowering import operation_of
from convnn_geo.metrics import Encoded, Interpolation, Metric, PaperMix, PositionBias, Spatial
from convnn_geo.metrics import Sum as MetricSum
from convnn_geo.nn import ConvNNAttention
from convnn_geo.nn.settable import slots
from convnn_geo.operation import Operation
from convnn_geo.points import Points
from convnn_geo.selection import Every, Given
from convnn_geo.weighting import Gaussian, InverseDistance, Ones, Similarity, Softmax

_WITHOUT_NETWORKS = (Gaussian, InverseDistance, Ones, Similarity, Softmax)


def counted(layer: Any, *args: Any, **kwargs: Any) -> tuple[Operation, int]:
    """The operation of a layer's call of ``forward``, and its FLOPs.

    Example:
        >>> import torch
        >>> from convnn_geo.nn import ConvNN2d
        >>> layer, x = ConvNN2d(3, 8, k=9, metric="cosine"), torch.zeros(2, 3, 4, 5)
        >>> counted(layer, x)[1] == 2 * 2 * (20 * 20 * 3 + 20 * 9 * 3 * 8)
        True
    """
    op, total = _encoded(layer, *args, **kwargs)
    bound = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    total += _distances(op, _asked(op, bound.get("batch"))) + _kernel(op)
    if isinstance(layer, ConvNNAttention):
        total += _projections(layer, op)
    return op, total


def looks_at_features(metric: Metric) -> bool:
    """Whether a metric looks at features; positions alone are searched without products."""
    parts = _parts(metric)
    if parts is not None:
        return any(looks_at_features(part) for part in parts)
    if isinstance(metric, Encoded):
        return looks_at_features(metric.metric)
    if isinstance(metric, PaperMix):
        return metric.lam > 0
    return not isinstance(metric, (Spatial, PatchPositions, PositionBias))


def _parts(metric: Metric) -> list[Any] | None:
    """The metrics that count in one that is made of others; None for all other metrics."""
    if isinstance(metric, Interpolation):
        return [metric.first, metric.second] if metric.end is None else [metric.end]
    if isinstance(metric, MetricSum):
        pairs = zip(metric.weights, metric.metrics, strict=True)
        return [part for weight, part in pairs if weight > 0]
    return None


def _encoded(layer: Any, *args: Any, **kwargs: Any) -> tuple[Operation, int]:
    """The operation, and what the layer's encoding does on the way there.

    Not what the way takes otherwise: large clouds are searched there, by any engine.
    """
    encoding: nn.Module | None = layer.encoding
    if encoding is None or encoding.on == "metric":  # then it is part of the metric
        return operation_of(layer, *args, **kwargs), 0
    with FlopCounterMode(display=False) as counter:
        seen: list[int] = []
        handles = [
            encoding.register_forward_pre_hook(lambda *_: seen.append(-counter.get_total_flops())),
            encoding.register_forward_hook(lambda *_: seen.append(counter.get_total_flops())),
        ]
        try:
            op = operation_of(layer, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return op, sum(seen)


def _asked(op: Operation, batch: Any) -> int:
    """Pairs whose distances somebody asks for."""
    if isinstance(op.selection, Given):
        if op.selection.origin != "edge_index":  # the layer has searched already, cloud by cloud
            return _pairs_of_clouds(op, batch)
        return _chosen(op) if op.weighting.uses_distance else 0
    return _pairs(op) if op.weighting.uses_distance or not op.whole else 0


def _pairs_of_clouds(op: Operation, batch: Any) -> int:
    source, target = batch if isinstance(batch, tuple) else (batch, batch)
    target = source if op.target is op.source else target
    clouds = 1 + int(max(source.max(), target.max()))
    sources, targets = (torch.bincount(b, minlength=clouds) for b in (source, target))
    return int((sources * targets).sum())


def _pairs(op: Operation) -> int:
    """Pairs of targets and candidates."""
    index = op.query().subset.index
    targets = _real(op.target)
    pairs = targets * (_real(op.source) if index is None else index.shape[-1])
    if isinstance(pairs, Tensor):
        return int(pairs.sum())
    return math.prod(op.value.shape[:-2]) * pairs


def _real(points: Points) -> Any:
    """Points of each example, without those that only fill it up."""
    return points.num_points if points.mask is None else points.mask.sum(-1)


def _targets(op: Operation) -> int:
    """Targets of all examples and heads, without those that only fill a batch up."""
    if op.target.mask is not None:
        return int(op.target.mask.sum())
    return math.prod(op.value.shape[:-2]) * op.target.num_points


def _chosen(op: Operation) -> int:
    """Pairs of targets and the slots of their neighbours."""
    if isinstance(op.selection, Every):
        return _pairs(op)
    if isinstance(op.selection, Given):
        return _targets(op) * op.selection.neighborhood.k
    k = slots(op.selection)
    return _targets(op) * (op.neighborhood().k if k is None else k)


def _distances(op: Operation, pairs: int) -> int:
    """What a metric makes of points, and of that many pairs."""
    if not pairs:
        return 0
    with FlopCounterMode(display=False) as counter:
        width = _width(op.metric, op.target, op.source)
    return counter.get_total_flops() + 2 * pairs * width


def _width(metric: Metric, target: Points, source: Points) -> int:
    """Channels that a pair looks at, those of positions left out."""
    if not looks_at_features(metric):
        return 0
    parts = _parts(metric)
    if parts is not None:
        return sum(_width(part, target, source) for part in parts)
    if isinstance(metric, PaperMix):
        return source.features.shape[-1]
    return metric.bind(target, source).width


def _kernel(op: Operation) -> int:
    """Taps, networks, and products with weights."""
    kernel, targets, channels, total = op.kernel, _targets(op), op.value.shape[-1], 0
    if not targets:
        return 0
    known = isinstance(kernel, (Taps, Separable, HeadTaps, Sum, Mean, Max))
    if isinstance(kernel, Taps):
        total = 2 * targets * kernel.weight.numel()
    elif isinstance(kernel, Separable):
        total = 2 * targets * (kernel.depthwise.numel() + kernel.pointwise.numel())
    elif isinstance(kernel, HeadTaps):
        total = 2 * targets * kernel.weight[0].numel()
    if not known or type(op.weighting) not in _WITHOUT_NETWORKS:
        networks, channels = _networks(op, known)
        total += networks
    if isinstance(kernel, VectorAttention):
        total += 2 * _chosen(op) * (channels // 2)  # scores are the other half
    if not isinstance(op.weighting, Ones):
        total += (2 if isinstance(kernel, (Sum, Mean)) else 1) * _chosen(op) * channels
    return total


def _networks(op: Operation, known: bool) -> tuple[int, int]:
    """What weighting and kernel are seen to do, without a known kernel; channels of messages."""
    hood = op.neighborhood()
    with FlopCounterMode(display=False) as counter:
        pairs = op.pairs(hood)
    total = counter.get_total_flops()
    if op.weighting.uses_distance:
        _ = pairs.distance  # kept: the weighting does not compute what is counted already
    with FlopCounterMode(display=False) as counter:
        op.weighting(pairs)
        messages = pairs.value if known else op.kernel.message(pairs)
        if not known:
            op.kernel.finish(op.kernel.reduce(messages, pairs.mask), pairs.target.x)
    return total + counter.get_total_flops(), messages.shape[-1]


def _projections(layer: ConvNNAttention, op: Operation) -> int:
    """Queries, keys, values, and the output."""
    b, _, n, _ = op.target.features.shape
    m = op.source.num_points - (layer.bias_k is not None) - layer.add_zero_attn
    query, key, value = layer.widths
    targets = layer.embed_dim * query + layer.out_proj.weight.numel()
    return 2 * b * (n * targets + m * layer.embed_dim * (key + value))
