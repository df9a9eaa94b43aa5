"""A model with all that changes while it trains: one epoch of training, and scoring."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from convnn_geo.datasets import Task
from convnn_geo.train.config import Config
from convnn_geo.train.objective import mix, objective
from convnn_geo.train.order import pieces, seed_epoch, share
from convnn_geo.train.processes import share_buffers, total
from convnn_geo.train.schedule import learning_rate
from convnn_geo.train.watch import Watch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class DivergedError(ArithmeticError):
    """The loss is no longer a number; the message says what may help."""


class Training:
    """A model in training: its weights, their average, the optimizer, and the epochs so far.

    Args:
        fabric: the processes, this one among them.
        config: of the run.
        task: the data.
        module: the model, with its first weights.
        seed: of the run.
        state: :meth:`state_dict` of a run that this one continues; None to begin.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: Config,
        task: Task,
        module: nn.Module,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.fabric, self.config, self.task, self.seed = fabric, config, task, seed
        self.history: list[dict[str, Any]] = []
        self.objective = objective(task.kind, config.label_smoothing)
        self.scoring = objective(task.kind)  # without smoothing: losses of all runs compare
        self.module = module.to(fabric.device)
        if config.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = _optimizer(config, self.module)
        self.average = None if config.ema is None else _average(self.module, config.ema)
        if state is not None:
            self._load(state, optimizer)
        network: Any = torch.compile(self.module) if config.compile else self.module
        self.network, self.optimizer = fabric.setup(network, optimizer)

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    @property
    def scored(self) -> nn.Module:
        """The model that is scored and saved: of averaged weights where there are."""
        return self.module if self.average is None else self.average.module

    def train_epoch(self, watch: Watch) -> None:
        """Train for an epoch, validate, and add a row to the history.

        Raises:
            DivergedError: the loss is infinite or no number.
        """
        began, epoch = time.perf_counter(), self.epoch
        seed_epoch(self.seed, epoch, self.fabric.global_rank)
        self.task.set_epoch(epoch)
        loss, rate = self._train(epoch, watch)
        seconds = time.perf_counter() - began
        self._check_finite("loss", loss)
        validation = self.evaluate(self.task.validation)
        self._check_finite("validation loss", validation["loss"])  # the last step has no other
        self.history.append(
            {
                "seed": self.seed,
                "epoch": epoch + 1,
                "learning_rate": rate,
                "train_loss": loss,
                **{f"validation_{name}": value for name, value in validation.items()},
                "seconds": seconds,
            }
        )

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"the {name} became {value} in epoch {self.epoch + 1} of seed {self.seed}; try a "
                "lower learning_rate, warmup_epochs or clip_norm"
            )

    @torch.no_grad()
    def evaluate(self, part: Any) -> dict[str, float]:
        """Mean loss and score of a part's items, each of which counts once.

        Args:
            part: map-style examples.
        """
        model = self.scored.eval()
        share_buffers(self.fabric, model)
        world = self.fabric.world_size
        mine = share(len(part), self.fabric.global_rank, world)
        size = max(1, self.config.batch_size // world)
        loader = self._loader(
            part, [list(mine[at : at + size]) for at in range(0, len(mine), size)]
        )
        loss, score, count = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        for inputs, target in map(self._move, loader):
            with self.fabric.autocast():
                output = model(*inputs)
            loss += self.scoring.loss(output.float(), target).double().sum()
            score += self.scoring.scores(output.float(), target).double().sum()
            count += len(target)
        loss, score, count = total(self.fabric, loss, score, count).tolist()
        return {"loss": loss / count, self.scoring.score: score / count}

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to continue; generators need none, see :func:`seed_epoch`."""
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "history": self.history,
            "model": self.module.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
        }

    def _load(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self.history = list(state["history"])
        self.module.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])

    def _train(self, epoch: int, watch: Watch) -> tuple[float, float]:
        """Mean loss, and the last learning rate."""
        config, fabric = self.config, self.fabric
        parts = (fabric.world_size, config.accumulate)
        count = len(self.task.train)
        mine = pieces(count, config.batch_size, self.seed, epoch, fabric.global_rank, parts)
        steps, rate = len(mine) // config.accumulate, 0.0
        watch.begin(self.seed, epoch + 1, config.epochs, steps)
        self.network.train()
        summed, items = torch.zeros(2, dtype=torch.float64, device=fabric.device)
        batches = _groups(map(self._move, self._loader(self.task.train, mine)), config.accumulate)
        for step, batch in enumerate(batches):
            rate = learning_rate(config, epoch * steps + step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, number = self._step(batch)
            summed += loss
            items += number
            watch.step()
        loss, number = total(fabric, summed, items).tolist()
        return loss / number, rate

    def _step(self, batch: list[Any]) -> tuple[Tensor, int]:
        """One step on the gradient of the mean loss of all items, of all processes and pieces."""
        config, fabric = self.config, self.fabric
        mine = sum(len(target) for _, target in batch)
        # Fabric takes the mean of the processes' gradients, which may have seen unequal numbers.
        items = total(fabric, torch.tensor(float(mine), device=fabric.device)) / fabric.world_size
        summed = torch.zeros((), dtype=torch.float64, device=fabric.device)
        for number, (inputs, target) in enumerate(batch, start=1):
            with fabric.no_backward_sync(self.network, enabled=number < len(batch)):
                loss = self._loss(inputs, target)
                fabric.backward(loss / items[0].to(loss.dtype))
            summed += loss.detach()
        if config.clip_norm is not None:
            fabric.clip_gradients(
                self.network, self.optimizer, max_norm=config.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.module)
        return summed, mine

    def _loss(self, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """Summed over items."""
        if not self.config.mixup:
            return self.objective.loss(self.network(*inputs).float(), target).sum()
        x, own = mix(inputs[0], self.config.mixup)
        output = self.network(x).float()
        loss = own * self.objective.loss(output, target)
        return (loss + (1 - own) * self.objective.loss(output, target.flip(0))).sum()

    def _loader(self, part: Any, numbers: list[list[int]]) -> Iterable[Any]:
        # New workers an epoch: those that live on would go on with their random numbers.
        return DataLoader(
            part,
            batch_sampler=numbers,
            collate_fn=self.task.collate,
            num_workers=self.config.workers,
            pin_memory=self.fabric.device.type == "cuda",
        )

    def _move(self, batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, target = self.fabric.to_device(batch)
        if self.config.channels_last:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
        return inputs, target


def _optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, config.momentum)
    return torch.optim.AdamW(groups, config.learning_rate)


def _average(module: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _groups(pieces: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many, in order."""
    waiting = iter(pieces)
    while group := list(islice(waiting, size)):
        yield group
