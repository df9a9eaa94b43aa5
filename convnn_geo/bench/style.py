"""How engines and layers look: the same in every plot."""

from __future__ import annotations

from dataclasses import dataclass

from convnn_geo.bench import peer
from convnn_geo.viz.colors import COLORS

_BLUE, _RED, _GREEN, _BLACK, _ORANGE, _SKY, _PINK, _YELLOW = COLORS
_GREY = "#6B6B6B"


@dataclass(frozen=True)
class Style:
    """Of a line and its marks; approximate engines are dashed and have open marks."""

    color: str
    marker: str
    dash: str = "-"

    @property
    def open(self) -> bool:
        """Whether marks are empty."""
        return self.dash != "-"

    @property
    def text(self) -> str:
        """Black or white, whichever is legible on the colour."""
        red, green, blue = (int(self.color[at : at + 2], 16) for at in (1, 3, 5))
        return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"


_ENGINES = {
    "dense": Style(_BLACK, "o"),
    "grid": Style(_SKY, "s"),
    "rings": Style(_SKY, "D"),
    "kd_tree": Style(_BLUE, "^"),
    "cells": Style(_GREEN, "D"),
    "torch_cluster": Style(_RED, "v"),
    "pyg_lib": Style(_YELLOW, "P"),
    "keops": Style(_PINK, "X"),
    "faiss": Style(_ORANGE, "h"),
    "triton": Style(_BLUE, "s"),
    "torchbvh": Style(_GREEN, "^"),
    "flashlib": Style(_RED, "D"),
    peer.NAME: Style(_GREY, "p"),
    "auto": Style(_BLACK, "*", ":"),
    "faiss_ivf": Style(_ORANGE, "o", "--"),
    "pynndescent": Style(_BLUE, "^", "--"),
    "random_projections": Style(_GREEN, "D", "--"),
}


def style(name: str) -> Style:
    """The style of an engine; engines unknown here share one.

    Example:
        >>> style("dense").text
        'white'
    """
    return _ENGINES.get(name, Style(_GREY, "."))


def number_style(number: int) -> Style:
    """The style of the layer with that number in its family."""
    return Style(COLORS[number % len(COLORS)], "osD^vPXh"[number % 8])
