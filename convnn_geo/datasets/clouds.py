"""Digits as point clouds: a point for each pixel with ink, raised by how much there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch_geometric.data import Data

from convnn_geo.checks import check_number
from convnn_geo.datasets.digits import ImageSplit, digits


@dataclass(frozen=True)
class CloudSplit:
    """Clouds of unequal size and their classes, filled up to one size with zeros.

    Args:
        pos: ``(b, n, 3)``.
        mask: ``(b, n)``, True for real points.
        y: ``(b,)``.
    """

    pos: Tensor
    mask: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.y.numel()

    def batch(self, index: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What a network takes, in PyG's form, and the classes, of chosen examples.

        Args:
            index: ``(b,)``, numbers of clouds.

        Returns:
            ``((pos (N, 3), batch (N,)), y (b,))``.
        """
        mask = self.mask[index]
        number = torch.arange(index.numel(), device=mask.device).unsqueeze(1).expand_as(mask)
        return (self.pos[index][mask], number[mask]), self.y[index]

    def __getitem__(self, number: int) -> Data:
        """One cloud as a PyG ``Data`` with ``pos`` and ``y``."""
        return Data(pos=self.pos[number][self.mask[number]], y=self.y[number])


@dataclass(frozen=True)
class CloudSplits:
    """Three parts without a common example.

    Args:
        train: to fit weights on.
        validation: to choose by.
        test: to be read once, at the end.
    """

    train: CloudSplit
    validation: CloudSplit
    test: CloudSplit


def digit_clouds(seed: int = 0, height: float = 4.0) -> CloudSplits:
    """The digits as clouds of 16 to 42 points (row, column, ``height`` times ink).

    The split is that of :func:`convnn_geo.datasets.digits`.

    Args:
        seed: of the split.
        height: of a pixel full of ink, in pixels.

    Shapes:
        - **pos:** :math:`(b, n, 3)` with a mask, or rows :math:`(N, 3)` with a batch vector

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> train = digit_clouds().train
        >>> train[0].pos.shape[1], len(train)
        (3, 1078)
    """
    check_number("height", height, exclusive=True)
    splits = digits(seed)
    return CloudSplits(
        _clouds(splits.train, height),
        _clouds(splits.validation, height),
        _clouds(splits.test, height),
    )


def _clouds(split: ImageSplit, height: float) -> CloudSplit:
    clouds = []
    for image in split.x[:, 0]:
        pixel = image.nonzero()
        ink = image[pixel[:, 0], pixel[:, 1]].unsqueeze(1)
        clouds.append(torch.cat([pixel.to(image.dtype), height * ink], 1))
    count = torch.tensor([len(cloud) for cloud in clouds])
    pos = pad_sequence(clouds, batch_first=True)
    return CloudSplit(pos, torch.arange(pos.shape[1]) < count.unsqueeze(1), split.y)
