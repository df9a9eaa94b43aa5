"""The k smallest of each row of distances, a slab of rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo.metrics import BilinearForm, Distances
from convnn_geo.metrics.distances import take, take_one
from convnn_geo.search.smallest import k_smallest, select
from convnn_geo.shapes import broadcast_shapes


@dataclass(frozen=True)
class Hidden:
    """Pairs that are not to be chosen.

    Args:
        mask: ``(..., n | 1, m)``, True where choice is allowed.
        own: ``(..., n)``, one place in each row that is not; -1 for none.
    """

    mask: Tensor | None = None
    own: Tensor | None = None

    def __bool__(self) -> bool:
        return self.mask is not None or self.own is not None

    def between(self, start: int, stop: int) -> Hidden:
        """Those of the targets ``start:stop`` alone."""
        mask, own = self.mask, self.own
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., start:stop, :]
        return Hidden(mask, None if own is None else own[..., start:stop])

    def targets(self, index: Tensor) -> Hidden:
        """Those of the targets ``index (..., 1, r)`` alone."""
        mask = self.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = take(mask, index)
        return Hidden(mask, take_one(self.own, index))

    def put_behind(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Values of rows ``start:stop`` with what is hidden last; NaN stays before it, seen."""
        if not self:
            return values
        hidden = torch.zeros((), dtype=torch.bool, device=values.device)
        if self.mask is not None:
            hidden = ~(self.mask[..., start:stop, :] if self.mask.shape[-2] > 1 else self.mask)
        if self.own is not None:
            places = torch.arange(values.shape[-1], device=values.device)
            hidden = hidden | (places == self.own[..., start:stop, None])
        largest = torch.finfo(values.dtype).max
        return values.nan_to_num(largest, largest, -largest).masked_fill(hidden, torch.inf)

    def kept(self, place: Tensor) -> Tensor | None:
        """Which of the chosen were allowed; None where nothing was hidden."""
        kept = None
        if self.mask is not None:
            lead = broadcast_shapes(self.mask.shape[:-2], place.shape[:-2])
            mask = self.mask.expand(*lead, place.shape[-2], self.mask.shape[-1])
            kept = mask.gather(-1, place.expand(*lead, *place.shape[-2:]))
        if self.own is not None:
            other = place != self.own.unsqueeze(-1)
            kept = other if kept is None else kept & other
        return kept


def smallest_in_rows(
    distances: Distances, k: int, hidden: Hidden, slab: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest values of each row, rounded to ``dtype``, and their places.

    Args:
        distances: ``(..., n, m)``.
        k: at most ``m``.
        hidden: what is not to be chosen.
        slab: bytes that a slab of rows may take.
        dtype: of the values.
    """
    shape = distances.shape
    if hidden.mask is not None:
        shape = broadcast_shapes(shape, hidden.mask.shape)
    batch = shape[0] if len(shape) > 2 and not hidden else 1
    size = dtype.itemsize * math.prod(shape[1:])
    fitting = max(1, slab // max(1, size))
    if fitting >= batch or distances.examples(0, 1) is None:
        return _by_rows(distances, k, hidden, slab, dtype, shape)
    found = []  # whole examples where they fit: one large product beats many small ones
    buffer = _buffer(distances, fitting, dtype, shape)
    for start in range(0, batch, fitting):
        stop = min(start + fitting, batch)
        part: Distances = distances.examples(start, stop)  # type: ignore[assignment]
        some = torch.Size((stop - start, *shape[1:]))
        if buffer is None:
            found.append(_by_rows(part, k, hidden, slab, dtype, some))
        else:
            found.append(select(part.rows_into(buffer[: stop - start]), k))  # type: ignore[attr-defined]
    values, places = zip(*found, strict=True)
    return torch.cat(values), torch.cat(places)


def _buffer(
    distances: Distances, examples: int, dtype: torch.dtype, shape: torch.Size
) -> Tensor | None:
    """Memory for the products of some examples, where products are all that rows are."""
    if type(distances) is not BilinearForm or len(shape) != 3 or torch.compiler.is_compiling():
        return None
    plain = distances.a is None and distances.precision is None and distances.q.dtype == dtype
    if not plain or distances.q.shape[0] != shape[0] or distances.k.shape[0] != shape[0]:
        return None
    if distances.q.ndim != 3 or distances.k.ndim != 3 or shape[1] < 2:
        return None
    return distances.q.new_empty(examples, *shape[1:])


def in_slabs(distances: Distances, index: Tensor, slab: int, dtype: torch.dtype) -> Tensor:
    """Distances of chosen pairs ``(..., n, k)``, a slab of targets at a time."""
    *lead, n, k = broadcast_shapes((*distances.shape[:-1], 1), index.shape)
    step = max(1, slab // max(1, 8 * distances.width * math.prod(lead) * k))
    if step >= n:
        return distances.at(index).to(dtype)
    found = torch.empty(*lead, n, k, dtype=dtype, device=index.device)
    for start in range(0, n, step):
        some = index[..., start : start + step, :]
        found[..., start : start + step, :] = distances.at(some, start)
    return found


def _by_rows(
    distances: Distances, k: int, hidden: Hidden, slab: int, dtype: torch.dtype, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Slabs of rows of all examples at once."""
    *lead, n, m = shape
    step = max(1, slab // max(1, dtype.itemsize * math.prod(lead) * m))

    def between(start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = distances.rows(start, stop).to(dtype).expand(*lead, stop - start, m)
        return k_smallest(hidden.put_behind(rows, start, stop), k)

    if step >= n:  # asked by itself, for sizes that are traced must not end up in a loop
        return between(0, n)
    # Written into one piece: small results kept between slabs would keep the heap from shrinking.
    found: tuple[Tensor, Tensor] | None = None
    for start in range(0, n, step):
        part = between(start, min(start + step, n))
        if found is None:
            found = part[0].new_empty(*lead, n, k), part[1].new_empty(*lead, n, k)
        for whole, some in zip(found, part, strict=True):
            whole[..., start : start + step, :] = some
    return found  # type: ignore[return-value]
