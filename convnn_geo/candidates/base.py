"""Where a target may look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor, nn

from convnn_geo.points import Grid, Points
from convnn_geo.shapes import broadcast_shapes


@dataclass(frozen=True)
class Subset:
    """The sources that each target may choose from.

    Args:
        index: source indices, ``(..., 1, r)`` where all targets share them, ``(..., n, w)`` where
            each has its own, None for all sources.
        mask: True where choice is allowed, broadcastable to ``(..., n, m | r | w)``; None for
            everywhere.
        repeated: ``(n, w)``, True where a window's padding names a source that it has named
            before; None where it names none twice.
        most: sources that a target may choose from at most, as far as sizes tell; None for all
            that are named.
        own: whether a target that is a source is surely among its own candidates.
    """

    index: Tensor | None = None
    mask: Tensor | None = None
    repeated: Tensor | None = None
    most: int | None = None
    own: bool = False

    def restrict(self, mask: Tensor | None) -> Subset:
        """The same with a mask over all sources, ``(..., n | 1, m)``, put upon it."""
        if mask is None:
            return self
        if self.index is not None:
            mask = _mask_at(mask, self.index)
        return self._masked(mask)

    def distinct(self) -> Subset:
        """The same with every source named once."""
        if self.repeated is None:
            return self
        return replace(self._masked(~self.repeated), repeated=None)

    def _masked(self, mask: Tensor) -> Subset:
        return replace(self, mask=mask if self.mask is None else self.mask & mask)


def _mask_at(mask: Tensor, index: Tensor) -> Tensor:
    n = max(mask.shape[-2], index.shape[-2])
    lead = broadcast_shapes(mask.shape[:-2], index.shape[:-2])
    mask = mask.expand(*lead, n, mask.shape[-1])
    return mask.gather(-1, index.expand(*lead, n, index.shape[-1]))


class Candidates(nn.Module, ABC):
    """Which sources a target may choose from; ``a & b`` is where both allow it."""

    @abstractmethod
    def forward(self, target: Points, source: Points) -> Subset:
        """The subset for these points."""

    def __and__(self, other: object) -> Candidates:
        return Both(self, other) if isinstance(other, Candidates) else NotImplemented


class Both(Candidates):
    """Sources that two sets of candidates both allow; what ``&`` makes.

    Example:
        >>> import torch
        >>> from convnn_geo.candidates import Causal, Window
        >>> from convnn_geo.points import Points
        >>> tokens = Points.from_tokens(torch.zeros(1, 4, 1))
        >>> (Window(3, padding=1) & Causal())(tokens, tokens).mask.int().tolist()
        [[0, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]]
    """

    def __init__(self, first: Candidates, second: Candidates) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, target: Points, source: Points) -> Subset:
        """The subset of the first, restricted to the second."""
        first, second = self.first(target, source), self.second(target, source)
        if first.index is not None and second.index is not None:
            raise ValueError(
                "candidates: at most one side of & may name sources by index (Window, Strided, "
                f"Random), got {self.first} & {self.second}"
            )
        if second.index is not None:
            first, second = second, first
        least = [subset.most for subset in (first, second) if subset.most is not None]
        return replace(
            first.restrict(second.mask),
            most=min(least, default=None),
            own=first.own and second.own,
        )


class All(Candidates):
    """Every source."""

    def forward(self, target: Points, source: Points) -> Subset:
        """No restriction."""
        return Subset()


def need_grid(what: str, points: Points) -> Grid:
    """The grid of points that must lie on one."""
    if points.grid is None:
        raise ValueError(f"{what} needs points on a grid (an image or a sequence), got none")
    return points.grid
