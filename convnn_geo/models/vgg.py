"""VGG, by torchvision's definition."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from convnn_geo.extras import require
from convnn_geo.models.head import linear_head
from convnn_geo.models.layers import Layer, replace_convolutions
from convnn_geo.models.registry import register_model
from convnn_geo.models.width import scaled


@register_model("vgg11", configuration="A")
@register_model("vgg13", configuration="B")
@register_model("vgg16", configuration="D")
@register_model("vgg19", configuration="E")
def vgg(
    layer: Layer,
    *,
    configuration: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float = 1.0,
    batch_norm: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    """VGG's features (https://arxiv.org/abs/1409.1556), averaged over the image, and a linear head.
    ``features`` has the state_dict that it has in torchvision, by default in ``vgg11_bn``, say.

    Every convolution becomes the layer. A pool that would see less than 2 x 2 pixels is left out.

    Args:
        layer: to put in.
        configuration: torchvision's letter.
        num_classes: of the data; 0 for pooled features.
        in_channels: of the images.
        image_size: shortest side of the images.
        width: multiplies all channels.
        batch_norm: normalise after each convolution.
        dropout: of the averaged features, in training.
    """
    definition = require("torchvision.models.vgg", extra="vision")
    cfg: list[int | str] = []
    side = image_size
    for part in definition.cfgs[configuration]:
        if part != "M":
            cfg += scaled([part], width)
        elif side >= 2:
            cfg.append(part)
            side //= 2
    features = definition.make_layers(cfg, batch_norm)
    if in_channels != 3:
        features[0] = nn.Conv2d(in_channels, features[0].out_channels, 3, padding=1)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision starts them
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    channels = [part for part in cfg if isinstance(part, int)]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        features=features,
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(dropout),
        head=linear_head(channels[-1], num_classes),
    )
    return replace_convolutions(nn.Sequential(parts), layer)
