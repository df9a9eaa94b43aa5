"""Does choosing neighbours help to remove noise?"""

from __future__ import annotations

from typing import Any

from convnn_geo.experiments.base import Experiment, Published, Setting
from convnn_geo.experiments.settings import longer
from convnn_geo.train import Config

_MODELS: dict[str, dict[str, Any]] = {
    "DnCNN": {"model": "dncnn", "model_options": {"width": 0.5, "depth": 4}},
    "UNet": {"model": "unet", "model_options": {"width": 0.125}},
}
_LAYERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "convolution": (None, {}),
    "branching": ("branching", {"ratio": 0.5, "k": 9, "metric": "paper_mix"}),
    "ConvNN": ("convnn", {"k": 9, "metric": "paper_mix"}),
}


def settings(quick: bool) -> list[Setting]:
    """Three layers in two networks, and in one of them longer."""
    found = [
        Setting(name, label, _config(quick, layer, options, **model))
        for name, model in _MODELS.items()
        for label, (layer, options) in _LAYERS.items()
    ]
    return found if quick else [*found, *longer(found, [("DnCNN", label) for label in _LAYERS])]


def _config(quick: bool, layer: str | None, options: dict[str, Any], **model: Any) -> Config:
    return Config(
        layer=layer,
        layer_options=options,
        data="denoising",
        data_options={"size": 16, "count": 10 if quick else 60},
        epochs=1 if quick else 10,
        batch_size=8,
        learning_rate=2e-2,
        warmup_epochs=0 if quick else 2,
        accelerator="cpu",
        **model,
    )


EXPERIMENT = Experiment(
    name="denoising",
    title="Denoising",
    question="Do layers that choose their neighbours remove noise better than convolution?",
    axis="layer",
    settings=settings,
    notes="Gaussian noise of standard deviation 0.1 on patches of 16 × 16 pixels of the "
    "photographs that ship, which have values in [0, 1]; test patches lie in regions of their own. "
    "Noisy patches have a PSNR of about 20 dB. Layers that choose take k = 9 by the published "
    "mixing, branching layers for half of the channels. Learning rate and warm-up were chosen for "
    "convolution, on the validation part. All seeds see the same noise.",
    published=Published(
        "CIFAR-10, arXiv 2606.14725",
        "PSNR (dB)",
        {
            "DnCNN": [("convolution", 26.63), ("branching", 27.78), ("ConvNN", 23.84)],
            "UNet": [("convolution", 28.22), ("branching", 28.46), ("ConvNN", 26.92)],
        },
    ),
)
