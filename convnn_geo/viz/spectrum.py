"""How networks do from one end of the spectrum to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from convnn_geo.extras import require
from convnn_geo.viz.colors import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DASHES = ("-", "--", "-.", ":")


def plot_spectrum(
    lam: Sequence[float],
    accuracy: Sequence[Sequence[float]],
    baselines: Mapping[str, Sequence[float]] | None = None,
    title: str = "",
) -> Figure:
    """Accuracy from one end of the spectrum to the other: mean, deviation and every run.

    Args:
        lam: points of the spectrum, 0 for position to 1 for feature.
        accuracy: of the runs at each point, in [0, 1].
        baselines: accuracies of the runs of other layers, drawn across: a line for the mean in a
            band of one deviation.
        title: of the picture.

    Raises:
        ValueError: no points, no runs at a point, or unequal numbers of points.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> plot_spectrum([0, 1], [[0.9, 0.92], [0.8, 0.81]], {"k = 1": [0.7]}).axes[0].get_ylabel()
        'test accuracy (%)'
    """
    if not lam or len(lam) != len(accuracy) or not all(accuracy):
        raise ValueError(
            f"expected runs for each of the points {list(lam)}, got runs of "
            f"{[len(runs) for runs in accuracy]}"
        )
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(8, 4.8), dpi=110, layout="constrained"
    )
    axis = figure.subplots()
    points = [mean_deviation([100 * a for a in runs]) for runs in accuracy]
    curve = axis.errorbar(
        lam,
        [mean for mean, _ in points],
        [deviation for _, deviation in points],
        color=COLORS[0],
        marker="o",
        markersize=8,
        linewidth=2,
        capsize=5,
        zorder=3,
    )
    dots = [(x, 100 * a) for x, runs in zip(lam, accuracy, strict=True) for a in runs]
    each = axis.scatter(*zip(*dots, strict=True), s=16, color="#222222", zorder=4)
    legend: dict[str, Any] = {f"ConvNN: {_drawn(accuracy)}": curve, "ConvNN: each run": each}
    for number, (name, runs) in enumerate((baselines or {}).items(), start=1):
        legend[f"{name}: {_drawn([runs])}"] = _across(axis, runs, number)
    _finish(axis, lam, title)
    figure.legend(
        list(legend.values()), list(legend), loc="outside lower center", ncols=2, frameon=False
    )
    return figure


def _drawn(accuracy: Sequence[Sequence[float]]) -> str:
    """What is drawn of runs: a single one has no deviation."""
    several = any(len(runs) > 1 for runs in accuracy)
    return "mean ± standard deviation" if several else "a single run"


def _across(axis: Axes, runs: Sequence[float], number: int) -> tuple[Any, Any]:
    """A line at the mean, in a band of one deviation: what the legend shows on one another."""
    mean, deviation = mean_deviation([100 * a for a in runs])
    color, dashes = COLORS[number % len(COLORS)], _DASHES[number % len(_DASHES)]
    band = axis.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
    return band, axis.axhline(mean, color=color, linewidth=1.8, linestyle=dashes)


def _finish(axis: Axes, lam: Sequence[float], title: str) -> None:
    axis.set_title(title, fontsize=13)
    axis.set_xticks(list(lam), [_end(x) for x in lam])
    axis.locator_params(axis="y", integer=True)
    axis.set_ylabel("test accuracy (%)", fontsize=11)
    axis.set_xlabel("λ, the share of feature distance in the metric", fontsize=11)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _end(lam: float) -> str:
    return f"{lam:g}" + {0.0: "\nposition", 1.0: "\nfeature"}.get(float(lam), "")


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the deviation of one value is 0.

    Example:
        >>> mean_deviation([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    if not values:
        raise ValueError("mean_deviation: expected at least one value, got none")
    sample = torch.tensor(values, dtype=torch.float64)
    return sample.mean().item(), sample.std().item() if len(values) > 1 else 0.0
