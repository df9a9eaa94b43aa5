"""Which tokens should a token attend to?"""

from __future__ import annotations

from convnn_geo.experiments.base import Experiment, Published, Setting
from convnn_geo.experiments.changes import LookAround
from convnn_geo.experiments.settings import vit


def settings(quick: bool) -> list[Setting]:
    """Attention, the k nearest keys without and with taps, and squares of patches."""
    return [setting for data in ("digits", "patches") for setting in _variants(quick, data)]


def _variants(quick: bool, data: str) -> list[Setting]:
    attention = vit(quick, "attention", data)
    return [
        Setting(data, "attention", attention),
        Setting(data, "KVT", vit(quick, "kvt", data, k=9)),
        Setting(data, "local window", attention, LookAround(3)),
        Setting(data, "neighborhood", attention, LookAround(3, shift=True)),
        Setting(data, "ConvNN", vit(quick, "convnn_attention", data, k=9)),
    ]


EXPERIMENT = Experiment(
    name="attention_variants",
    title="Variants of attention",
    question="Does it matter whether a token attends to all, to its nearest by feature, or to its "
    "nearest by position?",
    axis="attention",
    settings=settings,
    notes="A small vision transformer on 36 squares of an image and a class token; the data are "
    "digits, and patches of eleven photographs, to be told apart by the photograph. KVT and ConvNN "
    "take the nine nearest keys, ConvNN with a depthwise tap a rank; a local window is the 3 × 3 "
    "squares around one, cut at the border, a neighborhood the same moved inward. The class token "
    "sees all, and all see it. One learning rate for all: the one that did best on the digits' "
    "validation part for attention, KVT and ConvNN taken together.",
    published=Published(
        "ViT-Tiny, k = 9, 224 px, arXiv 2606.14725",
        "accuracy (%)",
        {
            "CIFAR-10": [("attention", 78.4), ("KVT", 75.8), ("ConvNN", 74.4)],
            "CIFAR-100": [("attention", 52.1), ("KVT", 49.0), ("ConvNN", 49.2)],
        },
    ),
)
