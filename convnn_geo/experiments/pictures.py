"""The picture of an experiment: ours, beside it the published curves, and where λ settled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convnn_geo.experiments.base import Experiment, Published, place
from convnn_geo.experiments.summary import Row, series
from convnn_geo.extras import require
from convnn_geo.viz import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP"


def draw(experiment: Experiment, rows: Sequence[Row]) -> Figure:
    """A curve a series: mean, deviation and every run.

    Args:
        experiment: that was run.
        rows: of all its settings.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    settled = [row for row in rows if row.learned]
    count = 1 + (experiment.published is not None) + bool(settled)
    figure = require("matplotlib.figure", extra="train").Figure(
        figsize=(1 + 5 * count, 4.6), dpi=110, layout="constrained"
    )
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    _ours(panels.pop(0), experiment, rows)
    if settled:
        _settled(panels.pop(0), settled, list(series(rows)))
    if experiment.published is not None:
        _published(panels.pop(0), experiment.axis, experiment.published)
    short = all(row.setting.config.epochs == 1 for row in rows)
    figure.suptitle(experiment.title + ": a single epoch, to see that it runs" * short)
    return figure


def _ours(axis: Axes, experiment: Experiment, rows: Sequence[Row]) -> None:
    names = _names([row.setting.at for row in rows])
    for number, (name, group) in enumerate(series(rows).items()):
        color = COLORS[number % len(COLORS)]
        if group[0].setting.at is None:
            low, high = group[0].mean - group[0].deviation, group[0].mean + group[0].deviation
            axis.axhspan(low, high, color=color, alpha=0.12, linewidth=0)
            axis.axhline(group[0].mean, color=color, linestyle="--", label=name)
            continue
        at = [_number(row.setting.at, names) for row in group]
        axis.errorbar(
            at,
            [row.mean for row in group],
            [row.deviation for row in group],
            color=color,
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="none" if names else "-",
            capsize=4,
            label=name,
        )
        for x, row in zip(at, group, strict=True):
            axis.scatter([x] * len(row.scores), row.scores, s=9, color=color, alpha=0.5, zorder=3)
    seeds = len(rows[0].results)
    each = f"mean ± deviation of {seeds} runs, and each" if seeds > 1 else "one run each"
    axis.set_title(f"here: {each}" if experiment.published is not None else each)
    _finish(axis, experiment.axis, names, "PSNR (dB)" if rows[0].unit == "dB" else "accuracy (%)")


def _published(axis: Axes, label: str, published: Published) -> None:
    names = _names([at for curve in published.curves.values() for at, _ in curve])
    for number, (name, curve) in enumerate(published.curves.items()):
        axis.plot(
            [_number(at, names) for at, _ in curve],
            [value for _, value in curve],
            color=COLORS[number % len(COLORS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="none" if names else "-",
            label=name,
        )
    axis.set_title("published, on other data")
    _finish(axis, label, names, published.unit)


def _settled(axis: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A line a setting, in the colour of its series, begun with a ring where learning began."""
    told = set()
    for row in rows:
        name = row.setting.series
        number = names.index(name)
        color = COLORS[number % len(COLORS)]
        means, deviations = zip(*row.learned.values(), strict=True)
        layers = range(1, len(means) + 1)
        marker = _MARKERS[number % len(_MARKERS)]
        label = None if name in told else name
        told.add(name)
        axis.errorbar(layers, means, deviations, color=color, marker=marker, capsize=3, label=label)
        if isinstance(row.setting.at, float):
            axis.plot(0, row.setting.at, "o", color=color, fillstyle="none")
            axis.plot([0, 1], [row.setting.at, means[0]], ":", color=color, linewidth=1)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title("where λ began (rings) and settled")
    axis.set_xticks(range(1, 1 + max(len(row.learned) for row in rows)))
    _finish(axis, "layer, or head, from first to last", [], "λ")


def _finish(axis: Axes, label: str, names: Sequence[str], unit: str) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel(unit)
    if names:
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _names(places: Sequence[float | str | None]) -> list[str]:
    """Names along the axis, in order; none where places are numbers."""
    return list(dict.fromkeys(place(at) for at in places if isinstance(at, str)))


def _number(at: float | str | None, names: Sequence[str]) -> float:
    return float(names.index(at)) if isinstance(at, str) else float(at or 0.0)
