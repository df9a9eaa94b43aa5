"""Attention and its relatives as choices of neighbours."""

from __future__ import annotations

from typing import Any

from convnn_geo.candidates import Block, Causal, Congruent, Window
from convnn_geo.metrics import Feature, Metric, Spatial, interpolate
from convnn_geo.nn import ConvNNAttention
from convnn_geo.recipes.registry import recipe
from convnn_geo.typing import Size


@recipe
def multihead_attention(
    embed_dim: int, num_heads: int, *args: Any, **kwargs: Any
) -> ConvNNAttention:
    """``nn.MultiheadAttention`` with ``batch_first=True``: every key, softmax, sum.

    Example:
        >>> import torch
        >>> from convnn_geo import recipes
        >>> x = torch.randn(2, 10, 64)
        >>> recipes.multihead_attention(64, 8)(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 10, 64])
    """
    return ConvNNAttention(embed_dim, num_heads, *args, **kwargs)


@recipe
def causal_attention(embed_dim: int, num_heads: int, **kwargs: Any) -> ConvNNAttention:
    """Attention to keys up to the query's own place."""
    return ConvNNAttention(embed_dim, num_heads, candidates=Causal(), **kwargs)


@recipe
def kvt(embed_dim: int, num_heads: int, k: int, **kwargs: Any) -> ConvNNAttention:
    """k-NN attention, softmax over the ``k`` nearest keys (https://arxiv.org/abs/2106.00515)."""
    return ConvNNAttention(embed_dim, num_heads, k=k, **kwargs)


@recipe
def neighborhood_attention(
    embed_dim: int,
    num_heads: int,
    kernel_size: Size,
    dilation: Size = 1,
    is_causal: bool = False,
    **kwargs: Any,
) -> ConvNNAttention:
    """Attention in a window that shifts inward at borders (https://arxiv.org/abs/2204.07143).

    Takes grids ``(b, *size, c)``, channels last, or sequences ``(b, n, c)``.

    Example:
        >>> import torch
        >>> from convnn_geo import recipes
        >>> layer = recipes.neighborhood_attention(64, 4, kernel_size=7, dilation=2)
        >>> layer(torch.randn(1, 14, 15, 64), need_weights=False)[0].shape
        torch.Size([1, 14, 15, 64])
    """
    window = Window(kernel_size, dilation=dilation, border="causal" if is_causal else "shift")
    return ConvNNAttention(embed_dim, num_heads, candidates=window, **kwargs)


@recipe
def sliding_window_attention(
    embed_dim: int, num_heads: int, kernel_size: Size, is_causal: bool = False, **kwargs: Any
) -> ConvNNAttention:
    """Attention in a window cut at borders, as in Longformer (https://arxiv.org/abs/2004.05150)."""
    return dilated_attention(embed_dim, num_heads, kernel_size, 1, is_causal, **kwargs)


@recipe
def dilated_attention(
    embed_dim: int,
    num_heads: int,
    kernel_size: Size,
    dilation: Size = 2,
    is_causal: bool = False,
    **kwargs: Any,
) -> ConvNNAttention:
    """Attention in a window with gaps (https://arxiv.org/abs/2004.05150)."""
    border: dict[str, Any] = {"border": "causal"} if is_causal else {"padding": "same"}
    window = Window(kernel_size, dilation=dilation, **border)
    sides = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
    if not is_causal and any(side % 2 == 0 for side in sides):
        raise ValueError(f"kernel_size: a window around the query has odd sides, got {kernel_size}")
    return ConvNNAttention(embed_dim, num_heads, candidates=window, **kwargs)


@recipe
def block_attention(
    embed_dim: int, num_heads: int, size: Size, shift: Size = 0, **kwargs: Any
) -> ConvNNAttention:
    """Attention inside non-overlapping windows, as in Swin (https://arxiv.org/abs/2103.14030).

    Takes grids ``(b, *size, c)``, channels last. Flat tokens ``(b, n, c)`` are a sequence, whose
    blocks are runs of it: give images as grids. Blocks start at the first place, and where ``size``
    does not divide the grid, the last along an axis holds what remains, unpadded.

    Args:
        embed_dim: channels.
        num_heads: heads.
        size: points of a block along each axis.
        shift: places by which the blocks are moved; those cut by the border stay cut, at both ends.
        **kwargs: of :class:`~convnn_geo.nn.ConvNNAttention`.

    Example:
        >>> import torch
        >>> from convnn_geo import recipes
        >>> layer = recipes.block_attention(8, 2, size=(2, 3))
        >>> _, weights = layer(torch.randn(1, 4, 7, 8))
        >>> (weights[0, 0] > 0).nonzero().flatten().tolist()  # two rows of three
        [0, 1, 2, 7, 8, 9]
        >>> (weights[0, 6] > 0).nonzero().flatten().tolist()  # what remains of seven columns
        [6, 13]
    """
    return ConvNNAttention(embed_dim, num_heads, candidates=Block(size, shift), **kwargs)


@recipe
def strided_attention(
    embed_dim: int, num_heads: int, stride: int, is_causal: bool = False, **kwargs: Any
) -> ConvNNAttention:
    """Attention to every ``stride``-th place (https://arxiv.org/abs/1904.10509)."""
    pattern = Congruent(stride) & Causal() if is_causal else Congruent(stride)
    return ConvNNAttention(embed_dim, num_heads, candidates=pattern, **kwargs)


@recipe
def interpolated_attention(
    embed_dim: int,
    num_heads: int,
    k: int | None = None,
    lam: float = 0.5,
    *,
    spatial: Metric | None = None,
    learnable: bool = False,
    **kwargs: Any,
) -> ConvNNAttention:
    """Attention between position (``lam = 0``) and scaled dot product (``lam = 1``)."""
    near = Spatial(squared=True) if spatial is None else spatial
    metric = interpolate(near, Feature("scaled_dot"), lam, learnable)
    return ConvNNAttention(embed_dim, num_heads, k=k, metric=metric, **kwargs)
