"""Windows: the candidates of convolution and of neighbourhood attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.caching import keep
from convnn_geo.candidates.base import Candidates, Subset, need_grid
from convnn_geo.checks import check_name, check_tuple
from convnn_geo.points import Grid, Points

Axes: TypeAlias = "tuple[int, ...]"
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
BORDERS = ("pad", "shift", "causal")


class Window(Candidates):
    """A window of ``kernel_size`` points an axis, in raster order.

    Args:
        kernel_size: points along each axis; one number, or one an axis.
        stride: pixels between the windows of neighbouring targets.
        padding: pixels that windows reach over the border, ``"same"`` or ``"valid"``, as in
            :class:`torch.nn.Conv2d`.
        dilation: pixels between neighbouring points of one window.
        padding_mode: ``"zeros"`` masks what lies outside; ``"reflect"``, ``"replicate"`` and
            ``"circular"`` look it up inside, as the convolution's padding does.
        border: ``"pad"`` for the above; ``"shift"`` moves windows inward at borders so that all
            are full, and ``"causal"`` ends them at the target, both as in neighbourhood attention
            (https://arxiv.org/abs/2204.07143). Those two need no padding and no stride.

    Example:
        >>> import torch
        >>> from convnn_geo.candidates import Window
        >>> from convnn_geo.points import Points
        >>> tokens = Points.from_tokens(torch.zeros(1, 5, 1))
        >>> Window(3, border="shift")(tokens, tokens).index.tolist()
        [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        border: str = "pad",
    ) -> None:
        super().__init__()
        self.padding_mode = check_name("padding_mode", padding_mode, PADDING_MODES)
        self.border = check_name("border", border, BORDERS)
        if isinstance(padding, str):
            check_name("padding", padding, ("same", "valid"))
            if padding == "same" and set(_plain(stride)) != {1}:
                raise ValueError(
                    f"padding='same' takes no stride, got {stride}; pass padding=, the half of "
                    "kernel_size, say"
                )
        for name, value, minimum in (
            ("kernel_size", kernel_size, 1),
            ("stride", stride, 1),
            ("padding", 0 if isinstance(padding, str) else padding, 0),
            ("dilation", dilation, 1),
        ):
            check_tuple(name, value, len(value) if isinstance(value, Sequence) else 1, minimum)
        self.kernel_size, self.stride = _fixed(kernel_size), _fixed(stride)
        self.padding, self.dilation = _fixed(padding), _fixed(dilation)
        if border != "pad" and (set(_plain(stride)) != {1} or set(_plain(padding)) != {0}):
            raise ValueError(
                f"border={border!r} takes neither stride nor padding, "
                f"got stride={stride}, padding={padding}"
            )

    def spread(self, axes: int) -> tuple[Axes, Axes, Axes]:
        """``kernel_size, stride, dilation``, each one number an axis."""
        return _spread(self.kernel_size, self.stride, self.dilation, axes)

    def pads(self, axes: int) -> tuple[tuple[int, int], ...]:
        """Padding before and after, for each axis."""
        return _pads(self.kernel_size, self.stride, self.padding, self.dilation, axes)

    @property
    def ascends(self) -> bool:
        """Whether the places inside the image stand in the order of their sources."""
        return self.border == "pad" and self.padding_mode == "zeros"

    def size(self, size: Axes) -> Axes:
        """Points an axis of the output for an image of that size; an error where none fit."""
        return _size(size, *self._options)

    def targets(self, source: Grid) -> Grid:
        """The grid of window centres: the output grid of the convolution with this window."""
        if self.border != "pad":
            return source
        return _targets(source, *self._options)

    @property
    def _options(self) -> tuple[Any, ...]:
        parts = self.kernel_size, self.stride, self.padding, self.dilation
        return (*parts, self.padding_mode)

    def forward(self, target: Points, source: Points) -> Subset:
        """Indices ``(n, w)`` with a mask where the window leaves the image."""
        at, among = need_grid("Window", target), need_grid("Window", source)
        kernel_size, _, dilation = self.spread(len(among.size))
        padding = self.pads(len(among.size))
        mode = self.padding_mode if self.border == "pad" else self.border
        index, mask, repeated = _window(
            at, among, kernel_size, padding, dilation, mode, source.device
        )
        folds = repeated is not None  # and may then reach pixels between the dilated ones
        most = 1
        for k, s, d in zip(kernel_size, among.size, dilation, strict=True):
            most *= min(k, s if folds else (s + d - 1) // d)
        centred = self.border != "pad" or all(k % 2 for k in kernel_size)
        return Subset(index, mask, repeated, most, own=centred)

    def extra_repr(self) -> str:
        return (
            f"{self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, padding_mode={self.padding_mode!r}, border={self.border!r}"
        )


def _plain(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@keep(256)
def _spread(
    kernel_size: int | Axes, stride: int | Axes, dilation: int | Axes, axes: int
) -> tuple[Axes, Axes, Axes]:
    return (
        check_tuple("kernel_size", kernel_size, axes),
        check_tuple("stride", stride, axes),
        check_tuple("dilation", dilation, axes),
    )


@keep(256)
def _pads(
    kernel_size: int | Axes,
    stride: int | Axes,
    padding: int | Axes | str,
    dilation: int | Axes,
    axes: int,
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * axes
    if padding == "same":
        kernel_size, _, dilation = _spread(kernel_size, stride, dilation, axes)
        total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in check_tuple("padding", padding, axes, 0))


@keep(256)
def _size(
    source: Axes,
    kernel_size: int | Axes,
    stride: int | Axes,
    padding: int | Axes | str,
    dilation: int | Axes,
    padding_mode: str,
) -> Axes:
    pads = _pads(kernel_size, stride, padding, dilation, len(source))
    kernel_size, stride, dilation = _spread(kernel_size, stride, dilation, len(source))
    size = tuple(
        (s + before + after - d * (k - 1) - 1) // t + 1
        for s, (before, after), d, k, t in zip(
            source, pads, dilation, kernel_size, stride, strict=True
        )
    )
    if min(size) < 1 and min(source) > 0:
        raise ValueError(
            f"a window of {kernel_size} with dilation {dilation} does not fit into an image "
            f"of {source} with padding {pads}"
        )
    for length, pad in zip(source, pads, strict=True):
        _check_fold(length, max(pad), padding_mode)
    return size


@keep(256)
def _targets(
    source: Grid,
    kernel_size: int | Axes,
    stride: int | Axes,
    padding: int | Axes | str,
    dilation: int | Axes,
    padding_mode: str,
) -> Grid:
    size = _size(source.size, kernel_size, stride, padding, dilation, padding_mode)
    pads = _pads(kernel_size, stride, padding, dilation, len(source.size))
    kernel_size, stride, dilation = _spread(kernel_size, stride, dilation, len(source.size))
    reach = tuple(d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
    origin = tuple(
        o + s * (r / 2 - before)
        for o, s, (before, _), r in zip(source.origin, source.step, pads, reach, strict=True)
    )
    step = tuple(s * t for s, t in zip(source.step, stride, strict=True))
    return Grid(size, origin, step)


@keep(32)
def _window(
    target: Grid,
    source: Grid,
    kernel_size: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    mode: str,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Indices, mask and repeats ``(n, w)``: functions of sizes alone, therefore computed once."""
    with torch.inference_mode(False), torch.no_grad():
        axes = len(source.size)
        index = torch.zeros((1,) * (2 * axes), dtype=torch.long, device=device)
        inside = torch.ones((1,) * (2 * axes), dtype=torch.bool, device=device)
        hides = folds = False
        for axis, length in enumerate(source.size):
            coordinate, whole = _axis(target, source, axis, kernel_size[axis], dilation[axis], mode)
            coordinate = coordinate.to(device)
            hides = hides or not whole
            short = dilation[axis] * (kernel_size[axis] - 1) >= length
            folds = folds or (not whole and (mode != "circular" or short))
            ok = (coordinate >= 0) & (coordinate < length)
            coordinate = _wrap(coordinate, length, max(padding[axis]), mode)
            shape = [1] * (2 * axes)
            shape[axis], shape[axes + axis] = coordinate.shape
            index = index * length + coordinate.view(shape)
            inside = inside & ok.view(shape)
        index = index.flatten(0, axes - 1).flatten(1)
        if mode not in ("zeros", "causal"):
            return index, None, _repeated(index) if folds else None
        if not hides:
            return index, None, None
        return index, inside.expand(*target.size, *kernel_size).reshape(index.shape), None


def _repeated(index: Tensor) -> Tensor:
    """True where a source stood earlier in its row."""
    ordered, order = index.sort(dim=-1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter(-1, order, again)


def _axis(
    target: Grid, source: Grid, axis: int, kernel: int, dilation: int, mode: str
) -> tuple[Tensor, bool]:
    """Source coordinates of every window along one axis, ``(targets, kernel)``, and whether all
    lie inside.

    What is decided here is decided on numbers, not on tensors, so that it can be traced.
    """
    length, count = source.size[axis], target.size[axis]
    taps = torch.arange(kernel, device="cpu")
    offset = (target.origin[axis] - source.origin[axis]) / source.step[axis]
    stride = target.step[axis] / source.step[axis]
    if mode not in ("shift", "causal"):
        first, step = offset - dilation * (kernel - 1) / 2, stride
        if not (first.is_integer() and (count < 2 or step.is_integer())):
            raise ValueError(
                f"Window: targets at {target.origin} with step {target.step} are not the centres "
                f"of windows of {kernel} on whole pixels; use Window.targets(source.grid)"
            )
        start = torch.arange(count, device="cpu") * int(step) + int(first)
        last = first + step * max(count - 1, 0) + dilation * (kernel - 1)
        return start[:, None] + dilation * taps, first >= 0 and last < length
    place = torch.arange(count, dtype=torch.float64, device="cpu") * stride + offset
    phase, turn = place.long() % dilation, place.long() // dilation
    if mode == "causal":
        return (turn[:, None] - (kernel - 1) + taps) * dilation + phase[:, None], kernel == 1
    members = (length - phase + dilation - 1) // dilation
    if max(length // dilation, 1) < kernel:
        raise ValueError(
            f"a window of {kernel} with dilation {dilation} that shifts inward needs an axis of "
            f"at least {kernel * dilation} points, got {length}"
        )
    start = torch.minimum((turn - kernel // 2).clamp_min(0), members - kernel)
    return (start[:, None] + taps) * dilation + phase[:, None], True


def _check_fold(length: int, padding: int, mode: str) -> None:
    """Raise where an axis is too short to be folded over."""
    if mode == "circular" and padding > length:
        raise ValueError(f"circular padding of {padding} is over the axis of {length} points")
    if mode == "reflect" and padding >= length:
        raise ValueError(f"reflect padding of {padding} must be under the axis of {length} points")


def _wrap(coordinate: Tensor, length: int, padding: int, mode: str) -> Tensor:
    """Fold coordinates outside ``[0, length)`` back inside, as the padding mode does."""
    _check_fold(length, padding, mode)
    if mode == "circular":
        return coordinate % length
    if mode == "reflect":
        period = max(2 * (length - 1), 1)
        coordinate = coordinate % period
        return torch.where(coordinate >= length, period - coordinate, coordinate)
    return coordinate.clamp(0, length - 1)
