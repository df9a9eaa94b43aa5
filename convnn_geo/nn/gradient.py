"""A learnable metric that gets no gradient is a mistake worth a word."""

from __future__ import annotations

import warnings

from convnn_geo.metrics import Metric
from convnn_geo.weighting import Weighting


def warn_without_gradient(metric: Metric, weighting: Weighting) -> None:
    """Warn once, at construction, where a metric's parameters can't learn."""
    if metric.learnable and not weighting.uses_distance:
        warnings.warn(
            f"{type(metric).__name__} has parameters, but weights of {type(weighting).__name__} "
            "do not depend on distances, and selection has no gradient: the metric will not "
            "learn. Pass weighting='softmax', say.",
            UserWarning,
            stacklevel=3,
        )
