"""Which examples a process trains on, step by step: a function of seed, epoch and rank alone.

All processes cut the same batches, so that however many there are, a step sees the same examples.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from convnn_geo.train.config import ConfigError

_MODEL, _ORDER, _EPOCH = 1, 2, 3  # each draws from a stream of its own


def pieces(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    parts: tuple[int, int] = (1, 1),
) -> list[list[int]]:
    """Numbers of the examples of each piece that a process takes in an epoch.

    The examples, shuffled by (seed, epoch), are cut into batches of at most ``batch_size`` whose
    sizes differ by at most one (a last batch of a single example would be of no use to batch
    normalisation), and a batch likewise into one part for each process, then into pieces.

    Args:
        count: examples in all.
        batch_size: examples of a step, at most.
        seed: of the run.
        epoch: of the run.
        rank: of the process.
        parts: processes, and pieces that each of them takes of a batch.

    Returns:
        ``parts[1]`` lists for each batch, in order; none is empty.

    Raises:
        ConfigError: a batch has too few examples for so many parts.

    Example:
        >>> [len(piece) for piece in pieces(10, batch_size=4, seed=0, epoch=0)]
        [4, 3, 3]
        >>> [len(piece) for piece in pieces(10, 4, 0, 0, rank=1, parts=(2, 1))]
        [2, 1, 1]
    """
    world, each = parts
    smallest_piece(count, batch_size, parts)
    number = -(-count // batch_size)
    generator = torch.Generator().manual_seed(_state(_ORDER, seed, epoch))
    shuffled = torch.randperm(count, generator=generator)
    return [
        piece.tolist()
        for batch in shuffled.tensor_split(number)
        for piece in batch.tensor_split(world)[rank].tensor_split(each)
    ]


def smallest_piece(count: int, batch_size: int, parts: tuple[int, int] = (1, 1)) -> int:
    """Examples in the smallest of all :func:`pieces`, which take the same arguments.

    Raises:
        ConfigError: a batch has too few examples for so many parts.

    Example:
        >>> smallest_piece(10, batch_size=4, parts=(2, 1))
        1
    """
    world, each = parts
    batches = -(-count // batch_size)
    least = count // max(batches, 1) // (world * each)
    if least < 1:
        raise ConfigError(
            f"{count} examples in batches of {batch_size} can't be cut into {world} processes "
            f"times {each} pieces (accumulate); raise batch_size or lower accumulate"
        )
    return least


def share(count: int, rank: int, world: int) -> range:
    """Numbers of the examples that a process evaluates: a part of all, in order.

    Example:
        >>> share(10, rank=1, world=3)
        range(4, 7)
    """
    each, more = divmod(count, world)  # the first few take one more
    return range(rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more))


def seed_model(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, GPUs' included, before a model is built."""
    _seed_all(_state(_MODEL, seed))


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed the same generators before an epoch, for dropout and the like.

    What an epoch draws thus depends on nothing before it, and a run that continues from its end
    needs no state of any generator.
    """
    _seed_all(_state(_EPOCH, seed, epoch, rank))


def _state(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _seed_all(state: int) -> None:
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)
