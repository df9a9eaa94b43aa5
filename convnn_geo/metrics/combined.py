"""Distances made of others: sums, biases, and any function of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from convnn_geo.metrics.angular import Angular
from convnn_geo.metrics.bilinear import BilinearForm
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import Distances, beginning
from convnn_geo.shapes import broadcast_shapes


@dataclass
class Combination(Distances):
    """``sum_r weight_r d_r(i, j)`` with non-negative weights."""

    parts: list[tuple[float | Tensor, Distances]]

    @property
    def shape(self) -> torch.Size:
        return broadcast_shapes(*(d.shape for _, d in self.parts))

    @property
    def offset(self) -> float | Tensor:  # type: ignore[override]
        """The weighted offsets of the parts."""
        return sum(w * d.offset for w, d in self.parts)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return reduce(torch.add, (w * d.rows(start, stop) for w, d in self.parts))

    @property
    def width(self) -> int:
        return max(d.width for _, d in self.parts)

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        return reduce(torch.add, (w * d.at(index, start) for w, d in self.parts))

    def select(self, index: Tensor) -> Combination:
        return Combination([(w, d.select(index)) for w, d in self.parts])

    def targets(self, index: Tensor) -> Combination:
        return Combination([(w, d.targets(index)) for w, d in self.parts])

    def double(self) -> Combination:
        """Every part in float64, so that weights are applied to what is not yet rounded."""
        return Combination(
            [(w.double() if isinstance(w, Tensor) else w, d.double()) for w, d in self.parts]
        )

    def refined(self) -> Combination:
        if self._only is None:
            return self.double()
        return Combination([(w, d.refined()) for w, d in self.parts])

    @property
    def _only(self) -> Distances | None:
        """The one part whose order is the order of all, if there is one."""
        (weight, part), *others = self.parts
        return None if others or isinstance(weight, Tensor) or weight == 0 else part

    def sharp(self) -> Distances:
        return self if self._only is None else self._only.sharp()

    def ordering(self, dtype: torch.dtype | None = None) -> Distances:
        # Parts of other kinds are added up: in float32 that rounds who is nearer away.
        return self.double() if self._only is None else self._only.ordering(dtype)

    @property
    def dimension(self) -> int | None:
        if self._only is not None:
            return self._only.dimension
        total = 0
        for _, d in self.parts:  # squared distances add when coordinates are laid side by side
            if _squared(d) is None:
                return None
            total += d.dimension or 0
        return total

    @property
    def freedom(self) -> int | None:
        if self._only is not None:
            return self._only.freedom
        return None if self.dimension is None else sum(d.freedom or 0 for _, d in self.parts)

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        if self.dimension is None:
            return None
        if self._only is not None:
            return self._only.coordinates()
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        for w, d in self.parts:
            q, k = d.coordinates()  # type: ignore[misc]
            square = _squared(d) * w  # type: ignore[operator]
            root = square.double().sqrt() if isinstance(square, Tensor) else math.sqrt(square)
            queries.append(q.double() * root)
            keys.append(k.double() * root)
        return _cat(queries), _cat(keys)

    def bilinear(self) -> BilinearForm | None:
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
        return BilinearForm(_cat(queries), _cat(keys), a, b, offset=self.offset)


def _squared(distances: Distances) -> float | None:
    """The factor of squared Euclidean distances that these are; None where they are not."""
    if isinstance(distances, Angular):
        return 0.5
    if isinstance(distances, Differences) and distances.p == 2 and not distances.root:
        return 1.0
    return None


def _cat(tensors: list[Tensor]) -> Tensor:
    lead = broadcast_shapes(*(t.shape[:-1] for t in tensors))
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

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        return self.fn(start, start + index.shape[-2], index)

    def select(self, index: Tensor) -> Pairwise:
        def fn(start: int, stop: int | None, chosen: Tensor | None) -> Tensor:
            n = len(range(self.size[-2])[start:stop])
            every = index.expand(*index.shape[:-2], n, index.shape[-1])
            if chosen is not None:
                lead = broadcast_shapes(every.shape[:-1], chosen.shape[:-1])
                every = every.expand(*lead, every.shape[-1])
                every = every.gather(-1, chosen.expand(*lead, chosen.shape[-1]))
            return self.fn(start, stop, every)

        lead = broadcast_shapes(self.size[:-2], index.shape[:-2])
        return Pairwise(torch.Size((*lead, self.size[-2], index.shape[-1])), fn)


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
        return broadcast_shapes(self.inner.shape, self.bias.shape)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        bias = self.bias if self.bias.shape[-2] == 1 else self.bias[..., start:stop, :]
        return self.inner.rows(start, stop) - bias

    @property
    def width(self) -> int:
        return self.inner.width

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        distance = self.inner.at(index, start)
        lead = broadcast_shapes(distance.shape[:-2], self.bias.shape[:-2])
        n, k = distance.shape[-2:]
        bias = self.bias if self.bias.shape[-2] == 1 else beginning(self.bias, start, index)
        bias = bias.expand(*lead, n, self.bias.shape[-1])
        return distance - bias.gather(-1, index.expand(*lead, n, k))

    def double(self) -> Biased:
        return Biased(self.inner.double(), self.bias)  # a bias is not copied: it adds exactly

    def refined(self) -> Biased:
        return self.double()

    def ordering(self, dtype: torch.dtype | None = None) -> Biased:
        return self.double()

    def select(self, index: Tensor) -> Biased:
        lead = broadcast_shapes(self.bias.shape[:-2], index.shape[:-2])
        bias = self.bias.expand(*lead, *self.bias.shape[-2:])
        index = index.expand(*lead, bias.shape[-2], index.shape[-1])
        return Biased(self.inner.select(index[..., :1, :]), bias.gather(-1, index))
