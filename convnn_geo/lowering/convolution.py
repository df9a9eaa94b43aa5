"""Convolution and pooling by torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.candidates import Window
from convnn_geo.kernels import Max, Mean, Separable, Taps
from convnn_geo.lowering.rules import Rule
from convnn_geo.operation import Operation
from convnn_geo.weighting import Ones

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _windowed(op: Operation) -> str | None:
    """Why the operation is not a plain sum over whole windows; None where it is."""
    window = op.candidates
    if not isinstance(window, Window):
        return f"candidates are {type(window).__name__}, not a Window"
    if window.border != "pad":
        return f"windows {window.border} at borders instead of padding"
    if not op.whole:
        return f"{type(op.selection).__name__} keeps part of the window"
    if not isinstance(op.weighting, Ones):
        return f"weights are {type(op.weighting).__name__}, not Ones"
    if op.mask is not None or op.source.mask is not None:
        return "some points are masked"
    grid = op.source.grid
    if grid is None or op.value.ndim != 3:
        return "the sources are no image"
    if len(grid.size) not in _CONV:
        return f"images of {len(grid.size)} axes"
    centred = op.target.grid == window.targets(grid)  # `!=` is not traceable for symbolic sizes
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
        if not isinstance(op.kernel, (Taps, Separable)):
            return f"the kernel is {type(op.kernel).__name__}, not taps"
        return _windowed(op)

    def run(self, op: Operation) -> Tensor:
        """Convolve."""
        if isinstance(op.kernel, Taps):
            out = self._convolve(op, op.kernel)
        else:
            kernel: Separable = op.kernel  # type: ignore[assignment]
            out = self._convolve(op, kernel.first)
            point = kernel.pointwise.flatten(1)[(...,) + (None,) * (out.ndim - 2)]
            out = _CONV[out.ndim - 2](out, point, kernel.bias)
        return out.flatten(2).transpose(1, 2)

    def _convolve(self, op: Operation, taps: Taps) -> Tensor:
        window: Window = op.candidates  # type: ignore[assignment]
        image = _image(op)
        axes = image.ndim - 2
        kernel_size, stride, dilation = window.spread(axes)
        pads = window.pads(axes)
        padding = tuple(before for before, _ in pads)
        if any(before != after for before, after in pads) or (
            window.padding_mode != "zeros" and any(padding)
        ):
            mode = "constant" if window.padding_mode == "zeros" else window.padding_mode
            around = [p for axis in reversed(pads) for p in axis]
            image, padding = F.pad(image, around, mode=mode), (0,) * axes
        weight = taps.weight.reshape(*taps.weight.shape[:2], *kernel_size)
        return _CONV[axes](image, weight, taps.bias, stride, padding, dilation, taps.groups)


class Pooling(Rule):
    """``F.avg_pool`` and ``F.max_pool``."""

    name = "pooling"
    backend = "native"

    def refuses(self, op: Operation) -> str | None:
        """Needs the mean or maximum of whole windows, padded by zeros, by at most half of them."""
        if not isinstance(op.kernel, (Mean, Max)):
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
