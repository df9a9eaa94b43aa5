"""Images in any form as tensors, and masks over their pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from convnn_geo.metrics.base import precise

Mask: TypeAlias = "Tensor | np.ndarray | Callable[[Tensor], Tensor]"

#: What stands for 1; floating-point images are taken as they are.
_WHITE = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}
#: Modes of PIL whose channels are kept; palettes and other colour spaces become RGB.
_MODES = ("1", "L", "LA", "RGB", "RGBA", "F")
_FORMS = (
    "a PIL image, an array (h, w) or (h, w, c), a tensor (h, w) or (c, h, w), "
    "or a Data that holds one of them as data.image"
)


def take_image(name: str, value: Any) -> tuple[Tensor, Data]:
    """The image, ``(c, h, w)`` in float32 or float64, and the data that is to hold its points.

    Args:
        name: of the transform, for errors.
        value: an image, or a ``Data`` with ``image``, which is taken out of it.
    """
    if not isinstance(value, Data):
        return _floating(name, _channels_first(name, value)), Data()
    if "image" not in value:
        raise ValueError(f"{name}: expected {_FORMS}; got {value}")
    image = _floating(name, _channels_first(name, value.image))
    del value.image
    return image, value


def check_mask(name: str, mask: Any) -> Mask | None:
    """Return ``mask`` if it is None, a function, or a boolean tensor or array ``(h, w)``."""
    if mask is None or callable(mask):
        return mask
    if not isinstance(mask, (Tensor, np.ndarray)):
        raise TypeError(
            f"{name}: expected a mask (h, w) or a function of the image (c, h, w) that returns "
            f"one, got {type(mask).__name__}"
        )
    _check_boolean(name, torch.as_tensor(mask))
    return mask


def kept_pixels(name: str, mask: Mask | None, image: Tensor) -> Tensor | None:
    """Which pixels of ``image (c, h, w)`` count, ``(h, w)``; None where all do."""
    if mask is None:
        return None
    kept = torch.as_tensor(mask(image) if callable(mask) else mask, device=image.device)
    _check_boolean(name, kept)
    if kept.shape != image.shape[1:]:
        raise ValueError(
            f"{name}: expected a mask of the image's size {tuple(image.shape[1:])}, got "
            f"{tuple(kept.shape)}"
        )
    return kept


def _check_boolean(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise TypeError(
            f"{name}: expected a boolean mask (h, w), got {mask.dtype} of shape "
            f"{tuple(mask.shape)}; compare with a threshold first"
        )


def _channels_first(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.ndim not in (2, 3):
            raise ValueError(
                f"{name}: expected a tensor (h, w) or (c, h, w), got shape {tuple(value.shape)}; "
                "transforms take one image at a time"
            )
        if value.ndim == 3 and _channels_elsewhere(value.shape, first=True):
            _warn(name, f"tensor (c, h, w) of shape {tuple(value.shape)}", ".permute(2, 0, 1)")
        return value if value.ndim == 3 else value.unsqueeze(0)
    if type(value).__module__.startswith("PIL."):
        known = value.mode in _MODES or value.mode.startswith("I")
        value = np.asarray(value if known else value.convert("RGB"))
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected {_FORMS}; got {type(value).__name__}")
    if value.ndim not in (2, 3):
        raise ValueError(
            f"{name}: expected an array (h, w) or (h, w, c), got shape {value.shape}; "
            "transforms take one image at a time"
        )
    if value.ndim == 3 and _channels_elsewhere(value.shape, first=False):
        _warn(name, f"array (h, w, c) of shape {value.shape}", ".transpose(1, 2, 0)")
    # A copy that torch can take: writable, no negative strides, bytes in this machine's order.
    native = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    return native.unsqueeze(0) if native.ndim == 2 else native.permute(2, 0, 1)


def _channels_elsewhere(shape: Sequence[int], first: bool) -> bool:
    """Whether an image's channels look as if they were on the other side."""
    here, there = (shape[0], shape[-1]) if first else (shape[-1], shape[0])
    return here > 4 and there in (3, 4)


def _warn(name: str, what: str, how: str) -> None:
    warnings.warn(
        f"{name}: a {what} has its channels elsewhere, it seems; if so, {how} puts them right",
        UserWarning,
        stacklevel=2,
    )


def _floating(name: str, image: Tensor) -> Tensor:
    if image.is_floating_point():
        return precise(image)
    if image.dtype not in _WHITE:
        raise TypeError(
            f"{name}: expected an image of floats, uint8, uint16 or bool, got {image.dtype}; "
            "convert it to floats in the range that you want"
        )
    return image.float() / _WHITE[image.dtype]
