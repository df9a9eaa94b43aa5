"""What stands in the place of timm's Attention and is no attention: layers of its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convnn_geo.checks import check_tensor
from convnn_geo.convert.attention import exact
from convnn_geo.convert.known import is_timm_attention
from convnn_geo.convert.patches import PatchConv
from convnn_geo.convert.positions import UnknownPositions
from convnn_geo.convert.weights import NotApplicable, check_share
from convnn_geo.nn import Branching, ConvNN1d
from convnn_geo.nn.branching import PixelAttention
from convnn_geo.nn.tracing import one_node
from convnn_geo.operation import Operation


class TimmTokens(nn.Module):
    """A layer of sequences with the forward of timm's ``Attention``.

    It sees the tokens as a sequence, channels first. It has no queries, so that it takes no mask.

    Args:
        layer: of sequences.
        proj_drop: dropout of the output.

    Shapes:
        - **input:** :math:`(b, n, c)`
        - **output:** :math:`(b, n, d)`

    Raises:
        ValueError: a mask, or ``is_causal``.

    Example:
        >>> import torch
        >>> layer = ConvNN1d(8, 8, k=3, metric="cosine")
        >>> TimmTokens(layer, nn.Dropout(0.0))(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, layer: ConvNN1d | Branching | PatchConv, proj_drop: nn.Module) -> None:
        super().__init__()
        self.layer, self.proj_drop = layer, proj_drop

    @one_node
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The layer on the tokens."""
        out: Tensor = self.layer(self._sequence(x, attn_mask, is_causal))
        return self.proj_drop(out.transpose(1, 2))

    def operation(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Operation:
        """The layer on these tokens, as an operation."""
        sequence = self._sequence(x, attn_mask, is_causal)
        if isinstance(self.layer, Branching):
            raise TypeError(
                "TimmTokens: two branches are no one operation; ask for those of its layer, which "
                "takes (b, c, n): lowering.explain(tokens.layer, x.transpose(1, 2))"
            )
        return self.layer.operation(sequence)

    def _sequence(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            given = "is_causal=True" if attn_mask is None else "an attn_mask"
            raise ValueError(
                f"{type(self.layer).__name__} in the place of attention takes all tokens: expected "
                f"no mask, got {given}; where tokens are masked, let it become 'exact', 'kvt' or "
                "'convnn_attention'"
            )
        return check_tensor("tokens", x, 3).transpose(1, 2)


def conv(layer: Any, kernel_size: int | tuple[int, ...] = 3) -> nn.Module:
    """A convolution of patches on their grid, or along a sequence, which keeps its length.

    Inside a vision transformer :func:`~convnn_geo.convert.to_convnn` makes it one of patches, with
    the tokens before them in sight of all. Elsewhere tokens are a sequence.
    """
    c, d = _channels(layer)
    new: ConvNN1d | PatchConv
    if isinstance(kernel_size, int) or len(kernel_size) == 1:
        new = ConvNN1d(c, d, kernel_size, padding="same", **_factory(layer))
    else:
        unknown = UnknownPositions("the layer is in no vision transformer that is known")
        new = PatchConv(c, d, kernel_size, unknown, **_factory(layer))
    return TimmTokens(new, layer.proj_drop)


def convnn(layer: Any, k: int | None = 9, metric: Any = "cosine", **options: Any) -> nn.Module:
    """The ``k`` nearest tokens by ``metric``."""
    c, d = _channels(layer)
    new = ConvNN1d(c, d, k=k, metric=metric, **_factory(layer), **options)
    return TimmTokens(new, layer.proj_drop)


def branching(
    layer: Any,
    ratio: float = 0.5,
    k: int | None = 9,
    metric: Any = "cosine",
    other: str = "attention",
    **options: Any,
) -> nn.Module:
    """ConvNN beside the attention, which keeps its projections, or beside a convolution."""
    c, d = _channels(layer)
    check_share(d, ratio)
    heads = layer.num_heads if other == "attention" else 1
    parts = {"ratio": ratio, "other": other, "num_heads": heads, "axes": 1, **_factory(layer)}
    new = Branching(c, d, **parts, k=k, metric=metric, **options)
    if isinstance(new.other, PixelAttention):
        if c != d:
            raise NotApplicable(f"its projection goes from {c} to {d} channels")
        kept: Any = exact(layer)
        new.other.attention = kept.attention
    return TimmTokens(new, layer.proj_drop)


def _channels(layer: Any) -> tuple[int, int]:
    if not is_timm_attention(layer):
        raise NotApplicable(
            "it is called with queries, keys and values, and this has but one sequence of tokens; "
            "timm's Attention can become it"
        )
    return layer.qkv.in_features, layer.proj.out_features


def _factory(layer: Any) -> dict[str, Any]:
    weight = layer.proj.weight
    return {"bias": layer.proj.bias is not None, "device": weight.device, "dtype": weight.dtype}
