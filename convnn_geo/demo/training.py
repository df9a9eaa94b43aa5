"""One protocol for every network: choose on validation, read the test part once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """How networks are trained, all of them alike.

    Args:
        epochs: passes over the training part.
        batch_size: examples a step.
        rates: learning rates to choose from, on the validation part with the first seed.
        train_size: examples of the training part that are used; None for all.
    """

    epochs: int = 5
    batch_size: int = 50
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
        test: accuracy on the test part after the last epoch; None for a run that was not chosen.
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


def train_all(
    task: str,
    networks: Sequence[Network],
    splits: Splits,
    seeds: Sequence[int],
    settings: Settings,
    tick: Callable[[str], object] = lambda name: None,
) -> list[Run]:
    """Train every network with every seed.

    Args:
        task: what the runs are called in tables.
        networks: to be compared.
        splits: the data.
        seeds: one run each; the first one also tries the learning rates.
        settings: of the training.
        tick: called with the network's name after each epoch.
    """
    return [
        run for network in networks for run in _train(task, network, splits, seeds, settings, tick)
    ]


def epochs_in_all(networks: int, seeds: int, settings: Settings) -> int:
    """How often ``tick`` will be called."""
    return networks * (len(settings.rates) + seeds - 1) * settings.epochs


def accuracy(model: nn.Module, split: Split, batch_size: int = 200) -> float:
    """Share of examples whose class is found: right answers over examples, not a mean of batches.

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


def _train(
    task: str,
    network: Network,
    splits: Splits,
    seeds: Sequence[int],
    settings: Settings,
    tick: Callable[[str], object],
) -> list[Run]:
    def fit(seed: int, rate: float) -> tuple[nn.Module, dict[str, Any]]:
        model, losses, validation = _fit(network, splits, seed, rate, settings, tick)
        count = sum(parameter.numel() for parameter in model.parameters())
        names = {"task": task, "network": network.name, "lam": network.lam, "seed": seed}
        return model, {
            **names,
            "rate": rate,
            "parameters": count,
            "losses": losses,
            "validation": validation,
        }

    tried = [fit(seeds[0], rate) for rate in settings.rates]
    best = max(range(len(tried)), key=lambda number: tried[number][1]["validation"][-1])
    rejected = [Run(**facts) for number, (_, facts) in enumerate(tried) if number != best]
    chosen = [tried[best], *(fit(seed, settings.rates[best]) for seed in seeds[1:])]
    return rejected + [Run(**facts, test=accuracy(model, splits.test)) for model, facts in chosen]


def _fit(
    network: Network,
    splits: Splits,
    seed: int,
    rate: float,
    settings: Settings,
    tick: Callable[[str], object],
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The model after the last epoch, and its losses and validation accuracies."""
    with torch.random.fork_rng(devices=[]):  # weights by this seed; the caller's stream untouched
        torch.manual_seed(seed)
        model = network.build()
    order = torch.Generator().manual_seed(seed)
    count = min(len(splits.train), settings.train_size or len(splits.train))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=settings.epochs * -(-count // settings.batch_size) + 1
    )
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
            total += loss.item() * len(index)  # the last batch is smaller, so weigh by size
        losses.append(total / count)
        validation.append(accuracy(model, splits.validation))
        tick(network.name)
    return model, tuple(losses), tuple(validation)
