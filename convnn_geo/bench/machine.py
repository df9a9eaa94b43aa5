"""What numbers belong to: the machine, versions of packages, and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
import torch_geometric

import convnn_geo

_PACKAGES = (
    *("torch", "torch_geometric", "torch_cluster", "pyg_lib", "numpy", "scipy", "scikit-learn"),
    *("scikit-image", "pykdtree"),
    *("faiss-cpu", "faiss-gpu", "pykeops", "pynndescent", "triton", "flashlib", "torchbvh"),
)


def machine(device: str = "cpu") -> str:
    """The machine and the versions that the numbers belong to, in one line.

    Args:
        device: that was measured.
    """
    return (
        f"{processor(device)}, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torch_geometric {torch_geometric.__version__}, convnn_geo {convnn_geo.__version__}"
    )


def processor(device: str = "cpu") -> str:
    """The name of the CPU, or of the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def other_work() -> str | None:
    """What to say where processors are busy already, so that times will be too long.

    Example:
        >>> other_work() is None or "load" in other_work()
        True
    """
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):  # not every system tells
        return None
    if load <= cores / 2:
        return None
    return (
        f"other work runs beside this, or has just ended (load {load:.1f} on {cores} cores): "
        "times may be too long, ratios off"
    )


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python, this package, and others that are installed.

    Args:
        packages: the others; by default those that engines and layers use.

    Example:
        >>> {"python", "convnn_geo", "torch"} <= set(versions())
        True
    """
    found = {"python": platform.python_version(), "convnn_geo": convnn_geo.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the clone that this package is imported from; None where it is none."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
