"""A task: three parts of a data set, and what a network must know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate

Kind = Literal["classification", "denoising", "point_classification", "point_segmentation"]
Collate = Callable[[Sequence[Any]], tuple[tuple[Tensor, ...], Tensor]]


@dataclass(frozen=True)
class Task:
    """Examples to train, to validate and to test on, with no example in two of them.

    Every example is a function of (seed, epoch, number): what is random in a part is drawn by a
    generator of its own. Workers, processes and resumed runs all see the same.

    Args:
        name: of the data set.
        kind: ``"classification"``, ``"denoising"``, ``"point_classification"`` or
            ``"point_segmentation"``.
        train: map-style data set to fit weights on.
        validation: to choose by; the same in every epoch.
        test: to be read once, at the end; the same in every epoch.
        num_classes: None for denoising.
        in_channels: of an image; of a point's position where examples are clouds.
        image_size: height and width in pixels; None for clouds.
        collate: a list of examples -> (inputs of the network, target).

    Example:
        >>> from convnn_geo.datasets import load
        >>> task = load("digits", image_size=32)
        >>> inputs, target = task.collate([task.train[0], task.train[1]])
        >>> inputs[0].shape, target.shape
        (torch.Size([2, 1, 32, 32]), torch.Size([2]))
    """

    name: str
    kind: Kind
    train: Any
    validation: Any
    test: Any
    num_classes: int | None
    in_channels: int
    image_size: int | None
    collate: Collate

    def set_epoch(self, epoch: int) -> None:
        """Draw what is random in training examples (crops, noise, points) anew.

        Call it before each epoch; without it every epoch sees those of epoch 0.
        """
        if hasattr(self.train, "set_epoch"):
            self.train.set_epoch(epoch)


def collate_images(examples: Sequence[Any]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Images with classes or with images: ``((x (b, c, h, w),), target (b, ...))``."""
    x, target = default_collate(list(examples))
    return (x,), target


def collate_points(examples: Sequence[Any]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Clouds as rows: ``((pos (N, p), batch (N,)), y)``, y one a cloud or one a point."""
    sizes = torch.tensor([len(data.pos) for data in examples])
    batch = torch.arange(len(examples)).repeat_interleave(sizes)
    y = torch.cat([data.y.reshape(-1) for data in examples])
    return (torch.cat([data.pos for data in examples]), batch), y
