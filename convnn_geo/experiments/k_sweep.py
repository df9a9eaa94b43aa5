"""How many neighbours?"""

from __future__ import annotations

from typing import Any

from convnn_geo.experiments.base import Experiment, Published, Setting
from convnn_geo.experiments.settings import longer, vgg, vit

_BRANCHING, _CONVNN, _KVT = "branching (VGG-11)", "ConvNN attention (ViT)", "KVT (ViT)"
_ATTENTION = "attention (ViT)"


def settings(quick: bool) -> list[Setting]:
    """Numbers of neighbours in three kinds of layers, the plain networks, and some longer."""
    numbers = (1, 9) if quick else (1, 4, 9, 25)
    mixed: dict[str, Any] = {"ratio": 0.5, "metric": "paper_mix"}
    found = [
        *(Setting(_BRANCHING, k, vgg(quick, "branching", k=k, **mixed)) for k in numbers),
        *(Setting(_CONVNN, k, vit(quick, "convnn_attention", k=k)) for k in numbers),
        *(Setting(_KVT, k, vit(quick, "kvt", k=k)) for k in numbers),
        Setting("convolution (VGG-11)", None, vgg(quick, None)),
        Setting(_ATTENTION, None, vit(quick, None)),
    ]
    return found if quick else [*found, *longer(found, [(_KVT, 1), (_KVT, 25), (_ATTENTION, None)])]


EXPERIMENT = Experiment(
    name="k_sweep",
    title="Number of neighbours",
    question="How many neighbours should a point have?",
    axis="k",
    settings=settings,
    notes="Branching layers of VGG-11 with ratio 0.5 by the published mixing; attention of a small "
    "vision transformer over the k nearest of its tokens, with a tap a rank (ConvNN) or without "
    "(KVT). Where an image of VGG-11 has fewer pixels than k, the last taps are empty. "
    "Of what is trained longer nothing but the epochs is changed; warm-up is as long as before.",
    published=Published(
        "ViT-Base and ResNet-50, ImageNet-1K, arXiv 2606.14725",
        "accuracy (%)",
        {
            "ConvNN attention (ViT-Base)": [(9, 81.19), (16, 81.60), (25, 81.64)],
            "attention (ViT-Base)": [(None, 80.95)],
            "KVT (ViT-Base)": [(25, 81.29)],
            "branching (ResNet-50)": [(9, 79.42), (16, 79.76)],
            "convolution (ResNet-50)": [(None, 79.16)],
        },
    ),
    pairs=[
        (_BRANCHING, "convolution (VGG-11)"),
        (_CONVNN, _ATTENTION),
        (_KVT, _ATTENTION),
    ],
)
