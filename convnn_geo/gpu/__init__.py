"""Kernels in Triton, for GPUs; on the CPU they run under ``TRITON_INTERPRET=1``, for tests.

The files beside this one import triton: import them where they are used.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_INSTALLED = find_spec("triton") is not None

_OLDEST = (3, 5)
"""Version of Triton: earlier ones do not compile functions that call themselves, among others."""


def _version() -> tuple[int, int]:
    """Of what is installed, under whatever name; of what has none nothing is refused."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            major, minor = metadata.version(name).split(".")[:2]
            return int(major), int(minor)
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return _OLDEST


_VERSION = _version()  # known before anything is traced
LARGEST_K = 256
"""Neighbours, at most, that a search keeps in registers."""


def refuses(device: torch.device) -> str | None:
    """Why Triton can't run on a device; None where it can."""
    if not _INSTALLED:
        return "triton is not installed: pip install 'convnn-geo[triton]'"
    if device.type != "cuda" and not interpreted():
        return f"Triton is for GPUs, the points are on {device}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the kernels hold assembly for NVIDIA's GPUs"
    if _VERSION < _OLDEST:
        return (
            f"triton {_VERSION[0]}.{_VERSION[1]} is installed, the kernels need {_OLDEST[0]}."
            f"{_OLDEST[1]}, as it comes with torch 2.9: update torch"
        )
    return None


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_its_device(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function that launches kernels on the device of its first tensor, whichever is current."""

    @functools.wraps(function)
    def launch(first: Tensor, *args: object, **kwargs: object) -> Result:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return launch


def cdiv(n: int, size: int) -> int:
    """How many parts of a size there are in ``n``, the last one perhaps smaller.

    Triton's own takes as long as a small operation of torch, and launches ask several times.
    """
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``, which is over 0."""
    return 1 << (n - 1).bit_length()


def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads can share: 227 KB on an H100, 99 KB on many others."""
    if device.type != "cuda":
        return 227 * 1024
    return _shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _shared_memory(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)  # whose stub lacks the field
    return properties.shared_memory_per_block_optin
