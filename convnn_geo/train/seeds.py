"""Several runs that differ by their seeds, and what they say together."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from convnn_geo.extras import require
from convnn_geo.train.checkpoint import write_atomically
from convnn_geo.train.config import Config
from convnn_geo.train.loop import fit, stored
from convnn_geo.train.processes import start
from convnn_geo.train.record import Run
from convnn_geo.train.setup import check_names
from convnn_geo.train.watch import Watch


@dataclass(frozen=True)
class Summary:
    """Runs of one configuration.

    Args:
        config: what they share.
        runs: one a seed.
    """

    config: Config
    runs: tuple[Run, ...]

    @property
    def score(self) -> str:
        """The name of what is scored: ``"accuracy"`` or ``"psnr"``."""
        return next(name for name in self.runs[0].test if name != "loss")

    @property
    def scores(self) -> list[float]:
        """On the test part, one a seed."""
        return [run.test[self.score] for run in self.runs]

    @property
    def mean(self) -> float:
        """Of :attr:`scores`."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of :attr:`scores`, of a sample (n - 1); None for a single run."""
        return statistics.stdev(self.scores) if len(self.runs) > 1 else None

    @property
    def validation(self) -> float:
        """Mean score on the validation part after the last epoch: what to choose by."""
        return statistics.fmean(run.validation[self.score] for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {
            "score": self.score,
            "mean": self.mean,
            "deviation": self.deviation,
            "validation": self.validation,
            "config": self.config.to_dict(),
            "runs": [run.to_dict() for run in self.runs],
        }

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.4g}"
        seeds = f"{len(self.runs)} seed" + ("s" if len(self.runs) > 1 else "")
        return f"test {self.score} {self.mean:.4g}{spread} ({seeds})"


def train(config: Config, *, resume: bool = False, watch: Watch | None = None) -> Summary:
    """Train once a seed; write ``summary.json`` and ``curves.png``.

    Args:
        config: of the runs.
        resume: continue what was begun in the folder.
        watch: is told how it goes.

    Raises:
        ConfigError: see :func:`convnn_geo.train.fit`, as for the other errors.
        MissingExtraError: Lightning Fabric or matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from convnn_geo.train import Config, train
        >>> config = Config("all_conv_net", image_size=8, epochs=1, out=tempfile.mkdtemp())
        >>> summary = train(config)
        >>> len(summary.runs), summary.score, summary.deviation
        (1, 'accuracy', None)
    """
    require("matplotlib.figure", extra="train")  # before hours of work
    from convnn_geo.train.plots import plot_curves

    check_names(config)
    fabric = start(config)
    if fabric.is_global_zero:
        for seed in range(config.seeds):  # before hours of work
            stored(config, seed, resume)
    runs = [fit(config, seed, resume=resume, watch=watch) for seed in range(config.seeds)]
    summary = Summary(config, tuple(runs))
    if fabric.is_global_zero:
        text = json.dumps(summary.to_dict(), indent=2)
        write_atomically(config.folder / "summary.json", text)
        plot_curves(runs, config.folder.name).savefig(config.folder / "curves.png")
    return summary
