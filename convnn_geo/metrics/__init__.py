"""How near a source is to a target: metrics over positions and features, and their algebra.

Example:
    >>> from convnn_geo.metrics import metric_names
    >>> "cosine" in metric_names() and "spatial" in metric_names()
    True
"""

from convnn_geo.metrics.angular import Angular
from convnn_geo.metrics.base import (
    Custom,
    Interpolation,
    Metric,
    Sum,
    as_metric,
    full_precision,
    interpolate,
    metric_names,
    register_metric,
)
from convnn_geo.metrics.bilinear import BilinearForm
from convnn_geo.metrics.combined import Biased, Combination, Pairwise
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import Distances
from convnn_geo.metrics.encoded import Encoded
from convnn_geo.metrics.feature import Feature
from convnn_geo.metrics.learned import Bilinear, Mahalanobis, PositionBias
from convnn_geo.metrics.paper import PaperMix
from convnn_geo.metrics.spatial import Spatial

__all__ = [
    "Angular",
    "Biased",
    "Bilinear",
    "BilinearForm",
    "Combination",
    "Custom",
    "Differences",
    "Distances",
    "Encoded",
    "Feature",
    "Interpolation",
    "Mahalanobis",
    "Metric",
    "PaperMix",
    "Pairwise",
    "PositionBias",
    "Spatial",
    "Sum",
    "as_metric",
    "full_precision",
    "interpolate",
    "metric_names",
    "register_metric",
]
