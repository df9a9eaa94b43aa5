"""Distances: a metric bound to two sets of points, ready to be asked for rows or for pairs.

A metric is bound once (projections are computed once), then searched row by row without gradient
and evaluated on the chosen pairs with gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from convnn_geo.points import gather_rows

DIRECT_DIMENSIONS = 8
"""Up to here distances are summed from differences; the product form misorders near points."""


class Distances(ABC):
    """Distances from ``n`` targets to ``m`` sources; smaller is nearer."""

    offset: float | Tensor = 0.0
    """Similarity is ``offset - distance``: 1 for cosine, 0 for a dot product."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """``(..., n, m)``."""

    @abstractmethod
    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Distances of targets ``start:stop`` to all sources, ``(..., stop - start, m)``."""

    @abstractmethod
    def at(self, index: Tensor) -> Tensor:
        """Distances of chosen pairs, ``(..., n, k)`` for an index ``(..., n, k)``."""

    @abstractmethod
    def select(self, index: Tensor) -> Distances:
        """The same to the sources ``index (..., 1, r)`` alone, which all targets share."""

    def bilinear(self) -> Bilinear | None:
        """The same distances as one matrix product, where they have that form."""
        return None

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        """Points ``(..., n, d)`` and ``(..., m, d)`` whose Euclidean order is the same order."""
        return None

    def ordering(self) -> Distances:
        """Distances in the same order, and cheaper to compute, for search."""
        return self



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
        embedding: points whose Euclidean order is the same, where that is known.
    """

    q: Tensor
    k: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    offset: float | Tensor = 0.0
    embedding: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        lead = torch.broadcast_shapes(self.q.shape[:-2], self.k.shape[:-2])
        return torch.Size((*lead, self.q.shape[-2], self.k.shape[-2]))

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        q = self.q[..., start:stop, :]
        keys = self.k.transpose(-1, -2)
        if self.b is None:
            product = torch.matmul(q * -self.scale, keys)
        elif q.ndim == keys.ndim == 2:
            product = torch.addmm(self.b, q, keys, alpha=-self.scale)
        else:
            product = self.b.unsqueeze(-2) - self.scale * torch.matmul(q, keys)
        return product if self.a is None else product + self.a[..., start:stop, None]

    def at(self, index: Tensor) -> Tensor:
        distance = (gather_rows(self.k, index) * self.q.unsqueeze(-2)).sum(-1) * -self.scale
        if self.a is not None:
            distance = distance + self.a.unsqueeze(-1)
        if self.b is not None:
            distance = distance + gather_rows(self.b.unsqueeze(-1), index).squeeze(-1)
        return distance

    def select(self, index: Tensor) -> Bilinear:
        b = None if self.b is None else _take(self.b.unsqueeze(-1), index).squeeze(-1)
        embedding = self.embedding
        if embedding is not None:
            embedding = (embedding[0], _take(embedding[1], index))
        return replace(self, k=_take(self.k, index), b=b, embedding=embedding)

    def bilinear(self) -> Bilinear:
        return self

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        return self.embedding

    def ordering(self) -> Distances:
        return replace(self, a=None)



@dataclass
class Differences(Distances):
    """``d(i, j) = (sum_a |q_ia - k_ja|^p)^(1/p)`` from differences, p-th root optional.

    Args:
        q: ``(..., n, d)``.
        k: ``(..., m, d)``.
        p: exponent of the norm; ``inf`` for Chebyshev.
        root: take the p-th root; False gives the squared distance for ``p = 2``.
        offset: similarity is ``offset - distance``.
    """

    q: Tensor
    k: Tensor
    p: float = 2.0
    root: bool = True
    offset: float | Tensor = 0.0

    @property
    def shape(self) -> torch.Size:
        lead = torch.broadcast_shapes(self.q.shape[:-2], self.k.shape[:-2])
        return torch.Size((*lead, self.q.shape[-2], self.k.shape[-2]))

    def _norm(self, parts: list[Tensor]) -> Tensor:
        """Combine per-axis differences, in the order of axes: the same sum on every path."""
        if self.p == torch.inf:
            return reduce(torch.maximum, (part.abs() for part in parts))
        if self.p == 1:
            return reduce(torch.add, (part.abs() for part in parts))
        if self.p == 2:
            total = reduce(torch.add, (part.square() for part in parts))
        else:
            total = reduce(torch.add, (part.abs().pow(self.p) for part in parts))
        return _safe_root(total, self.p) if self.root else total

    def _direct(self, q: Tensor, k: Tensor) -> Tensor:
        return self._norm([q[..., axis] - k[..., axis] for axis in range(q.shape[-1])])

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        q = self.q[..., start:stop, :]
        return self._direct(q.unsqueeze(-2), self.k.unsqueeze(-3))

    def at(self, index: Tensor) -> Tensor:
        return self._direct(self.q.unsqueeze(-2), gather_rows(self.k, index))

    def select(self, index: Tensor) -> Differences:
        return replace(self, k=_take(self.k, index))

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        return (self.q, self.k) if self.p == 2 else None

    def bilinear(self) -> Bilinear | None:
        if self.p != 2 or self.root:
            return None
        # Centred, so that |q|^2 + |k|^2 - 2 <q, k> cancels as little as it can.
        center = self.k.mean(-2, keepdim=True)
        q, k = self.q - center, self.k - center
        return Bilinear(q, k, q.square().sum(-1), k.square().sum(-1), 2.0, self.offset)

    def ordering(self) -> Distances:
        squared = replace(self, root=False) if self.root else self
        if self.p == 2 and self.q.shape[-1] > DIRECT_DIMENSIONS:
            return squared.bilinear().ordering()  # type: ignore[union-attr]
        return squared


def _safe_root(total: Tensor, p: float) -> Tensor:
    """The p-th root, with gradient 0 instead of infinity where points coincide."""
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1).pow(1 / p), 0)


@dataclass
class Combination(Distances):
    """``sum_r weight_r d_r(i, j)`` with non-negative weights."""

    parts: list[tuple[float | Tensor, Distances]]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(torch.broadcast_shapes(*(d.shape for _, d in self.parts)))

    @property
    def offset(self) -> float | Tensor:  # type: ignore[override]
        """The weighted offsets of the parts."""
        return sum(w * d.offset for w, d in self.parts)  # type: ignore[return-value]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return reduce(torch.add, (w * d.rows(start, stop) for w, d in self.parts))

    def at(self, index: Tensor) -> Tensor:
        return reduce(torch.add, (w * d.at(index) for w, d in self.parts))

    def select(self, index: Tensor) -> Combination:
        return Combination([(w, d.select(index)) for w, d in self.parts])

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        if len(self.parts) == 1 and self.parts[0][0] != 0:
            return self.parts[0][1].coordinates()
        queries, keys = [], []
        for w, d in self.parts:  # squared distances add when coordinates are laid side by side
            if not isinstance(d, Differences) or d.p != 2 or d.root or isinstance(w, Tensor):
                return None
            queries.append(d.q * w**0.5)
            keys.append(d.k * w**0.5)
        return _cat(queries), _cat(keys)

    def bilinear(self) -> Bilinear | None:
        parts = [(w, d.bilinear()) for w, d in self.parts]
        if any(d is None for _, d in parts):
            return None
        queries, keys, a, b = [], [], None, None
        for w, d in parts:
            queries.append(d.q * (w * d.scale))
            keys.append(d.k)
            a = a if d.a is None else (w * d.a if a is None else a + w * d.a)
            b = b if d.b is None else (w * d.b if b is None else b + w * d.b)
        return Bilinear(_cat(queries), _cat(keys), a, b, offset=self.offset)


def _cat(tensors: list[Tensor]) -> Tensor:
    lead = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return torch.cat([t.expand(*lead, t.shape[-1]) for t in tensors], -1)


@dataclass
class Pairwise(Distances):
    """Distances from any function of pairs: ``fn(targets, index | None) -> (..., rows, m | k)``.

    Args:
        size: ``(..., n, m)``.
        fn: given ``(start, stop, None)`` the rows, given ``(0, None, index)`` the chosen pairs.
    """

    size: torch.Size
    fn: Callable[[int, int | None, Tensor | None], Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.size

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.fn(start, stop, None)

    def at(self, index: Tensor) -> Tensor:
        return self.fn(0, None, index)

    def select(self, index: Tensor) -> Pairwise:
        def fn(start: int, stop: int | None, chosen: Tensor | None) -> Tensor:
            every = index.expand(*index.shape[:-2], self.size[-2], index.shape[-1])
            if chosen is None:
                return self.fn(0, None, every)[..., start:stop, :]
            lead = torch.broadcast_shapes(every.shape[:-1], chosen.shape[:-1])
            every = every.expand(*lead, every.shape[-1])
            return self.fn(0, None, every.gather(-1, chosen.expand(*lead, chosen.shape[-1])))

        return Pairwise(torch.Size((*self.size[:-1], index.shape[-1])), fn)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (..., 1, r)`` of ``values (..., m, c)``: ``(..., r, c)``."""
    return gather_rows(values, index).squeeze(-3)


@dataclass
class Biased(Distances):
    """Distances less a bias on similarities, ``d(i, j) - bias_ij``.

    Args:
        inner: the distances.
        bias: ``(..., n | 1, m)``.
    """

    inner: Distances
    bias: Tensor

    @property
    def offset(self) -> float | Tensor:  # type: ignore[override]
        """That of the inner distances."""
        return self.inner.offset

    @property
    def shape(self) -> torch.Size:
        return torch.Size(torch.broadcast_shapes(self.inner.shape, self.bias.shape))

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        bias = self.bias if self.bias.shape[-2] == 1 else self.bias[..., start:stop, :]
        return self.inner.rows(start, stop) - bias

    def at(self, index: Tensor) -> Tensor:
        distance = self.inner.at(index)
        lead = torch.broadcast_shapes(distance.shape[:-2], self.bias.shape[:-2])
        n, k = distance.shape[-2:]
        bias = self.bias.expand(*lead, n, self.bias.shape[-1])
        return distance - bias.gather(-1, index.expand(*lead, n, k))

    def select(self, index: Tensor) -> Biased:
        lead = torch.broadcast_shapes(self.bias.shape[:-2], index.shape[:-2])
        bias = self.bias.expand(*lead, *self.bias.shape[-2:])
        index = index.expand(*lead, bias.shape[-2], index.shape[-1])
        return Biased(self.inner.select(index[..., :1, :]), bias.gather(-1, index))
