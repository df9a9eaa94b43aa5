"""Distances of directions: by products where these tell, by differences where vectors are near."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convnn_geo.caching import once
from convnn_geo.metrics.bilinear import BilinearForm
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import DIRECT_DIMENSIONS, Distances, beginning
from convnn_geo.points import gather_rows


@dataclass
class Angular(BilinearForm):
    """``d(i, j) = 1 - <q_i, k_j>`` of vectors of length one or zero; 1 from and to a zero vector.

    For vectors of length one that is ``|q - k|^2 / 2``. For near ones differences are exact where
    the product is not, so these decide.

    Args:
        direct: rows, too, are computed from differences.
    """

    offset: float | Tensor = 1.0
    direct: bool = False

    @property
    def wide(self) -> bool:
        """Whether rows are computed by a product."""
        return self.q.shape[-1] > DIRECT_DIMENSIONS and not self.direct

    @once
    def _measured(self) -> Angular:
        """In float64, with the lengths that vectors have: float32 makes none of length one."""
        q, k = self.q.double(), self.k.double()
        return Angular(q, k, q.square().sum(-1) / 2, k.square().sum(-1) / 2)

    @once
    def _zeros(self) -> tuple[Tensor, Tensor]:
        """Which vectors are zero: ``(..., n, 1)`` and ``(..., m, 1)``; they must stay so."""
        return _is_zero(self.q), _is_zero(self.k)

    def _halved(self) -> Differences:
        return Differences(self.q, self.k, root=False, precision=self.precision)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        if self.wide and self.a is None:
            double = self.precision == torch.float64
            return (self._measured if double else self.bilinear()).rows(start, stop)
        rows = super().rows(start, stop) if self.wide else self._halved().rows(start, stop) / 2
        zero_q, zero_k = self._zeros
        return rows.masked_fill(zero_q[..., start:stop, :] | zero_k.transpose(-1, -2), 1.0)

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        zero_q, zero_k = self._zeros
        zero = gather_rows(zero_k, index).squeeze(-1) | beginning(zero_q, start, index)
        return (self._halved().at(index, start) / 2).masked_fill(zero, 1.0)

    def bilinear(self) -> BilinearForm:
        q, k = self.q.to(self.dtype), self.k.to(self.dtype)
        return BilinearForm(q, k, q.new_ones(q.shape[:-1]), offset=1.0)

    @property
    def dimension(self) -> int | None:
        return self.q.shape[-1] + 2

    @property
    def freedom(self) -> int | None:
        return max(1, self.q.shape[-1] - 1)  # on a sphere

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        """With two more axes: (1, 0) for a zero query and (0, 1) for a zero key."""
        zero_q, zero_k = (zero.to(self.q.dtype) for zero in self._zeros)
        return (
            torch.cat([self.q, zero_q, torch.zeros_like(zero_q)], -1),
            torch.cat([self.k, torch.zeros_like(zero_k), zero_k], -1),
        )

    def sharp(self) -> BilinearForm:
        return self

    def refined(self) -> BilinearForm:
        return self.double() if self.wide else self

    def apart(self) -> Distances:
        return replace(self, a=None, b=None, precision=torch.float64, direct=True)

    def ordering(self, dtype: torch.dtype | None = None) -> Distances:
        return super().ordering(dtype) if self.wide else self

    def exactly(self, dtype: torch.dtype) -> Distances | None:
        return None if dtype == torch.float64 else self._measured


def _is_zero(vectors: Tensor) -> Tensor:
    return vectors.detach().norm(dim=-1, keepdim=True) < 0.5
