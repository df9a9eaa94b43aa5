"""Distances that are one matrix product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convnn_geo.metrics.chosen import of_pairs
from convnn_geo.metrics.distances import (
    Distances,
    beginning,
    pairs_shape,
    some,
    take,
    take_one,
)
from convnn_geo.points import gather_rows


@dataclass
class BilinearForm(Distances):
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
        q = beginning(self.q, start, index)
        distance = of_pairs("products", q, self.k, index, self.dtype) * -self.scale
        if self.a is not None:
            distance = distance + beginning(self.a.unsqueeze(-1), start, index)
        if self.b is not None:
            distance = distance + gather_rows(self.b.unsqueeze(-1), index).squeeze(-1)
        return distance

    def select(self, index: Tensor) -> BilinearForm:
        return replace(self, k=take(self.k, index), b=take_one(self.b, index))

    def targets(self, index: Tensor) -> BilinearForm:
        return replace(self, q=take(self.q, index), a=take_one(self.a, index))

    def examples(self, start: int, stop: int) -> BilinearForm:
        if len(self.shape) == 2:  # they are the same for every example
            return self
        lead = len(self.shape) - 2
        a, b = (None if t is None else some(t, lead + 1, start, stop) for t in (self.a, self.b))
        q, k = (some(t, lead + 2, start, stop) for t in (self.q, self.k))
        return replace(self, q=q, k=k, a=a, b=b)

    def bilinear(self) -> BilinearForm:
        if self.precision is None:
            return self
        q, k, a, b = (
            None if t is None else t.to(self.precision) for t in (self.q, self.k, self.a, self.b)
        )
        return BilinearForm(q, k, a, b, self.scale, self.offset)  # type: ignore[arg-type]

    def sharp(self) -> BilinearForm:
        return replace(self, a=None)

    def double(self) -> BilinearForm:
        return replace(self, precision=torch.float64)

    def refined(self) -> BilinearForm:
        return self.double()

    def ordering(self, dtype: torch.dtype | None = None) -> Distances:
        dtype = self.dtype if dtype is None else dtype
        b = None if self.b is None else self.b.to(dtype)
        return BilinearForm(self.q.to(dtype), self.k.to(dtype), None, b, self.scale)

    def exactly(self, dtype: torch.dtype) -> Distances | None:
        return None if dtype == torch.float64 else self.refined()

    def apart(self) -> Distances | None:
        # In float32 a product in float64 tells ties apart as well.
        return Summed(self) if self.dtype == torch.float64 else None

    def rounding(self) -> Tensor:
        """How far off a value of each row can be, ``(..., n, 1)``."""
        largest = self.k.norm(dim=-1).nan_to_num(0.0).amax(-1, keepdim=True)
        size = abs(self.scale) * self.q.norm(dim=-1) * largest
        if self.b is not None:
            size = size + self.b.abs().nan_to_num(0.0).amax(-1, keepdim=True)
        terms = self.q.shape[-1] / 2 + 6
        return (terms * torch.finfo(self.q.dtype).eps * size).unsqueeze(-1)


@dataclass
class Summed(Distances):
    """The same, each pair summed by itself: so equal keys are equally far, whatever BLAS does.

    Args:
        product: what is summed.
    """

    product: BilinearForm

    @property
    def shape(self) -> torch.Size:
        return self.product.shape

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        every = torch.arange(self.shape[-1], device=self.product.q.device).expand(1, -1)
        numbers = range(*slice(start, stop).indices(self.shape[-2]))
        return torch.cat([self.at(every, number) for number in numbers], -2)  # one holds few copies

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        return self.product.at(index, start)

    def select(self, index: Tensor) -> Summed:
        return Summed(self.product.select(index))

    def targets(self, index: Tensor) -> Summed:
        return Summed(self.product.targets(index))
