"""Points that coincide: of more than k in one place, the first k are all that can be chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_SPREAD = 0x2545F4914F6CDD1D  # any large odd number: equal rows meet when sorted by a mixed sum


@dataclass(frozen=True)
class Thinned:
    """Points less those that can't be chosen, since so many before them lie in the same place.

    Args:
        kept: ``(r,)``, places of the points that are left, ascending.
        size: points there were.
    """

    kept: Tensor
    size: int

    @classmethod
    def of(cls, points: Tensor, most: int) -> Thinned | None:
        """The first ``most`` of those in one place; None where no place holds more.

        Args:
            points: ``(m, d)``.
            most: neighbours wanted, and one for a point that is not to find itself.

        Example:
            >>> Thinned.of(torch.tensor([[1.0], [0.0], [1.0], [-0.0], [1.0]]), 2).kept.tolist()
            [0, 1, 2, 3]
        """
        if points.dtype not in _BITS or len(points) <= most:
            return None
        bits = (points + 0.0).view(_BITS[points.dtype]).long()  # -0 lies where 0 does
        mixed = torch.zeros_like(bits[:, 0])
        for column in bits.unbind(1):
            mixed = (mixed + column) * _SPREAD
            mixed = mixed ^ (mixed >> 29)
        order = mixed.argsort(stable=True)
        rows = bits[order]
        number = torch.arange(len(rows), device=points.device)
        # Rows of one sum that differ only split a group: then too many are kept, never too few.
        first = torch.ones_like(number, dtype=torch.bool)
        first[1:] = (rows[1:] != rows[:-1]).any(1)
        rank = number - torch.where(first, number, 0).cummax(0).values
        kept = order[rank < most].sort().values
        return None if len(kept) == len(points) else cls(kept, len(points))

    def renumbered(self, place: Tensor) -> Tensor:
        """Places among all points as places among those left; -1 for what is not."""
        number = torch.full((self.size,), -1, device=place.device)
        number[self.kept] = torch.arange(len(self.kept), device=place.device)
        return torch.where(place >= 0, number[place.clamp_min(0)], -1)
