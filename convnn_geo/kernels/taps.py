"""Tap kernels: one weight matrix a neighbour, by rank or raster order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo.kernels.base import Kernel, flat_index, lowered, spread
from convnn_geo.kernels.gather_taps import gather_taps
from convnn_geo.operators import is_transformed
from convnn_geo.pairs import Pairs
from convnn_geo.shapes import broadcast_shapes


@dataclass(frozen=True, eq=False)
class Taps(Kernel):
    """``y_i = sum_j W_j rho_ij v_j + b``: standard, grouped and depthwise convolution kernels.

    Args:
        weight: ``(d, c // groups, k)`` or with several axes of taps, as a convolution's weight
            ``(d, c // groups, *kernel_size)``. ``groups = c`` is depthwise.
        bias: ``(d,)`` or None.
        groups: groups of channels.

    Example:
        >>> import torch
        >>> Taps(torch.zeros(8, 4, 3, 3)).k
        9
    """

    weight: Tensor
    bias: Tensor | None = None
    groups: int = 1

    @property
    def k(self) -> int:
        """Number of taps."""
        return math.prod(self.weight.shape[2:])

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """All taps at once, from slots ``(..., n, k, c)``."""
        self.check_slots(messages.shape[-2])
        if mask is not None:
            messages = messages * mask.unsqueeze(-1)
        weight = self.weight.flatten(2).unflatten(0, (self.groups, -1))
        grouped = messages.unflatten(-1, (self.groups, -1))
        out = torch.einsum("...kgc,gdck->...gd", grouped, weight).flatten(-2)
        return self._biased(out)

    def _biased(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def check_slots(self, k: int) -> None:
        """Raise unless there is one tap a neighbour."""
        if k != self.k:
            raise ValueError(f"the kernel has {self.k} taps, but targets have {k} neighbours")

    def gather(self, pairs: Pairs, weight: Tensor | None, triton: bool = False) -> Tensor:
        """Tap by tap: rows selected and multiplied, never ``(b, n, k, c)``; backward too."""
        hood, value = pairs.neighborhood, pairs.value
        self.check_slots(hood.k)
        if is_transformed() or (weight is not None and weight.ndim == value.ndim + 1):
            return super().gather(pairs, weight)
        lead = broadcast_shapes(
            value.shape[:-2],
            hood.index.shape[:-2],
            () if weight is None else weight.shape[:-2],
            () if hood.mask is None else hood.mask.shape[:-2],
        )
        m, c = value.shape[-2:]
        rows = lowered(value).expand(*lead, m, c).reshape(-1, c)
        index = flat_index(hood.index, lead, m)
        if hood.mask is not None:  # empty slots look at one more row, of zeros
            index = index.where(
                hood.mask.expand(*lead, *hood.mask.shape[-2:]).flatten(0, -2), rows.shape[0]
            )
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        rho = None if weight is None else spread(weight.to(rows.dtype), lead).t()
        taps = self.weight.flatten(2).permute(2, 0, 1)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        out = gather_taps(rows, index.t(), rho, taps.to(rows.dtype), bias, self.groups, triton)
        return out.view(*lead, hood.num_targets, out.shape[-1])


@dataclass(frozen=True, eq=False)
class Separable(Kernel):
    """A depthwise kernel, then one matrix over channels: ``y_i = P sum_j w_j rho_ij v_j + b``.

    Args:
        depthwise: ``(c, 1, k)`` or ``(c, 1, *kernel_size)``.
        pointwise: ``(d, c)``, or a 1 x 1 convolution's ``(d, c, 1, ...)``.
        bias: ``(d,)`` or None.
    """

    depthwise: Tensor
    pointwise: Tensor
    bias: Tensor | None = None

    @property
    def first(self) -> Taps:
        """The depthwise part."""
        return Taps(self.depthwise, None, self.depthwise.shape[0])

    def _mix(self, reduced: Tensor) -> Tensor:
        return torch.nn.functional.linear(reduced, self.pointwise.flatten(1), self.bias)

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Depthwise taps, then the mix."""
        return self._mix(self.first.reduce(messages, mask))

    def gather(self, pairs: Pairs, weight: Tensor | None, triton: bool = False) -> Tensor:
        """Likewise, without gathered copies."""
        return self._mix(self.first.gather(pairs, weight, triton))


@dataclass(frozen=True, eq=False)
class HeadTaps(Kernel):
    """Taps that differ from head to head: ``y_hi = sum_j W_hj rho_hij v_hj``.

    Args:
        weight: ``(heads, d, c, k)``, or ``(heads, c, 1, k)`` for depthwise taps.
    """

    weight: Tensor

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Taps of each head on slots ``(..., heads, n, k, c)``."""
        if mask is not None:
            messages = messages * mask.unsqueeze(-1)
        if self.weight.shape[-2] == 1:
            return torch.einsum("...hnkc,hck->...hnc", messages, self.weight.squeeze(-2))
        return torch.einsum("...hnkc,hdck->...hnd", messages, self.weight)
