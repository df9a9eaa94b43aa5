"""What an experiment is: a grid of training configurations, and a curve to stand beside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convnn_geo import __version__
from convnn_geo.train import Config

Place = float | str | None
"""Where a setting stands on the axis: a number, a name, or None for a baseline drawn across."""


@dataclass(frozen=True)
class Setting:
    """One point of the grid, trained once a seed.

    Args:
        series: the curve that it belongs to.
        at: its place on the axis.
        config: of the training; its ``seeds`` and ``out`` have no say.
        change: what is done to the new model before it learns, for what no option of a layer
            says; a frozen dataclass, as its ``repr`` tells settings apart.
        longer_than: the series that has the same setting, trained for fewer epochs.

    Example:
        >>> Setting("cosine", 0.5, Config(epochs=2)).label
        'cosine at 0.5'
    """

    series: str
    at: Place
    config: Config
    change: Callable[[nn.Module], object] | None = None
    longer_than: str | None = None

    @property
    def label(self) -> str:
        """In tables and on the terminal."""
        return self.series if self.at is None else f"{self.series} at {place(self.at)}"

    def key(self) -> str:
        """All that the numbers depend on, as text."""
        config = self.config.to_dict()
        for name in ("data_root", "download", "out", "seeds", "tensorboard", "workers"):
            del config[name]
        known = {"config": config, "change": repr(self.change), "version": __version__}
        return json.dumps(known, sort_keys=True)


@dataclass(frozen=True)
class Published:
    """Numbers of others to stand beside ours; other data, so that only shapes compare.

    Args:
        source: what was trained on what, and the paper.
        unit: of the numbers.
        curves: places and numbers by name; a single number at None is a baseline.
    """

    source: str
    unit: str
    curves: Mapping[str, Sequence[tuple[Place, float]]]


@dataclass(frozen=True)
class Experiment:
    """A question, and what is trained to answer it.

    Args:
        name: on the command line and of files.
        title: of pictures and pages.
        question: what it asks.
        axis: what ``at`` of the settings is.
        settings: the grid, or a small part of it where ``True`` is given.
        notes: what a reader must know of the settings.
        published: to be drawn beside; None where nothing is published.
        pairs: series that are compared, each by the point that the validation part chooses.
        apart: series that are drawn in a panel of their own, as most of their places lie near 0,
            with the place up to which its axis is linear; beyond, it is logarithmic.
    """

    name: str
    title: str
    question: str
    axis: str
    settings: Callable[[bool], list[Setting]]
    notes: str
    published: Published | None = None
    pairs: Sequence[tuple[str, str]] = ()
    apart: Mapping[str, float] = field(default_factory=dict)


def place(at: Any) -> str:
    """A place as text.

    Example:
        >>> place(0.25), place("conv"), place(None)
        ('0.25', 'conv', '')
    """
    if at is None:
        return ""
    return at if isinstance(at, str) else f"{at:g}"
