"""Can a network learn where to stand on the spectrum?"""

from __future__ import annotations

from convnn_geo.experiments.base import Experiment, Setting
from convnn_geo.experiments.changes import Interpolate, InterpolateHeads
from convnn_geo.experiments.settings import longer, vgg, vit
from convnn_geo.train import Config

_HEADS = "learned a head (ViT)"
_LONGER = [
    *(("fixed (VGG-11)", at) for at in (0.0, 0.25)),
    *(("learned (VGG-11)", at) for at in (0.25, 0.75)),
]


def settings(quick: bool) -> list[Setting]:
    """λ fixed, and learned from each of three starts, one a layer or a head, and some longer."""
    fixed = (0.0, 1.0) if quick else (0.0, 0.25, 0.5, 0.75, 1.0)
    starts = (0.5,) if quick else (0.25, 0.5, 0.75)
    found = []
    for name, config in _configs(quick).items():
        for kind, places in (("fixed", fixed), ("learned", starts)):
            found += [
                Setting(f"{kind} ({name})", at, config, Interpolate(at, kind == "learned"))
                for at in places
            ]
    heads = _configs(quick)["ViT"]
    found += [Setting(_HEADS, at, heads, InterpolateHeads(at)) for at in starts]
    return found if quick else [*found, *longer(found, _LONGER)]


def _configs(quick: bool) -> dict[str, Config]:
    return {
        "VGG-11": vgg(quick, "interpolated_conv2d", metric="euclidean"),
        "ViT": vit(quick, "interpolated_attention", k=9),
    }


EXPERIMENT = Experiment(
    name="learned_lambda",
    title="Learned place on the spectrum",
    question="Does one λ a layer or a head, learned, beat every fixed λ, and where is it when "
    "training ends?",
    axis="λ, where it is fixed or starts",
    settings=settings,
    notes="Which neighbours are chosen has no gradient, so λ learns through their weights, a "
    "softmax over distances. In VGG-11 these are times k, and so that only learning differs, the "
    "networks of fixed λ have them, too: λ = 0 is no plain convolution here. In the vision "
    "transformer λ lies between squared distance of patches (0) and attention over the nine "
    "nearest keys (1). AdamW moves a number by about the learning rate in a step, so that in few "
    "epochs λ stays near where it began, whatever is best. Nothing is published for this.",
    pairs=[
        ("learned (VGG-11)", "fixed (VGG-11)"),
        ("learned (ViT)", "fixed (ViT)"),
        (_HEADS, "fixed (ViT)"),
    ],
)
