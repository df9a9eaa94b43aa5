"""The kernel: what is done with a neighbourhood."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
from torch import Tensor
from torch_geometric.utils import scatter

from convnn_geo.checks import casts
from convnn_geo.metrics import full_precision
from convnn_geo.operators import is_watched
from convnn_geo.pairs import EdgePairs, Pairs
from convnn_geo.points import row_starts

Shape: TypeAlias = tuple[int, ...]


class Kernel(ABC):
    """``y_i = K({rho_ij v_j})``.

    A kernel says what each pair sends (:meth:`message`) and how a target reduces what it receives,
    on a regular neighbourhood (:meth:`reduce`) and on edges (:meth:`scatter`). One of your own
    implements :meth:`reduce`, and mostly that is all. ``pairs`` has ``x_j``, what neighbours send,
    ``x_i``, the target's features (say ``needs_target = True``), and ``offset``, where neighbours
    lie from it (``needs_offset = True``). A kernel with parameters is a module, too.

    Example:
        >>> from torch import nn
        >>> from convnn_geo.nn import PointConvNN
        >>> class Gated(nn.Module, Kernel):
        ...     needs_target = True
        ...
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.gate = nn.Linear(channels, channels)
        ...
        ...     def message(self, pairs):
        ...         return pairs.x_j * self.gate(pairs.x_i).sigmoid()
        ...
        ...     def reduce(self, messages, mask):  # (..., n, k, c) to (..., n, c)
        ...         return messages.amax(-2)
        >>> layer = PointConvNN(4, 4, k=3, kernel=Gated(4))
        >>> layer(torch.rand(9, 4), torch.rand(9, 3)).shape
        torch.Size([9, 4])
    """

    needs_target = False
    """Whether messages look at the target's features."""
    needs_offset = False
    """Whether messages look at relative positions."""
    counts_slots = True
    """Whether slots that are empty for all targets are anything else than none."""

    def project(self, value: Tensor) -> Tensor:
        """What is done to each source's value once, before it is sent: ``(..., m, c)``."""
        return value

    def knows(self, shortcut: str) -> bool:
        """Whether :meth:`gather` or :meth:`scatter` is this kernel's own.

        It is not where a subclass has another message or another way to reduce them, of which what
        it inherits knows nothing.
        """
        line = type(self).__mro__

        def given(name: str) -> int:
            return next(place for place, kind in enumerate(line) if name in vars(kind))

        return given(shortcut) <= min(map(given, ("message", "reduce", "finish")))

    def message(self, pairs: Pairs | EdgePairs) -> Tensor:
        """What a pair sends before weighting, ``(..., n, k, c)`` or ``(E, c)``."""
        return pairs.x_j

    @abstractmethod
    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """``(..., n, k, c)`` to ``(..., n, d)``; masked messages are to be ignored."""

    def scatter(
        self, messages: Tensor, target: Tensor, rank: Tensor, shape: Shape, k: int
    ) -> Tensor:
        """Messages of edges ``(E, c)`` into slots ``(target, rank)``, then :meth:`reduce`.

        Args:
            messages: one an edge.
            target: ``(E,)``, counted through ``shape``.
            rank: ``(E,)``, the slot of each edge.
            shape: leading shape ``(..., n)`` of the targets.
            k: slots of a target.
        """
        slot, slots = target * k + rank, math.prod(shape) * k
        filled = messages.new_zeros(slots, messages.shape[-1]).index_add(0, slot, messages)
        mask = torch.zeros(slots, dtype=torch.bool, device=slot.device)
        mask[slot] = True
        return self.reduce(filled.view(*shape, k, messages.shape[-1]), mask.view(*shape, k))

    def finish(self, reduced: Tensor, x_i: Tensor | None) -> Tensor:
        """What is done after reduction, with the targets' own features ``(..., n, c)``."""
        return reduced

    def gather(self, pairs: Pairs, weight: Tensor | None) -> Tensor:
        """The kernel on a regular neighbourhood: ``(..., n, d)``."""
        messages = self.message(pairs)
        if weight is not None:
            messages = messages * (weight if weight.ndim == messages.ndim else weight[..., None])
        return self.finish(self.reduce(messages, pairs.mask), pairs.target.x)


class Join(Kernel):
    """Several reductions side by side, as channels.

    Args:
        kernels: e.g. ``Mean(), Max()``.
    """

    def __init__(self, *kernels: Kernel) -> None:
        for kernel in kernels:
            for part in ("message", "project", "finish"):
                if getattr(type(kernel), part) is not getattr(Kernel, part):
                    raise ValueError(
                        f"Join: takes kernels that reduce what all of them are sent, "
                        f"{type(kernel).__name__} has a {part} of its own"
                    )
        self.kernels = kernels

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Each reduction of the same messages."""
        return torch.cat([kernel.reduce(messages, mask) for kernel in self.kernels], -1)


class Sum(Kernel):
    """Sum of weighted values."""

    counts_slots = False

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Sum over neighbours."""
        return (messages if mask is None else messages * mask.unsqueeze(-1)).sum(-2)

    def scatter(
        self, messages: Tensor, target: Tensor, rank: Tensor, shape: Shape, k: int
    ) -> Tensor:
        """Sum over edges."""
        return _scatter(messages, target, shape, "sum")

    def gather(self, pairs: Pairs, weight: Tensor | None) -> Tensor:
        """One small product a target; nothing of size ``n k c`` beside the gathered values."""
        if weight is None or weight.ndim == pairs.value.ndim + 1:
            return super().gather(pairs, weight)
        weight = weight.to(pairs.value.dtype)
        with full_precision(weight.device):  # a sum keeps its dtype, as torch's pooling does
            if pairs.neighborhood.complete:
                return torch.matmul(weight, pairs.value)
            return torch.matmul(weight.unsqueeze(-2), pairs.x_j).squeeze(-2)


class Mean(Kernel):
    """Mean of weighted values.

    Args:
        count_empty: divide by k even where slots are empty, as average pooling over a padded
            border does.
    """

    def __init__(self, count_empty: bool = False) -> None:
        self.count_empty = self.counts_slots = count_empty

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Mean over neighbours; 0 where there are none."""
        if not messages.shape[-2]:
            return messages.sum(-2)
        if mask is None:
            return messages.mean(-2)
        total = (messages * mask.unsqueeze(-1)).sum(-2)
        count = mask.shape[-1] if self.count_empty else mask.sum(-1, keepdim=True).clamp_min(1)
        return total / count

    def scatter(
        self, messages: Tensor, target: Tensor, rank: Tensor, shape: Shape, k: int
    ) -> Tensor:
        """Mean over edges."""
        if self.count_empty:
            return _scatter(messages, target, shape, "sum") / max(k, 1)
        return _scatter(messages, target, shape, "mean")


class Max(Kernel):
    """Maximum of weighted values, channel by channel; 0 where there are no neighbours."""

    counts_slots = False

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Maximum over neighbours."""
        if not messages.shape[-2]:
            return messages.sum(-2)
        if mask is None:
            return _largest(messages)
        best = _largest(messages.masked_fill(~mask.unsqueeze(-1), -torch.inf))
        return best.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def _largest(messages: Tensor) -> Tensor:
    """Over neighbours; the first of equal values takes the gradient.

    Where there is none, nobody asks who it is: ten times as fast on the CPU. What is traced may be
    given a gradient later.
    """
    if messages.requires_grad or is_watched():
        return messages.max(-2).values
    return messages.amax(-2)


def lowered(tensor: Tensor) -> Tensor:
    """What autocast makes of a convolution's input; the tensor itself where it is off."""
    if not casts(tensor.device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _scatter(messages: Tensor, target: Tensor, shape: Shape, reduce: str) -> Tensor:
    out = scatter(messages, target, dim=0, dim_size=math.prod(shape), reduce=reduce)
    return out.view(*shape, messages.shape[-1])


def spread(weight: Tensor, lead: torch.Size) -> Tensor:
    """Weights ``(..., n, k)`` for leading axes ``lead``, flattened to rows ``(B n, k)``."""
    return weight.expand(*lead, *weight.shape[-2:]).reshape(-1, weight.shape[-1])


def flat_index(index: Tensor, lead: torch.Size, num_sources: int) -> Tensor:
    """Indices ``(..., n, k)`` into rows of all examples, ``(B n, k)``."""
    start = row_starts(math.prod(lead), num_sources, index.device).view(*lead, 1, 1)
    return (index + start).flatten(0, -2)
