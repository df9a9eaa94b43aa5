"""What is in C: compiled when first used; without a compiler everything works, more slowly."""

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
LARGEST_K = 128
"""GROUPS of k_smallest.c."""

# Fused operations would round distances otherwise than torch does.
_FLAGS = ("-O3", "-ffp-contract=off", "-fPIC")
_WISHES: tuple[tuple[str, ...], ...] = (("-march=native", "-fopenmp"), ("-fopenmp",), ())
"""Flags that some compilers lack, the best first."""

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The ``k`` smallest of each row of ``(..., m)`` in order of (value, index), NaN last.

    None where that is not served: it is for float32 on the CPU, and k up to :data:`LARGEST_K`.
    """
    here = values.dtype == torch.float32 and values.device.type == "cpu"
    if not here or not 0 < k <= LARGEST_K or library() is None:
        return None
    values = values.contiguous()
    best = values.new_empty(*values.shape[:-1], k)
    index = torch.empty_like(best, dtype=torch.long)
    m = values.shape[-1]
    library().k_smallest(  # type: ignore[union-attr]
        *(values.data_ptr(), values.numel() // m, m, k, torch.get_num_threads()),
        *(best.data_ptr(), index.data_ptr()),
    )
    return best, index


def cells_nearest(
    q: Tensor, keys: Tensor, k: int, own: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Squared distances and places ``(n, k)`` of the nearest of ``keys (m, d)``, in order.

    None where that is not served: it is for finite float32 on the CPU, up to three dimensions,
    and for points that do not lie in tight clusters.

    Args:
        own: ``(n,)``, a key that each query is not to find; -1 for none.
    """
    here = q.dtype == torch.float32 and q.device.type == "cpu" and q.shape[-1] <= 3
    if not here or library() is None:
        return None
    q, keys = q.contiguous(), keys.contiguous()
    own = None if own is None else own.contiguous()
    values = q.new_empty(len(q), k)
    places = torch.empty_like(values, dtype=torch.long)
    status = library().cells_nearest(  # type: ignore[union-attr]
        *(keys.data_ptr(), len(keys), q.data_ptr(), len(q), q.shape[-1], k),
        *(None if own is None else own.data_ptr(), torch.get_num_threads()),
        *(values.data_ptr(), places.data_ptr()),
    )
    return (values, places) if status == 0 else None


def squared_differences(q: Tensor, keys: Tensor, index: Tensor) -> Tensor | None:
    """``sum (q - keys[index])^2``, ``(..., n, k)`` in float64, of float32 points.

    None where that is not served: it is for the CPU, without gradient, and for equal leading axes,
    at most one.
    """
    here = q.dtype == keys.dtype == torch.float32 and q.device.type == index.device.type == "cpu"
    like = q.ndim == keys.ndim == index.ndim <= 3 and q.shape[:-1] == index.shape[:-1]
    like = like and q.shape[:-2] == keys.shape[:-2] and index.numel() > 0
    graph = torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad)
    if not here or not like or graph or torch.compiler.is_compiling() or library() is None:
        return None
    q, keys, index = q.contiguous(), keys.contiguous(), index.contiguous()
    out = torch.empty_like(index, dtype=torch.float64)
    (n, d), m, k = q.shape[-2:], keys.shape[-2], index.shape[-1]
    library().squared_differences(  # type: ignore[union-attr]
        *(q.data_ptr(), keys.data_ptr(), index.data_ptr(), q.shape[:-2].numel()),
        *(n, m, d, k, torch.get_num_threads(), out.data_ptr()),
    )
    return out


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
        found.k_smallest.argtypes = [_POINTER, _LONG, _LONG, _INT, _INT, _POINTER, _POINTER]
        found.k_smallest.restype = None
        found.cells_nearest.argtypes = [
            *(_POINTER, _LONG, _POINTER, _LONG, _INT, _INT),
            *(_POINTER, _INT, _POINTER, _POINTER),
        ]
        found.cells_nearest.restype = _INT
        found.squared_differences.argtypes = [
            *(_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _LONG),
            *(_INT, _POINTER),
        ]
        found.squared_differences.restype = None
        return found
    return None


def _compiled(compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of the sources, from the user's cache where it is there and sound."""
    program = shutil.which(compiler[0] if compiler else "")
    if program is None:
        raise OSError(f"no C compiler {compiler}")
    sources = [source.read_text() for source in SOURCES]
    parts = [*sources, *compiler, program, str(os.stat(program).st_mtime), *flags, _processor()]
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
                [*compiler, "-x", "c", *flags, "-c", str(source), "-o", target]
                for source, target in zip(SOURCES, objects, strict=True)
            ),
            [*compiler, "-shared", *objects, "-o", str(whole), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        found = ctypes.CDLL(str(whole))  # what can't be loaded is not kept
        os.replace(whole, path)
    return found


def _processor() -> str:
    """What code for this machine depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return platform.machine() + (flags[0] if flags else platform.processor())
