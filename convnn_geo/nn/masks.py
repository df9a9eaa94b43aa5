"""The masks of nn.MultiheadAttention as what an operation takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.checks import check_tensor


def merge_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    extra: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks as one, True where allowed, and what is to be added to the scores.

    Args:
        key_padding_mask: ``(b, m)``, True where a key is to be ignored, or floats to be added.
        attn_mask: ``(n, m)`` or ``(b * heads, n, m)``, likewise.
        shape: ``(b, heads, n, m)``.
        extra: keys behind the ``m``, which are open to all.
        device: of the layer.
    """
    b, heads, n, m = shape
    allowed: Tensor | None = None
    bias: Tensor | None = None
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        check_tensor(name, mask)
        if name == "key_padding_mask":
            shapes: list[tuple[int, ...]] = [(b, m)] + ([(m,)] if b == 1 else [])
        else:
            shapes = [(n, m), (b * heads, n, m)]
        if tuple(mask.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"{name} is on {mask.device}, the layer on {device}; move one of them")
        if name == "key_padding_mask":
            mask = mask.reshape(b, 1, 1, m)
        elif mask.ndim == 3:
            mask = mask.unflatten(0, (b, heads))
        if mask.dtype == torch.bool:
            ok = ~mask
        elif mask.is_floating_point():
            ok = mask != -torch.inf
            add = F.pad(mask.masked_fill(~ok, 0.0), (0, extra))
            bias = add if bias is None else bias + add
        else:
            raise TypeError(f"{name}: expected bool or floating point, got {mask.dtype}")
        ok = F.pad(ok, (0, extra), value=True)
        allowed = ok if allowed is None else allowed & ok
    return allowed, bias
