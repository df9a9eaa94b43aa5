"""From the graph of positions to the graph of features, on clouds of points."""

from __future__ import annotations

from typing import Any

from convnn_geo.experiments.base import Experiment, Setting
from convnn_geo.train import Config

_METRICS = {"position + cosine": "cosine", "position + Euclidean": "euclidean"}
_OTHERS = {"DGCNN": "dynamic_edge_conv", "Point Transformer": "point_transformer"}


def settings(quick: bool) -> list[Setting]:
    """Places between position and feature for two metrics, and layers of others."""
    places = (0.0, 0.5, 1.0) if quick else (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    return [
        *(
            Setting(series, lam, _config(quick, "convnn", metric=metric, lam=lam))
            for series, metric in _METRICS.items()
            for lam in places
        ),
        *(Setting(series, None, _config(quick, layer)) for series, layer in _OTHERS.items()),
    ]


def _config(quick: bool, layer: str, **options: Any) -> Config:
    return Config(
        model="point_classifier",
        layer=layer,
        layer_options={"k": 9, **options},
        model_options={"width": 0.25, "depth": 2},
        data="digit_clouds",
        epochs=1 if quick else 8,
        learning_rate=5e-3,
        accelerator="cpu",
    )


EXPERIMENT = Experiment(
    name="point_spectrum",
    title="Clouds, from position to feature",
    question="Should a point of a cloud choose its neighbours by where they are or by what was "
    "learned of them?",
    axis="λ, the share of feature distance",
    settings=settings,
    notes="The digits as clouds of 16 to 42 points (row, column, ink). Two layers on the nine "
    "nearest by (1 - λ) · distance of positions + λ · distance of features: a fixed graph at "
    "λ = 0, one of each layer's own features at λ = 1, as in DGCNN. DGCNN's and Point "
    "Transformer's layers in the same network are drawn across. Nothing is published for this.",
    pairs=[(series, other) for series in _METRICS for other in _OTHERS],
)
