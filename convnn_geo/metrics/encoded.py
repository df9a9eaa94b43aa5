"""A metric that sees points through an encoding: rotary embeddings and the like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from convnn_geo.metrics.base import Metric, as_metric, precise, seen_by
from convnn_geo.metrics.distances import Distances
from convnn_geo.points import Points


class Encoded(Metric):
    """``metric`` on encoded points; the values that are aggregated stay as they are.

    Args:
        metric: of the encoded points.
        encoding: module from :class:`Points` to :class:`Points`, applied to targets and sources.
    """

    def __init__(self, metric: Metric | str, encoding: nn.Module | Callable[[Points], Points]):
        super().__init__()
        self.metric = as_metric(metric)
        self.encoding = encoding

    @property
    def by_set(self) -> bool:  # type: ignore[override]
        """Unless the encoding says that it looks at each point alone."""
        return getattr(self.encoding, "by_set", True)

    @property
    def rooted(self) -> bool:
        """As the metric of encoded points."""
        return self.metric.rooted

    def distances(self, target: Points, source: Points) -> Distances:
        """Encode, then measure."""
        seen = self._encode(source)
        return self.metric.distances(seen if target is source else self._encode(target), seen)

    def _encode(self, points: Points) -> Points:
        x = None if points.x is None else seen_by(self.encoding, points.x)
        pos = None if points.pos is None else precise(points.pos)
        return self.encoding(replace(points, x=x, pos=pos))
