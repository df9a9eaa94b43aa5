"""Running what an experiment lacks, with every finished run kept."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from torch import nn

from convnn_geo.checks import check_instance, check_number
from convnn_geo.experiments.base import Experiment, Setting
from convnn_geo.train import ConfigError
from convnn_geo.train.checkpoint import write_atomically
from convnn_geo.train.processes import start
from convnn_geo.train.setup import load_task, new_model
from convnn_geo.train.training import Training
from convnn_geo.train.watch import Watch
from convnn_geo.workers import run_jobs


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        score: name of what is scored.
        test: score on the test part after the last epoch.
        validation: score on the validation part after the last epoch.
        parameters: numbers in the model.
        seconds: of training, an epoch.
        test_size: examples that were scored.
        learned: where layers that learn their place on the spectrum were at the end, by name.
    """

    score: str
    test: float
    validation: float
    parameters: int
    seconds: float
    test_size: int
    learned: dict[str, float] = field(default_factory=dict)


def run(
    experiment: Experiment,
    folder: Path,
    seeds: int = 3,
    quick: bool = False,
    workers: int = 2,
    tell: Callable[[str], object] = lambda line: None,
) -> list[tuple[Setting, list[Result]]]:
    """Train what was not trained yet.

    A run is kept as a file under a name that says all that its numbers depend on, so that a second
    call goes on where the first was stopped, and changed settings, or those of another version of
    the library, are trained anew.

    Args:
        experiment: to run.
        folder: of the runs that are kept.
        seeds: runs of each setting, with seeds 0, 1, ...
        quick: run the small part.
        workers: processes; 1 to run here.
        tell: is given a line for each run that finishes.

    Returns:
        Each setting with its results, one a seed.

    Raises:
        CheckpointError: a result can't be written.
        ConfigError: a kept result is corrupt.
        DivergedError: a loss became infinite or no number.
        MissingExtraError: a package of the extras train, data or vision is not installed.
    """
    settings = experiment.settings(quick)
    runs = [(setting, seed) for seed in range(seeds) for setting in settings]
    files = [_file(folder, *each) for each in runs]
    lacking = {file: each for file, each in zip(files, runs, strict=True) if not file.exists()}
    if len(lacking) < len(set(files)):
        tell(f"{len(set(files)) - len(lacking)} of {len(set(files))} runs are there already")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {file: partial(train_setting, *each) for file, each in lacking.items()}
    for number, (file, result) in enumerate(run_jobs(jobs, workers), start=1):
        write_atomically(file, json.dumps(asdict(result), indent=1) + "\n")
        setting, seed = lacking[file]
        tell(
            f"{number}/{len(lacking)}  {setting.label}, seed {seed}: "
            f"{result.score} {result.test:.4g}"
        )
    found = {file: _read(file) for file in dict.fromkeys(files)}
    return [
        (setting, [found[_file(folder, setting, seed)] for seed in range(seeds)])
        for setting in settings
    ]


def train_setting(setting: Setting, seed: int) -> Result:
    """Train, and read the test part once, by the last weights.

    Args:
        setting: what to train.
        seed: of the weights, of the order of examples, and of what a model draws.
    """
    config = setting.config
    fabric, task = start(config), load_task(config)
    _, module = new_model(config, task, seed, change=setting.change)
    training = Training(fabric, config, task, module, seed)
    while training.epoch < config.epochs:
        training.train_epoch(Watch())
    test = training.evaluate(task.test)
    score = training.objective.score
    return Result(
        score=score,
        test=test[score],
        validation=training.history[-1][f"validation_{score}"],
        parameters=sum(p.numel() for p in module.parameters()),
        seconds=statistics.fmean(row["seconds"] for row in training.history),
        test_size=len(task.test),
        learned=learned(module),
    )


def learned(model: nn.Module) -> dict[str, float]:
    """Where layers stand that learn their place on the spectrum, or their heads, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith(".metric.lam") and parameter.requires_grad:
            layer, places = name.removesuffix(".metric.lam"), parameter.detach().clamp(0, 1)
            if places.ndim:
                found.update({f"{layer}, head {h}": lam for h, lam in enumerate(places.tolist())})
            else:
                found[layer] = places.item()
    return found


def _read(file: Path) -> Result:
    try:
        found = Result(**json.loads(file.read_text(encoding="utf-8")))
        check_instance("score", found.score, str)
        check_instance("learned", found.learned, dict)
        for name in ("test", "validation", "parameters", "seconds", "test_size"):
            check_number(name, getattr(found, name), -math.inf)
        for name, value in found.learned.items():
            check_number(name, value)
        return found
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is corrupt ({error}); delete it to train anew") from error


def _file(folder: Path, setting: Setting, seed: int) -> Path:
    digest = hashlib.sha256(setting.key().encode()).hexdigest()[:12]
    return folder / f"{digest}-seed-{seed}.json"
