"""What a search costs on each engine, as measured: by this table ``backend="auto"`` chooses.

The table that comes with the package was measured on two CPU cores and on an H100. ``convnn-geo
bench graph --calibrate`` measures one on the user's machine and stores it in the user's cache
directory; it goes before the other.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convnn_geo.search.query import Query

SHIPPED = Path(__file__).with_name("costs.json")

_NUMBERS = ("dimension", "n", "m", "k", "batch")
Case = tuple[int, int, int, int]
"""dimension, sources, neighbours, examples."""


def user_table() -> Path:
    """Where this user's table is, or would be."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "convnn_geo" / "costs.json"


def save(cells: list[dict[str, Any]]) -> Path:
    """Store what was measured in this user's table, in the place of what it had of that device.

    Args:
        cells: dictionaries with ``engine``, ``device`` (``"cpu"`` or ``"cuda"``), ``dimension``,
            ``n`` targets, ``m`` sources, ``k``, ``batch`` and ``seconds``.
    """
    path = user_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    devices = {cell["device"] for cell in cells}
    cells = [cell for cell in _users() if cell["device"] not in devices] + cells
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    path.write_text(f"[\n{lines}\n]\n")
    table.cache_clear()
    _expected.cache_clear()
    return path


@functools.cache
def table(device: str) -> dict[Case, dict[str, float]]:
    """Seconds by case and engine on a kind of device: the user's where there are any."""
    for read in (_users, _shipped):
        found: dict[Case, dict[str, float]] = {}
        for cell in read():
            if cell["device"] == device:
                case = (cell["dimension"], cell["m"], cell["k"], cell["batch"])
                found.setdefault(case, {})[cell["engine"]] = cell["seconds"]
        if found:
            return found
    return {}


def _shipped() -> list[dict[str, Any]]:
    return _read(SHIPPED)


def _users() -> list[dict[str, Any]]:
    """The rows of this user's table; none where there is no such file, or it holds other things."""
    try:
        return _read(user_table())
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _read(path: Path) -> list[dict[str, Any]]:
    return [
        {**cell, **{name: int(cell[name]) for name in _NUMBERS}, "seconds": float(seconds)}
        for cell in json.loads(path.read_text())
        if (seconds := cell["seconds"]) > 0 and {"engine", "device"} <= {*cell}
    ]


def expected(query: Query) -> dict[str, float]:
    """Seconds by engine, from the measured case that is most like a query; empty for none."""
    return _expected(
        query.target.device.type,
        _dimension(query),
        query.source.num_points,
        query.k,
        math.prod(query.bound.shape[:-2]),
    )


def _dimension(query: Query) -> int:
    """Of random points that are as hard to search."""
    problem, bound = query.problem, query.bound
    free = bound.freedom if problem is not None and problem.kind == "points" else None
    return free or query.dimension or max(1, bound.width)


@functools.lru_cache(1024)
def _expected(device: str, *size: int) -> dict[str, float]:
    """A case as measured, and from there along each axis as the engine's costs grow.

    Not below the fewest sources that were measured: there each call's own costs rule.
    """
    cases = table(device)
    if not cases:
        return {}
    dimension, sources, *rest = (max(1, number) for number in size)
    asked = (dimension, max(sources, min(case[1] for case in cases)), *rest)
    near = sorted(cases, key=lambda case: _unlike(case, asked))
    first = near[0]
    return {
        engine: seconds
        * math.prod(
            (asked[axis] / first[axis]) ** _growth(cases, near, engine, axis)
            for axis in range(len(asked))
            if asked[axis] != first[axis]
        )
        for engine, seconds in cases[first].items()
    }


def _unlike(case: Sequence[int], other: Sequence[int]) -> float:
    weights = (2.0, 1.0, 0.5, 0.5)  # another dimension changes most
    parts = zip(weights, case, other, strict=True)
    return sum(weight * abs(math.log(a / b)) for weight, a, b in parts)


def _growth(
    cases: dict[Case, dict[str, float]], near: Sequence[Case], engine: str, axis: int
) -> float:
    """The power of one of the four numbers that an engine's time follows near a case.

    By the first pair of cases that differ in that number alone; 0 where there is none.
    """
    for one in near:
        for other in near:
            rest = [a == b for at, (a, b) in enumerate(zip(one, other, strict=True)) if at != axis]
            if one[axis] == other[axis] or not all(rest):
                continue
            if engine in cases[one] and engine in cases[other]:
                ratio = cases[other][engine] / cases[one][engine]
                return math.log(ratio) / math.log(other[axis] / one[axis])
    return 0.0
