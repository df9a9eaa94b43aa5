"""ImageNet, or any photographs in folders of the same form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from convnn_geo.datasets.repeatable import Repeatable
from convnn_geo.datasets.splits import hold_out
from convnn_geo.datasets.task import Task, collate_images
from convnn_geo.extras import require

# Of the training set, as torchvision's documentation gives them: to measure them again would
# read 1.2 million files.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def imagenet_task(root: Path, seed: int = 0, image_size: int | None = None) -> Task:
    """Photographs in ``root/train/CLASS`` and ``root/val/CLASS``, read as they are asked for.

    To train on: a random part of 8 to 100 % of the area, resized, every other flipped. To validate
    and to test on: resized to 8/7 of ``image_size``, cut in the middle. ``val`` is the test part;
    one in ten of ``train`` is held out to validate on.

    Args:
        root: folder of ``train`` and ``val``.
        seed: of the split and of crops and flips.
        image_size: height and width; 224 where None.

    Raises:
        FileNotFoundError: a folder is missing, or holds no classes.
        ValueError: the two folders have different classes.
        MissingExtraError: torchvision is not installed.
    """
    size = 224 if image_size is None else image_size
    v2 = require("torchvision.transforms.v2", extra="vision")
    end = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(_MEAN, _STD),
    ]
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *end])
    centre = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *end])
    cropped, whole = _folder(root / "train", crop), _folder(root / "train", centre)
    test = _folder(root / "val", centre)
    if test.classes != cropped.classes:
        only = sorted(set(test.classes) ^ set(cropped.classes))
        raise ValueError(
            f"expected the same classes in {root / 'train'} and {root / 'val'}, but "
            f"{len(only)} are in one only: {', '.join(only[:5])}"
        )
    train, validation = (index.tolist() for index in hold_out(len(whole), seed))
    return Task(
        name="imagenet",
        kind="classification",
        train=Repeatable(Subset(cropped, train), seed),
        validation=Subset(whole, validation),
        test=test,
        num_classes=len(test.classes),
        in_channels=3,
        image_size=size,
        collate=collate_images,
    )


def _folder(path: Path, transform: Any) -> Any:
    if not path.is_dir():
        raise FileNotFoundError(
            f"expected photographs in {path}/CLASS, but there is no folder {path}; ImageNet must "
            "be fetched by hand, see https://image-net.org"
        )
    return require("torchvision.datasets", extra="vision").ImageFolder(path, transform)
