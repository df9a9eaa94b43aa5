"""What lies between convolution and neighbours by feature?"""

from __future__ import annotations

from convnn_geo.experiments.base import Experiment, Setting
from convnn_geo.experiments.changes import PublishedMix
from convnn_geo.experiments.settings import vgg

_COSINE, _EUCLIDEAN, _MIXED = "Chebyshev + cosine", "Chebyshev + Euclidean", "as published"


def settings(quick: bool) -> list[Setting]:
    """From position to feature by three metrics."""
    cosine = (0, 0.7, 1) if quick else (0, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    euclidean = (0.5, 1) if quick else (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    published = (0.01, 1) if quick else (0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)
    return [
        *(
            Setting(
                _COSINE,
                lam,
                vgg(quick, "interpolated_conv2d", lam=lam, metric="cosine"),
            )
            for lam in cosine
        ),
        *(
            Setting(_EUCLIDEAN, lam, vgg(quick, "interpolated_conv2d", lam=lam, metric="euclidean"))
            for lam in euclidean
        ),
        *(
            Setting(_MIXED, lam, vgg(quick, "convnn", k=9, metric="paper_mix"), PublishedMix(lam))
            for lam in published
        ),
        Setting("plain convolution", None, vgg(quick, None)),
    ]


EXPERIMENT = Experiment(
    name="lambda_sweep",
    title="From position to feature",
    question="Is a place between convolution (λ = 0) and neighbours by feature (λ = 1) better than "
    "both ends?",
    axis="λ, the share of feature distance",
    settings=settings,
    notes="Each convolution of VGG-11 takes the nine nearest by (1 - λ) · Chebyshev distance in "
    "pixels + λ · distance of features, with taps in raster order, so that λ = 0 is the plain "
    "convolution; or by the published mixing, (λ |Δf| / σ)² + ((1 - λ) |Δp|)² with positions in "
    "[-1, 1] and taps by rank. Chebyshev distances are whole numbers, and cosine distances of "
    "features after a ReLU lie in [0, 1], so that up to λ = 0.5 cosine makes no pixel cross a ring "
    "behind the first layer: the grid is denser beyond. The published mixing sums squares over all "
    "channels against squares of steps of a pixel, below 1, so that it leaves position for feature "
    "near λ = 0.01: the grid is denser there. Nothing is published for such a sweep.",
    pairs=[(name, "plain convolution") for name in (_COSINE, _EUCLIDEAN, _MIXED)],
    apart={_MIXED: 0.002},
)
