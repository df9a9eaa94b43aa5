"""A run from its first epoch, or from where it was left, to its one look at the test part."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from convnn_geo.train.alone import alone
from convnn_geo.train.checkpoint import (
    NAME,
    PREVIOUS,
    WEIGHTS,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from convnn_geo.train.config import Config, ConfigError
from convnn_geo.train.processes import start
from convnn_geo.train.record import Board, Run, write_metrics
from convnn_geo.train.setup import check_names, load_task, new_model, save_model
from convnn_geo.train.training import Training
from convnn_geo.train.watch import Watch


def fit(config: Config, seed: int = 0, *, resume: bool = False, watch: Watch | None = None) -> Run:
    """Train with one seed, and read the test part once, by the last weights.

    Writes to ``config.folder / f"seed-{seed}"``: after each epoch a checkpoint and the metrics so
    far, and at the end ``result.json`` and ``weights.pt``. A run that was killed loses at most the
    epoch that it was in. On the CPU a continued run gives the same weights, bit for bit, as one
    that was never interrupted.

    Args:
        config: of the run.
        seed: of the weights, of the order of examples, and of dropout and the like.
        resume: continue a run that was begun in the folder; what is done is not done again.
        watch: is told how it goes.

    Raises:
        ConfigError: the model or the data don't take what the configuration asks for, or a piece
            of a batch is too small for batch normalisation, or the folder holds a run and
            ``resume`` is False, or one of another configuration, or another run is writing there.
        CheckpointError: a checkpoint is corrupt or can't be written, or a run that is done has
            lost its weights.
        DivergedError: the loss became infinite or no number.
        MissingExtraError: Lightning Fabric is not installed.

    Example:
        >>> import tempfile
        >>> from convnn_geo.train import Config, fit
        >>> config = Config("all_conv_net", image_size=8, epochs=1, out=tempfile.mkdtemp())
        >>> sorted(fit(config, seed=0).test)
        ['accuracy', 'loss']
    """
    check_names(config)
    fabric = start(config)
    folder = _folder(config, seed)
    with alone(folder) if fabric.is_global_zero else nullcontext():
        run = _fit(config, seed, resume, watch, fabric, folder)
    fabric.barrier()
    return run


def _fit(
    config: Config, seed: int, resume: bool, watch: Watch | None, fabric: Any, folder: Path
) -> Run:
    found = stored(config, seed, resume) if fabric.is_global_zero else {}
    state = fabric.broadcast(found)
    if "test" in state:
        return Run.from_dict(state, folder)
    with fabric.rank_zero_first():  # the others find downloaded what the first downloads
        task = load_task(config)
    pieces = (fabric.world_size, config.accumulate)
    arguments, module = new_model(config, task, seed, pieces)
    training = Training(fabric, config, task, module, seed, state or None)
    if fabric.is_global_zero:
        write_atomically(config.folder / "config.json", json.dumps(config.to_dict(), indent=2))
    _epochs(training, folder, watch if watch and fabric.is_global_zero else Watch())
    run = Run(
        seed=seed,
        parameters=sum(p.numel() for p in module.parameters()),
        history=tuple(training.history),
        test=training.evaluate(task.test),
        folder=folder,
    )
    if fabric.is_global_zero:
        save_model(folder / WEIGHTS, arguments, training.scored)
        result = {"config": config.to_dict(), **run.to_dict()}
        write_atomically(folder / "result.json", json.dumps(result, indent=2))
    return run


def _epochs(training: Training, folder: Path, watch: Watch) -> None:
    config, first = training.config, training.fabric.is_global_zero
    with Board(folder, config.tensorboard if first else False, training.epoch) as board:
        if first:
            write_metrics(folder, training.history)  # rows after the checkpoint are forgotten
        while training.epoch < config.epochs:
            training.train_epoch(watch)
            if first:
                save_checkpoint(folder, training.state_dict())
                write_metrics(folder, training.history)
                board.add(training.history[-1])
                watch.end(training.history[-1])
            training.fabric.barrier()


def _folder(config: Config, seed: int) -> Path:
    return config.folder / f"seed-{seed}"


def stored(config: Config, seed: int, resume: bool) -> dict[str, Any]:
    """The result of a run that is done, the checkpoint of one that was begun, or nothing.

    Args:
        config: of the run.
        seed: of the run.
        resume: whether a run that was begun may be there.

    Raises:
        ConfigError: a run is there and may not be, or is of another configuration.
        CheckpointError: its checkpoint is corrupt, or its weights are missing.
    """
    folder = _folder(config, seed)
    result = folder / "result.json"
    if not resume:
        if any((folder / name).exists() for name in (NAME, PREVIOUS, result.name)):
            raise ConfigError(
                f"{folder} holds a run already; continue it with resume (--resume), or choose "
                "another folder by out (--out)"
            )
        return {}
    if result.exists():
        try:
            state: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{result} is corrupt ({error}); delete it to score anew") from error
        if not isinstance(state, dict) or not {"config", "test", "history"} <= state.keys():
            raise ConfigError(f"{result} is no result of a run; delete it to score anew")
        if not (folder / WEIGHTS).exists():
            raise CheckpointError(
                f"expected {folder / WEIGHTS} beside {result.name}, but there is no such file; put "
                f"it back, or delete {result.name} to write both again from {NAME}"
            )
    else:
        found = load_checkpoint(folder)
        if found is None:
            return {}
        state = found
        if not {"config", "history", "model"} <= state.keys():
            raise ConfigError(f"{folder / NAME} is no checkpoint of a run; delete it to go on")
    config.check_same(state["config"], str(folder))
    return state
