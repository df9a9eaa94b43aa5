"""What is asked of a search engine, and what an engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convnn_geo.caching import once
from convnn_geo.candidates import Subset
from convnn_geo.metrics import Distances, Metric, full_precision
from convnn_geo.operators import without_gradient
from convnn_geo.points import Points
from convnn_geo.search.problem import Problem

SORTING = 7
"""Times a slab of float32 that is taken on a GPU: 6 to sort it, as measured, and results beside."""


@dataclass(frozen=True)
class Query:
    """For each target its ``k`` nearest sources.

    Args:
        target: ``n`` points.
        source: ``m`` points.
        metric: how near.
        k: neighbours.
        subset: where to look.
        excluded: ``(n,)``, one source for each target that is not to be found; None for none.
        memory: bytes that distances, and sorting them, may take; by default what suits the device.
        bind: gives the metric bound to the points; by default it is bound here, without gradient.
        exact: report the chosen pairs' distances; otherwise what orders like them will do.
    """

    target: Points
    source: Points
    metric: Metric
    k: int
    subset: Subset = field(default_factory=Subset)
    excluded: Tensor | None = None
    memory: int | None = None
    bind: Callable[[], Distances] | None = None
    exact: bool = True

    @once
    def bound(self) -> Distances:
        """The metric bound to the points."""
        if self.bind is not None:
            return self.bind()
        return without_gradient(lambda: self.metric.bind(self.target, self.source))

    @once
    def problem(self) -> Problem | None:
        """The same in terms of tensors; None for metrics that are neither points nor products."""
        return Problem.of(self.bound, self.dtype, self.exact)

    @once
    def dimension(self) -> int | None:
        """Of points whose Euclidean order is the metric's; None where there are none."""
        return None if self.problem is None else self.problem.dimension

    @property
    def slab(self) -> int:
        """Bytes of a slab: on the CPU what stays in cache (measured: 8 MiB of 4 to 64).

        Less where distances are added up in float64, which takes several slabs at once (measured:
        1 MiB of 0.1 to 4). Elsewhere a part of what may be taken: to sort a slab takes several
        times as much.
        """
        if self.target.device.type == "cpu":
            fits = 2**20 if self.problem is None else 2**23
            return fits if self.memory is None else self.memory
        return (2**28 if self.memory is None else self.memory) // SORTING

    @property
    def dtype(self) -> torch.dtype:
        """Of distances: float32 or better."""
        seen = self.target.x if self.target.x is not None else self.target.pos
        double = seen is not None and seen.dtype == torch.float64
        return torch.float64 if double else torch.float32

    @property
    def plain(self) -> bool:
        """Whether all sources are open to every target."""
        return self.subset.index is None and self.subset.mask is None and self.excluded is None


class Engine(ABC):
    """A way to find the k nearest. One predicate decides and explains.

    Every engine returns the same neighbours in the same order: by distance, then source index.
    """

    name: str
    approximate = False
    """Whether it may miss neighbours."""

    def missing(self) -> str | None:
        """What is not installed, and how to; None where nothing is missing."""
        return None

    @abstractmethod
    def refuses(self, query: Query) -> str | None:
        """Why this engine can't answer the query; None where it can."""

    @abstractmethod
    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """Index, distance and mask, each ``(..., n, k)``; the mask is None where all are filled."""

    def __call__(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """:meth:`run` without gradient and in full precision."""
        _ = query.bound  # not without gradient: weights may be computed from the same
        with torch.no_grad(), full_precision(query.target.device):
            return self.run(query)
