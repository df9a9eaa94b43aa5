"""Neighborhood: who was chosen. The only currency between selection and aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from convnn_geo.checks import check_edges, check_int
from convnn_geo.operators import is_watched
from convnn_geo.shapes import broadcast_shapes


@dataclass(frozen=True)
class Neighborhood:
    """The neighbours of every target, in canonical order.

    Args:
        index: sources ``(..., n, k)``; without leading axes it serves every example.
        num_sources: ``m``.
        distance: ``(..., n, k)`` as searched, without gradient; None where none was computed.
        mask: ``(..., n, k)``, False where a slot is empty, whatever index and distance hold there;
            None where all are filled.
        complete: neighbour j is source j: every source, in order.

    Example:
        >>> import torch
        >>> from convnn_geo.neighborhood import Neighborhood
        >>> hood = Neighborhood(torch.tensor([[0, 1], [1, 0], [2, 1]]), num_sources=3)
        >>> edge_index, rank = hood.to_edge_index()
        >>> edge_index.tolist(), rank.tolist()
        ([[0, 1, 1, 0, 2, 1], [0, 0, 1, 1, 2, 2]], [0, 1, 0, 1, 0, 1])
    """

    index: Tensor
    num_sources: int
    distance: Tensor | None = None
    mask: Tensor | None = None
    complete: bool = False

    def __getitem__(self, item: object) -> NoReturn:
        """A tuple is expected by who knows other searches: nor can it be unpacked."""
        raise TypeError(
            "a Neighborhood is no tuple: take .index and .distance, or .to_edge_index() for edges"
        )

    @property
    def num_targets(self) -> int:
        """``n``."""
        return self.index.shape[-2]

    @property
    def k(self) -> int:
        """Neighbours of one target."""
        return self.index.shape[-1]

    def apply(self, function: Callable[[Tensor], Tensor]) -> Neighborhood:
        """The same function on index, distance and mask, where they are there."""
        distance, mask = (None if t is None else function(t) for t in (self.distance, self.mask))
        return replace(self, index=function(self.index), distance=distance, mask=mask)

    def to(self, device: torch.device | str) -> Neighborhood:
        """The same on another device."""
        return self.apply(lambda t: t.to(device))

    def expand(self, *lead: int) -> Neighborhood:
        """The same for leading axes ``lead``, as views."""
        return self.apply(lambda t: t.expand(*lead, *t.shape[-2:]))

    def padded(self, k: int) -> Neighborhood:
        """The same with empty slots up to ``k``, which name the nearest, or source 0."""
        missing = k - self.k
        if missing <= 0:
            return self
        pad = torch.nn.functional.pad
        full = torch.ones_like(self.index) if self.mask is None else self.mask
        mask, distance = pad(full, (0, missing)).bool(), self.distance
        if distance is not None:
            distance = pad(distance, (0, missing), value=torch.inf)
        nearest = self.index[..., :1] if self.k else self.index.new_zeros(*self.index.shape[:-1], 1)
        index = torch.cat([self.index, nearest.expand(*nearest.shape[:-1], missing)], -1)
        return replace(self, index=index, distance=distance, mask=mask)

    def trimmed(self) -> Neighborhood:
        """The same without slots at the end that are empty for all; on a GPU the host waits."""
        if self.mask is None or not self.mask.numel():
            return self
        used = self.mask.flatten(0, -2).any(0).nonzero()
        slots = int(used.max()) + 1 if len(used) else 0
        return self if slots == self.k else self.apply(lambda t: t[..., :slots])

    def within(self, distance: float) -> Neighborhood:
        """The same with slots empty whose neighbour is farther; a NaN stays, so that it shows."""
        if self.distance is None:
            raise ValueError("within: this neighbourhood has no distances")
        near = ~(self.distance > distance)
        return replace(self, mask=near if self.mask is None else near & self.mask)

    def raster(self, among: Tensor | None = None) -> Neighborhood:
        """The same neighbours in raster order, empty slots last.

        Args:
            among: each target's candidates ``(..., n, w)``, whose order is to be followed: that of
                a window's offsets, say. By source index where there are none.
        """
        key, last = self.index, self.num_sources
        if among is not None:
            key, last = _place(self.index, among), among.shape[-1]
        if self.mask is not None:
            key = torch.where(self.mask, key, last + 1)
        order = _ascending(key)
        return self.apply(lambda t: t.expand(order.shape).gather(-1, order))

    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(edge_index (2, E), rank (E,), slot (E,))``, sorted by target, then rank.

        Examples of a batch become disjoint graphs: target ``i`` of example ``b`` is node
        ``b * n + i``. ``slot`` is the place in the flattened ``(..., n, k)``.
        """
        shape = self.index.shape if self.mask is None else self.mask.shape
        shape = broadcast_shapes(shape, self.index.shape)
        n, k = shape[-2:]
        examples = math.prod(shape[:-2])
        device = self.index.device
        start = torch.arange(examples, device=device).view(*shape[:-2], 1, 1) * self.num_sources
        source = (self.index.expand(shape) + start).flatten()
        slot = torch.arange(examples * n * k, device=device)
        if self.mask is not None:
            kept = self.mask.expand(shape).flatten().nonzero().squeeze(-1)
            source, slot = source[kept], kept
        target = slot // max(k, 1)
        return torch.stack([source, target]), slot % max(k, 1), slot

    def to_edge_index(self) -> tuple[Tensor, Tensor]:
        """``edge_index (2, E)`` in PyG's form (source, target), and the rank of each edge."""
        edge_index, rank, _ = self.edges()
        return edge_index, rank

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        num_targets: int,
        num_sources: int,
        rank: Tensor | None = None,
        distance: Tensor | None = None,
        k: int | None = None,
    ) -> Neighborhood:
        """Edges in any order as a neighbourhood ``(n, k)`` without leading axes.

        Args:
            edge_index: ``(2, E)``, row 0 the source, row 1 the target.
            rank: ``(E,)``, the slot of each edge; see :func:`edge_rank` for the default.
            distance: ``(E,)``.
            k: slots; the largest rank + 1 by default.
        """
        check_edges(edge_index, edge_index.device)
        for name, values in (("rank", rank), ("distance", distance)):
            if values is not None and values.shape != edge_index.shape[1:]:
                raise ValueError(
                    f"from_edge_index: expected a {name} for each of {edge_index.shape[1]} edges, "
                    f"got shape {tuple(values.shape)}"
                )
        traced = torch.compiler.is_compiling()  # where there are no values to look at
        if not traced:
            _check_ends(edge_index, (num_sources, num_targets))
        if rank is None:
            rank = edge_rank(edge_index, distance)
        if k is None:
            k = int(rank.max()) + 1 if rank.numel() else 0
        elif traced:
            torch._assert_async(((rank >= 0) & (rank < k)).all())
        elif rank.numel() and int(rank.max()) >= check_int("k", k):
            raise ValueError(
                f"from_edge_index: a target has rank {int(rank.max())}, but there are only {k} "
                "slots; raise k or drop edges"
            )
        if not traced and rank.numel() and int(rank.min()) < 0:
            raise ValueError(f"from_edge_index: ranks count from 0, got {int(rank.min())}")
        source, target = edge_index[0], edge_index[1]
        slot = target * k + rank
        full = torch.zeros(num_targets * k, dtype=torch.bool, device=slot.device)
        full[slot] = True
        if not traced and int(full.sum()) != slot.numel():
            raise ValueError(
                "from_edge_index: two edges of one target have the same rank; give each its own"
            )
        index = torch.zeros(num_targets * k, dtype=torch.long, device=slot.device)
        index[slot] = source
        if distance is not None:
            values = distance.new_full((num_targets * k,), torch.inf)
            distance = values.scatter(0, slot, distance).view(num_targets, k)
        mask = full.view(num_targets, k)
        return cls(
            index.view(num_targets, k),
            num_sources,
            distance,
            None if not traced and bool(mask.all()) else mask,
        )


def _ascending(key: Tensor) -> Tensor:
    """The order that sorts each row, ties as they stand.

    On the CPU by numpy, which sorts numbers several times as fast as torch does pairs.
    """
    k = key.shape[-1]
    if not key.is_cpu or is_watched() or k < 2:
        return key.argsort(dim=-1, stable=True)
    pairs = key * k + torch.arange(k, device=key.device)
    return torch.from_numpy(np.sort(pairs.numpy(), axis=-1)) % k


def _check_ends(edge_index: Tensor, counts: tuple[int, int]) -> None:
    """Raise where an edge leaves the graph."""
    for name, ends, count in zip(("sources", "targets"), edge_index, counts, strict=True):
        if ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < count:
            raise ValueError(
                f"from_edge_index: {name} are numbered from {int(ends.min())} to "
                f"{int(ends.max())}, but there are {count}"
            )


def _place(index: Tensor, among: Tensor) -> Tensor:
    """Where each of ``index (..., n, k)`` first stands in its row of ``among (..., n, w)``.

    What stands nowhere is put before the next larger, or behind all.
    """
    lead = broadcast_shapes(index.shape[:-1], among.shape[:-1])
    ordered, order = among.expand(*lead, -1).sort(dim=-1, stable=True)
    found = torch.searchsorted(ordered, index.expand(*lead, -1).contiguous())
    return torch.nn.functional.pad(order, (0, 1), value=among.shape[-1]).gather(-1, found)


def edge_rank(edge_index: Tensor, distance: Tensor | None = None) -> Tensor:
    """Rank of each edge among those of its target, ``(E,)``.

    By distance and then source index where distances are given, by order of appearance otherwise.

    Example:
        >>> import torch
        >>> edge_rank(torch.tensor([[0, 1, 2], [5, 4, 5]])).tolist()
        [0, 0, 1]
    """
    source, target = edge_index[0], edge_index[1]
    order = torch.arange(target.numel(), device=target.device)
    keys = (target,) if distance is None else (source, distance, target)
    for key in keys:  # least significant first: stable sorts compose
        order = order[key[order].argsort(stable=True)]
    ordered = target[order]
    place = torch.arange(order.numel(), device=order.device)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(first, place, 0).cummax(0).values
    return torch.empty_like(place).scatter_(0, order, place - start)
