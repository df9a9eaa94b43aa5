"""Vision transformers, by timm's definition."""

from __future__ import annotations

from torch import nn

from convnn_geo.checks import check_int
from convnn_geo.extras import require
from convnn_geo.models.layers import ATTENTIONS, Layer, replace_attention
from convnn_geo.models.registry import register_model
from convnn_geo.models.width import scaled


@register_model("vit_tiny", ATTENTIONS, num_heads=3)
@register_model("vit_small", ATTENTIONS, num_heads=6)
@register_model("vit_base", ATTENTIONS, num_heads=12)
def vit(
    layer: Layer,
    *,
    num_heads: int,
    num_classes: int,
    in_channels: int,
    image_size: int,
    patch_size: int | None = None,
    depth: int = 12,
    width: float = 1.0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """Timm's vision transformer (https://arxiv.org/abs/2010.11929), with its state_dict.

    Every attention becomes the layer. Windows, blocks and strides, and ``"conv"``, are over the
    patches on their grid: a number is for both axes, ``(3, 5)`` has one for each. The class token,
    which alone is classified, sees all patches, and all patches see it.

    Args:
        layer: to put in.
        num_heads: heads.
        num_classes: of the data; 0 for pooled features.
        in_channels: of the images.
        image_size: side of the images, a multiple of ``patch_size``.
        patch_size: side of a patch; 16 for images of 224 pixels, otherwise the
            largest divisor of the side up to an eighth of it.
        depth: blocks.
        width: multiplies the 64 channels of a head.
        dropout: of projections, in training.
        drop_path: probability of leaving out the last block; of others less, in training.
    """
    definition = require("timm.models.vision_transformer", extra="vision")
    if patch_size is None:
        most = 16 if image_size == 224 else max(image_size // 8, 1)
        patch_size = next(side for side in range(most, 0, -1) if image_size % side == 0)
    if image_size % check_int("patch_size", patch_size):
        raise ValueError(
            f"image_size: expected a multiple of patch_size={patch_size}, got {image_size}; resize "
            "the images or pass another patch_size"
        )
    model: nn.Module = definition.VisionTransformer(
        image_size,
        patch_size,
        in_channels,
        num_classes,
        embed_dim=num_heads * scaled([64], width)[0],
        depth=check_int("depth", depth),
        num_heads=num_heads,
        proj_drop_rate=dropout,
        drop_path_rate=drop_path,
    )
    return replace_attention(model, layer)
