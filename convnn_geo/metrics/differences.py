"""Distances from differences of coordinates: norms, squared or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from convnn_geo.metrics.bilinear import BilinearForm
from convnn_geo.metrics.chosen import of_pairs
from convnn_geo.metrics.distances import (
    DIRECT_DIMENSIONS,
    Distances,
    beginning,
    pairs_shape,
    some,
    take,
)
from convnn_geo.operators import is_transformed
from convnn_geo.points import Grid, gather_rows


@dataclass
class Differences(Distances):
    """``d(i, j) = (sum_a |scale_a (q_ia - k_ja)|^p)^(1/p)``, p-th root optional.

    Args:
        q: ``(..., n, d)``.
        k: ``(..., m, d)``.
        p: exponent of the norm; ``inf`` for Chebyshev.
        root: take the p-th root; False gives the squared distance for ``p = 2``.
        offset: similarity is ``offset - distance``.
        scale: ``(..., 1, d | 1)``, of the axes. Differences are scaled, not coordinates: so what
            is equally far stays equally far.
        precision: dtype to compute in, that of the points by default. Points are converted where
            they are used: often that is a few.
        factors: where points are pixels, the scale once more as numbers, for which nobody waits
            for a device; () for none. None where they are not.
        grids: on which those pixels lie, of targets and of sources; None where who took this
            apart has looked.
    """

    q: Tensor
    k: Tensor
    p: float = 2.0
    root: bool = True
    offset: float | Tensor = 0.0
    scale: Tensor | None = None
    precision: torch.dtype | None = None
    factors: tuple[float, ...] | None = None
    grids: tuple[Grid, Grid] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which distances are computed."""
        return self.q.dtype if self.precision is None else self.precision

    @property
    def shape(self) -> torch.Size:
        return pairs_shape(self.q, self.k)

    @property
    def wide(self) -> bool:
        """Whether the dimension is too high for sums in the order of axes."""
        return self.q.shape[-1] > DIRECT_DIMENSIONS

    @property
    def plain(self) -> bool:
        """Whether these are Euclidean, of few axes, and neither scaled nor converted."""
        return self.p == 2 and not self.wide and self.scale is None and self.precision is None

    def of_square(self, total: Tensor) -> Tensor:
        """The distance whose square is given; for ``p = 2``."""
        return _safe_root(total, 2.0) if self.root else total

    def _norm(self, parts: Iterable[Tensor]) -> Tensor:
        """Combine per-axis differences, in the order of axes: the same sum on every path.

        Without gradient they are written over: fresh memory costs more than a sum.
        """
        if torch.is_grad_enabled() or is_transformed():
            combined = torch.maximum if self.p == torch.inf else torch.add
            total = reduce(combined, map(self._term, parts))
        elif self.p == torch.inf:
            total = reduce(lambda a, b: torch.maximum(a, b, out=a), map(Tensor.abs_, parts))
        else:
            total = reduce(Tensor.add_, map(self._term_, parts))
        return _safe_root(total, self.p) if self.root and self.p not in (1, torch.inf) else total

    def _term(self, part: Tensor) -> Tensor:
        if self.p == 2:
            return part.square()
        return part.abs() if self.p in (1, torch.inf) else part.abs().pow(self.p)

    def _term_(self, part: Tensor) -> Tensor:
        if self.p == 2:
            return part.square_()
        return part.abs_() if self.p == 1 else part.abs_().pow_(self.p)

    def single(self, difference: Tensor) -> Tensor:
        """The distance of points that differ, after scaling, on one axis alone."""
        return self._norm([difference.clone()])

    def axis_scale(self, axis: int) -> Tensor | float:
        """Of one axis, ``(..., 1)``."""
        if self.scale is None:
            return 1.0
        return self.scale[..., min(axis, self.scale.shape[-1] - 1)].to(self.dtype)

    def _direct(self, q: Tensor, k: Tensor) -> Tensor:
        # One axis at a time, so that one slab of memory is enough.
        axes = range(q.shape[-1])
        if self.scale is None:
            return self._norm(q[..., axis] - k[..., axis] for axis in axes)
        scales = (self.axis_scale(axis).unsqueeze(-1) for axis in axes)  # type: ignore[union-attr]
        return self._norm(
            (q[..., axis] - k[..., axis]) * scale for axis, scale in zip(axes, scales, strict=True)
        )

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        q, k = self.q[..., start:stop, :].to(self.dtype), self.k.to(self.dtype)
        if not self.wide:
            return self._direct(q.unsqueeze(-2), k.unsqueeze(-3))
        if self.scale is not None:
            q, k = (t * self.scale.to(t.dtype) for t in (q, k))
        distance = torch.cdist(q, k, self.p, compute_mode="donot_use_mm_for_euclid_dist")
        return distance if self.root else distance.pow(self.p)

    @property
    def width(self) -> int:
        return self.q.shape[-1]

    def at(self, index: Tensor, start: int = 0) -> Tensor:
        q = beginning(self.q, start, index)
        if self.wide and self.p == 2 and self.scale is None:
            square = of_pairs("squares", q, self.k, index, self.dtype)
            return _safe_root(square, self.p) if self.root else square
        q, k = q.unsqueeze(-2).to(self.dtype), gather_rows(self.k, index).to(self.dtype)
        if not self.wide:
            return self._direct(q, k)
        parts = q - k
        if self.scale is not None:
            parts = parts * self.scale.to(parts.dtype).unsqueeze(-2)
        if self.p == torch.inf:
            return parts.abs().amax(-1)
        if self.p == 1:
            return parts.abs().sum(-1)
        total = (parts.square() if self.p == 2 else parts.abs().pow(self.p)).sum(-1)
        return _safe_root(total, self.p) if self.root else total

    def select(self, index: Tensor) -> Differences:
        return replace(self, k=take(self.k, index))

    def targets(self, index: Tensor) -> Differences:
        return replace(self, q=take(self.q, index))

    def examples(self, start: int, stop: int) -> Differences:
        if len(self.shape) == 2:
            return self
        axes = len(self.shape)
        q, k = (some(t, axes, start, stop) for t in (self.q, self.k))
        scale = None if self.scale is None else some(self.scale, axes, start, stop)
        return replace(self, q=q, k=k, scale=scale)

    @property
    def dimension(self) -> int | None:
        return self.q.shape[-1] if self.p == 2 else None

    def coordinates(self) -> tuple[Tensor, Tensor] | None:
        if self.p != 2 or self.scale is None:
            return (self.q, self.k) if self.p == 2 else None
        scale = self.scale.double()
        return self.q.double() * scale, self.k.double() * scale

    def bilinear(self) -> BilinearForm | None:
        return None if self.p != 2 or self.root else self.product(self.dtype)

    def product(self, dtype: torch.dtype) -> BilinearForm:
        """Squared distances as one matrix product.

        Centred, so that |q|^2 + |k|^2 - 2 <q, k> cancels as little as it can. The centre is a
        constant: it drops out of the result, and one point's NaN must not reach all others.
        """
        center = _center(self.k.detach()).to(self.dtype)
        q, k = self.q.to(self.dtype) - center, self.k.to(self.dtype) - center
        if self.scale is not None:
            q, k = (t * self.scale.to(t.dtype) for t in (q, k))
        q, k = q.to(dtype), k.to(dtype)
        return BilinearForm(q, k, q.square().sum(-1), k.square().sum(-1), 2.0, self.offset)

    def sharp(self) -> Differences:
        # Other powers than squares leave the range of floats too soon.
        return replace(self, root=False) if self.root and self.p == 2 else self

    def double(self) -> Differences:
        return replace(self, precision=torch.float64)

    def apart(self) -> Distances:
        return replace(self, root=False, precision=torch.float64)

    def refined(self) -> Differences:
        # What is rounded more than once, or by a vectorised root, goes by roundoff in float32.
        sums = self.wide and self.p != torch.inf
        rounds = sums or self.scale is not None or self.p not in (1, 2, torch.inf)
        return self.double() if rounds else self

    def exactly(self, dtype: torch.dtype) -> Distances | None:
        sharp = self.refined().sharp()
        return sharp.product(torch.float64) if dtype != torch.float64 else sharp

    def ordering(self, dtype: torch.dtype | None = None) -> Distances:
        if self.p != 2 or not self.wide:
            return self.refined().sharp()
        return self.product(self.dtype if dtype is None else dtype).sharp()


def _center(points: Tensor) -> Tensor:
    """A point amid ``points``, on a lattice: its step is a power of two no wider than they lie.

    So integers less the centre are integers, and what is equally far stays equally far.
    """
    if not points.shape[-2]:
        return points.new_zeros(1, points.shape[-1])
    finite = points.nan_to_num(0.0, 0.0, 0.0)
    mean = finite.mean(-2, keepdim=True)
    spread = (finite - mean).abs().amax((-2, -1), keepdim=True)
    step = spread / torch.frexp(spread).mantissa / 2
    return torch.where(spread > 0, (mean / step).round() * step, mean)


def _safe_root(total: Tensor, p: float) -> Tensor:
    """The p-th root, with gradient 0 instead of infinity where points coincide."""
    if not (total.requires_grad or is_transformed()):  # forward mode requires none
        return total.pow(1 / p)
    zero = total == 0  # a NaN is none, and stays
    return torch.where(zero, 0, torch.where(zero, 1, total).pow(1 / p))
