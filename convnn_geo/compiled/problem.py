"""A search by products, laid out as products.h has it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from convnn_geo.compiled import build

KINDS = ("points", "angles", "products")
LARGEST_K = 128
"""GROUPS of select.h."""
LONGEST_ROW = 2**15
"""Sources, so that a block of rows stays in cache."""

_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Layout(ctypes.Structure):
    """``Problem`` of products.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "k", "exact")),
        *((name, _LONG) for name in ("examples", "heads", "n", "m", "d")),
        *((name, _POINTER) for name in ("q", "keys", "bias")),
        *((name, _LONG) for name in ("q_example", "q_head", "q_row")),
        *((name, _LONG) for name in ("key_example", "key_head", "key_row")),
        *((name, _LONG) for name in ("bias_example", "bias_head")),
        ("mask", _POINTER),
        *((name, _LONG) for name in ("mask_example", "mask_head", "mask_row")),
        ("own", _POINTER),
        ("scale", ctypes.c_float),
    )


class Described:
    """A layout, what it points to, and the leading axes of the result."""

    def __init__(self, layout: Layout, kept: list[Tensor], lead: torch.Size) -> None:
        self.layout, self.kept, self.lead = layout, kept, lead
        self.n, self.address = layout.n, ctypes.addressof(layout)


def describe(
    kind: str,
    q: Tensor,
    keys: Tensor,
    k: int,
    bias: Tensor | None,
    scale: float,
    mask: Tensor | None,
    own: Tensor | None,
    exact: bool,
) -> Described | None:
    """The layout of a search; None where it is not served."""
    if not _served(q, keys, k, own) or build.library() is None:
        return None
    parts = [q, keys, *(t for t in (bias, mask) if t is not None)]
    lead = torch.broadcast_shapes(
        q.shape[:-2],
        keys.shape[:-2],
        () if bias is None else bias.shape[:-1],
        () if mask is None else mask.shape[:-2],
    )
    if len(lead) > 2 or any(t.device.type != "cpu" for t in parts):
        return None
    kept: list[Tensor] = []

    def spread(tensor: Tensor, axes: int) -> tuple[int, list[int]]:
        """Where a tensor lies, and its strides along (example, head, rows)."""
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        kept.append(tensor)
        wide = tensor.expand(*lead, *tensor.shape[-axes:])
        strides = [*[0] * (2 - len(lead)), *wide.stride()[:-1]]
        return tensor.data_ptr(), strides

    n, d, m = *q.shape[-2:], keys.shape[-2]
    heads = lead[-1] if lead else 1
    at_bias, bias_strides = (None, [0, 0]) if bias is None else spread(bias, 1)
    at_mask, mask_strides = (None, [0, 0, 0]) if mask is None else spread(mask, 2)
    if mask is not None and mask.shape[-2] == 1:
        mask_strides[2] = 0
    at_own = None
    if own is not None:
        kept.append(own.contiguous())
        at_own = kept[-1].data_ptr()
    (at_q, q_strides), (at_keys, key_strides) = spread(q, 2), spread(keys, 2)
    layout = Layout(
        *(KINDS.index(kind), k, exact, lead.numel(), heads, n, m, d),
        *(at_q, at_keys, at_bias),
        *(*q_strides, *key_strides, *bias_strides),
        *(at_mask, *mask_strides),
        *(at_own, scale),
    )
    return Described(layout, kept, lead)


def _served(q: Tensor, keys: Tensor, k: int, own: Tensor | None) -> bool:
    here = q.dtype == keys.dtype == torch.float32
    some = q.numel() > 0 and 0 < k <= min(LARGEST_K, keys.shape[-2])
    return here and some and keys.shape[-2] <= LONGEST_ROW and (own is None or own.ndim == 1)
