"""All neighbours within a distance, without as many slots as there might be."""

from __future__ import annotations

from collections.abc import Callable

from convnn_geo.neighborhood import Neighborhood

_FIRST, _MORE = 32, 4
"""Slots that are asked for first, and how many times as many next."""


def within_reach(ask: Callable[[int], Neighborhood], most: int) -> Neighborhood:
    """Neighbours in as few slots as the fullest target needs, at most ``most``.

    More are asked for while some target has all that it may have. On a GPU the host waits for each
    answer.

    Args:
        ask: gives neighbourhoods of so many slots, with a mask where some are empty.
        most: slots.
    """
    slots = min(most, _FIRST)
    while True:
        found = ask(slots)
        full = found.mask is None or bool(found.mask[..., -1:].any())
        if slots >= most or not full:
            return found.trimmed()
        slots = min(most, _MORE * slots)
