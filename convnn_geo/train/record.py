"""What a run leaves for people and machines: metrics, a result, TensorBoard's files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from convnn_geo.extras import MissingExtraError, require
from convnn_geo.train.checkpoint import WEIGHTS, write_atomically


@dataclass(frozen=True)
class Run:
    """A trained model, scored.

    Args:
        seed: of the run.
        parameters: numbers in the model.
        history: a row an epoch: seed, epoch, learning_rate, train_loss (of what is learned, with
            mixup and label smoothing), validation_loss (without), the score as validation_accuracy
            or validation_psnr, and seconds of training.
        test: loss and score on the test part, by the last weights.
        folder: with ``weights.pt`` and the metrics.
    """

    seed: int
    parameters: int
    history: tuple[dict[str, Any], ...]
    test: dict[str, float]
    folder: Path

    @property
    def validation(self) -> dict[str, float]:
        """Loss and score on the validation part after the last epoch: what to choose by."""
        last = self.history[-1]
        return {name: last[f"validation_{name}"] for name in self.test}

    def model(self) -> nn.Module:
        """The model with its trained weights, in eval mode, on the CPU."""
        from convnn_geo.train.setup import load_model

        return load_model(self.folder / WEIGHTS)

    def to_dict(self) -> dict[str, Any]:
        """All but the folder."""
        return {
            "seed": self.seed,
            "parameters": self.parameters,
            "validation": self.validation,
            "test": self.test,
            "history": list(self.history),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: Path) -> Run:
        """Back from :meth:`to_dict`; keys that it does not give are left out."""
        return cls(
            values["seed"], values["parameters"], tuple(values["history"]), values["test"], folder
        )


def write_metrics(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write ``metrics.csv`` and ``metrics.jsonl``, a row an epoch.

    They are written anew from the history that the checkpoint holds, so that a run that was killed
    and continued leaves no epoch twice.

    Args:
        folder: of the run.
        history: rows with the same keys.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]) if history else [])
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "metrics.csv", text.getvalue())
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_atomically(folder / "metrics.jsonl", lines)


class Board:
    """TensorBoard's files, where they are asked for, or can be written.

    Args:
        folder: of the run; the files are in ``tensorboard`` there.
        enabled: whether to write any; None for where TensorBoard is installed.
        epoch: epochs that are done; later ones that the files hold are forgotten.

    Raises:
        MissingExtraError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, enabled: bool | None, epoch: int = 0) -> None:
        self._writer: Any = None
        if _is_there() if enabled is None else enabled:
            require("tensorboard", extra="tensorboard")
            board = require("torch.utils.tensorboard", extra="tensorboard")
            self._writer = board.SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # what failed before is the error to be seen
                self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        """Add an epoch."""
        if self._writer is not None:
            for name in row.keys() - {"seed", "epoch"}:
                self._writer.add_scalar(name, row[name], row["epoch"])
            self._writer.flush()


def _is_there() -> bool:
    try:
        require("tensorboard", extra="tensorboard")
    except MissingExtraError:
        return False
    return True
