"""What settings of different experiments share: small models on data that ship with packages."""

from __future__ import annotations

from typing import Any

from convnn_geo.train import Config

_DIGITS: dict[str, Any] = {"data": "digits", "accelerator": "cpu"}


def vgg(quick: bool, layer: str | None, **options: Any) -> Config:
    """VGG-11 of an eighth of its width on digits of 16 x 16 pixels.

    Args:
        quick: a single epoch.
        layer: in the place of its convolutions.
        **options: of the layer.
    """
    return Config(
        model="vgg11",
        layer=layer,
        layer_options=options,
        model_options={"width": 0.125},
        epochs=1 if quick else 6,
        learning_rate=3e-3,
        image_size=16,
        **_DIGITS,
    )


def vit(quick: bool, layer: str | None, **options: Any) -> Config:
    """A vision transformer of three heads on digits of 12 x 12 pixels: 36 patches of 2 x 2.

    Args:
        quick: a single epoch.
        layer: in the place of its attention.
        **options: of the layer.
    """
    return Config(
        model="vit_tiny",
        layer=layer,
        layer_options=options,
        model_options={"width": 0.25, "depth": 2, "patch_size": 2},
        epochs=1 if quick else 15,
        batch_size=16,
        learning_rate=4e-3,
        image_size=12,
        warmup_epochs=0 if quick else 1,
        **_DIGITS,
    )
