"""Rules: ways to run an operation. One predicate decides and explains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.checks import in_this_package
from convnn_geo.kernels import Kernel, Separable, Taps
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operation import Operation, show_nan
from convnn_geo.pairs import Pairs
from convnn_geo.search import ENGINES
from convnn_geo.selection import KNearest
from convnn_geo.weighting import Weighting

Again: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values to the result."""


class Rule(ABC):
    """A way to run an operation, proved equal to the plain one."""

    name: str
    backend: str
    weighs = False
    """Whether it has the weights of pairs at hand, and :meth:`run_with_weights`."""

    @abstractmethod
    def refuses(self, op: Operation) -> str | None:
        """Why this rule can't run the operation; None where it can."""

    @abstractmethod
    def run(self, op: Operation) -> Tensor:
        """The result, ``(..., n, d)``."""

    def run_with_weights(
        self, op: Operation, search: str | None = None
    ) -> tuple[Tensor, Neighborhood, Tensor | None]:
        """The result, who was chosen, and weights ``(..., n, k)``; None for ones.

        Args:
            op: what is run.
            search: the engine by which a rule that searches does, instead of its own choice.
        """
        raise TypeError(f"{self.name} has no weights")

    def again(self, op: Operation) -> Again | None:
        """How it runs the same operation on other tensors that look like these, unasked.

        None where it would have to ask: where more is looked at than queries, keys and values.
        """
        return None


class Aggregation(Rule):
    """A rule that finds neighbours and their weights, then aggregates."""

    weighs = True

    def refuses(self, op: Operation) -> str | None:
        """Never."""
        return None

    def run(self, op: Operation) -> Tensor:
        """Find, weigh, aggregate."""
        return self.run_with_weights(op)[0]

    def run_with_weights(
        self, op: Operation, search: str | None = None
    ) -> tuple[Tensor, Neighborhood, Tensor | None]:
        """Find, weigh, aggregate."""
        pairs = op.pairs(op.neighborhood(search or self.search(op)))
        weight = _checked(op.weighting, op.weighting(pairs), pairs)
        out = self.aggregate(op, pairs, weight)
        return show_nan(out, op, pairs), pairs.neighborhood, weight

    def search(self, op: Operation) -> str:
        """The engine by which this rule searches."""
        return op.search

    @abstractmethod
    def aggregate(self, op: Operation, pairs: Pairs, weight: Tensor | None) -> Tensor:
        """The kernel on weighted pairs."""


def _checked(weighting: Weighting, weight: Tensor | None, pairs: Pairs) -> Tensor | None:
    """What a weighting gave, if it is one number a pair, or one a pair and channel."""
    if weight is None or in_this_package(weighting):
        return weight
    n, k = pairs.neighborhood.num_targets, pairs.neighborhood.k
    if weight.shape[-2:] != (n, k) and weight.shape[-3:-1] != (n, k):
        raise ValueError(
            f"{type(weighting).__name__}: expected weights of shape (..., {n}, {k}), or "
            f"(..., {n}, {k}, channels), got {tuple(weight.shape)}"
        )
    return weight


class Gather(Aggregation):
    """Neighbours as a regular array: select rows, weigh, reduce."""

    name = "gather"
    backend = "gather"

    def aggregate(self, op: Operation, pairs: Pairs, weight: Tensor | None) -> Tensor:
        """Select, weigh, reduce."""
        if op.kernel.knows("gather"):
            return op.kernel.gather(pairs, weight)
        return Kernel.gather(op.kernel, pairs, weight)


class TritonTaps(Gather):
    """The same with a kernel in Triton that reads neighbours where they lie, for taps on a GPU."""

    name = "triton_taps"
    backend = "triton"

    def refuses(self, op: Operation) -> str | None:
        """Needs taps, one weight a neighbour at most, and a GPU."""
        if type(op.kernel) not in (Taps, Separable):
            return f"the kernel is {type(op.kernel).__name__}, not taps"
        if op.value.dtype == torch.float64:
            return "values are torch.float64"
        return gpu.refuses(op.value.device)

    def search(self, op: Operation) -> str:
        """Triton searches as well, unless another engine is asked for."""
        return triton_search(op)

    def aggregate(self, op: Operation, pairs: Pairs, weight: Tensor | None) -> Tensor:
        """One kernel forward, two backward."""
        kernel: Taps | Separable = op.kernel  # type: ignore[assignment]
        return kernel.gather(pairs, weight, triton=True)


def triton_search(op: Operation) -> str:
    """Triton's search where that serves and no other is asked for."""
    selection = op.selection
    if op.search != "auto" or op.whole or type(selection) is not KNearest:
        return op.search
    query = op.query(selection.k * selection.dilation)
    return op.search if ENGINES["triton"].refuses(query) else "triton"
