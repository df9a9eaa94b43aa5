"""Results as tables: for the terminal, for spreadsheets and for programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from convnn_geo.bench import graph, layers, peer
from convnn_geo.bench.cells import NOT_ASKED
from convnn_geo.bench.machine import commit, processor, versions
from convnn_geo.console import print_table


def print_graph(results: Sequence[graph.Result]) -> None:
    """A table for each metric, input, dimension, k and batch, with ratios to torch_cluster."""
    columns = [
        *("n", "engine", "median", "p10", "p90", f"ratio to\n{peer.NAME}", "points/s"),
        *("added MiB", "recall", "host", "syncs"),
    ]
    medians = {result.cell: result.median for result in results}
    tables: dict[str, list[list[str]]] = {}
    refusals: dict[str, dict[str, None]] = {}
    for result in _asked(sorted(results, key=lambda result: result.cell.n)):
        cell = result.cell
        title = (
            f"{cell.metric} on {cell.input}, {cell.dimension} dimensions, k = {cell.k}, "
            f"{examples(cell.batch)}, {cell.device}"
        )
        if result.note and not result.ended:
            refusals.setdefault(title, {})[f"  {cell.engine}: {result.note}"] = None
            continue
        base = medians.get(replace(cell, engine=peer.NAME), math.nan)
        measured = [
            result.note or seconds(result.median),
            *(seconds(value) for value in (result.p10, result.p90)),
            number(result.median / base),
            number(result.points),
            _whole(result.memory),
            "-" if math.isnan(result.recall) else f"{result.recall:.4f}",
            seconds(result.host),
            _whole(result.syncs),
        ]
        tables.setdefault(title, []).append([str(cell.n), cell.engine, *measured])
    _print(columns, tables, refusals)


def print_layers(results: Sequence[layers.Result]) -> None:
    """A table for each family and input, with ratios to the layer that it stands in for."""
    columns = [
        *("n", "layer", "forward", "p10", "p90", "ratio", "added MiB"),
        *("with backward", "p10", "p90", "ratio", "added MiB"),
    ]
    found = {result.cell: result for result in results}
    tables: dict[str, list[list[str]]] = {}
    refusals: dict[str, dict[str, None]] = {}
    for result in _asked(results):
        cell = result.cell
        first = layers.baseline(cell.family)
        base = found.get(replace(cell, layer=first), result)
        title = (
            f"{cell.family} on {cell.input}, {cell.channels} channels, {examples(cell.batch)}, "
            f"{cell.device}; ratios to {first}"
        )
        if result.note and not result.note.startswith(">"):
            refusals.setdefault(title, {})[f"  {cell.layer}, n = {cell.n}: {result.note}"] = None
            continue
        measured = [
            result.note or seconds(result.forward),
            *(seconds(value) for value in (result.forward_p10, result.forward_p90)),
            *(number(result.forward / base.forward), _whole(result.forward_memory)),
            *(seconds(value) for value in (result.both, result.both_p10, result.both_p90)),
            *(number(result.both / base.both), _whole(result.both_memory)),
        ]
        tables.setdefault(title, []).append([str(cell.n), cell.layer, *measured])
    _print(columns, tables, refusals)


def _asked(results: Sequence[Any]) -> Iterator[Any]:
    """Results that time was left for; then a word on the others."""
    late = [result for result in results if result.note == NOT_ASKED]
    yield from (result for result in results if result.note != NOT_ASKED)
    if late:
        print(f"{len(late)} of {len(results)} {NOT_ASKED}")


def _print(
    columns: Sequence[str],
    tables: Mapping[str, list[list[str]]],
    refusals: Mapping[str, Mapping[str, None]],
) -> None:
    """Each table by its title, and below it what gave no result, and why."""
    for title in {**tables, **refusals}:
        if title in tables:
            print_table(title, columns, tables[title])
        else:
            print(title)
        print(*refusals.get(title, ()), "", sep="\n")


def save(folder: Path, results: Sequence[Any], settings: Mapping[str, Any], device: str) -> None:
    """Write ``results.csv`` and ``results.json``; the latter says what was run, and on what.

    Args:
        folder: that exists.
        results: with cells.
        settings: that they were made with.
        device: that was measured.
    """
    rows = []
    for result in results:
        row = asdict(result)
        rows.append({**row.pop("cell"), **row})
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows({key: _empty(value, "") for key, value in row.items()} for row in rows)
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": processor(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "settings": dict(settings),
        "results": [{key: _empty(value, None) for key, value in row.items()} for row in rows],
    }
    text = json.dumps(facts, indent=1, default=str) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")


def seconds(value: float) -> str:
    """A time in its unit, with three digits.

    Example:
        >>> seconds(0.00123), seconds(12.34), seconds(float("nan"))
        ('1.23 ms', '12.3 s', '-')
    """
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 0.9995:
            return f"{number(value * factor)} {unit}"
    return "-" if math.isnan(value) else f"{number(value * 1e6)} µs"


def number(value: float) -> str:
    """A number with three digits; a dash for none.

    Example:
        >>> number(123456.7), number(0.5), number(float("nan"))
        ('123000', '0.500', '-')
    """
    if math.isnan(value):
        return "-"
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, places):.{max(0, places)}f}"


def examples(batch: int) -> str:
    """How many examples a batch has, in words.

    Example:
        >>> examples(1), examples(8)
        ('1 example', '8 examples')
    """
    return "1 example" if batch == 1 else f"{batch} examples"


def _whole(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"


def _empty(value: Any, none: Any) -> Any:
    return none if isinstance(value, float) and math.isnan(value) else value
