"""Convolution and pooling by torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.candidates import Candidates, Window
from convnn_geo.kernels import Max, Mean, Separable, Taps
from convnn_geo.lowering.rules import Rule
from convnn_geo.operation import Operation, keeps_all
from convnn_geo.selection import Selection
from convnn_geo.weighting import Ones, Weighting

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def unlike_windows(
    candidates: Candidates, selection: Selection, weighting: Weighting, order: str, axes: int | None
) -> str | None:
    """Why no sum of these is a plain one over whole windows; None where it is, on all images."""
    if type(candidates) is not Window:
        return f"candidates are {type(candidates).__name__}, not a Window"
    if candidates.border != "pad":
        return f"windows {candidates.border} at borders instead of padding"
    if not keeps_all(candidates, selection, order, axes):
        return f"{type(selection).__name__} keeps part of the window"
    if type(weighting) is not Ones:
        return f"weights are {type(weighting).__name__}, not Ones"
    return None


def _windowed(op: Operation) -> str | None:
    """Why the operation is not a plain sum over whole windows; None where it is."""
    grid, window = op.source.grid, op.candidates
    axes = None if grid is None else len(grid.size)
    reason = unlike_windows(window, op.selection, op.weighting, op.order, axes)
    if reason is not None:
        return reason
    if op.mask is not None or op.source.mask is not None:
        return "some points are masked"
    if grid is None or op.value.ndim != 3:
        return "the sources are no image"
    if len(grid.size) not in _CONV:
        return f"images of {len(grid.size)} axes"
    centres = window.targets(grid)  # type: ignore[operator]
    centred = op.target.grid == centres  # `!=` is not traceable for symbolic sizes
    if not centred:
        return "the targets are not the window's centres"
    return None


def _image(op: Operation) -> Tensor:
    if op.image is not None:
        return op.image
    return op.value.transpose(1, 2).unflatten(-1, op.source.grid.size)  # type: ignore[union-attr]


class Convolution(Rule):
    """``F.conv1d``, ``F.conv2d`` and ``F.conv3d``."""

    name = "convolution"
    backend = "native"

    def refuses(self, op: Operation) -> str | None:
        """Needs every point of a window, each with weight 1 and its own tap."""
        if type(op.kernel) not in (Taps, Separable):
            return f"the kernel is {type(op.kernel).__name__}, not taps"
        return _windowed(op)

    def run(self, op: Operation) -> Tensor:
        """Convolve."""
        out = convolve(_image(op), op.kernel, op.candidates)  # type: ignore[arg-type]
        return out.flatten(2).transpose(1, 2)


def convolve(image: Tensor, kernel: Taps | Separable, window: Window) -> Tensor:
    """Taps over the windows of images ``(b, c, *size)``: ``(b, d, *size)``."""
    axes = image.ndim - 2
    if isinstance(kernel, Separable):
        out = convolve(image, kernel.first, window)
        point = kernel.pointwise.flatten(1)[(...,) + (None,) * axes]
        return _CONV[axes](out, point, kernel.bias)
    padding, mode = window.padding, window.padding_mode
    if mode != "zeros" or isinstance(padding, str):
        pads = window.pads(axes)
        padding = tuple(before for before, _ in pads)
        if (mode != "zeros" and any(padding)) or any(before != after for before, after in pads):
            around = [p for axis in reversed(pads) for p in axis]
            mode = "constant" if mode == "zeros" else mode
            image, padding = F.pad(image, around, mode=mode), 0
    weight = kernel.weight
    if weight.ndim != image.ndim:
        weight = weight.reshape(*weight.shape[:2], *window.spread(axes)[0])
    options = window.stride, padding, window.dilation, kernel.groups
    return _CONV[axes](image, weight, kernel.bias, *options)


class Pooling(Rule):
    """``F.avg_pool`` and ``F.max_pool``."""

    name = "pooling"
    backend = "native"

    def refuses(self, op: Operation) -> str | None:
        """Needs the mean or maximum of whole windows, padded by zeros, by at most half of them."""
        if type(op.kernel) not in (Mean, Max):
            return f"the kernel is {type(op.kernel).__name__}, neither Mean nor Max"
        reason = _windowed(op)
        if reason is not None:
            return reason
        window: Window = op.candidates  # type: ignore[assignment]
        axes = len(op.source.grid.size)  # type: ignore[union-attr]
        kernel_size, _, dilation = window.spread(axes)
        pads = window.pads(axes)
        padding = tuple(before for before, _ in pads)
        if any(before != after for before, after in pads):
            return f"padding {pads} differs before and after"
        if window.padding_mode != "zeros" and any(padding):
            return f"padding_mode is {window.padding_mode!r}"
        if any(k > s for k, s in zip(kernel_size, op.source.grid.size, strict=True)):  # type: ignore[union-attr]
            return f"the window {kernel_size} is wider than the image"
        if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
            return f"padding {padding} is over half the window {kernel_size}"
        if isinstance(op.kernel, Mean) and set(dilation) != {1}:
            return "torch has no dilated average pooling"
        return None

    def run(self, op: Operation) -> Tensor:
        """Pool."""
        window: Window = op.candidates  # type: ignore[assignment]
        image = _image(op)
        axes = image.ndim - 2
        kernel_size, stride, dilation = window.spread(axes)
        padding = tuple(before for before, _ in window.pads(axes))
        if isinstance(op.kernel, Mean):
            out = _AVG_POOL[axes](
                image, kernel_size, stride, padding, count_include_pad=op.kernel.count_empty
            )
        else:
            out = _MAX_POOL[axes](image, kernel_size, stride, padding, dilation)
        return torch.flatten(out, 2).transpose(1, 2)
