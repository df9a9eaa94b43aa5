"""Kernels in Triton, for GPUs; on the CPU they run under ``TRITON_INTERPRET=1``, for tests.

The files beside this one import triton: import them where they are used.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

LARGEST_K = 256
"""Neighbours, at most, that a search keeps in registers."""


def refuses(device: torch.device) -> str | None:
    """Why Triton can't run on a device; None where it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'convnn-geo[triton]'"
    if device.type != "cuda" and not interpreted():
        return f"Triton is for GPUs, the points are on {device}"
    return None


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
