"""Experiments on images at the size of the paper's networks, for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convnn_geo.experiments.base import Experiment, Setting
from convnn_geo.train import ConfigError

_DATA: dict[str, dict[str, Any]] = {
    "MNIST": {"data": "mnist", "epochs": 15},
    "patches": {"data": "patches", "epochs": 60, "data_options": {"count": 1000}},
}
_MODELS: dict[str, dict[str, Any]] = {
    "vgg11": {"learning_rate": 1e-3, "model_options": {}},
    # 256 patches of 32 x 32 pixels; the paper has 196 of 224 x 224.
    "vit_tiny": {"learning_rate": 5e-4, "warmup_epochs": 2, "model_options": {"patch_size": 2}},
}


def at_full_size(
    experiment: Experiment, data_root: str, quick: bool = False, download: bool = False
) -> Experiment:
    """The experiment with VGG-11 and ViT-Tiny whole, on MNIST and patches of 32 x 32 pixels.

    Args:
        experiment: of these two networks.
        data_root: folder that has MNIST.
        quick: an epoch.
        download: MNIST, if it is not there.

    Raises:
        ConfigError: the experiment has other networks, and a single size.
    """
    small = [
        each
        for each in experiment.settings(quick)
        if each.config.data == "digits" and each.longer_than is None
    ]
    if not small or not {each.config.model for each in small} <= set(_MODELS):
        raise ConfigError(
            f"{experiment.name} comes in one size; --full is for experiments with "
            f"{' and '.join(_MODELS)} on images"
        )
    where = {"data_root": data_root, "download": download}
    settings = [_enlarged(each, data, where, quick) for data in _DATA for each in small]
    names = {each.series for each in settings}
    pairs = [(_on(one, data), _on(two, data)) for data in _DATA for one, two in experiment.pairs]
    return replace(
        experiment,
        name=f"{experiment.name}_full",
        title=f"{experiment.title}, at full size",
        settings=lambda quick: settings,
        pairs=[pair for pair in pairs if names.issuperset(pair)],
    )


def _enlarged(setting: Setting, data: str, where: dict[str, Any], quick: bool) -> Setting:
    changes: dict[str, Any] = {
        "data_options": {},
        "image_size": 32,
        "batch_size": 256,
        "workers": 2,
        "accelerator": "auto",
        "precision": "bf16-mixed",
        **_MODELS[setting.config.model],
        **_DATA[data],
        **where,
    }
    if quick:
        changes.update(epochs=1, warmup_epochs=0)
    config = replace(setting.config, **changes)
    return replace(setting, series=_on(setting.series, data), config=config)


def _on(series: str, data: str) -> str:
    return f"{series}, {data}"
