"""DenseNet, by torchvision's definition."""

from __future__ import annotations

from typing import Any

from torch import nn

from convnn_geo.extras import require
from convnn_geo.models.layers import Layer, replace_convolutions
from convnn_geo.models.registry import register_model
from convnn_geo.models.resnet import SMALL
from convnn_geo.models.width import scaled


@register_model("densenet121", blocks=(6, 12, 24, 16))
def densenet(
    layer: Layer,
    *,
    blocks: tuple[int, int, int, int],
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float = 1.0,
    small_stem: bool | None = None,
) -> nn.Module:
    """DenseNet as torchvision has it (https://arxiv.org/abs/1608.06993), with its state_dict.

    Every 3 x 3 convolution of stride 1 becomes the layer. A pool that would see less than 2 x 2
    pixels is left out.

    Args:
        layer: to put in.
        blocks: layers of each of the four blocks.
        num_classes: of the data; 0 for pooled features.
        in_channels: of the images.
        image_size: shortest side of the images.
        width: multiplies all channels.
        small_stem: a 3 x 3 convolution of stride 1 and no pool, instead of 7 x 7 of stride 2 and a
            pool; by default for images up to 64 pixels.
    """
    definition = require("torchvision.models.densenet", extra="vision")
    growth, first = scaled([32, 64], width)
    model: nn.Module = definition.DenseNet(growth, blocks, first, num_classes=num_classes or 1)
    if not num_classes:
        model.classifier = nn.Identity()
    features: Any = model.features
    small = image_size <= SMALL if small_stem is None else small_stem
    if small or in_channels != 3:
        side, stride = (3, 1) if small else (7, 2)
        features.conv0 = nn.Conv2d(in_channels, first, side, stride, side // 2, bias=False)
        nn.init.kaiming_normal_(features.conv0.weight)
    if small:
        features.pool0 = nn.Identity()
    pixels = image_size if small else -(-image_size // 4)  # two strides of 2, rounded up
    for transition in (features.transition1, features.transition2, features.transition3):
        if pixels < 2:
            transition.pool = nn.Identity()
        pixels //= 2
    return replace_convolutions(model, layer)
