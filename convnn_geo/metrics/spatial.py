"""Metrics over positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convnn_geo.checks import check_name, check_number
from convnn_geo.metrics.base import Metric, of_both, precise, register_metric
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import Distances
from convnn_geo.points import Points

_NORMS = {"l1": 1.0, "manhattan": 1.0, "l2": 2.0, "euclidean": 2.0, "chebyshev": torch.inf}


class Spatial(Metric):
    r"""Distance of positions, in pixels for images.

    .. math:: d(i, j) = \lVert s \odot (p_i - p_j) \rVert

    Args:
        p: ``"l1"``, ``"l2"``, ``"chebyshev"`` or the exponent of a norm.
        squared: the square of the distance (L2 only).
        scale: one factor an axis, or one for all; distances are measured after scaling.

    Example:
        >>> import torch
        >>> from convnn_geo.metrics import Spatial
        >>> from convnn_geo.points import Points
        >>> corners = Points(pos=torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        >>> [Spatial(p)(corners)[0, 1].item() for p in ("l1", "l2", "chebyshev")]
        [7.0, 5.0, 4.0]
    """

    def __init__(
        self,
        p: str | float = "l2",
        squared: bool = False,
        scale: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(p, str):
            p = _NORMS[check_name("norm", p, _NORMS)]
        elif p != torch.inf:
            p = check_number("p", p, 1.0)
        if squared and p != 2:
            raise ValueError(f"squared: only the L2 distance has a square here, got p={p}")
        self.p, self.squared = float(p), squared
        scales = scale if isinstance(scale, Sequence) else None if scale is None else (scale,)
        self.scale = (
            None
            if scales is None
            else tuple(check_number("scale", s, exclusive=True) for s in scales)
        )

    @property
    def rooted(self) -> bool:
        """Unless squared."""
        return not self.squared

    def distances(self, target: Points, source: Points) -> Distances:
        """Differences of positions."""
        q, k = of_both(lambda points: precise(points.position), target, source)
        if q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"positions of targets have {q.shape[-1]} axes, of sources {k.shape[-1]}"
            )
        if self.scale is not None and len(self.scale) not in (1, q.shape[-1]):
            raise ValueError(f"scale: expected 1 or {q.shape[-1]} factors, got {len(self.scale)}")
        scale = None
        if self.scale is not None:  # filled where it is wanted: to copy it would make the host wait
            parts = [q.new_full((1,), factor, dtype=torch.float64) for factor in self.scale]
            scale = torch.cat(parts)
        found = Differences(q, k, self.p, not self.squared, scale=scale)
        if target.pos is None and source.pos is None:  # then positions are those of grids
            found.factors = self.scale or ()
            found.grids = target.grid, source.grid  # type: ignore[assignment]
        return found

    def extra_repr(self) -> str:
        extra = [f"p={self.p}"]
        extra += ["squared=True"] if self.squared else []
        extra += [f"scale={self.scale}"] if self.scale is not None else []
        return ", ".join(extra)


register_metric("spatial", Spatial)
register_metric("squared_spatial", lambda: Spatial("l2", squared=True))
register_metric("chebyshev", lambda: Spatial("chebyshev"))
