"""Whom to keep: the k nearest, those within a radius, or every candidate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from convnn_geo.candidates import Subset
from convnn_geo.checks import check_int, check_name, check_number
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.search import Query, find, with_self_first, within_reach
from convnn_geo.shapes import broadcast_shapes
from convnn_geo.typing import SELF_POINTS


class Selection(nn.Module, ABC):
    """Chooses neighbours. ``query.k`` is for the selection to fill in."""

    @abstractmethod
    def forward(self, query: Query, own: Tensor | None, search: str = "auto") -> Neighborhood:
        """The neighbourhood.

        Args:
            query: targets, sources, metric and candidates.
            own: ``(n,)``, the source that each target is; None where targets are no sources.
            search: engine.
        """

    def asked(self, query: Query, own: Tensor | None) -> Query | None:
        """What it asks of a search engine; None where it asks none.

        Args:
            query: targets, sources, metric and candidates.
            own: ``(n,)``, the source that each target is; None where targets are no sources.
        """
        return None


class Every(Selection):
    """Every candidate, in order of source index."""

    def forward(self, query: Query, own: Tensor | None, search: str = "auto") -> Neighborhood:
        """All candidates as neighbours; no distance is computed."""
        index, mask = query.subset.index, query.subset.mask
        n, m = query.target.num_points, query.source.num_points
        complete = index is None
        if index is None:
            index = torch.arange(m, device=query.target.device).expand(n, m)
        elif index.shape[-2] != n:
            index = index.expand(*index.shape[:-2], n, index.shape[-1])
        if mask is not None:
            lead = broadcast_shapes(mask.shape[:-2], index.shape[:-2])
            mask = mask.expand(*lead, n, index.shape[-1])
        return Neighborhood(index, m, None, mask, complete)


class KNearest(Selection):
    """The ``k`` nearest candidates, nearest first, ties to the lowest source index.

    A source is chosen once, even where a window's padding names it several times. Where borders
    and masks leave a target fewer than ``k`` candidates, its last slots are empty.

    Args:
        k: neighbours.
        dilation: keep every ``dilation``-th of the ``k * dilation`` nearest, as ViG does.
        self_point: ``"natural"``: where it ranks; ``"first"``: neighbour 0, whatever its distance;
            ``"excluded"``: never a neighbour.
        short: where the sizes alone tell that every target has fewer candidates than k (a
            window of 3 x 3 has 9, and 8 without the point itself): ``"error"``, or ``"pad"`` for
            empty slots there, too.

    Example:
        >>> KNearest(9, dilation=2)
        KNearest(k=9, dilation=2, self_point='natural', short='error')
    """

    def __init__(
        self, k: int, dilation: int = 1, self_point: str = "natural", short: str = "error"
    ) -> None:
        super().__init__()
        self.k, self.dilation = check_int("k", k), check_int("dilation", dilation)
        self.self_point = check_name("self_point", self_point, SELF_POINTS)
        self.short = check_name("short", short, ("error", "pad"))

    def forward(self, query: Query, own: Tensor | None, search: str = "auto") -> Neighborhood:
        """Search; with the point itself put first or left out where asked."""
        found = find(self.asked(query, own), search)
        if self.self_point == "first":
            found = with_self_first(found, query.bound, own)  # type: ignore[arg-type]
        return _dilate(found, self.dilation).padded(self.k)

    def asked(self, query: Query, own: Tensor | None) -> Query:
        """The nearest among distinct candidates, or those beside the point itself."""
        if self.self_point != "natural" and own is None:
            raise ValueError(
                f"self_point={self.self_point!r} needs targets that are among the sources"
            )
        subset = query.subset.distinct()
        wanted, spare = self.k * self.dilation, self.spare(subset, query.source.num_points)
        k = min(wanted, spare) if self.short == "pad" else wanted
        if k > spare:
            raise ValueError(
                f"k={self.k}"
                + (f" with dilation {self.dilation}" if self.dilation > 1 else "")
                + f" needs {wanted} candidates, but there are {spare}"
                + (" besides the point itself" if self.self_point == "excluded" else "")
                + "; lower k, widen the candidates, or select by KNearest(..., short='pad')"
            )
        excluded = None if self.self_point == "natural" else own
        others = k - (self.self_point == "first")
        return replace(query, subset=subset, k=others, excluded=excluded)

    def spare(self, subset: Subset, m: int) -> int:
        """The most of ``m`` sources that a target may be left with, as far as sizes tell."""
        named = m if subset.index is None else subset.index.shape[-1]
        most = named if subset.most is None else min(named, subset.most)
        if self.self_point == "natural":
            return most
        others = min(most - 1 if subset.own else most, m - 1)
        return others + 1 if self.self_point == "first" else others

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, dilation={self.dilation}, self_point={self.self_point!r}, "
            f"short={self.short!r}"
        )


class Radius(Selection):
    """Candidates at a distance of at most ``r``, nearest first, at most ``max_k`` of them.

    Args:
        r: radius, in the metric's unit (squared for a squared metric).
        max_k: the most neighbours to keep; the nearest are kept.
    """

    def __init__(self, r: float, max_k: int) -> None:
        super().__init__()
        self.r, self.max_k = check_number("r", r), check_int("max_k", max_k)

    def forward(self, query: Query, own: Tensor | None, search: str = "auto") -> Neighborhood:
        """The nearest ``max_k``, masked beyond the radius."""

        def ask(k: int) -> Neighborhood:
            return find(self._nearest(k, query, own), search).within(self.r)

        if query.target.device.type != "cpu":  # where looking would be waiting
            return ask(self.max_k).padded(self.max_k)
        found = within_reach(ask, self.max_k, query.metric, query.source, query.target)
        return found.padded(self.max_k)

    def asked(self, query: Query, own: Tensor | None) -> Query:
        """The nearest, whose distances decide."""
        return self._nearest(self.max_k, query, own)

    def _nearest(self, k: int, query: Query, own: Tensor | None) -> Query:
        return KNearest(k, short="pad").asked(replace(query, exact=True), own)

    def extra_repr(self) -> str:
        return f"r={self.r}, max_k={self.max_k}"


class Given(Selection):
    """A neighbourhood that is there already.

    Args:
        neighborhood: whom to keep.
        origin: where it comes from.
    """

    def __init__(self, neighborhood: Neighborhood, origin: str = "edge_index") -> None:
        super().__init__()
        self.neighborhood, self.origin = neighborhood, origin

    def forward(self, query: Query, own: Tensor | None, search: str = "auto") -> Neighborhood:
        """That neighbourhood."""
        return self.neighborhood


def _dilate(found: Neighborhood, dilation: int) -> Neighborhood:
    return found if dilation == 1 else found.apply(lambda t: t[..., ::dilation])
