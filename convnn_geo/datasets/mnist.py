"""MNIST: 70 000 handwritten digits of 28 x 28 pixels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convnn_geo.datasets.images import image_task
from convnn_geo.datasets.splits import hold_out
from convnn_geo.datasets.task import Task
from convnn_geo.datasets.torchvision_sets import torchvision_arrays

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def mnist_task(
    root: Path, seed: int = 0, image_size: int | None = None, download: bool = False
) -> Task:
    """MNIST of one file ``root/mnist.npz`` where that is, else torchvision's in ``root/MNIST``.

    The file holds ``x_train``, ``y_train``, ``x_test`` and ``y_test`` as bytes. One in ten of the
    training examples is held out to validate on.

    Args:
        root: folder of the file, or of torchvision's ``MNIST``.
        seed: of the split.
        image_size: to resize the 28 x 28 pixels to.
        download: through torchvision, if neither is there.
    """
    file = root / "mnist.npz"
    if file.is_file():
        (x, y), test = _read(file)
    else:
        try:
            arrays = torchvision_arrays("MNIST", root, download)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; {file} with {', '.join(_KEYS)} will do, too"
            ) from error
        (x, y), test = ((images.unsqueeze(1), labels) for images, labels in arrays)
    parts = [*((x[index], y[index]) for index in hold_out(len(y), seed)), test]
    return image_task("mnist", parts, 10, image_size)


def _read(file: Path) -> list[tuple[Tensor, Tensor]]:
    try:
        with file.open("rb") as stream, np.load(stream) as arrays:
            x_train, y_train, x_test, y_test = (torch.from_numpy(arrays[key]) for key in _KEYS)
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"expected arrays {', '.join(_KEYS)} in {file}, but it can't be read so: {error}"
        ) from error
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if x.dtype != torch.uint8 or x.ndim != 3 or y.shape != x.shape[:1]:
            raise ValueError(
                f"{file}: expected images of bytes (n, height, width) and labels (n), got "
                f"{x.dtype} {tuple(x.shape)} and {tuple(y.shape)}"
            )
    return [(x_train.unsqueeze(1), y_train.long()), (x_test.unsqueeze(1), y_test.long())]
