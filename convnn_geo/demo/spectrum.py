"""Networks that classify images of digits, alike but for the layer that mixes pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.candidates import All
from convnn_geo.demo.training import Network
from convnn_geo.metrics import Feature, Spatial, interpolate
from convnn_geo.nn import ConvNN2d

SIDE = 8
WIDTH = 16
ATTENTION_WIDTH = 24
"""As many parameters a layer as 3 x 3 taps have: 4 * 24^2 is 9 * 16^2."""


class DigitNet(nn.Module):
    """Two mixing layers with pooling between them, on 8 x 8 pixels that know their coordinates.

    Args:
        layer: makes a mixing layer of so many channels, in and out.
        width: channels.

    Shapes:
        - **input:** :math:`(b, 1, 8, 8)`
        - **output:** :math:`(b, 10)`

    Example:
        >>> DigitNet(lambda width: nn.Conv2d(width, width, 1), 4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, layer: Callable[[int], nn.Module], width: int) -> None:
        super().__init__()
        # No bias where BatchNorm follows: it would have no gradient but rounding errors, which
        # AdamW scales up, so that layers equal to the last digit would end in different networks.
        self.stem = nn.Sequential(nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width))
        self.layers = nn.ModuleList(layer(width) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        axis = torch.linspace(-1, 1, SIDE, dtype=x.dtype, device=x.device)
        place = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(x), -1, -1, -1)
        x = self.stem(torch.cat([x, place], 1))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(layer(x))), 2)
        return self.head(x.mean((2, 3)))


class PixelAttention(nn.Module):
    """``nn.MultiheadAttention`` among the pixels of an image.

    Args:
        width: channels.
        num_heads: heads.

    Shapes:
        - **input, output:** :math:`(b, c, height, width)`
    """

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Every pixel attends to every pixel."""
        tokens = x.flatten(2).transpose(1, 2)
        out = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


def convolution(width: int) -> nn.Module:
    """Plain 3 x 3 convolution."""
    return nn.Conv2d(width, width, 3, padding=1, bias=False)


def interpolated(width: int, lam: float) -> nn.Module:
    """Nine taps on the nine nearest pixels: the 3 x 3 window at ``lam=0``, features at ``lam=1``.

    Positions are measured in sides of the image, so that both distances go from 0 to about 1.
    """
    metric = interpolate(Spatial("chebyshev", scale=1 / SIDE), Feature("cosine"), lam)
    return ConvNN2d(width, width, 3, padding=1, bias=False, candidates=All(), metric=metric)


def networks(lams: Sequence[float]) -> list[Network]:
    """Both plain networks, and one at each point of the spectrum."""
    return [
        Network("nn.Conv2d", partial(DigitNet, convolution, WIDTH)),
        Network("nn.MultiheadAttention", partial(DigitNet, PixelAttention, ATTENTION_WIDTH)),
        *(
            Network(
                f"ConvNN2d, λ = {lam:g}",
                partial(DigitNet, partial(interpolated, lam=lam), WIDTH),
                lam,
            )
            for lam in lams
        ),
    ]
