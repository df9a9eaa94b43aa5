"""Photographs that ship with scikit-image and scikit-learn, and reading your own."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.checks import check_int, check_name, check_tensor
from convnn_geo.extras import require

_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}


def photographs() -> list[str]:
    """Names that :func:`photograph` knows.

    Example:
        >>> "chelsea" in photographs()
        True
    """
    return list(_FILES)


def photograph(name: str = "coffee", width: int | None = None) -> Tensor:
    """A photograph by name.

    Args:
        name: one of :func:`photographs`.
        width: in pixels, the height in proportion; None for the size as it ships.

    Shapes:
        - **output:** :math:`(3, height, width)`, red, green and blue in [0, 1]

    Raises:
        MissingExtraError: the package that ships it is not installed.
        ValueError: an unknown name.

    Example:
        >>> photograph("coffee", width=96).shape
        torch.Size([3, 64, 96])
    """
    package, path = _FILES[check_name("photograph", name, _FILES)]
    require(package, extra="data")
    with importlib.resources.as_file(importlib.resources.files(package).joinpath(path)) as file:
        return read_image(file, width)


def read_image(path: str | Path, width: int | None = None) -> Tensor:
    """Read a picture file.

    Args:
        path: of the file, in any format that Pillow reads.
        width: in pixels, the height in proportion; None for the size as it is.

    Shapes:
        - **output:** :math:`(3, height, width)`, red, green and blue in [0, 1]

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture.
        MissingExtraError: Pillow is not installed.
    """
    image_module = require("PIL.Image", extra="viz")
    ops = require("PIL.ImageOps", extra="viz")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a picture file, but there is no file {path}")
    try:
        with image_module.open(path) as image:
            pixels = _to_tensor(ops.exif_transpose(image))
    except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
        # What Pillow raises for files that are no pictures, cut off, or of absurd size.
        raise ValueError(f"expected a picture, but {path} can't be read as one: {error}") from error
    return pixels if width is None else resize(pixels, width)


def resize(image: Tensor, width: int) -> Tensor:
    """A smoothly resized copy, the height in proportion.

    Args:
        image: ``(c, height, width)``, in [0, 1].
        width: of the copy.

    Example:
        >>> resize(torch.rand(3, 10, 20), 10).shape
        torch.Size([3, 5, 10])
    """
    if 0 in check_tensor("image", image, 3).shape:
        raise ValueError(f"image: expected a pixel at least, got shape {tuple(image.shape)}")
    height = max(1, round(image.shape[1] * check_int("width", width) / image.shape[2]))
    if (height, width) == image.shape[1:]:
        return image
    copy = F.interpolate(image.unsqueeze(0), (height, width), mode="bicubic", antialias=True)
    return copy.squeeze(0).clamp(0, 1)


def _to_tensor(image: Any) -> Tensor:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits instead of scaling them
        image = image.convert("I").point(lambda value: value / 257)
    image = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
