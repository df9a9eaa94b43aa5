"""Optional packages: imported where they are used, and named by the error where they lack."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: what to import, e.g. ``"matplotlib.figure"``.
        extra: the extra of convnn-geo that brings it, or several, e.g. ``"data,viz"``.

    Raises:
        MissingExtraError: the module is not installed.

    Example:
        >>> require("json", extra="viz").dumps([1])
        '[1]'
    """
    package = module.partition(".")[0]
    if package in _USERS_OF_TORCHVISION:
        prepare_torchvision()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # the package is there, but something in it or something it needs is not
        raise MissingExtraError(
            f"{package} is not installed; install it with: pip install 'convnn-geo[{extra}]'",
            name=package,
        ) from error


_USERS_OF_TORCHVISION = ("torchvision", "timm")


@functools.cache
def prepare_torchvision() -> None:
    """Let torchvision be imported beside a torch that its operators were not compiled for.

    PyPI's torchvision is built for CUDA. Beside a CPU build of torch its operators, non-maximum
    suppression and the like, can't be loaded; its import then fails for want of their signatures,
    although models, transforms and data sets use none of them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.version.cuda is not None or "torchvision" in sys.modules:
        return
    folder = Path(spec.origin or "").parent
    for library in folder.glob("_C.*"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)
            return
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )


@torch.compiler.assume_constant_result
def installed(module: str) -> bool:
    """Whether a package is there; it is not imported, which may take seconds.

    Example:
        >>> installed("json"), installed("no_such_package")
        (True, False)
    """
    return _is_there(module)


@functools.cache
def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@torch.compiler.assume_constant_result
def importable(module: str) -> bool:
    """Whether a module can be imported: a package built for another torch can't.

    Example:
        >>> importable("json"), importable("no_such_package")
        (True, False)
    """
    return _imports(module)


@functools.cache
def _imports(module: str) -> bool:
    if not _is_there(module):
        return False
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True
