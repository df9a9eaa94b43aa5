"""Rotary embeddings of queries and keys, over any number of axes."""

from __future__ import annotations

import torch

from convnn_geo.checks import check_number
from convnn_geo.encodings.base import Encoding
from convnn_geo.points import Points


class Rotary(Encoding):
    """Turns pairs of channels by angles that grow with position (https://arxiv.org/abs/2104.09864).

    Channels are divided among the axes, row first, so a dot product of two encoded features
    depends on their offset alone. It acts in the metric: on queries and keys, not on values.

    Args:
        base: wavelengths run from 2 pi pixels to about ``2 pi base``.

    Example:
        >>> import torch
        >>> points = Points.from_image(torch.randn(1, 8, 3, 3))
        >>> Rotary()(points).x.norm(dim=-1).allclose(points.x.norm(dim=-1))
        True
    """

    on = "metric"
    by_set = False

    def __init__(self, base: float = 100.0) -> None:
        super().__init__()
        self.base = check_number("base", base, 1.0, exclusive=True)

    def forward(self, points: Points) -> Points:
        """Rotate features ``(..., n, d)``; d must be a multiple of twice the number of axes."""
        x, pos = points.features, points.position
        if pos.dtype in (torch.float16, torch.bfloat16):
            pos = pos.float()  # an angle needs more digits than these have
        axes, d = pos.shape[-1], x.shape[-1]
        if d % (2 * axes):
            raise ValueError(
                f"Rotary over {axes} axes needs a multiple of {2 * axes} channels, got {d}"
            )
        pairs = d // (2 * axes)
        exponent = torch.arange(pairs, device=x.device, dtype=pos.dtype) / pairs
        angle = (pos.unsqueeze(-1) * self.base**-exponent).flatten(-2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return points.with_x(turned.flatten(-2))

    def extra_repr(self) -> str:
        return f"base={self.base:g}"
