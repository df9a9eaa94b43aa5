"""Distances that are one matrix product: dot products and angles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import (
    DIRECT_DIMENSIONS,
    Distances,
    beginning,
    pairs_shape,
    some,
    take,
    take_one,
)
from convnn_geo.points import gather_rows


@dataclass
class Bilinear(Distances):
    """``d(i, j) = a_i + b_j - scale <q_i, k_j>``.

    Squared Euclidean, cosine and dot products have this form, and so have their non-negative
    combinations; softmax over it is one attention call.

    Args:
        q: ``(..., n, d)``.
        k: ``(..., m, d)``.
        a: ``(..., n)`` or None.
        b: ``(..., m)`` or None.
        scale: of the product.
        offset: similarity is ``offset - distance``.
        precision: dtype to compute in, that of ``q`` by default. Points are converted where they
            are used: often that is a few.
    """

    q: Tensor
    k: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    offset: float | Tensor = 0.0
    precision: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which distances are computed."""
        return self.q.dtype if self.precision is None else self.precision

    @property
    def shape(self) -> torch.Size:
        return pairs_shape(self.q, self.k)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        if self.precision is not None:
            return self.bilinear().rows(start, stop)
        q = self.q[..., start:stop, :]
        if q.shape[-2] == 1:
            # For a single row BLAS takes a path on which equal keys can get unequal products.
            pair = Bilinear(q.expand(*q.shape[:-2], 2, -1), self.k, None, self.b, self.scale)
            two = pair.rows()[..., :1, :]
            return two if self.a is None else two + self.a[..., start:stop, None]
        keys = self.k.transpose(-1, -2)
        if self.b is None:
            product = torch.matmul(q * -self.scale, keys)
        elif q.ndim == keys.ndim == 2:
            product = torch.addmm(self.b, q, keys, alpha=-self.scale)
        elif q.ndim == keys.ndim == 3 and q.shape[0] == keys.shape[0]:
            product = torch.baddbmm(self.b.unsqueeze(-2), q, keys, alpha=-self.scale)
        else:
            product = self.b.unsqueeze(-2) - self.scale * torch.matmul(q, keys)
        return product if self.a is None else product + self.a[..., start:stop, None]

    def rows_into(self, out: Tensor) -> Tensor:
        """All rows, written into ``out (b, n, m)``: fresh memory costs more than the product."""
        keys = self.k.transpose(-1, -2)
        if self.b is None:
            return torch.baddbmm(out, self.q, keys, beta=0.0, alpha=-self.scale, out=out)
        b = self.b.unsqueeze(-2).expand(out.shape)
        return torch.baddbmm(b, self.q, keys, alpha=-self.scale, out=out)

    @property
    def width(self) -> int:
        return self.q.shape[-1]

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        q = beginning(self.q, start, index).unsqueeze(-2).to(self.dtype)
        distance = (gather_rows(self.k, index).to(self.dtype) * q).sum(-1) * -self.scale
        if self.a is not None:
            distance = distance + beginning(self.a.unsqueeze(-1), start, index)
        if self.b is not None:
            distance = distance + gather_rows(self.b.unsqueeze(-1), index).squeeze(-1)
        return distance

    def select(self, index: Tensor) -> Bilinear:
        return replace(self, k=take(self.k, index), b=take_one(self.b, index))

    def targets(self, index: Tensor) -> Bilinear:
        return replace(self, q=take(self.q, index), a=take_one(self.a, index))

    def examples(self, start: int, stop: int) -> Bilinear:
        if len(self.shape) == 2:  # they are the same for every example
            return self
        lead = len(self.shape) - 2
        a, b = (None if t is None else some(t, lead + 1, start, stop) for t in (self.a, self.b))
        q, k = (some(t, lead + 2, start, stop) for t in (self.q, self.k))
        return replace(self, q=q, k=k, a=a, b=b)

    def bilinear(self) -> Bilinear:
        if self.precision is None:
            return self
        q, k, a, b = (
            None if t is None else t.to(self.precision) for t in (self.q, self.k, self.a, self.b)
        )
        return Bilinear(q, k, a, b, self.scale, self.offset)  # type: ignore[arg-type]

    def sharp(self) -> Bilinear:
        return replace(self, a=None)

    def double(self) -> Bilinear:
        return replace(self, precision=torch.float64)

    def refined(self) -> Bilinear:
        return self.double()

    def ordering(self, dtype: torch.dtype | None = None) -> Distances:
        dtype = self.dtype if dtype is None else dtype
        b = None if self.b is None else self.b.to(dtype)
        return Bilinear(self.q.to(dtype), self.k.to(dtype), None, b, self.scale)

    def exactly(self, dtype: torch.dtype) -> Distances | None:
        return None if dtype == torch.float64 else self.refined()

    def rounding(self) -> Tensor:
        """How far off a value of each row can be, ``(..., n, 1)``."""
        largest = self.k.norm(dim=-1).nan_to_num(0.0).amax(-1, keepdim=True)
        size = abs(self.scale) * self.q.norm(dim=-1) * largest
        if self.b is not None:
            size = size + self.b.abs().nan_to_num(0.0).amax(-1, keepdim=True)
        terms = self.q.shape[-1] / 2 + 6
        return (terms * torch.finfo(self.q.dtype).eps * size).unsqueeze(-1)


@dataclass
class Angular(Bilinear):
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

    def _halved(self) -> Differences:
        return Differences(self.q, self.k, root=False, precision=self.precision)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        if self.wide and self.a is None:
            return self.bilinear().rows(start, stop)
        rows = super().rows(start, stop) if self.wide else self._halved().rows(start, stop) / 2
        zero = _is_zero(self.q[..., start:stop, :]) | _is_zero(self.k).transpose(-1, -2)
        return rows.masked_fill(zero, 1.0)

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        zero = gather_rows(_is_zero(self.k), index).squeeze(-1)
        zero = zero | _is_zero(beginning(self.q, start, index))
        return (self._halved().at(index, start) / 2).masked_fill(zero, 1.0)

    def bilinear(self) -> Bilinear:
        q, k = self.q.to(self.dtype), self.k.to(self.dtype)
        return Bilinear(q, k, q.new_ones(q.shape[:-1]), offset=1.0)

    @property
    def dimension(self) -> int | None:
        return self.q.shape[-1] + 2

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        """With two more axes: (1, 0) for a zero query and (0, 1) for a zero key."""
        zero_q, zero_k = (_is_zero(t).to(t.dtype) for t in (self.q, self.k))
        return (
            torch.cat([self.q, zero_q, torch.zeros_like(zero_q)], -1),
            torch.cat([self.k, torch.zeros_like(zero_k), zero_k], -1),
        )

    def sharp(self) -> Bilinear:
        return self

    def refined(self) -> Bilinear:
        return self.double() if self.wide else self

    def apart(self) -> Distances:
        return replace(self, a=None, b=None, precision=torch.float64, direct=True)

    def ordering(self, dtype: torch.dtype | None = None) -> Distances:
        return super().ordering(dtype) if self.wide else self

    def exactly(self, dtype: torch.dtype) -> Distances | None:
        if dtype == torch.float64:
            return None
        q, k = self.q.double(), self.k.double()
        return Angular(q, k, q.square().sum(-1) / 2, k.square().sum(-1) / 2)


def _is_zero(vectors: Tensor) -> Tensor:
    return vectors.detach().norm(dim=-1, keepdim=True) < 0.5
