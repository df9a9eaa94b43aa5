"""Operators without parameters, in the manner of torch.nn.functional."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from convnn_geo.caching import keep
from convnn_geo.candidates import All, Causal
from convnn_geo.checks import (
    casts,
    check_alike,
    check_floating,
    check_int,
    check_number,
    check_tensor,
)
from convnn_geo.kernels import Sum
from convnn_geo.kernels.base import lowered
from convnn_geo.lowering import Again, choose
from convnn_geo.metrics import Metric, as_metric
from convnn_geo.operation import Operation
from convnn_geo.operators import is_watched
from convnn_geo.points import Points
from convnn_geo.selection import KNearest
from convnn_geo.shapes import broadcast_shapes
from convnn_geo.weighting import Softmax

_AGAIN: dict[tuple[Any, ...], Again] = {}
_MOST = 1024
"""Kinds of calls that are remembered."""

# Modules without parameters serve every call: to make one takes longer than a call should.
_SCALED_DOT, _DOT = as_metric("scaled_dot"), as_metric("dot")
_ALL, _CAUSAL, _SUM = All(), Causal(), Sum()


@keep(64)
def _stages(k: int, temperature: float, dropout: float) -> tuple[KNearest, Softmax]:
    return KNearest(k), Softmax(temperature, dropout)


def knn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    metric: Metric | str | None = None,
    backend: str = "auto",
    enable_gqa: bool = False,
) -> Tensor:
    r"""Attention of each query over its ``k`` nearest keys: scaled_dot_product_attention with k.

    .. math:: y_i = \sum_{j \in I_i} \mathrm{softmax}_{j \in I_i}(\mathrm{scale} \, q_i^T k_j) v_j

    ``I_i`` are the ``k`` keys with the largest scores, ties to the lowest index (KVT,
    https://arxiv.org/abs/2106.00515; ConvNN, https://arxiv.org/abs/2606.14725).

    Args:
        query: ``(..., n, d)``.
        key: ``(..., m, d)``; leading axes broadcast.
        value: ``(..., m, c)``.
        k: keys that a query attends to, at most ``m``.
        attn_mask: ``(..., n, m)`` or what broadcasts to it: boolean, True where attention is
            allowed; or floats that are added to the scores before the choice.
        dropout_p: probability of dropping a weight. Pass 0 when evaluating.
        is_causal: query ``i`` sees the keys up to ``i`` only; not together with a mask.
        scale: of the product; ``1 / sqrt(d)`` by default.
        metric: another way of comparing: similarities are minus its distances. Not with scale.
        backend: ``"auto"``, or a way of running it, as layers take.
        enable_gqa: keys and values may have fewer heads, ``(..., heads, m, d)``: each then serves
            a group of the query's.

    Returns:
        ``(..., n, c)``. A query that may attend to nobody gets zeros. Under autocast it is in
        autocast's dtype, unless all is in float64; scores are in float32.

    Raises:
        ValueError: k < 1 or over ``m``, shapes or devices that do not match, both a mask and
            is_causal, both a metric and a scale.
        TypeError: unequal dtypes, integers.

    Example:
        >>> import torch
        >>> from convnn_geo.nn.functional import knn_attention
        >>> q, k, v = torch.randn(3, 2, 8, 50, 16)
        >>> knn_attention(q, k, v, k=9).shape
        torch.Size([2, 8, 50, 16])
    """
    if enable_gqa:
        key, value = _for_groups("key", key, query), _for_groups("value", value, query)
    alike = None
    plain = attn_mask is None and metric is None and is_causal is False
    if plain and type(dropout_p) in (int, float) and not dropout_p:
        alike = _alike(query, key, value, k, scale, backend)
        again = None if alike is None else _AGAIN.get(alike)
        if again is not None:
            return again(query, key, value)
    if isinstance(k, Tensor):
        raise TypeError("k: expected an integer, got a tensor; pass the mask as attn_mask=")
    k = check_int("k", k)
    _check(query, key, value)
    value = lowered(value)
    if k > key.shape[-2]:
        raise ValueError(f"k={k} is larger than the number of keys, {key.shape[-2]}; lower k")
    check_number("dropout_p", dropout_p, maximum=1)
    if attn_mask is not None and is_causal:
        raise ValueError("pass attn_mask or is_causal, not both; the mask may be causal itself")
    if metric is not None and scale is not None:
        raise ValueError("pass metric or scale, not both")
    chosen, temperature = _SCALED_DOT if metric is None else as_metric(metric), 1.0
    if scale is not None:
        scale = check_number("scale", scale, -math.inf)
        if scale <= 0:  # nearest is still who has the largest score
            query, scale, alike = query * scale, 1.0, None
        chosen, temperature = _DOT, 1 / scale
    mask, bias = _mask(attn_mask, query, key, value)
    if bias is not None:  # it is added once scores are scaled
        bias = bias * temperature
    op = Operation(
        Points(query),
        Points(key),
        value,
        chosen,
        _CAUSAL if is_causal else _ALL,
        *_stages(k, temperature, dropout_p),
        _SUM,
        mask=mask,
        bias=bias,
    )
    rule, _ = choose(op, backend)
    again = None if alike is None else rule.again(op)
    if alike is not None and again is not None:
        if len(_AGAIN) >= _MOST:
            _AGAIN.clear()
        _AGAIN[alike] = again
    return rule.run(op)


def _for_groups(name: str, tensor: Tensor, query: Tensor) -> Tensor:
    """Each head once for every head of the query that it serves."""
    for what, given in (("query", query), (name, tensor)):
        if check_tensor(what, given).ndim < 3:
            raise ValueError(
                f"{what}: expected shape (..., heads, n, d) with enable_gqa, "
                f"got {tuple(given.shape)}"
            )
    wanted, heads = query.shape[-3], tensor.shape[-3]
    if not heads or wanted % heads:
        raise ValueError(f"{name}: its {heads} heads do not divide the query's {wanted}")
    return tensor if wanted == heads else tensor.repeat_interleave(wanted // heads, -3)


def _alike(
    query: Tensor, key: Tensor, value: Tensor, k: int, scale: float | None, backend: str
) -> tuple[Any, ...] | None:
    """What calls have in common that are checked, and run, alike.

    None where somebody looks on, or has a say in it: a tracer, a transform, autocast.
    """
    if not type(query) is type(key) is type(value) is Tensor:
        return None
    if type(k) is not int or type(scale) not in (float, type(None)) or type(backend) is not str:
        return None
    if is_watched() or casts(query.device):
        return None
    if query.is_meta or query.is_neg() or key.is_neg() or value.is_neg():  # not read as they lie
        return None
    seen = (query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype)
    return (k, scale, backend, *seen, query.device, key.device, value.device)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, check_tensor(name, tensor))
        if tensor.ndim < 2:
            raise ValueError(f"{name}: expected shape (..., n, d), got {tuple(tensor.shape)}")
        check_alike("query", query, name, tensor)
    if not query.shape[-1]:
        raise ValueError(f"query: expected at least one channel, got {tuple(query.shape)}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key: expected equal channels, got {query.shape[-1]} and {key.shape[-1]}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key and value: expected equal lengths, got {key.shape[-2]} and {value.shape[-2]}"
        )
    try:
        broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    except RuntimeError:
        raise ValueError(
            "query, key and value: leading axes do not broadcast: "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; "
            "heads that share keys and values want enable_gqa=True"
        ) from None


def _mask(
    attn_mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is allowed, and what is added, ``(..., n, m)``."""
    if attn_mask is None:
        return None, None
    check_tensor("attn_mask", attn_mask)
    if isinstance(attn_mask, CausalBias):
        raise TypeError(
            "attn_mask: expected True where attention is allowed, or floats, got a CausalBias, "
            "which holds neither; pass is_causal=True, or a mask: "
            "torch.ones(n, m, dtype=torch.bool).tril(m - n) for causal_lower_right"
        )
    lead = broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    shape = torch.Size((*lead, query.shape[-2], key.shape[-2]))
    try:
        fits = broadcast_shapes(attn_mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {tuple(shape)}, "
            f"got {tuple(attn_mask.shape)}"
        )
    attn_mask = attn_mask.expand(*attn_mask.shape[:-2], *shape[-2:])
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device}, the query on {query.device}")
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    if not attn_mask.is_floating_point():
        raise TypeError(
            "attn_mask: expected True where attention is allowed, or floats that are added, got "
            f"{attn_mask.dtype}; pass attn_mask.bool() if 1 allows"
        )
    allowed = attn_mask != -torch.inf
    return allowed, attn_mask.masked_fill(~allowed, 0.0)
