"""Search by flashlib: brute force in fused kernels on a GPU, the products in TF32."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.extras import installed, require
from convnn_geo.search.points import PointEngine, unlike_a_gpu
from convnn_geo.search.query import Query

_MORE = 8
"""Proposals beside those asked for: TF32 often takes the next few for one another."""


class FlashLib(PointEngine):
    """``flashlib.flash_knn`` of centred points, from the extra ``gpu``."""

    name = "flashlib"
    whole = True

    def missing(self) -> str | None:
        """Flashlib must be installed, and have a GPU."""
        if not installed("flashlib"):
            return "flashlib is not installed: pip install 'convnn-geo[gpu]'"
        return None if torch.cuda.is_available() else "flashlib is for GPUs, and torch sees none"

    def limit(self, device: torch.device) -> int:
        """What its kernels are tuned for is 128."""
        return 128 - _MORE

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, of float32 on a GPU."""
        return unlike_a_gpu("flashlib", query) or super().refuses(query)

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """That of products of factors with ten bits, about the keys' mean."""
        center = keys.mean(-2, keepdim=True)
        length = (q - center).norm(dim=-1) + (keys - center).norm(dim=-1).amax(-1, keepdim=True)
        return 2**-9 * length.square()

    def prepare(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The points about their mean, and it."""
        center = keys.mean(-2, keepdim=True)
        return keys - center, center

    def propose(self, prepared: tuple[Tensor, Tensor], q: Tensor, asked: int) -> Tensor:
        """Somewhat more than were asked for."""
        keys, center = prepared
        find = require("flashlib", extra="gpu").flash_knn
        many = min(asked + _MORE, keys.shape[-2])
        return find(q - center, keys, many, return_distances=False).long()
