"""All neighbours within a distance, without as many slots as there might be."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from convnn_geo.checks import all_finite, in_this_package
from convnn_geo.metrics import Metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operators import is_watched
from convnn_geo.points import Points

_FIRST, _MORE = 32, 4
"""Slots that are asked for first, and how many times as many next."""


def within_reach(
    ask: Callable[[int], Neighborhood], most: int, metric: Metric, *points: Points
) -> Neighborhood:
    """Neighbours in as few slots as the fullest target needs, at most ``most``.

    More are asked for while some target has all that it may have; on a GPU the host waits for each
    answer. All are asked for at once where there is nothing to look at, as in traced programs,
    where a NaN, which is at no distance, is to show, and where a metric that learns would count
    each look.

    Args:
        ask: gives neighbourhoods of so many slots, with a mask where some are empty.
        most: slots.
        metric: by which.
        points: among whom.
    """
    tensors = [t for part in points for t in (part.x, part.pos) if t is not None]
    slots = min(most, _FIRST)
    blind = is_watched() or any(t.is_meta for t in tensors)
    if blind or (slots < most and (_counts_calls(metric) or not all(map(all_finite, tensors)))):
        return ask(most)
    while True:
        found = ask(slots)
        full = found.mask is None or bool(found.mask[..., -1:].any())
        if slots >= most or not full or found.k < slots:
            return found.trimmed()
        slots = min(most, _MORE * slots)


def _counts_calls(metric: Metric) -> bool:
    """Whether two calls need not find the same: statistics that run, and dropout."""
    parts: list[nn.Module] = [part for part in metric.modules() if part.training]
    theirs = [part for part in parts if not in_this_package(part)]
    return any(isinstance(part, _DropoutNd) or bool(part._buffers) for part in theirs)
