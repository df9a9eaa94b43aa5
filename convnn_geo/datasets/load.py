"""Tasks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convnn_geo.checks import check_instance, check_int, check_name
from convnn_geo.datasets.cifar import cifar10_task, cifar100_task
from convnn_geo.datasets.denoising import cifar10_denoising_task, denoising_task
from convnn_geo.datasets.digits import digits_task
from convnn_geo.datasets.imagenet import imagenet_task
from convnn_geo.datasets.mnist import mnist_task
from convnn_geo.datasets.patches import patches_task
from convnn_geo.datasets.point_sets import (
    digit_clouds_task,
    modelnet10_task,
    modelnet40_task,
    shapenet_task,
)
from convnn_geo.datasets.splits import check_seed
from convnn_geo.datasets.task import Task

_LOADERS: dict[str, Callable[..., Task]] = {
    "digits": digits_task,
    "patches": patches_task,
    "mnist": mnist_task,
    "cifar10": cifar10_task,
    "cifar100": cifar100_task,
    "imagenet": imagenet_task,
    "digit_clouds": digit_clouds_task,
    "modelnet10": modelnet10_task,
    "modelnet40": modelnet40_task,
    "shapenet": shapenet_task,
    "denoising": denoising_task,
    "cifar10_denoising": cifar10_denoising_task,
}
_COMMON = ("root", "seed", "image_size", "download")


def data_names() -> list[str]:
    """Names that :func:`load` knows.

    Example:
        >>> "digits" in data_names()
        True
    """
    return list(_LOADERS)


def load(
    name: str,
    *,
    root: str | Path = "data",
    seed: int = 0,
    image_size: int | None = None,
    download: bool = False,
    **options: Any,
) -> Task:
    """A task by name: its examples split into train, validation and test.

    Images are in [0, 1], resized, and normalised a channel by mean and standard deviation of the
    part to train on (ImageNet: by the known ones of its training set); those of denoising are
    left in [0, 1].

    Args:
        name: one of :func:`data_names`.
        root: folder of what does not ship with packages.
        seed: of splits, sampling and noise.
        image_size: height and width to resize images to, bilinear and antialiased; None for
            their own.
        download: whether to download what is not in ``root``.
        options: of the data set, e.g. ``sigma`` for denoising.

    Raises:
        ValueError: an unknown name or option, ``image_size`` for clouds, a ``seed`` that is
            negative, 2**64 or more, or for a data set that draws nothing.
        TypeError: an argument of the wrong type.
        FileNotFoundError: the data are not in ``root``.
        MissingExtraError: a package that ships or reads the data is not installed.

    Example:
        >>> task = load("digits", image_size=32)
        >>> len(task.train), task.num_classes, task.in_channels, task.image_size
        (1078, 10, 1, 32)
    """
    loader = _LOADERS[check_name("data set", name, _LOADERS)]
    if image_size is not None:
        check_int("image_size", image_size)
    if not isinstance(root, (str, Path)):
        raise TypeError(f"root: expected the path of a folder, got {root!r}")
    common = {
        "root": Path(root),
        "seed": check_seed(seed),
        "image_size": image_size,
        "download": check_instance("download", download, bool),
    }
    known = list(inspect.signature(loader).parameters)
    _check_options(name, options, [key for key in known if key not in _COMMON])
    if image_size is not None and "image_size" not in known:
        raise ValueError(f"image_size: {name} holds clouds of points; leave image_size out")
    if seed and "seed" not in known:
        raise ValueError(f"seed: {name} has parts of its own and draws nothing; leave seed out")
    return loader(**{key: value for key, value in common.items() if key in known}, **options)


def _check_options(name: str, options: dict[str, Any], known: list[str]) -> None:
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            takes = f"it takes: {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"unknown option {option!r} of data set {name!r}; {hint}{takes}")
