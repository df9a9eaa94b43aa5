"""Who follows a run: nobody, or a terminal with a bar and a line an epoch."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

import torch

from convnn_geo.extras import MissingExtraError, require


class Watch:
    """Is told how a run goes, and does nothing about it."""

    def begin(self, seed: int, epoch: int, epochs: int, steps: int) -> None:
        """An epoch of so many steps begins; epochs count from 1."""

    def step(self) -> None:
        """An optimizer step is done."""

    def end(self, row: dict[str, Any]) -> None:
        """An epoch is done and saved."""


class Terminal(Watch):
    """Prints a line for each epoch, and draws a bar under them where someone looks.

    Needs rich for the bar. Without it, and in a file or a pipe, an epoch that takes long says now
    and then how far it is.

    Args:
        every: seconds between two such lines.
    """

    def __init__(self, every: float = 20.0) -> None:
        self.every = every
        self._bar: Any = None
        self._task: Any = None
        self._begun = False
        self._place, self._steps, self._done, self._said = "", 0, 0, 0.0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Terminal:
        if sys.stdout.isatty():
            with contextlib.suppress(MissingExtraError):
                progress = require("rich.progress", extra="train")
                self._bar = self._open.enter_context(progress.Progress(transient=True))
                self._task = self._bar.add_task("")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def begin(self, seed: int, epoch: int, epochs: int, steps: int) -> None:
        if not self._begun:  # the first epoch may take long
            self._begun = True
            threads = torch.get_num_threads()
            start = f", from epoch {epoch} on" if epoch > 1 else ""
            print(f"{epochs} epochs of {steps} steps{start}; threads {threads}", flush=True)
        self._place = f"seed {seed}, epoch {epoch} of {epochs}"
        self._steps, self._done, self._said = steps, 0, time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, total=steps, description=self._place)

    def step(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif time.monotonic() - self._said >= self.every and self._done < self._steps:
            self._said = time.monotonic()
            print(f"{self._place}, step {self._done} of {self._steps}", flush=True)

    def end(self, row: dict[str, Any]) -> None:
        say = print if self._bar is None else self._bar.console.print
        say(line(row))
        sys.stdout.flush()


def line(row: dict[str, Any]) -> str:
    """An epoch in a line.

    Example:
        >>> row = {"seed": 0, "epoch": 3, "train_loss": 0.5, "validation_loss": 0.25}
        >>> line({**row, "validation_accuracy": 0.9, "seconds": 1.5, "learning_rate": 0.1})
        'seed 0  epoch 3  train_loss 0.5  validation_loss 0.25  validation_accuracy 0.9  1.5 s'
    """
    shown = [key for key in row if key == "train_loss" or key.startswith("validation_")]
    values = "  ".join(f"{key} {row[key]:.4g}" for key in shown)
    return f"seed {row['seed']}  epoch {row['epoch']}  {values}  {row['seconds']:.1f} s"
