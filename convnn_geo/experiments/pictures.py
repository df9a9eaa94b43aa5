"""The picture of an experiment: ours, beside it the published curves, and where λ ended."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convnn_geo.experiments.base import Experiment, Place, Published, place
from convnn_geo.experiments.summary import Row, budget, series
from convnn_geo.extras import require
from convnn_geo.viz import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX"
_LINES = 7
"""Colours that are seen as a line on white."""


@dataclass(frozen=True)
class _Look:
    """Of a series; what is trained longer has the colour of what is not, and is hollow."""

    number: int
    longer: bool = False

    @property
    def color(self) -> str:
        return COLORS[self.number % _LINES]

    @property
    def marker(self) -> str:
        return _MARKERS[self.number % len(_MARKERS)]

    @property
    def fill(self) -> str:
        return "white" if self.longer else self.color


def draw(experiment: Experiment, rows: Sequence[Row]) -> Figure:
    """A curve a series: mean, deviation and every run.

    Args:
        experiment: that was run.
        rows: of all its settings.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    looks = _looks(rows)
    together = [row for row in rows if row.setting.series not in experiment.apart]
    lines = [row for row in together if row.setting.at is None]
    ended: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.learned:
            ended.setdefault(tuple(row.learned), []).append(row)
    count = 1 + len(experiment.apart) + (experiment.published is not None) + len(ended)
    across = math.ceil(count / 2) if count > 3 else count
    down = math.ceil(count / across)
    figure = require("matplotlib.figure", extra="train").Figure(
        figsize=(1 + 5 * across, 5 * down), dpi=110, layout="constrained"
    )
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    _ours(panels.pop(0), experiment, together, looks)
    for name, linear in experiment.apart.items():
        axis = panels.pop(0)
        axis.set_xscale("symlog", linthresh=linear)
        alone = [row for row in rows if row.setting.series == name]
        _ours(axis, experiment, [*alone, *lines], looks)
        axis.set_title(f"{name}, after {budget(alone)}, near 0 linear", fontsize=10)
    for names, group in ended.items():
        _ended(panels.pop(0), names, group, looks)
    if experiment.published is not None:
        _published(panels.pop(0), experiment.axis, experiment.published, looks)
    short = all(row.setting.config.epochs == 1 for row in rows)
    figure.suptitle(experiment.title + ": a single epoch, to see that it runs" * short)
    return figure


def _looks(rows: Sequence[Row]) -> dict[str, _Look]:
    """Colours and markers by series."""
    found: dict[str, _Look] = {}
    for name, group in series(rows).items():
        shorter = group[0].setting.longer_than
        if shorter in found:
            found[name] = _Look(found[shorter].number, longer=True)
        else:
            found[name] = _Look(sum(not look.longer for look in found.values()))
    return found


def _ours(
    axis: Axes, experiment: Experiment, rows: Sequence[Row], looks: Mapping[str, _Look]
) -> None:
    groups = series(rows)
    names = _names([row.setting.at for row in rows])
    curves = [name for name, group in groups.items() if group[0].setting.at is not None]
    for name, group in groups.items():
        look = looks[name]
        if name not in curves:
            low, high = group[0].mean - group[0].deviation, group[0].mean + group[0].deviation
            axis.axhspan(low, high, color=look.color, alpha=0.12, linewidth=0)
            line = ":" if look.longer else "--"
            axis.axhline(group[0].mean, color=look.color, linestyle=line, label=name)
            continue
        aside = _aside(curves.index(name), len(curves), rows, names)
        at = [_number(row.setting.at, names) + aside for row in group]
        axis.errorbar(
            at,
            [row.mean for row in group],
            [row.deviation for row in group],
            color=look.color,
            marker=look.marker,
            markerfacecolor=look.fill,
            linestyle="none" if names or look.longer else "-",
            capsize=4,
            label=name,
        )
        for x, row in zip(at, group, strict=True):
            axis.scatter(
                [x] * len(row.scores), row.scores, s=9, color=look.color, alpha=0.5, zorder=3
            )
    seeds = len(rows[0].results)
    each = f"mean ± deviation of {seeds} runs, and each" if seeds > 1 else "one run each"
    here = "here: " if experiment.published is not None else ""
    longer = " or as named" if any(looks[name].longer for name in groups) else ""
    axis.set_title(f"{here}{each}, after {budget(rows)}{longer}", fontsize=10)
    _finish(axis, experiment.axis, names, "PSNR (dB)" if rows[0].unit == "dB" else "accuracy (%)")


def _aside(number: int, count: int, rows: Sequence[Row], names: Sequence[str]) -> float:
    """How far a curve is moved along the axis, so that it does not hide others."""
    places = [float(row.setting.at) for row in rows if isinstance(row.setting.at, (int, float))]
    step = 0.1 if names else 0.01 * (max(places) - min(places))
    return step * (number - (count - 1) / 2)


def _published(axis: Axes, label: str, published: Published, looks: Mapping[str, _Look]) -> None:
    """Curves that ours name alike have the same colour; so have a curve and its baseline."""
    known = {_stem(name): look.number for name, look in reversed(list(looks.items()))}
    names = _names([at for curve in published.curves.values() for at, _ in curve])
    for name, curve in published.curves.items():
        look = _Look(known.setdefault(_stem(name), 1 + max(known.values())))
        if curve[0][0] is None:
            axis.axhline(curve[0][1], color=look.color, linestyle="--", label=name)
            continue
        axis.plot(
            [_number(at, names) for at, _ in curve],
            [value for _, value in curve],
            color=look.color,
            marker=look.marker,
            linestyle="none" if names else "-",
            label=name,
        )
    axis.set_title("published, on other data", fontsize=10)
    _finish(axis, label, names, published.unit)


def _ended(
    axis: Axes, names: Sequence[str], rows: Sequence[Row], looks: Mapping[str, _Look]
) -> None:
    """Where every layer or head of one kind of network was when training ended, and began."""
    heads = [name.partition(", ")[2] for name in names]
    layers = list(dict.fromkeys(name.partition(", ")[0] for name in names))
    told = set()
    for number, row in enumerate(rows):
        name = row.setting.series
        look = looks[name]
        means, deviations = zip(*row.learned.values(), strict=True)
        aside = 0.06 * (number - (len(rows) - 1) / 2)
        axis.errorbar(
            [1 + aside + layer for layer in range(len(means))],
            means,
            deviations,
            color=look.color,
            marker=look.marker,
            markerfacecolor=look.fill,
            linestyle="none" if any(heads) else "--" if look.longer else "-",
            capsize=3,
            label=None if name in told else name,
        )
        told.add(name)
        if isinstance(row.setting.at, float):
            axis.axhline(row.setting.at, color="grey", linestyle=":", linewidth=1, zorder=0)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title(
        f"{rows[0].setting.series}: λ when training ended; dotted, where it began", fontsize=10
    )
    ticks = [
        f"{layers.index(name.partition(', ')[0]) + 1}" + f"\n{head}" * bool(head)
        for name, head in zip(names, heads, strict=True)
    ]
    axis.set_xticks(range(1, 1 + len(names)), ticks, fontsize=8)
    axis.set_xlim(0.5, len(names) + 0.5)
    label = "layer, and head" if any(heads) else "layer, from first to last"
    _finish(axis, label, [], "λ", below=0.2 if any(heads) else 0.14)


def _finish(axis: Axes, label: str, names: Sequence[str], unit: str, below: float = 0.14) -> None:
    """Labels, and the legend below, where it hides nothing."""
    axis.set_xlabel(label)
    axis.set_ylabel(unit)
    if names:
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -below)
    )


def _stem(name: str) -> str:
    """What is before the network or the kind of a name: ``"KVT (ViT)"`` is KVT."""
    return re.split(r" \(|, ", name)[0]


def _names(places: Sequence[Place]) -> list[str]:
    """Names along the axis, in order; none where places are numbers."""
    return list(dict.fromkeys(place(at) for at in places if isinstance(at, str)))


def _number(at: Place, names: Sequence[str]) -> float:
    return float(names.index(at)) if isinstance(at, str) else float(at or 0.0)
