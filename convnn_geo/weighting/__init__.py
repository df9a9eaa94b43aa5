"""How much each neighbour counts."""

from convnn_geo.weighting.base import (
    Gaussian,
    InverseDistance,
    MeanOneSoftmax,
    Ones,
    Similarity,
    Softmax,
    Weighting,
    as_weighting,
    weighting_names,
)
from convnn_geo.weighting.mlp import PositionMLP

__all__ = [
    "Gaussian",
    "InverseDistance",
    "MeanOneSoftmax",
    "Ones",
    "PositionMLP",
    "Similarity",
    "Softmax",
    "Weighting",
    "as_weighting",
    "weighting_names",
]
