"""What layers do alike with the metric and the encoding that they are given."""

from __future__ import annotations

import warnings

import torch

from convnn_geo.encodings import Encoding, as_encoding
from convnn_geo.metrics import Encoded, Metric, PositionBias, as_metric, full_precision
from convnn_geo.metrics.base import seen_by
from convnn_geo.points import Points
from convnn_geo.weighting import Weighting


def layer_encoding(
    encoding: Encoding | str | None,
    channels: int,
    axes: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Encoding | None:
    """The encoding of a layer; one by name takes the layer's device and dtype."""
    chosen = as_encoding(encoding, channels, axes)
    if isinstance(encoding, str) and chosen is not None:
        chosen.to(device=device, dtype=dtype)
    return chosen


def layer_metric(
    metric: Metric | str,
    encoding: Encoding | None,
    weighting: Weighting,
    heads: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Metric:
    """The metric of a layer, seeing points through the encoding where that is its place.

    One by name takes the layer's device and dtype; a module keeps its own. A learnable metric that
    gets no gradient is a mistake worth a word.
    """
    chosen = as_metric(metric)
    if not isinstance(metric, Metric):
        chosen.to(device=device, dtype=dtype)
    if encoding is not None and encoding.on == "metric":
        chosen = Encoded(chosen, encoding)
    _check_heads(chosen, heads)
    if chosen.learnable and not weighting.uses_distance:
        warnings.warn(
            f"{type(chosen).__name__} has parameters, but weights of {type(weighting).__name__} "
            "do not depend on distances, and selection has no gradient: the metric will not "
            "learn. Pass weighting='softmax', say.",
            UserWarning,
            stacklevel=3,
        )
    return chosen


def _check_heads(metric: Metric, heads: int | None) -> None:
    """Raise where tables of heads would meet an axis that is none."""
    for part in metric.modules():
        if not isinstance(part, PositionBias) or part.table.ndim == 1:
            continue
        tables = part.table.shape[0]
        if tables not in (1, heads):
            wanted = "has no heads" if heads is None else f"has {heads}"
            raise ValueError(
                f"metric: PositionBias has tables for {tables} heads, but the layer {wanted}; "
                "give it as many, or leave heads out for one table"
            )


def encode(encoding: Encoding, points: Points) -> Points:
    """Points with encoded features, computed in full precision since the metric may see them."""
    x = points.features
    with full_precision(points.device):
        encoded = encoding(points.with_x(seen_by(encoding, x)))
    return encoded.with_x(encoded.features.to(x.dtype))
