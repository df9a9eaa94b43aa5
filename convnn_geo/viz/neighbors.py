"""Who the neighbours of a pixel are, drawn on the photograph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convnn_geo.checks import check_tensor
from convnn_geo.extras import require
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.viz.colors import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LUMA = (0.299, 0.587, 0.114)


def draw_neighbors(
    image: Tensor,
    pixels: Sequence[tuple[int, int]],
    neighborhoods: Sequence[Neighborhood],
    titles: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    backdrop: Tensor | None = None,
) -> Figure:
    """The photograph with marked pixels, then a panel for each way to choose their neighbours.

    The panels fill a rectangle; where their number fills none, the photograph is twice as large.

    Args:
        image: ``(3, height, width)`` or ``(1, height, width)``, in [0, 1]; its pixels are the
            sources that neighbourhoods count, in raster order.
        pixels: targets, as (row, column).
        neighborhoods: one a panel, ``index (number of pixels, k)``.
        titles: one a panel.
        names: of the pixels in the legend; their row and column by default.
        backdrop: the same photograph at a higher resolution, to draw on.

    Raises:
        ValueError: pixels outside the image, or numbers of panels, titles or targets that differ.
        MissingExtraError: matplotlib is not installed.
    """
    height, width = _check_neighbors(image, pixels, neighborhoods, titles)
    photo = image if backdrop is None else backdrop
    names = [f"pixel ({r}, {c})" for r, c in pixels] if names is None else names
    panels = 1 + len(neighborhoods)
    columns = _layout(panels)[1]  # a panel is as wide as an entry of the legend
    figure, axes = _grid(panels, height / width, math.ceil(len(pixels) / columns))
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    for place, axis in enumerate(axes):
        shown = photo if place == 0 else _dim(photo)
        channels_last = shown.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1)
        axis.imshow(channels_last.numpy(), extent=extent, interpolation="antialiased")
        title = "photograph" if place == 0 else titles[place - 1]
        axis.set_title(title, fontsize=13, fontweight="normal" if place == 0 else "bold")
        if place:
            _scatter(axis, neighborhoods[place - 1], width)
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
        ncols=min(len(pixels), columns),
        frameon=False,
        fontsize=11,
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


def _grid(panels: int, ratio: float, legend_lines: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels of one shape, without ticks, and room for a legend below."""
    rows, columns, span = _layout(panels)
    size = (_PANEL * columns, (_PANEL * ratio + 0.4) * rows + 0.2 + 0.3 * legend_lines)
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=size, dpi=110, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.06)
    grid = figure.add_gridspec(rows, columns)
    axes = [figure.add_subplot(grid[:span, :span])]
    axes += [
        figure.add_subplot(grid[row, column])
        for row in range(rows)
        for column in range(columns)
        if row >= span or column >= span
    ]
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_anchor("N")  # titles of a row stand on one line
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes


def _layout(panels: int) -> tuple[int, int, int]:
    """Rows, columns, and cells that the photograph spans each way, so that no cell stays empty."""
    rows, span = _rows(panels), 1
    if rows == 1 and panels > 3:  # a prime number fills no rectangle, but an even one does
        rows, span = _rows(panels + 3), 2
    return rows, (panels - 1 + span**2) // rows, span


def _rows(cells: int) -> int:
    """Rows of the rectangle of so many cells that is nearest to a square, and no taller than it."""
    return max(rows for rows in range(1, math.isqrt(cells) + 1) if cells % rows == 0)


def _dim(photo: Tensor) -> Tensor:
    """Grey and light, so that colours on it stand out."""
    if photo.shape[0] == 3:
        photo = torch.einsum("chw,c->hw", photo, photo.new_tensor(_LUMA)).unsqueeze(0)
    return 0.45 + 0.55 * photo


def _scatter(axis: Axes, hood: Neighborhood, width: int) -> None:
    """A square for each neighbour, a little larger than its pixel, so that it can be seen."""
    side = 1.5 * 72 * _PANEL / width  # in points, 72 an inch
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
