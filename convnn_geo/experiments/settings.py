"""What settings of different experiments share: small models on data that ship with packages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from convnn_geo.experiments.base import Setting
from convnn_geo.train import Config

_PATCHES = {"count": 150}
_LONGER = 4


def _images(data: str, size: int) -> dict[str, Any]:
    """Images of a size; patches are cut to it, digits resized."""
    options = {"size": size, **_PATCHES} if data == "patches" else {}
    return {"data": data, "data_options": options, "image_size": size, "accelerator": "cpu"}


def vgg(quick: bool, layer: str | None, data: str = "digits", **options: Any) -> Config:
    """VGG-11 of an eighth of its width on images of 16 x 16 pixels.

    Args:
        quick: a single epoch.
        layer: in the place of its convolutions.
        data: ``"digits"`` or ``"patches"``.
        **options: of the layer.
    """
    return Config(
        model="vgg11",
        layer=layer,
        layer_options=options,
        model_options={"width": 0.125},
        epochs=1 if quick else 6,
        # Validates best, or as well, of 1e-3, 3e-3 and 1e-2 for convolution, ConvNN and both.
        learning_rate=3e-3,
        **_images(data, 16),
    )


def vit(quick: bool, layer: str | None, data: str = "digits", **options: Any) -> Config:
    """A vision transformer of three heads on images of 12 x 12 pixels: 36 squares of 2 x 2.

    Args:
        quick: a single epoch.
        layer: in the place of its attention.
        data: ``"digits"`` or ``"patches"``.
        **options: of the layer.
    """
    return Config(
        model="vit_tiny",
        layer=layer,
        layer_options=options,
        model_options={"width": 0.25, "depth": 2, "patch_size": 2},
        epochs=1 if quick else 15,
        batch_size=16,
        # Of 1e-3, 2e-3 and 4e-3 the one that validates best for attention, KVT and ConvNN together.
        learning_rate=2e-3,
        warmup_epochs=0 if quick else 3,
        clip_norm=1.0,
        **_images(data, 12),
    )


def longer(settings: Iterable[Setting], chosen: Iterable[tuple[str, Any]]) -> list[Setting]:
    """Some settings trained four times as long, each series under a name of its own.

    Args:
        settings: to choose from.
        chosen: series and places.

    Example:
        >>> short = Setting("convolution", None, Config(epochs=6))
        >>> longer([short], [("convolution", None)])[0].label
        'convolution, 24 epochs'
    """
    known = {(each.series, each.at): each for each in settings}
    return [_longer(known[each]) for each in chosen]


def _longer(setting: Setting) -> Setting:
    epochs = _LONGER * setting.config.epochs
    return replace(
        setting,
        series=f"{setting.series}, {epochs} epochs",
        config=replace(setting.config, epochs=epochs),
        longer_than=setting.series,
    )
