"""The All Convolutional Network."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from convnn_geo.models.layers import Layer, replace_convolutions
from convnn_geo.models.registry import register_model
from convnn_geo.models.width import scaled

#: Channels, side of the kernel and stride of each convolution: All-CNN-C.
CONVOLUTIONS = (
    *((96, 3, 1), (96, 3, 1), (96, 3, 2)),
    *((192, 3, 1), (192, 3, 1), (192, 3, 2)),
    *((192, 3, 1), (192, 1, 1)),
)


@register_model("all_conv_net")
def all_conv_net(
    layer: Layer, *, num_classes: int, in_channels: int, width: float = 1.0
) -> nn.Module:
    """All-CNN-C (https://arxiv.org/abs/1412.6806), with BatchNorm: convolutions of stride 2 in
    place of pooling, and a 1 x 1 convolution averaged over the image in place of a linear head.

    Every 3 x 3 convolution of stride 1 becomes the layer.

    Args:
        layer: to put in.
        num_classes: of the data; 0 for pooled features.
        in_channels: of the images.
        width: multiplies all channels.
    """
    parts: list[nn.Module] = []
    channels = in_channels
    for base, side, stride in CONVOLUTIONS:
        (out,) = scaled([base], width)
        parts += [
            nn.Conv2d(channels, out, side, stride, side // 2, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]
        channels = out
    classes = nn.Conv2d(channels, num_classes, 1) if num_classes else nn.Identity()
    head = nn.Sequential(classes, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(OrderedDict(features=nn.Sequential(*parts), head=head))
    return replace_convolutions(model, layer)
