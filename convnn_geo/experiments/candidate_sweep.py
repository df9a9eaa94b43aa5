"""Among how many, and which, should a point choose?"""

from __future__ import annotations

from convnn_geo.experiments.base import Experiment, Published, Setting
from convnn_geo.experiments.changes import LookAmong
from convnn_geo.experiments.settings import vgg, vit

_ALL = "all"


def settings(quick: bool) -> list[Setting]:
    """All points, so many drawn at random, or a lattice of them; in images and among tokens."""
    conv = vgg(quick, "branching", ratio=0.5, k=9, metric="paper_mix", self_point="first")
    attention = vit(quick, "convnn_attention", k=9, self_point="first")
    sides = (4,) if quick else (3, 4, 5)
    numbers = (16,) if quick else (9, 16, 32)
    found = []
    for name, config in (("VGG-11", conv), ("ViT", attention)):
        found += [Setting(f"random ({name})", r, config, LookAmong("random", r)) for r in numbers]
        found += [
            Setting(f"strided ({name})", side**2, config, LookAmong("strided", side))
            for side in sides
        ]
        found.append(Setting(f"{_ALL} ({name})", None, config))
    return found


EXPERIMENT = Experiment(
    name="candidate_sweep",
    title="Candidates",
    question="What does it cost to choose among a sample of the points, drawn at random or "
    "strided, and not among all?",
    axis="candidates r",
    settings=settings,
    notes="k = 9, the point itself first, the others the nearest of the sample. Branching "
    "layers of VGG-11 with ratio 0.5, by the published mixing, and ConvNN in the place of each "
    "attention of a small vision transformer, whose class token is in every strided sample. A "
    "random sample is drawn anew in each step of training and is fixed when scored. Where a layer "
    "sees no more points than r it chooses among all.",
    published=Published(
        "ViT-Tiny, k = 9, 224 px, arXiv 2606.14725",
        "accuracy (%)",
        {
            "CIFAR-10": [("all", 74.4), ("random, r = 32", 80.3)],
            "CIFAR-10, plain attention": [(None, 78.4)],
            "CIFAR-100": [("all", 49.2), ("random, r = 32", 54.1)],
            "CIFAR-100, plain attention": [(None, 52.1)],
        },
    ),
    pairs=[
        (f"{kind} ({name})", f"{_ALL} ({name})")
        for name in ("VGG-11", "ViT")
        for kind in ("random", "strided")
    ],
)
