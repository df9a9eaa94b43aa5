"""Point clouds, seen from above at an angle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convnn_geo.checks import check_tensor
from convnn_geo.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_clouds(clouds: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Point clouds side by side, coloured by their third axis.

    Args:
        clouds: each ``(n, 3)``: row, column, height.
        titles: one a cloud.

    Raises:
        ValueError: no clouds, other shapes, or unequal numbers of titles.
        MissingExtraError: matplotlib is not installed.
    """
    if not clouds or len(clouds) != len(titles):
        raise ValueError(f"expected a title a cloud, got {len(titles)} for {len(clouds)}")
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(3.0 * len(clouds), 3.2), dpi=110, layout="constrained"
    )
    for place, (cloud, title) in enumerate(zip(clouds, titles, strict=True), start=1):
        if check_tensor("cloud", cloud, 2).shape[1] != 3:
            raise ValueError(f"cloud: expected (n, 3), got shape {tuple(cloud.shape)}")
        axis: Any = figure.add_subplot(1, len(clouds), place, projection="3d")
        row, column, height = (part.numpy() for part in cloud.unbind(1))
        size = 25 + 190 * (height - height.min()) / max(float(np.ptp(height)), 1e-6)
        axis.plot_trisurf(*_floor(cloud), color="#eef2f6", shade=False)
        axis.scatter(
            column,
            row,
            height,
            c=height,
            s=size,
            cmap="viridis_r",
            edgecolor="white",
            depthshade=False,
        )
        axis.set_title(title, fontsize=15, y=1.0)
        axis.set_axis_off()
        axis.invert_yaxis()
        axis.set_box_aspect((1, 1, 0.35), zoom=1.25)
        axis.view_init(elev=58, azim=-78)
    return figure


def _floor(cloud: Tensor) -> tuple[Any, Any, Any]:
    """Corners of the plane of pixels under a cloud: columns, rows, heights."""
    low, high = cloud[:, :2].amin(0) - 0.5, cloud[:, :2].amax(0) + 0.5
    columns = torch.stack([low[1], high[1], low[1], high[1]])
    rows = torch.stack([low[0], low[0], high[0], high[0]])
    return columns.numpy(), rows.numpy(), np.zeros(4)
