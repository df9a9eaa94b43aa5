"""One operator: the pipeline of one call, from points to aggregation, as a value.

Every layer turns its input into an :class:`Operation`; :mod:`convnn_geo.lowering` decides how the
operation runs. The operation itself says what is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from convnn_geo.caching import once
from convnn_geo.candidates import Candidates, Subset, Window
from convnn_geo.kernels import Kernel
from convnn_geo.metrics import Biased, BilinearForm, Distances, Metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operators import is_watched, without_gradient
from convnn_geo.pairs import Pairs
from convnn_geo.points import Points, row_starts
from convnn_geo.search import Query
from convnn_geo.selection import Every, KNearest, Radius, Selection
from convnn_geo.weighting import Ones, Softmax, Weighting


@dataclass(frozen=True)
class Operation:
    """``y_i = sum_j W_j rho(s_i)_j v[I_i(j)] + b``, its parts bound to one input.

    Args:
        target: ``n`` points.
        source: ``m`` points.
        value: ``(..., m, c)``, what sources give; often ``source.x``.
        metric: how near.
        candidates: where to look.
        selection: whom to keep.
        weighting: how much each counts.
        kernel: what is done with them.
        order: of the neighbours that reach the kernel: ``"rank"``, or ``"raster"``: by place in
            the window where candidates are windows, by source index elsewhere.
        mask: more to be masked, ``(..., n | 1, m)``, True where choice is allowed.
        bias: added to the similarities, ``(..., n | 1, m)``; may carry a gradient.
        search: search engine.
        image: ``(b, c, *size)``, the image that the values are the pixels of, where there is one.
        with_weights: whether the weights of the chosen pairs are asked for, too.
    """

    target: Points
    source: Points
    value: Tensor
    metric: Metric
    candidates: Candidates
    selection: Selection
    weighting: Weighting
    kernel: Kernel
    order: str = "rank"
    mask: Tensor | None = None
    bias: Tensor | None = None
    search: str = "auto"
    image: Tensor | None = None
    with_weights: bool = False

    @once
    def subset(self) -> Subset:
        """Where each target may look."""
        subset = self.candidates(self.target, self.source).restrict(self.mask)
        if self.source.mask is not None:
            subset = subset.restrict(self.source.mask.unsqueeze(-2))
        return subset

    def query(self, k: int = 1) -> Query:
        """What is asked of the search; a selection may want another number of the nearest."""
        return Query(
            self.target,
            self.source,
            self.metric,
            k,
            self.subset,
            bind=lambda: self._searched,
            exact=False,  # who wants the distances of chosen pairs asks for them, with gradient
        )

    @once
    def bound(self) -> Distances:
        """The metric bound to the points, with gradient."""
        return self._bind()

    @once
    def _searched(self) -> Distances:
        """The same for the search, which needs no gradient; one binding does where weights do."""
        return self.bound if self.weighting.uses_distance else without_gradient(self._bind)

    def _bind(self) -> Distances:
        bound = self.metric.bind(self.target, self.source)
        return bound if self.bias is None else Biased(bound, self.bias)

    @once
    def product(self) -> BilinearForm | None:
        """The metric as one matrix product; None where it is none."""
        bound = self.bound
        return (bound.inner if isinstance(bound, Biased) else bound).bilinear()

    def own(self) -> Tensor | None:
        """The source that each target is, ``(n,)``; None where targets are no sources."""
        if self.target is self.source:
            return row_starts(self.source.num_points, 1, self.value.device)
        if self.source.grid is not None and self.target.grid is not None:
            return self.source.grid.index_of(self.target.grid, self.value.device)
        return None

    @once
    def whole(self) -> bool:
        """Whether every candidate is kept, each in its place."""
        axes = None if self.source.grid is None else len(self.source.grid.size)
        return keeps_all(self.candidates, self.selection, self.order, axes)

    def neighborhood(self, search: str | None = None) -> Neighborhood:
        """Candidates, then selection, then order; by another search engine than its own."""
        selection = Every() if self.whole else self.selection
        found = selection(self.query(), self.own(), search or self.search)
        if found.mask is not None and not (found.complete or self._counts_slots):
            m = self.source.num_points
            if found.k > m and type(selection) in (KNearest, Radius):
                found = found.apply(lambda t: t[..., :m])  # filled first, so that the rest is empty
            draws = self.weighting.training and getattr(self.weighting, "dropout", 0.0) > 0
            if found.index.device.type == "cpu" and not draws and not is_watched():
                some = found.trimmed()
                found = some if some.k else found
        if self.target.mask is not None:  # what only fills a batch up hears nobody
            real = self.target.mask.unsqueeze(-1).expand(*self.target.mask.shape, found.k)
            found = replace(found, mask=real if found.mask is None else found.mask & real)
        if self.order == "rank" or self.whole:
            return found
        among, window = self.subset.index, self.candidates
        by_source = isinstance(window, Window) and window.ascends
        if by_source or among is None or among.shape[-2] != found.num_targets:
            among = None
        return found.raster(among)

    @property
    def _counts_slots(self) -> bool:
        """Whether slots that are empty for all are anything else than none."""
        return self.kernel.counts_slots or type(self.weighting) not in (Ones, Softmax)

    def pairs(self, neighborhood: Neighborhood | None = None) -> Pairs:
        """The chosen pairs."""
        chosen = self.neighborhood() if neighborhood is None else neighborhood
        value = self.kernel.project(self.value)
        rooted = self.metric.rooted
        return Pairs(self.target, self.source, value, lambda: self.bound, chosen, rooted)


def keeps_all(candidates: Candidates, selection: Selection, order: str, axes: int | None) -> bool:
    """Whether every candidate is kept, each in its place, of sources on a grid of that many axes.

    So it is, too, where as many as a window has are kept in raster order: then there is nothing to
    choose, and tap j is the window's j-th place at borders as well.
    """
    if type(selection) is not KNearest:
        return type(selection) is Every
    if order != "raster" or not isinstance(candidates, Window) or axes is None:
        return False
    size = math.prod(candidates.spread(axes)[0])
    return selection.k == size and selection.dilation == 1 and selection.self_point == "natural"


def show_nan(out: Tensor, op: Operation, pairs: Pairs | None = None) -> Tensor:
    """Let NaN in a target's own features or position, or in its distances, reach its output.

    By itself it does where the target is its own neighbour or its weights look at its features.
    Otherwise the finite values of its neighbours would hide it. A convolution's windows are left
    alone: there a NaN shows where the window holds it.
    """
    if op.whole and isinstance(op.candidates, Window) and not op.weighting.uses_distance:
        return out
    own = [t.detach() for t in (op.target.x, op.target.pos) if t is not None]
    lost = [t.sum(-1, keepdim=True).isnan() for t in own]
    distance = None if pairs is None else pairs.neighborhood.distance
    if distance is not None and distance.shape[-1] and not op.weighting.uses_distance:
        lost.append(distance.isnan().any(-1, keepdim=True))
    if not lost:
        return out
    # Added rather than filled in: four times faster on the CPU, and backward copies nothing.
    here = reduce(torch.logical_or, lost)
    nan = here.to(out.dtype).masked_fill_(here, torch.nan)
    return out + nan if out.requires_grad else out.add_(nan)  # a kernel's result is its own
