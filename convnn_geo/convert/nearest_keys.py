"""Attention over the nearest keys wherever a model calls torch's, its layers left as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convnn_geo.checks import check_int
from convnn_geo.nn.functional import knn_attention

_ATTENTION = F.scaled_dot_product_attention
_HINT = (
    "to_convnn replaces nn.MultiheadAttention; timm.layers.set_fused_attn(True, True) and "
    "attn_implementation='sdpa' of transformers have more layers call it"
)


class NearestKeys(TorchFunctionMode):
    r"""A context in which ``scaled_dot_product_attention`` attends to the ``k`` nearest keys alone.

    .. math:: y_i = \sum_{j \in I_i} \mathrm{softmax}_{j \in I_i}(s\, q_i^T k_j + b_{ij})\, v_j

    For models whose attention :func:`~convnn_geo.convert.to_convnn` does not know: biases of
    places, rotary encodings, windows, grouped queries stay what they are, as do weights and their
    names (KVT, https://arxiv.org/abs/2106.00515; ConvNN, https://arxiv.org/abs/2606.14725). Where
    there are no more than ``k`` keys, torch's own attention runs.

    Args:
        k: keys that a query attends to.

    Raises:
        TypeError: in the context, ``nn.MultiheadAttention``, which
            :func:`~convnn_geo.convert.to_convnn` replaces.
        ValueError: ``k`` < 1.

    Warns:
        UserWarning: at its end, if nothing in the context called ``scaled_dot_product_attention``.

    Example:
        >>> import torch
        >>> from convnn_geo.convert import NearestKeys
        >>> q, k, v = torch.randn(3, 1, 2, 20, 8)
        >>> with NearestKeys(k=1):
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> bool((out[0, 0, 0] == v[0, 0]).all(-1).any())  # the value of the nearest key
        True
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_int("k", k)
        self.seen = False
        """Whether anything called attention."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attend where attention is called; everything else runs as it is."""
        given = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            raise TypeError(
                "NearestKeys: nn.MultiheadAttention computes attention by itself; replace it "
                "first, e.g. convert.to_convnn(model), and set k of its layers"
            )
        if func is not _ATTENTION:
            return func(*args, **given)
        self.seen = True
        return self._attend(*args, **given)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        *args: Any,
        **rest: Any,
    ) -> Tensor:
        if key.shape[-2] <= self.k:
            return _ATTENTION(query, key, value, attn_mask, *args, **rest)
        return knn_attention(query, key, value, self.k, attn_mask, *args, **rest)

    def __exit__(self, *error: Any) -> None:
        """Leave the context."""
        super().__exit__(*error)
        if not self.seen and error[0] is None:
            warnings.warn(
                f"NearestKeys: nothing called scaled_dot_product_attention; {_HINT}",
                stacklevel=2,
            )
