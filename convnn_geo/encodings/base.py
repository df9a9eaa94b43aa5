"""Encodings of position in features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.checks import check_int, check_layer, check_tuple
from convnn_geo.points import Points, position_range


class Encoding(nn.Module, ABC):
    """From points to points with other features.

    A layer applies it where ``on`` says: to the ``"value"`` that is aggregated (the metric does
    not see it), to the ``"features"`` (both see it), or in the ``"metric"`` alone.
    """

    on: Literal["value", "features", "metric"] = "features"
    by_set = True
    """Whether a point's encoding depends on the other points, on the range of positions, say."""

    @abstractmethod
    def forward(self, points: Points) -> Points:
        """The same points with encoded features."""

    def extra_channels(self, axes: int) -> int:
        """Channels that are added, for positions of ``axes`` axes."""
        return 0


def unit_positions(points: Points) -> Tensor:
    """Positions scaled to [-1, 1] along each axis, ``(..., n, p)``; 0 on an axis of one pixel."""
    if points.grid is not None and points.pos is None:
        device, dtype = points.device, points.position.dtype  # float32 or better
        lines = [
            torch.linspace(-1, 1, s, device=device, dtype=dtype)
            if s > 1
            else torch.zeros(s, device=device, dtype=dtype)
            for s in points.grid.size
        ]
        return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)
    pos = points.position
    pos = pos.float() if pos.dtype in (torch.float16, torch.bfloat16) else pos
    low, high = position_range(pos, points.mask)
    half = (high - low) / 2
    return torch.where(half > 0, (pos - (low + high) / 2) / torch.where(half > 0, half, 1), 0)


def _append(points: Points, channels: Tensor) -> Points:
    x = points.features
    channels = channels.to(x.dtype).expand(*x.shape[:-1], channels.shape[-1])
    return points.with_x(torch.cat([x, channels], -1))


def _check_channels(name: str, points: Points, channels: int) -> None:
    got = points.features.shape[-1]
    if got != channels:
        raise ValueError(f"{name}: expected features of {channels} channels, got {got}")


class Coordinates(Encoding):
    """Positions as more channels of the values, in [-1, 1], last axis first: (x, y) for images.

    Example:
        >>> import torch
        >>> points = Points.from_image(torch.zeros(1, 1, 1, 2))
        >>> Coordinates()(points).x.tolist()
        [[[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]]]
    """

    on = "value"

    def forward(self, points: Points) -> Points:
        """Append the coordinates."""
        return _append(points, unit_positions(points).flip(-1))

    def extra_channels(self, axes: int) -> int:
        """One an axis."""
        return axes


class Fourier(Encoding):
    """Sines and cosines of positions as more channels (https://arxiv.org/abs/2006.10739).

    ``sin(pi 2^f u / 2), cos(pi 2^f u / 2)`` for ``f = 0 .. frequencies - 1`` and u in [-1, 1]: the
    longest wave is twice the image, so that its two ends differ.

    Args:
        frequencies: for each axis.
    """

    def __init__(self, frequencies: int = 4) -> None:
        super().__init__()
        self.frequencies = check_int("frequencies", frequencies)

    def forward(self, points: Points) -> Points:
        """Append the waves."""
        unit = unit_positions(points)
        octave = 2.0 ** torch.arange(self.frequencies, device=unit.device, dtype=unit.dtype)
        angle = (unit.unsqueeze(-1) * octave * (math.pi / 2)).flatten(-2)
        return _append(points, torch.cat([angle.sin(), angle.cos()], -1))

    def extra_channels(self, axes: int) -> int:
        """Two an axis and frequency."""
        return 2 * axes * self.frequencies

    def extra_repr(self) -> str:
        return f"frequencies={self.frequencies}"


class LearnedAbsolute(Encoding):
    """A learned vector for each place, added to the features; resampled to other grid sizes.

    Args:
        channels: of the features.
        size: the grid that the table is for, one number an axis.
    """

    def __init__(self, channels: int, size: int | tuple[int, ...]) -> None:
        super().__init__()
        size = (size,) if isinstance(size, int) else size
        self.size = check_tuple("size", size, len(size))
        if len(self.size) > 3:
            raise ValueError(f"size: expected 1, 2 or 3 axes, got {self.size}")
        self.table = nn.Parameter(torch.empty(check_int("channels", channels), *self.size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random vectors."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, points: Points) -> Points:
        """Add the table."""
        if points.grid is None or len(points.grid.size) != len(self.size):
            raise ValueError(f"LearnedAbsolute of size {self.size} needs a grid of as many axes")
        _check_channels("LearnedAbsolute", points, self.table.shape[0])
        table = self.table[None]
        if points.grid.size != self.size:
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.size)]
            table = F.interpolate(table, points.grid.size, mode=mode, align_corners=False)
        rows = table.flatten(2).transpose(1, 2).squeeze(0)
        return points.with_x(points.features + rows.to(points.features.dtype))

    def extra_repr(self) -> str:
        return f"{self.table.shape[0]}, size={self.size}"


class Conditional(Encoding):
    """Features plus a depthwise convolution of them (https://arxiv.org/abs/2102.10882).

    Args:
        channels: of the features.
        axes: of the grid.
        kernel_size: odd.
    """

    def __init__(self, channels: int, axes: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        if check_int("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        convolutions = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        if axes not in convolutions:
            raise ValueError(f"axes: expected 1, 2 or 3, got {axes!r}")
        self.conv = convolutions[axes](
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )

    def reset_parameters(self) -> None:
        """Reset the convolution."""
        self.conv.reset_parameters()

    def forward(self, points: Points) -> Points:
        """Convolve and add."""
        axes = self.conv.weight.ndim - 2
        if points.grid is None or len(points.grid.size) != axes:
            on = "no grid" if points.grid is None else f"a grid of {points.grid.size}"
            raise ValueError(f"Conditional of {axes} axes needs points on such a grid, got {on}")
        _check_channels("Conditional", points, self.conv.in_channels)
        check_layer("Conditional: the input", points.features, self.conv.weight)
        image = points.to_image()
        encoded = image + self.conv(image).to(image.dtype)
        return points.with_x(encoded.flatten(2).transpose(1, 2))
