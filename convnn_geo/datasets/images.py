"""Images held in memory: scaled to [0, 1], resized and normalised as they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from convnn_geo.checks import check_int, check_tensor
from convnn_geo.datasets.task import Task, collate_images

_SLAB = 1024  # images at a time, so that bytes of a whole set are never held as floats


class ImageDataset(Dataset):
    r"""Images and targets, prepared when they are read.

    .. math:: x = \frac{\text{resize}(\text{transform}(\text{image})) - \mu_c}{\sigma_c}

    Args:
        images: ``(n, c, height, width)``, uint8 from 0 to 255 or floating point in [0, 1].
        target: ``(n,)``, classes; None where the prepared image is its own target.
        image_size: height and width to resize to, bilinear and antialiased; None to leave them.
        mean: ``(c,)``, subtracted, of images in [0, 1]; see :func:`channel_statistics`.
        std: ``(c,)``, divided by.
        transform: of one image ``(c, height, width)`` as it is stored, before all else.

    Shapes:
        - **an example:** x :math:`(c, h, w)` and an int, or x alone

    Example:
        >>> images = ImageDataset(torch.zeros(5, 1, 8, 8), torch.arange(5), image_size=16)
        >>> x, y = images[3]
        >>> x.shape, y
        (torch.Size([1, 16, 16]), 3)
    """

    def __init__(
        self,
        images: Tensor,
        target: Tensor | None,
        image_size: int | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images = check_tensor("images", images, 4)
        if target is not None and target.shape != images.shape[:1]:
            raise ValueError(
                f"target: expected shape ({len(images)},), one an image, got {tuple(target.shape)}"
            )
        self.target = target
        self.image_size = None if image_size is None else check_int("image_size", image_size)
        channels = images.shape[1]
        self.mean = torch.zeros(channels) if mean is None else mean
        self.std = torch.ones(channels) if std is None else std
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, int] | Tensor:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[Tensor, int]] | list[Tensor]:
        """A batch at once, which torch's ``DataLoader`` asks for: several times as fast."""
        index = torch.as_tensor(numbers)
        images = self.images[index]
        if self.transform is not None:
            images = torch.stack([self.transform(image) for image in images])
        x = _resize(to_unit(images), self.image_size)
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        if self.target is None:
            return list(x)
        return list(zip(x, self.target[index].tolist(), strict=True))


def to_unit(images: Tensor) -> Tensor:
    """Bytes as floats in [0, 1]; floats as they are."""
    return images if images.is_floating_point() else images.float() / 255


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of images scaled to [0, 1].

    Args:
        images: ``(n, c, height, width)``, uint8 or floating point.

    Shapes:
        - **output:** mean and standard deviation, each :math:`(c)`; 1 for a constant channel

    Example:
        >>> channel_statistics(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        (tensor([0.5000]), tensor([0.5000]))
    """
    slabs = images.split(_SLAB)
    pixels = images[:, 0].numel()
    mean = torch.stack([_sum(to_unit(slab).double()) for slab in slabs]).sum(0) / pixels
    centre = mean[:, None, None]
    squares = [_sum((to_unit(slab).double() - centre).square()) for slab in slabs]
    variance = torch.stack(squares).sum(0) / pixels
    std = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
    return mean.float(), std.float()


def _sum(slab: Tensor) -> Tensor:
    return slab.sum((0, 2, 3))


def _resize(x: Tensor, size: int | None) -> Tensor:
    if size is None or x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def image_task(
    name: str,
    parts: Sequence[tuple[Tensor, Tensor]],
    num_classes: int,
    image_size: int | None,
) -> Task:
    """A task of classes, all parts normalised by mean and deviation of the part to train on.

    Args:
        name: of the data set.
        parts: images and classes to train, to validate and to test on.
        num_classes: how many there are.
        image_size: to resize to; None for the images' own.
    """
    images = parts[0][0]
    mean, std = channel_statistics(images)
    train, validation, test = (ImageDataset(x, y, image_size, mean, std) for x, y in parts)
    return Task(
        name=name,
        kind="classification",
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        in_channels=images.shape[1],
        image_size=image_size or images.shape[-1],
        collate=collate_images,
    )
