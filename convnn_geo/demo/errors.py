"""The table of errors of recipes against their peers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from convnn_geo.console import print_table
from convnn_geo.verify import Row

COLUMNS = (
    "recipe",
    "peer",
    "backend",
    "float64\noutput",
    "float64\ngradient",
    "float32\noutput",
    "float32\ngradient",
    "within\nbounds",
)


def error_table(rows: Sequence[Row]) -> tuple[list[list[str]], set[int]]:
    """The worst error of each recipe on each backend.

    Args:
        rows: of :func:`convnn_geo.verify.run`.

    Returns:
        Cells by :data:`COLUMNS`, and the numbers of lines with an error over its bound.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.recipe, row.backend), []).append(row)
    lines, failed = [], set()
    for number, ((recipe, backend), group) in enumerate(groups.items()):
        passed = all(row.passed for row in group)
        if not passed:
            failed.add(number)
        peers = ", ".join(dict.fromkeys(row.peer for row in group))
        worst = [
            _worst([getattr(row, f"error_{what}") for row in group if row.dtype == dtype])
            for dtype in ("float64", "float32")
            for what in ("output", "gradient")
        ]
        lines.append([recipe, peers, backend, *worst, "yes" if passed else "NO"])
    return lines, failed


def _worst(errors: Sequence[float]) -> str:
    if not errors:
        return "-"
    return f"{math.nan if any(map(math.isnan, errors)) else max(errors):.1e}"


def print_errors(rows: Sequence[Row]) -> None:
    """Print the table and a line that sums it up."""
    lines, failed = error_table(rows)
    print_table("Recipes against their peers: worst absolute errors", COLUMNS, lines, failed)
    print(verdict(rows))


def verdict(rows: Sequence[Row]) -> str:
    """One line: how many checks passed, and which bounds were asked of them.

    Example:
        >>> verdict([Row("conv2d", "even", "nn.Conv2d", "native", "float64", 0.0, 0.0, 1e-10)])
        '1 of 1 checks within bounds (1e-10 in float64)'
    """
    passed = sum(row.passed for row in rows)
    bounds = {(row.dtype, row.bound) for row in rows}
    named = ", ".join(f"{bound:.0e} in {dtype}" for dtype, bound in sorted(bounds, reverse=True))
    return f"{passed} of {len(rows)} checks within bounds ({named})"


def save_errors(rows: Sequence[Row], path: str | Path) -> None:
    """Write every check to a JSON file; an error that is no number becomes null."""
    entries = []
    for row in rows:
        entry = {**dataclasses.asdict(row), "passed": row.passed}
        for key, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[key] = None
        entries.append(entry)
    Path(path).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
