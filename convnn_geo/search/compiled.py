"""Selection in C, compiled when first used; without a compiler everything works, more slowly."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("k_smallest.c")
LARGEST_K = 128
"""GROUPS of the source."""

_FLAGS = ("-O3", "-march=native", "-fPIC")
_PARALLEL: tuple[tuple[str, ...], ...] = (("-fopenmp",), ())


def serves(values: Tensor, k: int) -> bool:
    """Whether :func:`k_smallest` can: float32 on the CPU, and a library."""
    return (
        values.dtype == torch.float32
        and values.device.type == "cpu"
        and 0 < k <= LARGEST_K
        and library() is not None
    )


def k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest of each row of ``(..., m)`` in order of (value, index), NaN last."""
    values = values.contiguous()
    best = values.new_empty(*values.shape[:-1], k)
    index = torch.empty_like(best, dtype=torch.long)
    m = values.shape[-1]
    rows = values.numel() // m
    pointers = values.data_ptr(), best.data_ptr(), index.data_ptr()
    library().k_smallest(pointers[0], rows, m, k, torch.get_num_threads(), *pointers[1:])  # type: ignore[union-attr]
    return best, index


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled source; None where there is no compiler or CONVNN_GEO_COMPILE is 0."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("CONVNN_GEO_COMPILE", "1") == "0" or compiler is None:
        return None
    for parallel in _PARALLEL:
        try:
            found = ctypes.CDLL(str(_compiled(compiler, (*_FLAGS, *parallel))))
        except (OSError, RuntimeError, subprocess.SubprocessError):  # no home, for one
            continue
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        found.k_smallest.argtypes = [
            *(pointer, number, number),
            *(ctypes.c_int, ctypes.c_int, pointer, pointer),
        ]
        found.k_smallest.restype = None
        return found
    return None


def _compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """The shared library of the source, from the user's cache where it is there."""
    parts = [SOURCE.read_text(), compiler, str(os.stat(compiler).st_mtime), *flags, _processor()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "convnn_geo"
    path = cache / f"k_smallest_{name}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part, whole = Path(folder, "part.o"), Path(folder, "whole.so")
            # Linked without OpenMP's library, so that it runs on the threads that torch has.
            for command in (
                [compiler, *flags, "-c", str(SOURCE), "-o", str(part)],
                [compiler, "-shared", str(part), "-o", str(whole), "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(whole, path)
    return path


def _processor() -> str:
    """What code for this machine depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return platform.machine() + (flags[0] if flags else platform.processor())
