"""How networks do from one end of the spectrum to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from convnn_geo.extras import require
from convnn_geo.viz.colors import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        baselines: accuracies of the runs of other layers, drawn as lines across.
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
    axis.errorbar(
        lam,
        [mean for mean, _ in points],
        [deviation for _, deviation in points],
        color=COLORS[0],
        marker="o",
        markersize=8,
        linewidth=2,
        capsize=5,
        label="ConvNN: mean ± deviation",
        zorder=3,
    )
    dots = [(x, 100 * a) for x, runs in zip(lam, accuracy, strict=True) for a in runs]
    axis.scatter(*zip(*dots, strict=True), s=16, color="#222222", zorder=4, label="each run")
    for number, (name, runs) in enumerate((baselines or {}).items(), start=1):
        mean, deviation = mean_deviation([100 * a for a in runs])
        color = COLORS[number % len(COLORS)]
        axis.axhline(mean, color=color, linewidth=1.8, linestyle="--", label=name)
        axis.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.13, linewidth=0)
    _finish(axis, lam, title)
    handles, names = axis.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: not names[i].startswith("ConvNN"))
    figure.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    return figure


def _finish(axis: Axes, lam: Sequence[float], title: str) -> None:
    axis.set_title(title, fontsize=13)
    axis.set_xticks(list(lam), [_end(x) for x in lam])
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
