"""Curves of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from convnn_geo.extras import require
from convnn_geo.train.record import Run
from convnn_geo.viz.colors import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_curves(runs: Sequence[Run], title: str = "") -> Figure:
    """Losses and the validation score over epochs: a thin line a run, a thick one for their mean.

    Args:
        runs: of one configuration.
        title: of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", extra="train").Figure(
        figsize=(9, 3.8), dpi=110, layout="constrained"
    )
    losses, scores = figure.subplots(1, 2)
    _curve(losses, runs, "train_loss", COLORS[0])
    _curve(losses, runs, "validation_loss", COLORS[1])
    losses.set_ylabel("loss")
    score = next(name for name in runs[0].test if name != "loss")
    _curve(scores, runs, f"validation_{score}", COLORS[1])
    tested = [run.test[score] for run in runs]
    last = runs[0].history[-1]["epoch"]
    scores.plot([last] * len(tested), tested, "o", color=COLORS[3], label=f"test_{score}")
    scores.set_ylabel("PSNR (dB)" if score == "psnr" else score)
    for axis in (losses, scores):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    return figure


def _curve(axis: Axes, runs: Sequence[Run], name: str, color: str) -> None:
    epochs = [row["epoch"] for row in runs[0].history]
    lines = np.array([[row[name] for row in run.history] for run in runs])
    if len(runs) > 1:
        axis.plot(epochs, lines.T, color=color, linewidth=0.8, alpha=0.5)
    marker = "o" if len(epochs) == 1 else None
    label = f"{name}, mean of {len(runs)}" if len(runs) > 1 else name
    axis.plot(epochs, lines.mean(0), color=color, linewidth=2, marker=marker, label=label)
