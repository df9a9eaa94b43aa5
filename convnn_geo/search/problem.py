"""A search as tensors alone: what every engine and every operator takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convnn_geo.metrics import Angular, BilinearForm, Differences, Distances
from convnn_geo.metrics.distances import take
from convnn_geo.shapes import broadcast_shapes


@dataclass(frozen=True)
class Problem:
    """Whose ``k`` nearest are wanted, in terms of tensors alone.

    Args:
        kind: ``"points"``: by distance; ``"angles"``: of vectors of length one or zero;
            ``"products"``: by ``bias - scale <q, keys>``.
        q: ``(..., n, d)``.
        keys: ``(..., m, d)``.
        bias: ``(..., m)`` or None, of ``"products"``.
        scale: of ``"products"``.
        dtype: in which distances are compared.
        axes: ``(..., 1, d | 1)``, by which differences of ``"points"`` are scaled; None for 1.
        exact: whether values are wanted as they are compared; otherwise good to rounding.
    """

    kind: str
    q: Tensor
    keys: Tensor
    bias: Tensor | None
    scale: float
    dtype: torch.dtype
    axes: Tensor | None = None
    exact: bool = False

    @classmethod
    def of(cls, bound: Distances, dtype: torch.dtype, exact: bool = False) -> Problem | None:
        """Distances as a problem; None for forms that are neither points nor products."""
        sharp = bound.sharp()
        if isinstance(sharp, Angular):
            return cls("angles", sharp.q, sharp.k, None, 1.0, dtype, None, exact)
        if isinstance(sharp, Differences) and sharp.p == 2:
            return cls("points", sharp.q, sharp.k, None, 1.0, dtype, sharp.scale, exact)
        points = sharp.coordinates()
        if points is not None:
            return cls("points", *points, None, 1.0, dtype, None, exact)
        product = sharp if isinstance(sharp, BilinearForm) else None
        if product is None and sharp.bilinear() is not None:
            product = sharp.double().bilinear()  # combined, and not yet rounded
        if product is None:
            return None
        return cls("products", product.q, product.k, product.b, product.scale, dtype, None, exact)

    def arguments(self) -> tuple[Any, ...]:
        """As operators take it, without gradient; :meth:`from_arguments` puts it together again."""
        tensors = (self.q, self.keys, self.bias, self.axes)
        plain = (None if t is None else t.detach() for t in tensors)
        return (self.kind, *plain, float(self.scale), self.dtype == torch.float64, self.exact)

    @classmethod
    def from_arguments(
        cls,
        kind: str,
        q: Tensor,
        keys: Tensor,
        bias: Tensor | None,
        axes: Tensor | None,
        scale: float,
        double: bool,
        exact: bool,
    ) -> Problem:
        """What :meth:`arguments` took apart."""
        dtype = torch.float64 if double else torch.float32
        return cls(kind, q, keys, bias, scale, dtype, axes, exact)

    def targets(self, index: Tensor) -> Problem:
        """The same from the targets ``index (..., 1, r)`` alone."""
        return replace(self, q=take(self.q, index))

    def between(self, start: int, stop: int) -> Problem:
        """The same from the targets ``start:stop`` alone."""
        return replace(self, q=self.q[..., start:stop, :])

    @property
    def dimension(self) -> int | None:
        """Of :meth:`coordinates`; None where there are none."""
        if self.kind == "products":
            return self.q.shape[-1] + 1 if self.scale > 0 else None
        return self.bound().dimension

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Points ``(..., n, d)`` and ``(..., m, d)`` whose Euclidean order is the same order.

        Of products by one more axis, which makes ``|key|^2 - 2 bias / scale`` the same for all
        keys (Bachrach et al., RecSys 2014).
        """
        if self.kind != "products":
            return self.bound().coordinates()  # type: ignore[return-value]
        keys = self.keys.double()
        size = keys.square().sum(-1)
        if self.bias is not None:
            size = size - 2 / self.scale * self.bias.double()
        rest = (size.amax(-1, keepdim=True) - size).sqrt().to(self.keys.dtype).unsqueeze(-1)
        lead = broadcast_shapes(self.keys.shape[:-2], rest.shape[:-2])
        wide = self.keys.expand(*lead, *self.keys.shape[-2:])
        return torch.nn.functional.pad(self.q, (0, 1)), torch.cat([wide, rest], -1)

    def bound(self) -> Distances:
        """The distances again."""
        if self.kind == "angles":
            return Angular(self.q, self.keys)
        if self.kind == "points":
            return Differences(self.q, self.keys, root=False, scale=self.axes)
        return BilinearForm(self.q, self.keys, None, self.bias, self.scale)
