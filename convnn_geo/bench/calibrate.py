"""What ``backend="auto"`` chooses by: measured on this machine, kept in the user's cache."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convnn_geo import search
from convnn_geo.bench import graph
from convnn_geo.bench.cells import run
from convnn_geo.bench.worker import Worker

SIZES = (256, 1024, 4096, 16384, 65536)
DIMENSIONS = (2, 3, 8, 32, 64, 192)
NEIGHBORS = (9, 40)
BATCHES = (1, 8)
LARGEST = 2**19
"""Points in all examples of a cell, at most."""
LIMIT = 5.0
"""Seconds that a call may take."""


def cells(device: str = "cpu") -> list[graph.Cell]:
    """What is measured: exact engines on random points, and on a lattice what needs one.

    Example:
        >>> {cell.input for cell in cells()} <= {"random", "lattice"}
        True
    """
    found = []
    for n, batch, dimension, k in itertools.product(SIZES, BATCHES, DIMENSIONS, NEIGHBORS):
        if n * batch > LARGEST:
            continue
        for name in search.engines():
            if getattr(search.ENGINES[name], "approximate", False):
                continue
            if name != "grid":
                found.append(graph.Cell(name, n=n, dimension=dimension, k=k, batch=batch))
            elif dimension == 2:
                found.append(graph.Cell(name, "spatial", "lattice", n, 2, k, batch))
    return [replace(cell, device=device, seconds=0.05) for cell in found]


def calibrate(
    device: str = "cpu",
    budget: float = 180.0,
    done: Callable[[graph.Result], object] = lambda result: None,
    todo: Sequence[graph.Cell] | None = None,
) -> list[dict[str, Any]]:
    """Measure within a budget of seconds; what does not fit is left out, largest cells first.

    Args:
        device: where.
        budget: seconds.
        done: called with each result.
        todo: :func:`cells` by default.

    Returns:
        Rows of a cost table, with ``engine``, ``device``, ``dimension``, ``n``, ``m``, ``k``,
        ``batch`` and ``seconds``.
    """
    todo = cells(device) if todo is None else todo
    with Worker(graph.measure, LIMIT) as worker:
        results = run(todo, worker.ask, graph.Result, done, budget)
    return [
        {
            **{"engine": result.cell.engine, "device": device, "dimension": result.cell.dimension},
            **{"n": result.cell.n, "m": result.cell.n, "k": result.cell.k},
            **{"batch": result.cell.batch, "seconds": result.median},
        }
        for result in results
        if not result.note
    ]


def save(rows: Sequence[dict[str, Any]]) -> Path:
    """Keep a cost table in the user's cache; returns the file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "convnn_geo"
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "costs.json"
    file.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    return file
