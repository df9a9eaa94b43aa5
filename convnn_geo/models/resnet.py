"""ResNet, by timm's definition, whose weights and state_dict are torchvision's."""

from __future__ import annotations

from torch import nn

from convnn_geo.extras import require
from convnn_geo.models.layers import Layer, replace_convolutions
from convnn_geo.models.registry import register_model
from convnn_geo.models.width import scaled

#: Images up to this side get the small stem.
SMALL = 64


@register_model("resnet18", block="BasicBlock", blocks=(2, 2, 2, 2))
@register_model("resnet34", block="BasicBlock", blocks=(3, 4, 6, 3))
@register_model("resnet50", block="Bottleneck", blocks=(3, 4, 6, 3))
def resnet(
    layer: Layer,
    *,
    block: str,
    blocks: tuple[int, ...],
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float = 1.0,
    small_stem: bool | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """A residual network (https://arxiv.org/abs/1512.03385). timm's definition, as it takes
    channels and drop-path; parameters are named as torchvision's.

    Every 3 x 3 convolution of stride 1 becomes the layer.

    Args:
        layer: to put in.
        block: ``"BasicBlock"`` or ``"Bottleneck"``.
        blocks: of each of the four stages.
        num_classes: of the data; 0 for pooled features.
        in_channels: of the images.
        image_size: shortest side of the images.
        width: multiplies the channels of the stages; the stem keeps its 64.
        small_stem: a 3 x 3 convolution of stride 1 and no pool, instead of 7 x 7 of stride 2 and a
            pool; by default for images up to 64 pixels.
        drop_path: probability of leaving out the last block; of others less, in training.
    """
    definition = require("timm.models.resnet", extra="vision")
    model: nn.Module = definition.ResNet(
        getattr(definition, block),
        blocks,
        num_classes=num_classes,
        in_chans=in_channels,
        channels=tuple(scaled([64, 128, 256, 512], width)),
        drop_path_rate=drop_path,
    )
    if small_stem or (small_stem is None and image_size <= SMALL):
        model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return replace_convolutions(model, layer)
