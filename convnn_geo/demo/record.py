"""What a demonstration leaves for machines: its configuration and a row for every epoch."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from convnn_geo.bench.machine import processor
from convnn_geo.demo.training import Run

PACKAGES = ("torch", "torch_geometric", "numpy", "scikit-learn", "scikit-image", "matplotlib")
"""Those that numbers may depend on."""

COLUMNS = (
    "task",
    "network",
    "lam",
    "seed",
    "learning_rate",
    "parameters",
    "epoch",
    "train_loss",
    "validation_accuracy",
    "test_accuracy",
)


def write_metrics(runs: Sequence[Run], path: Path) -> None:
    """A row for each epoch of each run.

    ``test_accuracy`` stands in the last row of the runs that were chosen, and nowhere else.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for run in runs:
            facts = (run.task, run.network, run.lam, run.seed, run.rate, run.parameters)
            last = len(run.losses)
            history = zip(run.losses, run.validation, strict=True)
            for epoch, (loss, validation) in enumerate(history, start=1):
                test = run.test if epoch == last else None
                cells = (*facts, epoch, f"{loss:.6f}", f"{validation:.6f}")
                writer.writerow(
                    ["" if c is None else c for c in cells]
                    + ["" if test is None else f"{test:.6f}"]
                )


def machine() -> dict[str, str | int]:
    """What times may depend on: processor, cores that this process may use, and system.

    Example:
        >>> sorted(machine())
        ['cores', 'processor', 'system']
    """
    system = f"{platform.system()} {platform.machine()}"
    return {"processor": processor(), "cores": cores(), "system": system}


def cores() -> int:
    """Processors that this process may use.

    Example:
        >>> cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
