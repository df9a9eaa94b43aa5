"""Cases of attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convnn_geo import recipes
from convnn_geo.verify import naive
from convnn_geo.verify.case import add, call

_EMBED, _HEADS, _TOKENS = 12, 3, 9
_PADDING = torch.zeros(2, _TOKENS, dtype=torch.bool)
_PADDING[0, 6:] = True
_HIDDEN = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool).triu(3)


def _multihead(
    name: str, *, keywords: dict[str, Any] | None = None, cross: bool = False, **kw: Any
) -> None:
    """Attention against ``nn.MultiheadAttention`` on the same parameters."""
    peer = nn.MultiheadAttention(_EMBED, _HEADS, batch_first=True, **kw)
    keywords = keywords or {}
    shapes = [(2, _TOKENS, _EMBED)]
    if cross:
        shapes += [(2, 7, kw.get("kdim", _EMBED)), (2, 7, kw.get("vdim", _EMBED))]

    def forward(layer: nn.Module, q: Tensor, *rest: Tensor) -> Tensor:
        return layer(q, *(rest or (q, q)), **keywords)[0]

    add(
        "multihead_attention",
        name,
        "nn.MultiheadAttention",
        partial(recipes.multihead_attention, _EMBED, _HEADS, **kw),
        shapes,
        lambda layer, q, *rest: call(peer, layer, q, *(rest or (q, q)), **keywords)[0],
        forward,
    )


_multihead("self, weights")
_multihead("self", keywords={"need_weights": False})
_multihead("cross", cross=True)
_multihead("cross, kdim, vdim, no bias", cross=True, kdim=5, vdim=8, bias=False)
_multihead("key padding mask", keywords={"key_padding_mask": _PADDING, "need_weights": False})
_multihead("attention mask", keywords={"attn_mask": _HIDDEN})
_multihead("float mask", keywords={"attn_mask": torch.linspace(-1, 1, 81).view(9, 9).double()})
_multihead("both masks", keywords={"attn_mask": _HIDDEN, "key_padding_mask": _PADDING})
_multihead("added key and value", add_bias_kv=True, add_zero_attn=True)


def _plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, need_weights=False)[0]


def _tokens(
    recipe: str,
    name: str,
    allowed: list[list[int]],
    *args: Any,
    k: int | None = None,
    score: Any = None,
    batch: int = 2,
    **kw: Any,
) -> None:
    """Attention of tokens against a double loop over allowed keys."""
    add(
        recipe,
        name,
        "double loop",
        partial(getattr(recipes, recipe), _EMBED, _HEADS, *args, **kw),
        [(batch, len(allowed), _EMBED)],
        lambda layer, x: naive.attention(layer, x, allowed, k, score),
        _plain,
    )


def _grid(
    recipe: str, name: str, size: tuple[int, int], allowed: list[list[int]], *args: Any, **kw: Any
) -> None:
    """Attention on a grid against the same."""
    add(
        recipe,
        name,
        "double loop",
        partial(getattr(recipes, recipe), _EMBED, _HEADS, *args, **kw),
        [(1, *size, _EMBED)],
        lambda layer, x: naive.attention(layer, x.flatten(1, 2), allowed).unflatten(1, size),
        _plain,
    )


_ALL = [list(range(_TOKENS))] * _TOKENS
_PAST = [list(range(i + 1)) for i in range(_TOKENS)]
for _k in (1, 4, _TOKENS):
    _tokens("kvt", f"k = {'n' if _k == _TOKENS else _k}", _ALL, _k, k=_k, batch=1 + _k % 2)
_tokens("causal_attention", "tokens", _PAST)
for _dilation, _causal in ((1, False), (2, False), (2, True)):
    _keys = naive.neighborhood(11, 3, _dilation, _causal)
    _name = f"dilation {_dilation}" + (", causal" if _causal else "")
    _tokens("neighborhood_attention", _name, _keys, 3, _dilation, _causal)
_grid(
    "neighborhood_attention",
    "3 on 5 x 6",
    (5, 6),
    naive.product(naive.neighborhood(5, 3, 1, False), naive.neighborhood(6, 3, 1, False)),
    3,
)
_grid(
    "neighborhood_attention",
    "(3, 2) dilated (1, 2) on 4 x 6",
    (4, 6),
    naive.product(naive.neighborhood(4, 3, 1, False), naive.neighborhood(6, 2, 2, False)),
    (3, 2),
    (1, 2),
)


def _band(length: int, reach: int, dilation: int, causal: bool = False) -> list[list[int]]:
    return [
        [
            j
            for j in range(length)
            if (j - i) % dilation == 0
            and (0 <= i - j < reach * dilation if causal else abs(i - j) <= reach * dilation)
        ]
        for i in range(length)
    ]


_tokens("sliding_window_attention", "5", _band(_TOKENS, 2, 1), 5)
_tokens("sliding_window_attention", "4, causal", _band(_TOKENS, 4, 1, True), 4, True)
_tokens("dilated_attention", "3, dilation 2", _band(_TOKENS, 1, 2), 3, 2)
_tokens("dilated_attention", "3, dilation 2, causal", _band(_TOKENS, 3, 2, True), 3, 2, True)
_tokens(
    "strided_attention",
    "stride 3",
    [[j for j in range(_TOKENS) if (i - j) % 3 == 0] for i in range(_TOKENS)],
    3,
)
_tokens(
    "strided_attention",
    "stride 3, causal",
    [[j for j in range(i + 1) if (i - j) % 3 == 0] for i in range(_TOKENS)],
    3,
    True,
)
_grid("block_attention", "2 on 4 x 6", (4, 6), naive.swin((4, 6), 2, 0), 2)
_grid("block_attention", "shifted 4 on 8 x 4", (8, 4), naive.swin((8, 4), 4, 2), 4, 2)


def _between(lam: float) -> Any:
    def score(q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
        return lam * (q @ k) / q.shape[0] ** 0.5 - (1 - lam) * float((i - j) ** 2)

    return score


for _lam in (0.0, 0.4, 1.0):
    _tokens(
        "interpolated_attention", f"all, lam = {_lam:g}", _ALL, None, _lam, score=_between(_lam)
    )
    _tokens(
        "interpolated_attention", f"k = 4, lam = {_lam:g}", _ALL, 4, _lam, k=4, score=_between(_lam)
    )
