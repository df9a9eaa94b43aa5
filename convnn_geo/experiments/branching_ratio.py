"""How large a share of ConvNN is best beside convolution?"""

from __future__ import annotations

from convnn_geo.experiments.base import Experiment, Published, Setting
from convnn_geo.experiments.settings import longer, vgg

RATIOS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def settings(quick: bool) -> list[Setting]:
    """Nine shares for each of two metrics, and on patches, three of one longer; in a hurry three
    each.
    """
    found = [
        Setting(series, ratio, vgg(quick, "branching", data, ratio=ratio, k=9, metric=metric))
        for series, data, metric in (
            ("cosine", "digits", "cosine"),
            ("mixed as published", "digits", "paper_mix"),
            ("mixed, patches", "patches", "paper_mix"),
        )
        for ratio in (RATIOS[::4] if quick else RATIOS)
    ]
    return found if quick else [*found, *longer(found, [("cosine", at) for at in RATIOS[::4]])]


EXPERIMENT = Experiment(
    name="branching_ratio",
    title="Share of ConvNN in branching layers",
    question="Which share of a layer's channels should choose their neighbours, the rest being "
    "convolution?",
    axis="share of ConvNN channels",
    settings=settings,
    notes="Every 3 × 3 convolution of VGG-11 is a branching layer with k = 9: at 0 the plain "
    "convolution, at 1 ConvNN alone, and in between a 1 × 1 convolution more, which mixes both. By "
    "cosine a pixel of a digit, which has one channel, sees in the first layer only whether "
    "another is on its side of the mean; the published mixing, "
    "(λ |Δf| / σ)² + ((1 - λ) |Δp|)² with λ = 0.5, also sees where it lies. Patches of 16 × 16 "
    "pixels are to be told apart by the photograph, one of eleven, that they are cut from. One "
    "learning rate for all: on the digits' validation part it did best, or as well, of three at "
    "the shares 0, 0.5 and 1, after the shorter training.",
    published=Published(
        "VGG-11, k = 9, Euclidean mixed, 150 epochs, arXiv 2606.14725",
        "accuracy (%)",
        {
            "CIFAR-10": [(0.0, 81.1), (0.25, 82.2), (0.5, 83.1), (0.75, 81.9), (1.0, 68.8)],
            "CIFAR-100": [(0.0, 46.3), (0.25, 48.4), (0.5, 50.0), (0.75, 51.0), (1.0, 32.8)],
        },
    ),
    pairs=[("cosine", "mixed as published")],
)
