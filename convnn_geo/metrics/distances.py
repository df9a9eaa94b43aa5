"""Distances: a metric bound to two sets of points, ready to be asked for rows or for pairs.

A metric is bound once (projections are computed once), then searched row by row without gradient
and evaluated on the chosen pairs with gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
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

    def examples(self, start: int, stop: int) -> Distances | None:
        """Those of examples ``start:stop`` of the first leading axis; None where it can't say."""
        return None

    def bilinear(self) -> Bilinear | None:
        """The same distances as one matrix product, where they have that form."""
        return None

    @property
    def dimension(self) -> int | None:
        """Dimension of :meth:`coordinates`; None where there are none."""
        return None

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        """Points ``(..., n, d)`` and ``(..., m, d)`` whose Euclidean order is the same order."""
        return None

    def sharp(self) -> Distances:
        """Distances in the same order, computed pair by pair: what decides between near ones."""
        return self

    def ordering(self) -> Distances:
        """Distances in the same order up to rounding, and cheaper in rows, for search."""
        return self.sharp()

    def targets(self, index: Tensor) -> Distances:
        """The same from the targets ``index (..., 1, r)`` alone; for those with coordinates."""
        raise TypeError(f"{type(self).__name__} has no coordinates to take targets of")


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
        embedding: gives points whose Euclidean order is the same, where that is known.
    """

    q: Tensor
    k: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    offset: float | Tensor = 0.0
    embedding: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def shape(self) -> torch.Size:
        lead = torch.broadcast_shapes(self.q.shape[:-2], self.k.shape[:-2])
        return torch.Size((*lead, self.q.shape[-2], self.k.shape[-2]))

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        q = self.q[..., start:stop, :]
        if q.shape[-2] == 1:
            # For a single row BLAS takes a path on which equal keys can get unequal products.
            two = replace(self, q=q.expand(*q.shape[:-2], 2, -1), a=None).rows()[..., :1, :]
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

    def at(self, index: Tensor) -> Tensor:
        distance = (gather_rows(self.k, index) * self.q.unsqueeze(-2)).sum(-1) * -self.scale
        if self.a is not None:
            distance = distance + self.a.unsqueeze(-1)
        if self.b is not None:
            distance = distance + gather_rows(self.b.unsqueeze(-1), index).squeeze(-1)
        return distance

    def select(self, index: Tensor) -> Bilinear:
        b = None if self.b is None else _take(self.b.unsqueeze(-1), index).squeeze(-1)
        return replace(self, k=_take(self.k, index), b=b, embedding=None)

    def examples(self, start: int, stop: int) -> Bilinear:
        if len(self.shape) == 2:  # they are the same for every example
            return self
        lead = len(self.shape) - 2
        a, b = (None if t is None else _some(t, lead + 1, start, stop) for t in (self.a, self.b))
        q, k = (_some(t, lead + 2, start, stop) for t in (self.q, self.k))
        return replace(self, q=q, k=k, a=a, b=b, embedding=None)

    def bilinear(self) -> Bilinear:
        return self

    @property
    def dimension(self) -> int | None:
        return None if self.embedding is None else self.q.shape[-1] + 2

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        return None if self.embedding is None else self.embedding()

    def sharp(self) -> Bilinear:
        return replace(self, a=None)

    def targets(self, index: Tensor) -> Bilinear:
        a = None if self.a is None else _take(self.a.unsqueeze(-1), index).squeeze(-1)
        whole, embedding = self.embedding, None
        if whole is not None:

            def embedding() -> tuple[Tensor, Tensor]:
                q, k = whole()
                return _take(q, index), k

        return replace(self, q=_take(self.q, index), a=a, embedding=embedding)


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

    def _norm(self, parts: Iterable[Tensor]) -> Tensor:
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

    def single(self, difference: Tensor) -> Tensor:
        """The distance of points that differ on one axis alone."""
        return self._norm([difference])

    def _direct(self, q: Tensor, k: Tensor) -> Tensor:
        # One axis at a time, so that one slab of memory is enough.
        return self._norm(q[..., axis] - k[..., axis] for axis in range(q.shape[-1]))

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        q = self.q[..., start:stop, :]
        return self._direct(q.unsqueeze(-2), self.k.unsqueeze(-3))

    def at(self, index: Tensor) -> Tensor:
        q, k = self.q.unsqueeze(-2), gather_rows(self.k, index)
        if q.shape[-1] <= DIRECT_DIMENSIONS:
            return self._direct(q, k)
        parts = q - k
        if self.p == torch.inf:
            return parts.abs().amax(-1)
        if self.p == 1:
            return parts.abs().sum(-1)
        total = (parts.square() if self.p == 2 else parts.abs().pow(self.p)).sum(-1)
        return _safe_root(total, self.p) if self.root else total

    def select(self, index: Tensor) -> Differences:
        return replace(self, k=_take(self.k, index))

    def examples(self, start: int, stop: int) -> Differences:
        if len(self.shape) == 2:
            return self
        axes = len(self.shape)
        q, k = (_some(t, axes, start, stop) for t in (self.q, self.k))
        return replace(self, q=q, k=k)

    @property
    def dimension(self) -> int | None:
        return self.q.shape[-1] if self.p == 2 else None

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        return (self.q, self.k) if self.p == 2 else None

    def bilinear(self) -> Bilinear | None:
        if self.p != 2 or self.root:
            return None
        # Centred, so that |q|^2 + |k|^2 - 2 <q, k> cancels as little as it can. The centre is a
        # constant: it drops out of the result, and one point's NaN must not reach all others.
        center = _center(self.k.detach())
        q, k = self.q - center, self.k - center
        return Bilinear(q, k, q.square().sum(-1), k.square().sum(-1), 2.0, self.offset)

    def sharp(self) -> Differences:
        return replace(self, root=False) if self.root else self

    def ordering(self) -> Distances:
        product = self.sharp().bilinear() if self.q.shape[-1] > DIRECT_DIMENSIONS else None
        return self.sharp() if product is None else product.sharp()

    def targets(self, index: Tensor) -> Differences:
        return replace(self, q=_take(self.q, index))


def _center(points: Tensor) -> Tensor:
    """A point amid ``points``, on a lattice: its step is a power of two no wider than they lie.

    So integers less the centre are integers, and what is equally far stays equally far.
    """
    if not points.shape[-2]:
        return points.new_zeros(1, points.shape[-1])
    finite = points.nan_to_num(0.0, 0.0, 0.0)
    mean = finite.mean(-2, keepdim=True)
    spread = (finite - mean).abs().amax((-2, -1), keepdim=True)
    step = spread / torch.frexp(spread).mantissa / 2
    return torch.where(spread > 0, (mean / step).round() * step, mean)


def _safe_root(total: Tensor, p: float) -> Tensor:
    """The p-th root, with gradient 0 instead of infinity where points coincide."""
    zero = total == 0  # a NaN is none, and stays
    return torch.where(zero, 0, torch.where(zero, 1, total).pow(1 / p))


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
        return sum(w * d.offset for w, d in self.parts)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return reduce(torch.add, (w * d.rows(start, stop) for w, d in self.parts))

    def at(self, index: Tensor) -> Tensor:
        return reduce(torch.add, (w * d.at(index) for w, d in self.parts))

    def select(self, index: Tensor) -> Combination:
        return Combination([(w, d.select(index)) for w, d in self.parts])

    @property
    def _only(self) -> Distances | None:
        """The one part whose order is the order of all, if there is one."""
        (weight, part), *others = self.parts
        return None if others or isinstance(weight, Tensor) or weight == 0 else part

    def sharp(self) -> Distances:
        return self if self._only is None else self._only.sharp()

    def ordering(self) -> Distances:
        if self._only is not None:
            return self._only.ordering()
        product = self.bilinear()
        wide = product is not None and product.q.shape[-1] > DIRECT_DIMENSIONS
        return product.sharp() if wide else self  # type: ignore[union-attr]

    def targets(self, index: Tensor) -> Combination:
        return Combination([(w, d.targets(index)) for w, d in self.parts])

    @property
    def dimension(self) -> int | None:
        if self._only is not None:
            return self._only.dimension
        total = 0
        for w, d in self.parts:  # squared distances add when coordinates are laid side by side
            if not isinstance(d, Differences) or d.p != 2 or d.root or isinstance(w, Tensor):
                return None
            total += d.q.shape[-1]
        return total

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        if self.dimension is None:
            return None
        if self._only is not None:
            return self._only.coordinates()
        queries, keys = [], []
        for w, d in self.parts:
            queries.append(d.q * w**0.5)  # type: ignore[attr-defined]
            keys.append(d.k * w**0.5)  # type: ignore[attr-defined]
        return _cat(queries), _cat(keys)

    def bilinear(self) -> Bilinear | None:
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        a = b = None
        for w, part in self.parts:
            d = part.bilinear()
            if d is None:
                return None
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
        fn: given ``(start, stop, None)`` the rows of those targets, given ``(start, stop, index)``
            their chosen pairs.
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
            n = len(range(self.size[-2])[start:stop])
            every = index.expand(*index.shape[:-2], n, index.shape[-1])
            if chosen is not None:
                lead = torch.broadcast_shapes(every.shape[:-1], chosen.shape[:-1])
                every = every.expand(*lead, every.shape[-1])
                every = every.gather(-1, chosen.expand(*lead, chosen.shape[-1]))
            return self.fn(start, stop, every)

        lead = torch.broadcast_shapes(self.size[:-2], index.shape[:-2])
        return Pairwise(torch.Size((*lead, self.size[-2], index.shape[-1])), fn)


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


def _some(tensor: Tensor, axes: int, start: int, stop: int) -> Tensor:
    """Examples ``start:stop`` of a tensor, where it has that axis and does not broadcast it."""
    return tensor[start:stop] if tensor.ndim == axes and tensor.shape[0] > 1 else tensor
