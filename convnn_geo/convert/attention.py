"""What an attention may become, and what keeps the forward of timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convnn_geo import recipes
from convnn_geo.convert.known import is_timm_attention
from convnn_geo.convert.weights import NotApplicable, carry, check_plain
from convnn_geo.metrics import Feature
from convnn_geo.nn import ConvNNAttention
from convnn_geo.nn.tracing import one_node
from convnn_geo.operation import Operation

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class TimmAttention(nn.Module):
    """Our attention with the forward of timm's ``Attention``.

    Its parameters have the names of ``nn.MultiheadAttention``; ``load_state_dict`` takes those of
    timm's as well.

    Args:
        attention: of tokens, batch first.
        proj_drop: dropout of the output.

    Shapes:
        - **input:** :math:`(b, n, c)`
        - **attn_mask:** broadcastable to :math:`(b, heads, n, n)`: floats added to the scores, or
          True where a token may be looked at
        - **output:** :math:`(b, n, c)`

    Example:
        >>> attention = TimmAttention(recipes.kvt(8, 2, k=3), nn.Dropout(0.0))
        >>> attention(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, attention: ConvNNAttention, proj_drop: nn.Module) -> None:
        super().__init__()
        self.attention, self.proj_drop = attention, proj_drop

    @property
    def num_heads(self) -> int:
        """Heads, by timm's name."""
        return self.attention.num_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head, by timm's name."""
        return self.attention.head_dim

    @one_node
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend among the tokens."""
        mask = None if is_causal else self._mask(x, attn_mask)  # as scaled_dot_product_attention
        out, _ = self.attention(x, need_weights=False, attn_mask=mask, is_causal=is_causal)
        return self.proj_drop(out)

    def operation(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Operation:
        """The attention on these tokens, as an operation."""
        mask = None if is_causal else self._mask(x, attn_mask)
        return self.attention.operation(x, attn_mask=mask, is_causal=is_causal)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for part in ("weight", "bias"):
            for timms, ours in self.names():
                key = f"{prefix}{timms}{part}"
                if key in state_dict:
                    state_dict[f"{prefix}attention.{ours}{part}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def names(self) -> list[tuple[str, str]]:
        """What timm calls the parts, and what they are called here."""
        names = [("qkv.", "in_proj_"), ("proj.", "out_proj.")]
        for where, part in self.attention.named_modules():
            if isinstance(part, Feature):  # the metric, or one of those that it mixes
                names += [("q_norm.", f"{where}.query."), ("k_norm.", f"{where}.key.")]
        return names

    def _mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """A mask by the rules of ``nn.MultiheadAttention``, where True hides a key."""
        if mask is None:
            return None
        b, n = x.shape[:2]
        mask = ~mask if mask.dtype == torch.bool else mask
        return mask.expand(b, self.attention.num_heads, n, n).flatten(0, 1)


def original_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a converted model by the names that it had before: what timm loads.

    Other layers than timm's ``Attention`` keep their names when they are converted.

    Args:
        model: converted, or any other.

    Returns:
        Names and tensors, which are those of ``model.state_dict()``. Parameters that the model did
        not have before, such as a place between positions and features that learns, stay in it.

    Example:
        >>> from convnn_geo import convert
        >>> model = nn.ModuleDict({"attn": TimmAttention(recipes.kvt(8, 2, 3), nn.Identity())})
        >>> sorted(convert.original_state_dict(model))
        ['attn.proj.bias', 'attn.proj.weight', 'attn.qkv.bias', 'attn.qkv.weight']
    """
    renamed = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, TimmAttention):
            start = f"{prefix}." if prefix else ""
            for timms, ours in layer.names():
                for part in ("weight", "bias"):
                    renamed[f"{start}attention.{ours}{part}"] = f"{start}{timms}{part}"
    return {renamed.get(name, name): value for name, value in model.state_dict().items()}


def by_recipe(recipe: Callable[..., ConvNNAttention], **defaults: Any) -> Callable[..., nn.Module]:
    """A recipe of attention, its projections taken from the layer."""

    def build(layer: Any, **options: Any) -> nn.Module:
        parts = {**defaults, **options}
        if is_timm_attention(layer):
            return _of_timm(recipe, layer, parts)
        return _of_torch(recipe, layer, parts)

    return build


def exact(layer: Any) -> nn.Module:
    """The same attention with the same parameters."""
    # Nothing is drawn for what the old layer brings.
    return by_recipe(recipes.multihead_attention, device="meta")(layer)


def _of_torch(recipe: Callable[..., ConvNNAttention], layer: Any, options: Any) -> ConvNNAttention:
    names = (*_PROJECTIONS, "in_proj_bias", "bias_k", "bias_v")
    check_plain(layer, names)
    weight = layer.out_proj.weight
    given = {
        "dropout": layer.dropout,
        "bias": layer.in_proj_bias is not None,
        "add_bias_kv": layer.bias_k is not None,
        "add_zero_attn": layer.add_zero_attn,
        "kdim": layer.kdim,
        "vdim": layer.vdim,
        "batch_first": layer.batch_first,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    new = recipe(layer.embed_dim, layer.num_heads, **{**given, **options})
    for name in names:
        carry(new, name, getattr(layer, name))
    new.out_proj = layer.out_proj
    return new


def _of_timm(recipe: Callable[..., ConvNNAttention], layer: Any, options: Any) -> TimmAttention:
    check_plain(layer.qkv, ("weight", "bias"))
    width = layer.qkv.in_features
    if layer.qkv.out_features != 3 * width:
        raise NotApplicable(f"its heads have {layer.qkv.out_features // 3} channels, not {width}")
    for name in ("norm", "gate"):
        if not isinstance(getattr(layer, name, None), (nn.Identity, type(None))):
            raise NotApplicable(f"it has a {name} between attention and projection")
    given = {
        "dropout": layer.attn_drop.p,
        "bias": layer.qkv.bias is not None,
        "device": layer.qkv.weight.device,
        "dtype": layer.qkv.weight.dtype,
    }
    given.update(_normalised(recipe, layer, options))
    new = recipe(width, layer.num_heads, **{**options, **given, **_only_device(options)})
    carry(new, "in_proj_weight", layer.qkv.weight)
    carry(new, "in_proj_bias", layer.qkv.bias)
    new.out_proj = layer.proj
    return TimmAttention(new, layer.proj_drop)


def _normalised(recipe: Any, layer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The metric of normalised queries and keys, where the layer has such."""
    if isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity):
        return {}
    kind = options.get("metric", "scaled_dot")
    if not isinstance(kind, str) or recipe is recipes.interpolated_attention:
        raise NotApplicable("it normalises queries and keys: pass the name of a feature metric")
    return {"metric": Feature(kind, query=layer.q_norm, key=layer.k_norm)}


def _only_device(options: dict[str, Any]) -> dict[str, Any]:
    return {"device": options["device"]} if "device" in options else {}
