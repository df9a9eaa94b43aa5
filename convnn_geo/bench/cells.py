"""Going through cells, less those that are sure to take too long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from convnn_geo.bench.worker import Failed

NOT_ASKED = "not asked: time was over"


def run(
    todo: Sequence[Any],
    ask: Callable[[Any], Any],
    failed: Callable[[Any, str], Any],
    done: Callable[[Any], object] = lambda result: None,
    budget: float = math.inf,
) -> list[Any]:
    """Measure cells in turn. One that is larger than one that took too long is left out.

    Args:
        todo: cells, small ones first.
        ask: gives a cell's result or :class:`Failed`, as :meth:`Worker.ask` does.
        failed: gives the result of a cell without one, and why.
        done: called with each result.
        budget: seconds, after which nothing more is asked.
    """
    end = time.monotonic() + budget
    results: list[Any] = []
    slow: list[tuple[Any, str]] = []
    for cell in todo:
        before = next((reason for small, reason in slow if small.no_larger(cell)), None)
        if before is not None:
            result = failed(cell, f"{before}, skipped")
        elif time.monotonic() > end:
            result = failed(cell, NOT_ASKED)
        else:
            result = ask(cell)
            if isinstance(result, Failed):
                slow.append((cell, result.reason))
                result = failed(cell, result.reason)
        results.append(result)
        done(result)
    return results
