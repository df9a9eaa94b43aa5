"""Which pictures there are of results, and under what names they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convnn_geo.bench import graph, layers, plots
from convnn_geo.bench.tables import examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_graph(results: Sequence[graph.Result], folder: Path, limit: float) -> list[Path]:
    """Scaling and recall for each input, k and batch; winners for each input and metric.

    Args:
        results: of search engines.
        folder: for the pictures; those of an earlier run are removed.
        limit: seconds after which calls were ended.

    Returns:
        The files written.
    """
    return _save(_of_graph(results, limit), folder)


def draw_layers(results: Sequence[layers.Result], folder: Path, limit: float) -> list[Path]:
    """Time and memory for each input, number of channels and batch.

    Args:
        results: of layers.
        folder: for the pictures; those of an earlier run are removed.
        limit: seconds after which calls were ended.

    Returns:
        The files written.
    """
    return _save(_of_layers(results), folder)


def _of_graph(results: Sequence[graph.Result], limit: float) -> Iterator[tuple[str, Figure]]:
    for name, k, batch in dict.fromkeys((r.cell.input, r.cell.k, r.cell.batch) for r in results):
        some = [r for r in results if (r.cell.input, r.cell.k, r.cell.batch) == (name, k, batch)]
        what = f"{name} points, k = {k}, {examples(batch)}, {some[0].cell.device}"
        yield f"scaling_{name}_k{k}_batch{batch}", plots.plot_scaling(some, what, limit)
        yield f"recall_{name}_k{k}_batch{batch}", plots.plot_recall(some, what)
    for name, metric in dict.fromkeys((r.cell.input, r.cell.metric) for r in results):
        some = [r for r in results if (r.cell.input, r.cell.metric) == (name, metric)]
        what = f"Fastest with recall over 0.999: {metric}, {name} points, {some[0].cell.device}"
        yield f"winners_{name}_{metric}", plots.plot_winners(some, what)


def _of_layers(results: Sequence[layers.Result]) -> Iterator[tuple[str, Figure]]:
    keys = dict.fromkeys((r.cell.input, r.cell.channels, r.cell.batch) for r in results)
    for name, channels, batch in keys:
        some = [
            r
            for r in results
            if (r.cell.input, r.cell.channels, r.cell.batch) == (name, channels, batch)
        ]
        what = f"{name} points, {channels} channels, {examples(batch)}, {some[0].cell.device}"
        if not any(not r.note for r in some):
            continue
        yield f"layers_{name}_c{channels}_batch{batch}", plots.plot_layers(some, what)


def _save(figures: Iterator[tuple[str, Figure]], folder: Path) -> list[Path]:
    for old in folder.glob("*.png"):
        if re.match(r"(scaling|recall|winners|layers)_", old.name):
            old.unlink()
    files = []
    for name, figure in figures:
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1])
    return files
