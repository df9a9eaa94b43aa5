"""Pictures: who the neighbours of a pixel are, and how a network does along the spectrum.

Needs the extra ``viz`` (matplotlib). Every function returns a Figure and touches no global state:
nothing is shown, and ``figure.savefig(path)`` works on machines without a display.

Example:
    >>> import torch
    >>> from convnn_geo.points import Points
    >>> from convnn_geo.search import knn
    >>> image = torch.rand(3, 6, 8)
    >>> pixels = Points.from_image(image[None]).with_x(None)
    >>> nearest = knn(pixels, Points(pos=torch.tensor([[2.0, 3.0]])), k=5, metric="spatial")
    >>> figure = draw_neighbors(image, [(2, 3)], [nearest], ["the 5 nearest"])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convnn_geo.checks import check_tensor
from convnn_geo.extras import require
from convnn_geo.neighborhood import Neighborhood

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""

_LUMA = (0.299, 0.587, 0.114)


def draw_neighbors(
    image: Tensor,
    pixels: Sequence[tuple[int, int]],
    neighborhoods: Sequence[Neighborhood],
    titles: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    backdrop: Tensor | None = None,
    columns: int = 3,
) -> Figure:
    """The photograph with marked pixels, then a panel for each way to choose their neighbours.

    Args:
        image: ``(3, height, width)`` or ``(1, height, width)``, in [0, 1]; its pixels are the
            sources that neighbourhoods count, in raster order.
        pixels: targets, as (row, column).
        neighborhoods: one a panel, ``index (number of pixels, k)``.
        titles: one a panel.
        names: of the pixels in the legend; their row and column by default.
        backdrop: the same photograph at a higher resolution, to draw on.
        columns: panels beside one another.

    Raises:
        ValueError: pixels outside the image, or numbers of panels, titles or targets that differ.
        MissingExtraError: matplotlib is not installed.
    """
    height, width = _check_neighbors(image, pixels, neighborhoods, titles)
    photo = image if backdrop is None else backdrop
    names = [f"pixel ({r}, {c})" for r, c in pixels] if names is None else names
    panels = 1 + len(neighborhoods)
    columns = max(1, min(columns, panels))
    figure, axes = _grid(panels, columns, height / width)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    for place, axis in enumerate(axes):
        shown = photo if place == 0 else _dim(photo)
        channels_last = shown.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1)
        axis.imshow(channels_last.numpy(), extent=extent, interpolation="antialiased")
        title = "photograph" if place == 0 else titles[place - 1]
        axis.set_title(title, fontsize=13, fontweight="normal" if place == 0 else "bold")
        if place:
            _scatter(axis, neighborhoods[place - 1], (height, width))
        for number, (name, (row, column)) in enumerate(zip(names, pixels, strict=True)):
            axis.plot(
                column,
                row,
                marker="*",
                markersize=15,
                color=COLORS[number % len(COLORS)],
                markeredgecolor="white",
                markeredgewidth=1.4,
                linestyle="none",
                label=name,
            )
    k = neighborhoods[0].k if neighborhoods else 0
    figure.legend(
        axes[0].get_legend_handles_labels()[0],
        [f"{name} and its {k} neighbours" for name in names],
        loc="outside lower center",
        ncols=min(len(pixels), 3),
        frameon=False,
        fontsize=12,
    )
    return figure


def _check_neighbors(
    image: Tensor,
    pixels: Sequence[tuple[int, int]],
    neighborhoods: Sequence[Neighborhood],
    titles: Sequence[str],
) -> tuple[int, int]:
    check_tensor("image", image, 3)
    channels, height, width = image.shape
    if channels not in (1, 3):
        raise ValueError(f"image: expected 1 or 3 channels first, got shape {tuple(image.shape)}")
    if len(titles) != len(neighborhoods):
        raise ValueError(f"expected a title a panel, got {len(titles)} for {len(neighborhoods)}")
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"pixel ({row}, {column}) is outside the image of {height} rows and {width} columns"
            )
    for hood in neighborhoods:
        if hood.index.ndim != 2 or hood.num_targets != len(pixels):
            raise ValueError(
                f"neighborhood: expected index ({len(pixels)}, k), a row a pixel, got shape "
                f"{tuple(hood.index.shape)}"
            )
        if hood.num_sources != height * width:
            raise ValueError(
                f"neighborhood: expected the image's {height * width} pixels as sources, "
                f"got {hood.num_sources}"
            )
    return height, width


_PANEL = 4.0
"""Width of a panel in inches."""


def _grid(panels: int, columns: int, ratio: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels of one shape, without ticks."""
    rows = math.ceil(panels / columns)
    size = (_PANEL * columns, (_PANEL * ratio + 0.3) * rows + 0.45)
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=size, dpi=110, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.06)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _dim(photo: Tensor) -> Tensor:
    """Grey and light, so that colours on it stand out."""
    if photo.shape[0] == 3:
        photo = torch.einsum("chw,c->hw", photo, photo.new_tensor(_LUMA)).unsqueeze(0)
    return 0.45 + 0.55 * photo


def _scatter(axis: Axes, hood: Neighborhood, size: tuple[int, int]) -> None:
    """A square for each neighbour, a little larger than its pixel, so that it can be seen."""
    height, width = size
    side = 0.72 * 1.5 * _PANEL * 100 / max(width, height * 1.0)
    for number in range(hood.num_targets):
        index = hood.index[number]
        if hood.mask is not None:
            index = index[hood.mask[number]]
        axis.scatter(
            (index % width).numpy(),
            (index // width).numpy(),
            s=side**2,
            marker="s",
            color=COLORS[number % len(COLORS)],
            linewidths=0,
        )


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
        figsize=(3.2 * len(clouds), 3.4), dpi=110, layout="constrained"
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
        axis.set_title(title, fontsize=15, y=0.92)
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
