"""The k smallest of each row of distances, a slab of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo.metrics import BilinearForm, Distances
from convnn_geo.metrics.distances import take, take_one
from convnn_geo.metrics.packed import pack, unpack
from convnn_geo.operators import operator
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
        largest = torch.finfo(values.dtype).max
        values = values.nan_to_num(largest, largest, -largest)
        if self.mask is not None:
            mask = self.mask[..., start:stop, :] if self.mask.shape[-2] > 1 else self.mask
            values = values.masked_fill(~mask, torch.inf)
        if self.own is not None:
            own = self.own[..., start:stop, None].expand(*values.shape[:-1], 1)
            place = own.clamp_min(0)
            values = values.scatter(-1, place, values.gather(-1, place).where(own < 0, torch.inf))
        return values

    def may_have_put(self, values: Tensor) -> bool:
        """Whether a number may stand for NaN or infinity, which come before what is hidden.

        On a GPU nobody waits to see.
        """
        largest = torch.finfo(values.dtype).max
        return bool(self) and (not values.is_cpu or bool((values.abs() == largest).any()))

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

    One operator where it is traced, so that sizes stay open and no slab is a part of the program.
    Distances by a function of the user's are then all computed at once.
    """
    compiling = torch.compiler.is_compiling()
    packed = pack(distances) if compiling else None
    if packed is not None:
        double = dtype == torch.float64
        found: tuple[Tensor, Tensor] = _smallest_in_rows(
            *packed, k, hidden.mask, hidden.own, slab, double
        )
        return found
    shape = distances.shape
    if hidden.mask is not None:
        shape = broadcast_shapes(shape, hidden.mask.shape)
    if compiling:
        return _of_rows(distances, k, hidden, dtype, shape, 0, shape[-2])
    batch = shape[0] if len(shape) > 2 and not hidden else 1
    size = dtype.itemsize * math.prod(shape[1:])
    fitting = max(1, slab // max(1, size))
    if fitting >= batch or distances.examples(0, 1) is None:
        return _by_rows(distances, k, hidden, slab, dtype, shape)
    parts = []  # whole examples where they fit: one large product beats many small ones
    buffer = _buffer(distances, fitting, dtype, shape)
    for start in range(0, batch, fitting):
        stop = min(start + fitting, batch)
        part: Distances = distances.examples(start, stop)  # type: ignore[assignment]
        some = torch.Size((stop - start, *shape[1:]))
        if buffer is None:
            parts.append(_by_rows(part, k, hidden, slab, dtype, some))
        else:
            parts.append(select(part.rows_into(buffer[: stop - start]), k))  # type: ignore[attr-defined]
    values, places = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(places)


def _buffer(
    distances: Distances, examples: int, dtype: torch.dtype, shape: torch.Size
) -> Tensor | None:
    """Memory for the products of some examples, where products are all that rows are."""
    if type(distances) is not BilinearForm or len(shape) != 3:
        return None
    plain = distances.a is None and distances.precision is None and distances.q.dtype == dtype
    if not plain or distances.q.shape[0] != shape[0] or distances.k.shape[0] != shape[0]:
        return None
    if distances.q.ndim != 3 or distances.k.ndim != 3 or shape[1] < 2:
        return None
    return distances.q.new_empty(examples, *shape[1:])


def in_slabs(distances: Distances, index: Tensor, slab: int, dtype: torch.dtype) -> Tensor:
    """Distances of chosen pairs ``(..., n, k)``, a slab of targets at a time; traced as above."""
    compiling = torch.compiler.is_compiling()
    packed = pack(distances) if compiling else None
    if packed is not None:
        traced: Tensor = _distances_of_pairs(*packed, index, slab, dtype == torch.float64)
        return traced
    if compiling:
        return distances.at(index).to(dtype)
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
    if step >= n:
        return _of_rows(distances, k, hidden, dtype, shape, 0, n)
    # Written into one piece: small results kept between slabs would keep the heap from shrinking.
    found: tuple[Tensor, Tensor] | None = None
    for start in range(0, n, step):
        part = _of_rows(distances, k, hidden, dtype, shape, start, min(start + step, n))
        if found is None:
            found = part[0].new_empty(*lead, n, k), part[1].new_empty(*lead, n, k)
        for whole, some in zip(found, part, strict=True):
            whole[..., start : start + step, :] = some
    return found  # type: ignore[return-value]


def _of_rows(
    distances: Distances,
    k: int,
    hidden: Hidden,
    dtype: torch.dtype,
    shape: torch.Size,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Rows ``start:stop`` at once."""
    rows = distances.rows(start, stop).to(dtype)
    rows = rows.expand(*shape[:-2], stop - start, shape[-1])
    return k_smallest(hidden.put_behind(rows, start, stop), k)


@operator("smallest_in_rows")
def _smallest_in_rows(
    numbers: Sequence[float],
    tensors: Sequence[Tensor],
    k: int,
    mask: Tensor | None,
    own: Tensor | None,
    slab: int,
    double: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if double else torch.float32
    return smallest_in_rows(unpack(numbers, tensors), k, Hidden(mask, own), slab, dtype)


@_smallest_in_rows.register_fake
def _shapes(
    numbers: Sequence[float],
    tensors: Sequence[Tensor],
    k: int,
    mask: Tensor | None,
    own: Tensor | None,
    slab: int,
    double: bool,
) -> tuple[Tensor, Tensor]:
    shape = unpack(numbers, tensors).shape
    if mask is not None:
        shape = broadcast_shapes(shape, mask.shape)
    dtype = torch.float64 if double else torch.float32
    values = tensors[0].new_empty((*shape[:-1], k), dtype=dtype)
    return values, torch.empty_like(values, dtype=torch.long)


@_smallest_in_rows.register_flops
def flops_of_rows(numbers: Sequence[float], tensors: Sequence[Tensor]) -> int:
    """Of all distances, two a number that a pair looks at."""
    distances = unpack(numbers, tensors)
    return 2 * distances.width * math.prod(distances.shape)


@operator("distances_of_pairs")
def _distances_of_pairs(
    numbers: Sequence[float], tensors: Sequence[Tensor], index: Tensor, slab: int, double: bool
) -> Tensor:
    dtype = torch.float64 if double else torch.float32
    return in_slabs(unpack(numbers, tensors), index, slab, dtype)


@_distances_of_pairs.register_fake
def _shape(
    numbers: Sequence[float], tensors: Sequence[Tensor], index: Tensor, slab: int, double: bool
) -> Tensor:
    shape = broadcast_shapes((*unpack(numbers, tensors).shape[:-1], 1), index.shape)
    return tensors[0].new_empty(shape, dtype=torch.float64 if double else torch.float32)
