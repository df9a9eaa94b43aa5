"""Handwritten digits: 1797 real images of 8 x 8 pixels, from scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo.datasets.images import image_task
from convnn_geo.datasets.splits import check_seed
from convnn_geo.datasets.task import Task
from convnn_geo.extras import require

SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class ImageSplit:
    """Images and their classes.

    Args:
        x: ``(n, c, height, width)``, in [0, 1].
        y: ``(n,)``, classes from 0 on.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.y.numel()

    def batch(self, index: Tensor) -> tuple[tuple[Tensor], Tensor]:
        """What a network takes, and the classes, of chosen examples.

        Args:
            index: ``(b,)``, numbers of images.

        Returns:
            ``((x (b, c, height, width),), y (b,))``.
        """
        return (self.x[index],), self.y[index]


@dataclass(frozen=True)
class ImageSplits:
    """Three parts without a common example.

    Args:
        train: to fit weights on.
        validation: to choose by.
        test: to be read once, at the end.
    """

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit


def digits(seed: int = 0) -> ImageSplits:
    """The digits, split at random into 1078 to train, 359 to validate and 360 to test.

    Args:
        seed: of the split; the same seed always gives the same split.

    Shapes:
        - **x:** :math:`(n, 1, 8, 8)`, ink from 0 to 1
        - **y:** :math:`(n)`, the digit

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> splits = digits()
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (1078, 359, 360)
    """
    data = require("sklearn.datasets", extra="data").load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target, dtype=torch.long)
    parts = (ImageSplit(x[index], y[index]) for index in split_index(len(y), seed))
    return ImageSplits(*parts)


def split_index(count: int, seed: int) -> tuple[Tensor, ...]:
    """Numbers of the examples in each of the three parts, shuffled by ``seed``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(check_seed(seed)))
    train, validation = int(SHARES[0] * count), int(SHARES[1] * count)
    return order.split([train, validation, count - train - validation])


def digits_task(seed: int = 0, image_size: int | None = None) -> Task:
    """The digits, normalised, as a task of ten classes.

    Args:
        seed: of the split.
        image_size: to resize the 8 x 8 pixels to.
    """
    splits = digits(seed)
    parts = [(part.x, part.y) for part in (splits.train, splits.validation, splits.test)]
    return image_task("digits", parts, 10, image_size)
