"""The page of an experiment: NAME.md with a table and what was seen, NAME.csv and NAME.png."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch

from convnn_geo import __version__
from convnn_geo.experiments.base import Experiment, place
from convnn_geo.experiments.pictures import draw
from convnn_geo.experiments.summary import Row, paragraphs
from convnn_geo.train.checkpoint import write_atomically


def write_report(experiment: Experiment, rows: Sequence[Row], folder: Path, command: str) -> Path:
    """Write the three files.

    Args:
        experiment: that was run.
        rows: of all its settings.
        folder: for the files.
        command: that made them.

    Returns:
        The page's path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw(experiment, rows).savefig(folder / f"{experiment.name}.png")
    write_atomically(folder / f"{experiment.name}.csv", _csv(rows))
    path = folder / f"{experiment.name}.md"
    write_atomically(path, page(experiment, rows, command))
    return path


def head(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Names of the table's columns."""
    unit = rows[0].unit
    scores = [f"test ({unit})", f"validation ({unit})"]
    return ["series", experiment.axis, "epochs", *scores, "parameters", "seconds an epoch"]


def cells(row: Row) -> list[str]:
    """A row of the table, by :func:`head`."""
    return [
        row.setting.series,
        place(row.setting.at),
        f"{row.setting.config.epochs}",
        row.shown,
        f"{row.validation:.2f}",
        f"{row.results[0].parameters}",
        f"{row.seconds:.2f}",
    ]


def page(experiment: Experiment, rows: Sequence[Row], command: str) -> str:
    """The page in Markdown."""
    lines = [
        f"# {experiment.title}",
        experiment.question,
        *paragraphs(experiment, rows),
        f"![{experiment.title}]({experiment.name}.png)",
        experiment.notes,
    ]
    if experiment.published is not None:
        lines.append(
            f"Published, on other data and at another size, so that only shapes compare: "
            f"{experiment.published.source}."
        )
    lines.append(_table(head(experiment, rows), [cells(row) for row in rows]))
    places = [row for row in rows if row.learned]
    if places:
        lines += ["Where λ was when training ended, mean over seeds:", *_places(places)]
    lines.append(
        f"Made by `{command}` with convnn_geo {__version__} and torch {torch.__version__}. Within "
        "a series all are trained alike. The test part is read once, after the last epoch. Seconds "
        "are of a thread beside whatever else the machine did. Every run is in "
        f"[{experiment.name}.csv]({experiment.name}.csv)."
    )
    return "\n\n".join(lines) + "\n"


def _places(rows: Sequence[Row]) -> list[str]:
    """A table for each kind of network, as these have layers of their own."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        means = [f"{mean:.2f}" for mean, _ in row.learned.values()]
        tables.setdefault(tuple(row.learned), []).append([row.setting.label, *means])
    return [_table(["setting", *names], body) for names, body in tables.items()]


def _table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *body))


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["series", "at", "epochs", "seed", "test", "validation", "parameters", "seconds", "learned"]
    )
    for row in rows:
        for seed, result in enumerate(row.results):
            learned = " ".join(f"{name}={value:.4f}" for name, value in result.learned.items())
            writer.writerow(
                [
                    row.setting.series,
                    place(row.setting.at),
                    row.setting.config.epochs,
                    seed,
                    f"{result.test:.6g}",
                    f"{result.validation:.6g}",
                    result.parameters,
                    f"{result.seconds:.3f}",
                    learned,
                ]
            )
    return text.getvalue()
