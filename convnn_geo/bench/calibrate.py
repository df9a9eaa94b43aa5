"""What ``backend="auto"`` chooses by: measured on this machine, kept in the user's cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from convnn_geo import search
from convnn_geo.bench import graph
from convnn_geo.bench.cells import NOT_ASKED, run
from convnn_geo.bench.worker import Worker

NEIGHBORS_AND_BATCHES = ((9, 1), (40, 1), (9, 8))
SIZES = (1024, 16384, 4096, 65536, 256)
DIMENSIONS = (2, 3, 16, 64, 192)
"""In the order in which they are measured: a short budget still covers a wide range."""

LIMIT = 3.0
"""Seconds that a call may take."""


def cells(device: str = "cpu") -> list[graph.Cell]:
    """What is measured: exact engines on random points, but ``grid``, which keeps what it found.

    Example:
        >>> {cell.input for cell in cells()}
        {'random'}
    """
    left_out = {"grid", "keops"} if device == "cpu" else {"grid"}  # KeOps compiles for each case
    exact = [
        name for name in search.engines() if name not in left_out and not graph.is_approximate(name)
    ]
    found = []
    for (k, batch), n, dimension in itertools.product(NEIGHBORS_AND_BATCHES, SIZES, DIMENSIONS):
        size = (n, dimension, k, batch, device, 0.05)
        found += [graph.Cell(name, "euclidean", "random", *size) for name in exact]
    return found


def calibrate(
    device: str = "cpu",
    budget: float = 480.0,
    done: Callable[[graph.Result], object] = lambda result: None,
    todo: Sequence[graph.Cell] | None = None,
) -> list[dict[str, Any]]:
    """Measure within a budget of seconds; what does not fit is left out.

    Args:
        device: where.
        budget: seconds.
        done: called with each result.
        todo: :func:`cells` by default.

    Returns:
        The :func:`rows` of a cost table.
    """
    todo = cells(device) if todo is None else todo
    with Worker(graph.measure, LIMIT, device=device, apart=graph.engine_of) as worker:
        return rows(run(todo, worker.ask, graph.Result, done, budget))


def rows(results: Sequence[graph.Result]) -> list[dict[str, Any]]:
    """Rows of a cost table, of cases in which every engine was asked.

    Returns:
        Dictionaries with ``engine``, ``device``, ``dimension``, ``n``, ``m``, ``k``, ``batch`` and
        ``seconds``.
    """

    def case(cell: graph.Cell) -> tuple[int, ...]:
        return cell.n, cell.dimension, cell.k, cell.batch

    partial = {case(result.cell) for result in results if result.note == NOT_ASKED}
    return [
        {
            "engine": cell.engine,
            "device": cell.device.partition(":")[0],
            "dimension": cell.dimension,
            "n": cell.n,
            "m": cell.n,
            "k": cell.k,
            "batch": cell.batch,
            "seconds": result.median,
        }
        for result in results
        if not result.note and case(cell := result.cell) not in partial
    ]
