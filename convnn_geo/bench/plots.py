"""Pictures of results: how engines scale, which wins where, and what recall costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from convnn_geo.bench import graph, layers
from convnn_geo.bench.cells import NOT_ASKED
from convnn_geo.bench.style import Style, number_style, style
from convnn_geo.bench.tables import seconds
from convnn_geo.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_scaling(results: Sequence[graph.Result], title: str, limit: float) -> Figure:
    """Time over points, log-log: a panel for each metric and dimension, a line for each engine.

    Args:
        results: on one input, with one k and one batch.
        title: of the picture.
        limit: seconds after which calls were ended; these are drawn as arrows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, panels = _panels(results, title)
    for (metric, dimension), axis in panels.items():
        some = [r for r in results if (r.cell.metric, r.cell.dimension) == (metric, dimension)]
        for number, name in enumerate(_engines(some)):
            look = style(name)
            mine = [r for r in some if r.cell.engine == name]
            timed = [r for r in mine if not r.note]
            axis.plot(
                [r.cell.n for r in timed], [r.median for r in timed], label=name, **_line(look)
            )
            ended = [r.cell.n * 1.03**number for r in mine if r.ended]  # side by side
            axis.plot(ended, [limit] * len(ended), "^", color=look.color, markersize=9, alpha=0.8)
        if any(r.ended for r in some):
            axis.axhline(limit, color="#999999", linewidth=0.8, linestyle=":")
            axis.annotate(
                f"ended after {limit:g} s (arrows)",
                (0.02, limit),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(0, 9),
                fontsize=8,
                color="#666666",
            )
        _sizes(axis, sorted({r.cell.n for r in some}))
        _times(axis, [limit if r.note else r.median for r in some if not r.note or r.ended])
    _legend(figure, panels)
    return figure


def plot_recall(results: Sequence[graph.Result], title: str) -> Figure:
    """Time over recall at the largest size, and the front: what no engine beats in both.

    Args:
        results: on one input, with one k and one batch.
        title: of the picture.
    """
    figure, panels = _panels(results, title)
    for (metric, dimension), axis in panels.items():
        some = [
            r
            for r in results
            if (r.cell.metric, r.cell.dimension) == (metric, dimension) and not r.note
        ]
        largest = max((r.cell.n for r in some), default=0)
        some = sorted((r for r in some if r.cell.n == largest), key=lambda r: r.median)
        for result in some:
            look = style(result.cell.engine)
            line = {**_line(look), "linestyle": "none", "markersize": 9}
            axis.plot([result.recall], [result.median], label=result.cell.engine, zorder=3, **line)
        front, best = [], -math.inf
        for result in some:
            if result.recall > best:
                front.append(result)
                best = result.recall
        axis.step(
            [r.recall for r in front],
            [r.median for r in front],
            where="pre",
            color="#999999",
            zorder=1,
            label="front",
        )
        _times(axis, [r.median for r in some])
        low = min((r.recall for r in some), default=1.0)
        low = min(low, 0.9)
        margin = (1 - low) / 12  # so that marks are whole
        axis.set(xlim=(low - margin, 1 + margin), xlabel=f"recall at {largest} points")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.3)
    _legend(figure, panels)
    return figure


def plot_winners(results: Sequence[graph.Result], title: str, recall: float = 0.999) -> Figure:
    """Which engine is the fastest, and how long the next takes: a row for each dimension and k.

    A column is a size. None is named where time was over before all exact ones were asked.

    Args:
        results: on one input, by one metric.
        title: of the picture.
        recall: engines that find less do not count.
    """
    rows = sorted({(r.cell.dimension, r.cell.k) for r in results})
    columns = sorted({(r.cell.batch, r.cell.n) for r in results})
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(max(7.5, 2.2 + 1.55 * len(columns)), 1.6 + 0.62 * len(rows)),
        dpi=110,
        layout="constrained",
    )
    axis = figure.subplots()
    for y, (dimension, k) in enumerate(rows):
        for x, (batch, n) in enumerate(columns):
            here = [
                r
                for r in results
                if (r.cell.dimension, r.cell.k, r.cell.batch, r.cell.n) == (dimension, k, batch, n)
                and r.cell.engine != "auto"
            ]
            mine = [r for r in here if not r.note and r.recall >= recall]
            asked = all(r.note != NOT_ASKED or graph.is_approximate(r.cell.engine) for r in here)
            ranked = sorted(mine, key=lambda r: r.median) if asked else []
            best = ranked[0] if ranked else None
            look = Style("#FFFFFF", "") if best is None else style(best.cell.engine)
            box = {"hatch": "////", "edgecolor": "#BBBBBB"} if best is None else {"edgecolor": "w"}
            axis.add_patch(_patch(x, y, facecolor=look.color, linewidth=2, **box))
            nothing = "no result" if asked else "not all asked"
            text = nothing if best is None else f"{best.cell.engine}\n{seconds(best.median)}"
            if len(ranked) > 1:
                times = ranked[1].median / ranked[0].median
                text += f"\nthen {ranked[1].cell.engine}, {times:.{int(times < 10)}f} ×"
            background = {"facecolor": "white", "edgecolor": "none"} if best is None else None
            axis.text(
                *(x, y, text),
                **{"ha": "center", "va": "center", "fontsize": 8.5, "color": look.text},
                bbox=background,
            )
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axis.set_xticks(range(len(columns)), [_size(batch, n) for batch, n in columns])
    axis.set_yticks(range(len(rows)), [f"{d} dimensions, k = {k}" for d, k in rows])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=12)
    return figure


def _panels(
    results: Sequence[graph.Result], title: str
) -> tuple[Figure, dict[tuple[str, int], Axes]]:
    """A panel for each metric (down) and dimension (across)."""
    metrics = list(dict.fromkeys(r.cell.metric for r in results))
    dimensions = sorted({r.cell.dimension for r in results})
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(max(6.5, 3.3 * len(dimensions)), 1.2 + 2.9 * len(metrics)),
        dpi=110,
        layout="constrained",
    )
    axes = figure.subplots(len(metrics), len(dimensions), squeeze=False)
    figure.suptitle(title, fontsize=12)
    panels = {}
    for row, metric in zip(axes, metrics, strict=True):
        for axis, dimension in zip(row, dimensions, strict=True):
            axis.set_title(f"{metric}, {dimension} dimensions", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            panels[metric, dimension] = axis
        row[0].set_ylabel("time of a search")
    return figure, panels


def _engines(results: Sequence[graph.Result]) -> list[str]:
    """Those with something to draw, in the order in which they were asked."""
    drawn = (r for r in results if not r.note or r.ended)
    return list(dict.fromkeys(r.cell.engine for r in drawn))


def _line(look: Style) -> dict[str, Any]:
    return {
        "color": look.color,
        "marker": look.marker,
        "linestyle": look.dash,
        "markersize": 6,
        "markerfacecolor": "white" if look.open else look.color,
        "linewidth": 1.6,
    }


def _legend(figure: Figure, panels: dict[Any, Axes]) -> None:
    """One for all panels, below them."""
    handles: dict[str, Any] = {}
    for axis in panels.values():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = min(len(handles), 4)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
        )


def _patch(x: int, y: int, **style: Any) -> Any:
    patches = require("matplotlib.patches", extra="viz")
    return patches.Rectangle((x - 0.5, y - 0.5), 1, 1, **style)


def _times(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of whole decades around some times, with their units."""
    if not values:
        axis.text(0.5, 0.5, "no result", transform=axis.transAxes, ha="center", color="#666666")
    low, high = min(values, default=1e-3), max(values, default=1e-3)
    first, last = math.floor(math.log10(low / 1.2)), math.ceil(math.log10(high * 1.2))
    ticks = [10.0**power for power in range(first, last + 1)]
    axis.set(yscale="log", ylim=(ticks[0], ticks[-1]))
    axis.set_yticks(ticks, [_time(tick) for tick in ticks])
    axis.tick_params(axis="y", which="minor", labelleft=False)


def _time(tick: float) -> str:
    """A power of ten seconds with its unit.

    Example:
        >>> _time(0.01), _time(1e-4)
        ('10 ms', '100 µs')
    """
    factor, unit = (1.0, "s") if tick > 0.9 else (1e3, "ms") if tick > 0.9e-3 else (1e6, "µs")
    return f"{tick * factor:.3g} {unit}"


def _sizes(axis: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis with a tick for each number of points."""
    axis.set(xscale="log", xlabel="points")
    if sizes:
        axis.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.6)
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axis.grid(alpha=0.3)


def _size(batch: int, n: int) -> str:
    return f"{n} points" if batch == 1 else f"{batch} x {n}"


def plot_layers(results: Sequence[layers.Result], title: str) -> Figure:
    """Forward, forward and backward, and memory over points: a row for each family of layers.

    Args:
        results: on one input, of one number of channels and one batch.
        title: of the picture.
    """
    families = list(dict.fromkeys(r.cell.family for r in results if not r.note))
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(13, 0.6 + 2.7 * len(families)), dpi=110, layout="constrained"
    )
    figure.suptitle(title, fontsize=12)
    columns: dict[str, Callable[[layers.Result], float]] = {
        "forward": lambda r: r.forward,
        "forward and backward": lambda r: r.both,
        "memory of both": lambda r: r.both_memory,
    }
    axes = figure.subplots(len(families), len(columns), squeeze=False)
    for row, family in zip(axes, families, strict=True):
        some = [r for r in results if r.cell.family == family and not r.note]
        for axis, (what, value) in zip(row, columns.items(), strict=True):
            for number, name in enumerate(dict.fromkeys(r.cell.layer for r in some)):
                mine = [r for r in some if r.cell.layer == name]
                axis.plot(
                    [r.cell.n for r in mine],
                    [value(r) for r in mine],
                    label=name,
                    **_line(number_style(number)),
                )
            axis.set_title(f"{family}: {what}", fontsize=10)
            if what.startswith("memory"):
                axis.margins(y=0.12)  # so that marks are whole
                axis.set_ylim(bottom=0)
                axis.set_ylabel("MiB")
            else:
                _times(axis, [value(r) for r in some])
            _sizes(axis, sorted({r.cell.n for r in some}))
            axis.spines[["top", "right"]].set_visible(False)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    return figure
