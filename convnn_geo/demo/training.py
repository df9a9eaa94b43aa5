"""One protocol for every network: choose on validation, read the test part once, at the end.

The loop is one of its own, and not that of :mod:`convnn_geo.train`, since a demonstration must run
where Lightning is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Split(Protocol):
    """Examples that can be drawn by number."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, /) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs of a network, and classes."""


class Splits(Protocol):
    """Three parts without a common example."""

    @property
    def train(self) -> Split:
        """To fit weights on."""

    @property
    def validation(self) -> Split:
        """To choose by."""

    @property
    def test(self) -> Split:
        """To be read once."""


@dataclass(frozen=True)
class Network:
    """A network to be trained several times.

    Args:
        name: in tables and pictures.
        build: makes it, with new random weights.
        lam: its place on the spectrum; None for layers that have none.
    """

    name: str
    build: Callable[[], nn.Module]
    lam: float | None = None


@dataclass(frozen=True)
class Settings:
    """How networks are trained, all of a task alike.

    Args:
        seeds: one run each; the first one also tries the learning rates.
        epochs: passes over the training part.
        batch_size: examples a step.
        rates: learning rates to choose from, on the validation part with the first seed.
        train_size: examples of the training part that are used; None for all.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 4
    batch_size: int = 40
    rates: tuple[float, ...] = (0.01, 0.03)
    train_size: int | None = None


@dataclass(frozen=True)
class Run:
    """A trained network.

    Args:
        task: what it was trained on.
        network: its name.
        lam: its place on the spectrum.
        seed: of its weights and of the order of examples.
        rate: learning rate.
        parameters: numbers that were learned.
        losses: mean loss of each epoch.
        validation: accuracy on the validation part after each epoch.
        test: accuracy on the test part after the last epoch; None for a rate that was not chosen.
    """

    task: str
    network: str
    lam: float | None
    seed: int
    rate: float
    parameters: int
    losses: tuple[float, ...]
    validation: tuple[float, ...]
    test: float | None = None


@dataclass(frozen=True)
class Job:
    """A network and the data that it learns.

    Args:
        task: what the data are called.
        load: gives the data; loaded where the job runs.
        network: what to train.
        settings: of the training.
    """

    task: str
    load: Callable[[], Splits]
    network: Network
    settings: Settings

    def __call__(self) -> list[Run]:
        """Do it."""
        return train(self.task, self.network, self.load(), self.settings)


def train(task: str, network: Network, splits: Splits, settings: Settings) -> list[Run]:
    """Train a network with every seed, at the learning rate that validates best.

    Args:
        task: what the runs are called in tables.
        network: what to train.
        splits: the data.
        settings: of the training.

    Returns:
        The runs with rates that were tried and not chosen, then one run a seed with its test
        accuracy.
    """

    def fit(seed: int, rate: float) -> tuple[nn.Module, Run]:
        model, facts = _fit(network, splits, seed, rate, settings)
        return model, Run(task, network.name, network.lam, seed, rate, **facts)

    first, *others = settings.seeds
    tried = [fit(first, rate) for rate in settings.rates]
    best = max(tried, key=lambda pair: pair[1].validation[-1])
    chosen = [best, *(fit(seed, best[1].rate) for seed in others)]
    rejected = [run for _, run in tried if run is not best[1]]
    return rejected + [replace(run, test=accuracy(model, splits.test)) for model, run in chosen]


def accuracy(model: nn.Module, split: Split, batch_size: int = 200) -> float:
    """Right answers over examples, which a mean of batches of unequal size is not.

    Args:
        model: left in evaluation mode.
        split: examples.
        batch_size: examples at a time.
    """
    model.eval()
    right = 0
    with torch.no_grad():
        for index in torch.arange(len(split)).split(batch_size):
            inputs, classes = split.batch(index)
            right += int((model(*inputs).argmax(1) == classes).sum())
    return right / len(split)


def _fit(
    network: Network, splits: Splits, seed: int, rate: float, settings: Settings
) -> tuple[nn.Module, dict[str, Any]]:
    """The model after the last epoch, and what there is to say about it."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        model = network.build()
    order = torch.Generator().manual_seed(seed)
    count = min(len(splits.train), settings.train_size or len(splits.train))
    steps = settings.epochs * -(-count // settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    losses, validation = [], []
    for _ in range(settings.epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(count, generator=order).split(settings.batch_size):
            inputs, classes = splits.train.batch(index)
            loss = F.cross_entropy(model(*inputs), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)  # the last batch is smaller
        losses.append(total / count)
        validation.append(accuracy(model, splits.validation))
    return model, {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": tuple(losses),
        "validation": tuple(validation),
    }
