"""The sources in C, compiled when first used and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FLAGS = ("-O3", "-fPIC")
_WISHES = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
"""Flags that some compilers lack, the best first."""
_ARGUMENTS = {
    "k_smallest": [_POINTER, _LONG, _LONG, _INT, _INT, _POINTER, _POINTER],
    "cells_nearest": [
        *(_POINTER, _LONG, _POINTER, _LONG, _INT, _INT),
        *(_POINTER, _INT, _POINTER, _POINTER),
    ],
    "rings_nearest": [_POINTER] * 3,
    "pairs_measure": [_POINTER] * 3,
    "pairs_gradient": [_POINTER] * 4,
    "gather_taps": [_POINTER, _POINTER, _POINTER, _INT, _POINTER],
    "gather_depthwise": [_POINTER, _POINTER, _POINTER, _INT, _POINTER],
    "attention_forward": [_POINTER, _INT, *[_POINTER] * 3, *[_LONG] * 3],
    "attention_backward": [_POINTER, _INT, *[_POINTER] * 8],
    "products_nearest": [_POINTER, _INT, _POINTER, _POINTER],
    "windows_nearest": [_POINTER, _POINTER, _POINTER, _LONG, _INT, *[_POINTER] * 3],
}
_FUSED = ("products.c", "taps.c", "attention.c", "windows.c", "pairs.c")
"""Whose sums may fuse a product into its addition; elsewhere they round as torch's do."""


def here(tensor: Tensor) -> bool:
    """Whether a tensor is what most of the sources take: float32, real, and on the CPU."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def threads(products: int) -> int:
    """On how many to work where so many products are added up: on one, or on all that torch has.

    To wake them takes as long as some hundred thousand, and far longer where others keep them busy.
    Some of them are no choice: OpenMP ends the rest, and starts others when torch asks for all.
    """
    return torch.get_num_threads() if products >= 2**20 else 1


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled sources; None where there is no compiler or CONVNN_GEO_COMPILE is 0."""
    if os.environ.get("CONVNN_GEO_COMPILE", "1") == "0":
        return None
    for wishes in _WISHES:
        try:
            compiler = shlex.split(os.environ.get("CC", "cc"))
            found = _compiled(compiler, (*_FLAGS, *wishes))
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
            continue  # no compiler, one that fails, no home, nowhere to write
        return declare(found)
    return None


def declare(found: ctypes.CDLL) -> ctypes.CDLL:
    """The same with the types of what its functions take."""
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    return found


def _compiled(compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of the sources, from the user's cache where it is there and sound."""
    program = shutil.which(compiler[0] if compiler else "")
    if program is None:
        raise OSError(f"no C compiler {compiler}")
    sources = [source.read_text() for source in (*SOURCES, *HEADERS)]
    parts = [*sources, *compiler, program, str(os.stat(program).st_mtime), *flags]
    parts += [*_FUSED, _processor()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnn_geo"
    path = cache / f"convnn_geo_{name}.so"
    ours = (0, os.getuid()) if hasattr(os, "getuid") else (0,)  # nobody else's code is run
    if path.exists() and path.stat().st_uid in ours:
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged: build it again
            pass
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects = [str(Path(folder, f"{source.stem}.o")) for source in SOURCES]
        whole = Path(folder, "whole.so")
        # Linked without OpenMP's library, so that it runs on the threads that torch has.
        for command in (
            *(
                [*compiler, "-x", "c", *flags, _contract(source), "-c", str(source), "-o", target]
                for source, target in zip(SOURCES, objects, strict=True)
            ),
            [*compiler, "-shared", *objects, "-o", str(whole), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        found = ctypes.CDLL(str(whole))  # what can't be loaded is not kept
        os.replace(whole, path)
    return found


def _contract(source: Path) -> str:
    return f"-ffp-contract={'fast' if source.name in _FUSED else 'off'}"


def _processor() -> str:
    """What code for this machine depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return platform.machine() + (flags[0] if flags else platform.processor())
