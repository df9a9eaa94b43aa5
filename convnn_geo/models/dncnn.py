"""DnCNN: an image in, the clean image out, by predicting the noise."""

from __future__ import annotations

from torch import Tensor, nn

from convnn_geo.checks import check_int, check_number
from convnn_geo.models.layers import Layer, replace_convolutions
from convnn_geo.models.registry import register_model
from convnn_geo.models.width import scaled


class DnCNN(nn.Module):
    r"""Convolutions of one width that predict the noise, which is subtracted
    (https://arxiv.org/abs/1608.03981).

    .. math:: y = x - \mathrm{noise}(x)

    Args:
        image_channels: of the input and the output.
        channels: of the layers between.
        depth: convolutions, first and last among them.

    Shapes:
        - **input:** :math:`(b, c, h, w)`, noisy
        - **output:** :math:`(b, c, h, w)`, clean

    Example:
        >>> import torch
        >>> DnCNN(1, channels=8, depth=4)(torch.zeros(1, 1, 9, 14)).shape
        torch.Size([1, 1, 9, 14])
    """

    def __init__(self, image_channels: int, channels: int = 64, depth: int = 17) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(image_channels, channels, bias=True), nn.ReLU(True)]
        for _ in range(check_int("depth", depth, 2) - 2):
            layers += [
                _convolution(channels, channels, bias=False),  # BatchNorm has its own
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        self.noise = nn.Sequential(*layers, _convolution(channels, image_channels, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        """Clean an image."""
        out: Tensor = x - self.noise(x)
        return out


def _convolution(in_channels: int, out_channels: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


@register_model("dncnn")
def dncnn(layer: Layer, *, in_channels: int, width: float = 1.0, depth: int = 17) -> nn.Module:
    """A :class:`DnCNN`, every convolution of which becomes the layer.

    The last has but the channels of the images. Where ``ratio`` of ``"branching"`` leaves a branch
    none of them, it has the other branch alone.

    Args:
        layer: to put in.
        in_channels: of the images.
        width: multiplies the 64 channels.
        depth: convolutions.
    """
    (channels,) = scaled([64], width)
    model = DnCNN(in_channels, channels, depth)
    end = _end(layer, in_channels)
    if end is not None:
        model.noise[-1] = replace_convolutions(model.noise[-1], end)
    return replace_convolutions(model, layer)


def _end(layer: Layer, channels: int) -> Layer | None:
    """The one branch for channels that the layer's ratio does not divide; None where it does."""
    if layer.name != "branching":
        return None
    ratio = check_number("ratio", layer.options.get("ratio", 0.5), maximum=1)
    share = round(ratio * channels)
    if 0 < share < channels:
        return None
    return Layer(layer.name, {**layer.options, "ratio": share / channels})
