"""How many neighbours a layer looks at, asked and set as an attribute."""

from __future__ import annotations

from convnn_geo.checks import check_int
from convnn_geo.selection import KNearest, Radius, Selection


def slots(selection: Selection) -> int | None:
    """Neighbours that a selection gives each target; None where the candidates decide."""
    if isinstance(selection, Radius):
        return selection.max_k
    return getattr(selection, "k", None)


class LooksAtK:
    """A layer whose ``k`` is that of its selection."""

    selection: Selection

    @property
    def k(self) -> int | None:
        """Neighbours of a target; None where the candidates decide."""
        return slots(self.selection) or self._whole()

    @k.setter
    def k(self, k: int) -> None:
        if self._has_taps() or not isinstance(self.selection, KNearest):
            why = "has one tap a neighbour" if self._has_taps() else "chooses by no k"
            raise AttributeError(f"k: the layer {why}; make a new one with k={k}")
        self.selection.k = check_int("k", k)

    def _whole(self) -> int | None:
        """Neighbours where all candidates are kept, if that is known."""
        return None

    def _has_taps(self) -> bool:
        """Whether parameters are one for each neighbour."""
        raise NotImplementedError
