"""Models by name, each with a choice of layers.

Definitions are torchvision's and timm's where those serve, with layers replaced by
:func:`convnn_geo.convert.to_convnn`.

Example:
    >>> import torch
    >>> from convnn_geo.models import create_model, list_models
    >>> list_models("vit*")
    ['vit_base', 'vit_small', 'vit_tiny']
    >>> model = create_model("vit_tiny", layer="kvt", k=16, depth=2)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
"""

from convnn_geo.models import (  # noqa: F401 - enter themselves into the list
    all_conv_net,
    densenet,
    dncnn,
    points,
    resnet,
    unet,
    vgg,
    vit,
)
from convnn_geo.models.registry import (
    create_model,
    is_model,
    list_layers,
    list_models,
    register_model,
)

__all__ = ["create_model", "is_model", "list_layers", "list_models", "register_model"]
