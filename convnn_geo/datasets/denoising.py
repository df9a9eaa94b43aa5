"""Denoising: images with Gaussian noise, and without."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convnn_geo.checks import check_number
from convnn_geo.datasets.cifar import cifar_parts
from convnn_geo.datasets.images import ImageDataset
from convnn_geo.datasets.patches import photograph_patches
from convnn_geo.datasets.repeatable import Repeatable
from convnn_geo.datasets.task import Task, collate_images


class NoisyImages(Dataset):
    r"""Pairs of a noisy image and the clean one.

    .. math:: \text{noisy} = \text{clean} + \sigma \epsilon, \quad \epsilon \sim N(0, 1)

    Noisy values are not clipped to [0, 1]: that would make the noise depend on the image.

    Args:
        clean: data set of images ``(c, height, width)`` in [0, 1].
        sigma: standard deviation of the noise, in the same units.

    Example:
        >>> noisy, clean = NoisyImages([torch.zeros(1, 64, 64)], sigma=0.1)[0]
        >>> bool((noisy - clean).std().sub(0.1).abs() < 0.01)
        True
    """

    def __init__(self, clean: Dataset[Tensor] | list[Tensor], sigma: float) -> None:
        self.clean = clean
        self.sigma = check_number("sigma", sigma)

    def __len__(self) -> int:
        return len(self.clean)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        clean = self.clean[number]
        return clean + self.sigma * torch.randn_like(clean), clean


def denoising_task(
    seed: int = 0,
    image_size: int | None = None,
    sigma: float = 0.1,
    size: int = 32,
    count: int = 500,
) -> Task:
    """Noise on patches of the photographs that ship, split as those of ``patches``.

    Args:
        seed: of patches and noise.
        image_size: to resize clean patches to.
        sigma: standard deviation of the noise, of values in [0, 1].
        size: of a patch, in pixels of the photograph.
        count: patches of each photograph.
    """
    images = [part for part, _ in photograph_patches(size, count, seed)]
    return _noisy("denoising", images, sigma, seed, image_size)


def cifar10_denoising_task(
    root: Path,
    seed: int = 0,
    image_size: int | None = None,
    download: bool = False,
    sigma: float = 0.1,
) -> Task:
    """Noise on CIFAR-10.

    Args:
        root: folder of ``cifar-10-batches-py``.
        seed: of the split and the noise.
        image_size: to resize clean images to.
        download: what is not in ``root``.
        sigma: standard deviation of the noise, of values in [0, 1].
    """
    images = [part for part, _ in cifar_parts("CIFAR10", root, seed, download)]
    return _noisy("cifar10_denoising", images, sigma, seed, image_size)


def _noisy(
    name: str, images: list[Tensor], sigma: float, seed: int, image_size: int | None
) -> Task:
    # A seed a part: else example 5 of each would have the same noise.
    train, validation, test = (
        Repeatable(NoisyImages(ImageDataset(part, None, image_size), sigma), 3 * seed + place)
        for place, part in enumerate(images)
    )
    return Task(
        name=name,
        kind="denoising",
        train=train,
        validation=validation,
        test=test,
        num_classes=None,
        in_channels=images[0].shape[1],
        image_size=image_size or images[0].shape[-1],
        collate=collate_images,
    )
