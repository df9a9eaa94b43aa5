"""UNet: an image in, the clean image out."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.models.layers import Layer, replace_convolutions
from convnn_geo.models.registry import register_model
from convnn_geo.models.width import scaled

#: Channels of each resolution, from full size down.
CHANNELS = (64, 128, 256, 512)


class UNet(nn.Module):
    """Two convolutions at each of a few resolutions, down and up again, with skips across
    (https://arxiv.org/abs/1505.04597).

    Upsampling is to the size of the skip, by nearest neighbour, so any image size will do.

    Args:
        image_channels: of the input and the output.
        channels: of each resolution, from full size down.

    Shapes:
        - **input:** :math:`(b, c, h, w)`, noisy
        - **output:** :math:`(b, c, h, w)`, clean

    Example:
        >>> UNet(3, (8, 16))(torch.zeros(1, 3, 9, 14)).shape
        torch.Size([1, 3, 9, 14])
    """

    def __init__(self, image_channels: int, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        steps = list(pairwise(channels))
        self.stem = _block(image_channels, channels[0])
        self.down = nn.ModuleList(_block(fine, coarse) for fine, coarse in steps)
        self.up = nn.ModuleList(_block(coarse + fine, fine) for fine, coarse in reversed(steps))
        self.head = nn.Conv2d(channels[0], image_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Clean an image."""
        x = self.stem(x)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2, ceil_mode=True))  # one pixel remains one
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(torch.cat([skip, F.interpolate(x, skip.shape[-2:])], 1))
        out: Tensor = self.head(x)
        return out


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolutions; no bias where BatchNorm follows."""
    layers: list[nn.Module] = []
    for c in (in_channels, out_channels):
        layers += [
            nn.Conv2d(c, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


@register_model("unet")
def unet(layer: Layer, *, in_channels: int, width: float = 1.0) -> nn.Module:
    """A :class:`UNet`, every 3 x 3 convolution of which becomes the layer.

    Args:
        layer: to put in.
        in_channels: of the images.
        width: multiplies all channels but the images'.
    """
    return replace_convolutions(UNet(in_channels, tuple(scaled(CHANNELS, width))), layer)
