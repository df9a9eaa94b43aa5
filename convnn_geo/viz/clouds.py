"""Point clouds, seen from above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convnn_geo.checks import check_tensor
from convnn_geo.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_clouds(
    clouds: Sequence[Tensor],
    titles: Sequence[str],
    labels: Sequence[str] = ("row", "column", "height"),
) -> Figure:
    """Point clouds side by side, seen from above: the higher a point, the darker and larger.

    All clouds share their axes and one scale of heights.

    Args:
        clouds: each ``(n, 3)``: row, column, height.
        titles: one a cloud.
        labels: of the three axes.

    Raises:
        ValueError: no clouds, no point in them, other shapes, or unequal numbers of titles or
            labels.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> figure = draw_clouds([torch.rand(9, 3)], ["a cloud"])
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['row', 'height']
    """
    _check_clouds(clouds, titles, labels)
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(1.9 * len(clouds) + 1.2, 2.9), dpi=110, layout="compressed"
    )
    axes = figure.subplots(1, len(clouds), sharex=True, sharey=True, squeeze=False)[0]
    every = torch.cat(list(clouds))
    low, high = every.amin(0).tolist(), every.amax(0).tolist()
    for axis, cloud, title in zip(axes, clouds, titles, strict=True):
        row, column, height = (part.numpy() for part in cloud.unbind(1))
        points = axis.scatter(
            column,
            row,
            c=height,
            s=15 + 100 * (height - low[2]) / max(high[2] - low[2], 1e-6),
            cmap="viridis_r",
            vmin=low[2],
            vmax=high[2],
            edgecolor="#444444",
            linewidths=0.5,
        )
        axis.set_title(title, fontsize=12)
        axis.set_xlabel(labels[1], fontsize=11)
        axis.set_aspect("equal")
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylabel(labels[0], fontsize=11)
    axes[0].locator_params(steps=[1, 2, 5, 10])  # whole rows and columns
    axes[0].set_xlim(low[1] - 0.6, high[1] + 0.6)
    axes[0].set_ylim(high[0] + 0.6, low[0] - 0.6)  # rows count downwards, as in an image
    figure.colorbar(points, ax=list(axes), aspect=14, pad=0.015).set_label(labels[2], fontsize=11)
    return figure


def _check_clouds(clouds: Sequence[Tensor], titles: Sequence[str], labels: Sequence[str]) -> None:
    if not clouds or len(clouds) != len(titles):
        raise ValueError(f"expected a title a cloud, got {len(titles)} for {len(clouds)}")
    if len(labels) != 3:
        raise ValueError(f"labels: expected one an axis, three, got {len(labels)}")
    for cloud in clouds:
        if check_tensor("cloud", cloud, 2).shape[1] != 3:
            raise ValueError(f"cloud: expected (n, 3), got shape {tuple(cloud.shape)}")
    if not any(len(cloud) for cloud in clouds):
        raise ValueError("clouds: expected at least one point, got none")
