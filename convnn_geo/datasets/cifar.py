"""CIFAR-10 and CIFAR-100: 60 000 photographs of 32 x 32 pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from convnn_geo.checks import check_instance
from convnn_geo.datasets.images import image_task
from convnn_geo.datasets.repeatable import Repeatable
from convnn_geo.datasets.splits import hold_out
from convnn_geo.datasets.task import Task
from convnn_geo.datasets.torchvision_sets import torchvision_arrays
from convnn_geo.extras import require


def cifar10_task(
    root: Path,
    seed: int = 0,
    image_size: int | None = None,
    download: bool = False,
    augment: bool = True,
) -> Task:
    """CIFAR-10; one in ten of the training examples is held out to validate on.

    Args:
        root: folder of ``cifar-10-batches-py``.
        seed: of the split and of crops and flips.
        image_size: to resize the 32 x 32 pixels to.
        download: what is not in ``root``.
        augment: in training crop at random from a margin of 4 black pixels, and flip every other.
    """
    parts = cifar_parts("CIFAR10", root, seed, download)
    return _augmented(image_task("cifar10", parts, 10, image_size), seed, augment)


def cifar100_task(
    root: Path,
    seed: int = 0,
    image_size: int | None = None,
    download: bool = False,
    augment: bool = True,
) -> Task:
    """CIFAR-100, with its hundred fine labels; else as :func:`cifar10_task`.

    Args:
        root: folder of ``cifar-100-python``.
        seed: of the split and of crops and flips.
        image_size: to resize the 32 x 32 pixels to.
        download: what is not in ``root``.
        augment: in training crop at random from a margin of 4 black pixels, and flip every other.
    """
    parts = cifar_parts("CIFAR100", root, seed, download)
    return _augmented(image_task("cifar100", parts, 100, image_size), seed, augment)


def cifar_parts(kind: str, root: Path, seed: int, download: bool) -> list[tuple[Tensor, Tensor]]:
    """Images ``(n, 3, 32, 32)`` as bytes, and labels, to train, to validate and to test on."""
    (x, y), test = (
        (images.permute(0, 3, 1, 2).contiguous(), labels)
        for images, labels in torchvision_arrays(kind, root, download)
    )
    return [*((x[index], y[index]) for index in hold_out(len(y), seed)), test]


def _augmented(task: Task, seed: int, augment: bool) -> Task:
    if not check_instance("augment", augment, bool):
        return task
    task.train.transform = _crop_and_flip()
    return replace(task, train=Repeatable(task.train, seed))


def _crop_and_flip() -> Callable[[Tensor], Tensor]:
    v2 = require("torchvision.transforms.v2", extra="vision")
    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    )
    return transform
