"""Distances: a metric bound to two sets of points, ready to be asked for rows or for pairs.

A metric is bound once (projections are computed once), then searched row by row without gradient
and evaluated on the chosen pairs with gradient. The forms that distances take are in the files
beside: bilinear, differences, combined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convnn_geo.points import gather_rows
from convnn_geo.shapes import broadcast_shapes

if TYPE_CHECKING:
    from convnn_geo.metrics.bilinear import BilinearForm

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
    def at(self, index: Tensor, start: int = 0) -> Tensor:
        """Distances of chosen pairs, ``(..., n, k)`` for an index ``(..., n, k)``.

        Its rows are those of the targets from ``start`` on.
        """

    @abstractmethod
    def select(self, index: Tensor) -> Distances:
        """The same to the sources ``index (..., 1, r)`` alone, which all targets share."""

    def targets(self, index: Tensor) -> Distances:
        """The same from the targets ``index (..., 1, r)`` alone; for forms made of points."""
        raise TypeError(f"{type(self).__name__} is not made of points to take targets of")

    def examples(self, start: int, stop: int) -> Distances | None:
        """Those of examples ``start:stop`` of the first leading axis; None where it can't say."""
        return None

    def bilinear(self) -> BilinearForm | None:
        """The same distances as one matrix product, where they have that form."""
        return None

    @property
    def width(self) -> int:
        """Numbers of a source that a pair looks at, for estimates of memory."""
        return 1

    @property
    def dimension(self) -> int | None:
        """Dimension of :meth:`coordinates`; None where there are none."""
        return None

    @property
    def freedom(self) -> int | None:
        """In how many directions :meth:`coordinates` can vary: what a tree's time depends on."""
        return self.dimension

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        """Points ``(..., n, d)`` and ``(..., m, d)`` whose Euclidean order is the same order.

        In float64 where the points are scaled, so that ties stay ties.
        """
        return None

    def sharp(self) -> Distances:
        """Distances in the same order, without what is the same for a whole row."""
        return self

    def double(self) -> Distances:
        """The same in float64, where it can be."""
        return self

    def refined(self) -> Distances:
        """The same in float64, where float32 rounds too coarsely to tell who is nearer."""
        return self

    def apart(self) -> Distances | None:
        """Distances in the same order from differences in float64: slow, and never wrong."""
        return None

    def ordering(self, dtype: torch.dtype | None = None) -> Distances:
        """Distances in the same order up to rounding, and cheaper in rows, for search."""
        return self.sharp()

    def exactly(self, dtype: torch.dtype) -> Distances | None:
        """Distances in the same order whose rows, rounded to ``dtype``, tell who is nearer.

        None where :meth:`ordering` tells as well as can be told.
        """
        return None


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (..., 1, r)`` of ``values (..., m, c)``: ``(..., r, c)``."""
    return gather_rows(values, index).squeeze(-3)


def take_one(values: Tensor | None, index: Tensor) -> Tensor | None:
    """Entries ``index (..., 1, r)`` of ``values (..., m)``: ``(..., r)``."""
    return None if values is None else take(values.unsqueeze(-1), index).squeeze(-1)


def beginning(tensor: Tensor, start: int, index: Tensor) -> Tensor:
    """Rows of ``tensor (..., n, c)`` from ``start`` on, as many as the index has."""
    return tensor[..., start : start + index.shape[-2], :]


def some(tensor: Tensor, axes: int, start: int, stop: int) -> Tensor:
    """Examples ``start:stop`` of a tensor, where it has that axis and does not broadcast it."""
    return tensor[start:stop] if tensor.ndim == axes and tensor.shape[0] > 1 else tensor


def pairs_shape(q: Tensor, k: Tensor) -> torch.Size:
    """``(..., n, m)`` of points ``(..., n, d)`` and ``(..., m, d)``."""
    lead = broadcast_shapes(q.shape[:-2], k.shape[:-2])
    return torch.Size((*lead, q.shape[-2], k.shape[-2]))
