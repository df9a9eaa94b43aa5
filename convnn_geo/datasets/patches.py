"""Patches of the photographs that ship: which photograph is this patch from?"""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.checks import check_int
from convnn_geo.datasets.digits import SHARES, split_index
from convnn_geo.datasets.images import image_task
from convnn_geo.datasets.photographs import photograph, photographs
from convnn_geo.datasets.splits import check_seed
from convnn_geo.datasets.task import Task

_CELL = 2  # patches that fit side by side into a cell


def photograph_patches(
    size: int = 32, count: int = 500, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Patches to train, to validate and to test on, from regions without a common pixel.

    Each photograph is cut into square cells of twice the patch's width. Cells are dealt out to
    the three parts at random, and every patch lies within one cell.

    Args:
        size: height and width of a patch in pixels.
        count: patches of each photograph, split 60 to 20 to 20; no two at the same place.
        seed: of the cells' parts and the patches' places.

    Shapes:
        - **patches:** :math:`(n, 3, size, size)` in [0, 1]
        - **photographs:** :math:`(n)`, numbers in :func:`convnn_geo.datasets.photographs`

    Raises:
        ValueError: patches too large or too many for a photograph.
        MissingExtraError: a package that ships photographs is not installed.

    Example:
        >>> train, validation, test = photograph_patches(size=16, count=10)
        >>> train[0].shape, test[1].shape
        (torch.Size([66, 3, 16, 16]), torch.Size([22]))
    """
    check_int("size", size)
    check_int("count", count, 5)
    generator = torch.Generator().manual_seed(check_seed(seed))
    counts = _shares(count)
    parts: list[tuple[list[Tensor], list[Tensor]]] = [([], []), ([], []), ([], [])]
    for label, name in enumerate(photographs()):
        image = photograph(name)
        corners = _cells(image, name, size)
        views = image.unfold(1, size, 1).unfold(2, size, 1)
        for part, index, number in zip(parts, split_index(len(corners), seed), counts, strict=True):
            row, column = _draw(corners[index], name, size, number, generator)
            part[0].append(views[:, row, column].transpose(0, 1))
            part[1].append(torch.full((number,), label))
    return tuple((torch.cat(images), torch.cat(labels)) for images, labels in parts)


def patches_task(
    seed: int = 0, image_size: int | None = None, size: int = 32, count: int = 500
) -> Task:
    """Which photograph is this patch from, as a task of as many classes as photographs.

    Args:
        seed: of the patches.
        image_size: to resize patches to.
        size: of a patch, in pixels of the photograph.
        count: patches of each photograph.
    """
    parts = photograph_patches(size, count, seed)
    return image_task("patches", parts, len(photographs()), image_size)


def _shares(count: int) -> tuple[int, ...]:
    train, validation = int(SHARES[0] * count), int(SHARES[1] * count)
    return train, validation, count - train - validation


def _cells(image: Tensor, name: str, size: int) -> Tensor:
    """Upper left corners of the squares that tile the photograph, ``(m, 2)``."""
    cell = _CELL * size
    rows, columns = image.shape[1] // cell, image.shape[2] // cell
    if rows * columns < 5:  # fewer can't be dealt out to three parts
        raise ValueError(
            f"size: photograph {name!r} of {image.shape[1]} x {image.shape[2]} pixels gives "
            f"{rows * columns} cells of {cell} x {cell}, expected 5 at least; "
            f"choose a size under {size}"
        )
    return cell * torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def _draw(
    corners: Tensor, name: str, size: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows and columns of ``count`` patches, each within a cell, no two at the same place."""
    steps = (_CELL - 1) * size + 1
    places = len(corners) * steps**2
    if count > places:
        raise ValueError(
            f"count: photograph {name!r} has {places} places for patches in one of the parts, "
            f"got {count} to draw; choose fewer or smaller patches"
        )
    chosen = torch.randperm(places, generator=generator)[:count]
    row, column = corners[chosen // steps**2].unbind(1)
    return row + chosen // steps % steps, column + chosen % steps
