"""Attention over the nearest keys wherever a model calls torch's, its layers left as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convnn_geo.checks import check_int
from convnn_geo.nn.functional import knn_attention

_ATTENTION = F.scaled_dot_product_attention
_HINT = (
    "timm.layers.set_fused_attn(True, True) before a model is made has more of timm's layers call "
    "it, attn_implementation='sdpa' those of transformers; those that multiply themselves never do"
)


class NearestKeys(TorchFunctionMode):
    r"""A context in which ``scaled_dot_product_attention`` attends to the ``k`` nearest keys alone.

    .. math:: y_i = \sum_{j \in I_i} \mathrm{softmax}_{j \in I_i}(s\, q_i^T k_j + b_{ij})\, v_j

    For models whose attention :func:`~convnn_geo.convert.to_convnn` does not know: biases of
    places, rotary encodings, windows, grouped queries stay what they are, as do weights and their
    names (KVT, https://arxiv.org/abs/2106.00515; ConvNN, https://arxiv.org/abs/2606.14725). Where
    there are no more than ``k`` keys, torch's own attention runs. The innermost context holds,
    for its thread, and for layers of this package that keep all keys, too. Not for checkpointed
    activations, which backward computes again, where no context holds; within the function that is
    checkpointed it does.

    Args:
        k: keys that a query attends to.

    Attributes:
        calls: how many calls of attention there were since it was entered, but for what was
            compiled: fewer than the model has layers where some multiply by themselves.

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

    _entered = 0  # contexts so far: within one that is not the last, others were entered

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_int("k", k)
        self.calls, self._seen = 0, False

    def __enter__(self) -> NearestKeys:
        """Enter the context."""
        self.calls, self._seen = 0, False
        if not torch.compiler.is_compiling():
            NearestKeys._entered += 1
            self._number = NearestKeys._entered
        super().__enter__()
        return self

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
                "NearestKeys: nn.MultiheadAttention computes attention by itself; "
                "convert.to_convnn(model) puts a layer in its place that does not"
            )
        if func is not _ATTENTION:
            return func(*args, **given)
        self._seen = True
        if not torch.compiler.is_compiling():  # to be counted, it would be compiled for each number
            self.calls += 1
        with torch._C.DisableTorchFunction():  # or a context around this one would have its say
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
        if not key.is_nested and key.shape[-2] <= self.k:
            return _ATTENTION(query, key, value, attn_mask, *args, **rest)
        return knn_attention(query, key, value, self.k, attn_mask, *args, **rest)

    def __exit__(self, *error: Any) -> None:
        """Leave the context; the innermost says so if it was of no use."""
        super().__exit__(*error)
        if torch.compiler.is_compiling() or self._seen or error[0] is not None:
            return
        if self._number == NearestKeys._entered:
            warnings.warn(
                f"NearestKeys: nothing called scaled_dot_product_attention; {_HINT}",
                stacklevel=2,
            )
