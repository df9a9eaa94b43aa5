"""Attributes that count when they are set after a layer was made, as torch's do."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from convnn_geo.checks import check_int
from convnn_geo.selection import KNearest, Radius, Selection


def slots(selection: Selection) -> int | None:
    """Neighbours that a selection gives each target; None where the candidates decide."""
    if isinstance(selection, Radius):
        return selection.max_k
    return getattr(selection, "k", None)


class Settable(nn.Module, ABC):
    """A layer that is told of attributes which are set once it is built.

    It says so by ``self.built = True`` at the end of ``__init__``. Modules that take an attribute's
    place, as in subclasses, are none of its business.
    """

    selection: Selection
    k: int | None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what :meth:`settling` makes of a value; an error leaves the layer as it was."""
        settle = None
        if "built" in self.__dict__ and not isinstance(value, nn.Module):
            settle = self.settling().get(name)
        super().__setattr__(name, value if settle is None else settle(value))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of states that were saved before layers were told."""
        super().__setstate__(state)
        self.__dict__["built"] = True

    def settling(self) -> dict[str, Callable[[Any], Any]]:
        """What checks a value that is set, moves the layer's parts, and returns what is stored."""
        return {"k": self._settle_k}

    @abstractmethod
    def has_taps(self) -> bool:
        """Whether parameters are one for each neighbour."""

    def _settle_k(self, k: Any) -> int | None:
        if k == self.k:
            return self.k
        if self.has_taps() or not isinstance(self.selection, KNearest):
            why = "has one tap a neighbour" if self.has_taps() else "chooses by no k"
            raise AttributeError(f"k: the layer {why}; make a new one with k={k}")
        selection = copy.copy(self.selection)  # which another layer may have, too
        selection.k = check_int("k", k)
        self.selection = selection
        return selection.k
