"""Neighborhood: who was chosen. The only currency between selection and aggregation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convnn_geo.checks import check_int, check_tensor


@dataclass(frozen=True)
class Neighborhood:
    """The neighbours of every target, in canonical order.

    Args:
        index: sources ``(..., n, k)``; without leading axes it serves every example.
        num_sources: ``m``.
        distance: ``(..., n, k)`` as searched, without gradient; None where none was computed.
        mask: ``(..., n, k)``, False where a slot is empty; None where all are filled.
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

    @property
    def num_targets(self) -> int:
        """``n``."""
        return self.index.shape[-2]

    @property
    def k(self) -> int:
        """Neighbours of one target."""
        return self.index.shape[-1]

    def to(self, device: torch.device | str) -> Neighborhood:
        """The same on another device."""
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        return replace(
            self, index=self.index.to(device), distance=move(self.distance), mask=move(self.mask)
        )

    def expand(self, *lead: int) -> Neighborhood:
        """The same for leading axes ``lead``, as views."""

        def grow(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.expand(*lead, *t.shape[-2:])

        return replace(
            self, index=grow(self.index), distance=grow(self.distance), mask=grow(self.mask)
        )

    def raster(self) -> Neighborhood:
        """The same neighbours in raster order: by source index, empty slots last."""
        key = self.index
        if self.mask is not None:
            key = torch.where(self.mask, key, self.num_sources)
        order = key.argsort(dim=-1, stable=True)

        def sort(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.expand(order.shape).gather(-1, order)

        return replace(self, index=sort(self.index), distance=sort(self.distance), mask=sort(self.mask))

    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(edge_index (2, E), rank (E,), slot (E,))``, sorted by target, then rank.

        Examples of a batch become disjoint graphs: target ``i`` of example ``b`` is node
        ``b * n + i``. ``slot`` is the place in the flattened ``(..., n, k)``.
        """
        shape = self.index.shape if self.mask is None else self.mask.shape
        shape = torch.broadcast_shapes(shape, self.index.shape)
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
        check_tensor("edge_index", edge_index, 2)
        if rank is None:
            rank = edge_rank(edge_index, distance)
        if k is None:
            k = int(rank.max()) + 1 if rank.numel() else 0
        elif rank.numel() and int(rank.max()) >= check_int("k", k):
            raise ValueError(
                f"from_edge_index: a target has rank {int(rank.max())}, but there are only {k} "
                "slots; raise k or drop edges"
            )
        source, target = edge_index[0], edge_index[1]
        slot = target * k + rank
        full = torch.zeros(num_targets * k, dtype=torch.bool, device=slot.device)
        full[slot] = True
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
            None if bool(mask.all()) else mask,
        )


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
