"""Weights from relative positions by a learned network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convnn_geo.pairs import Pairs, on_rows
from convnn_geo.weighting.base import Weighting


class PositionMLP(Weighting):
    """``rho_ij = mlp(p_j - p_i)``, one weight a pair or one a channel, as in PointConv
    (https://arxiv.org/abs/1811.07246).

    Args:
        mlp: from positions ``(..., p)`` to ``(..., 1)`` or ``(..., c)``.
    """

    uses_distance = False
    uses_offset = True

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, pairs: Pairs) -> Tensor:
        """Weights of relative positions."""
        weight = on_rows(self.mlp, pairs.offset.to(pairs.value.dtype), pairs)
        if pairs.mask is not None:
            weight = torch.where(pairs.mask.unsqueeze(-1), weight, 0.0)
        if weight.shape[-1] == 1:
            return weight.squeeze(-1)
        # One weight a channel is told from one a pair by its axes, so none may be left out.
        return weight.reshape((1,) * (pairs.value.ndim + 1 - weight.ndim) + tuple(weight.shape))
