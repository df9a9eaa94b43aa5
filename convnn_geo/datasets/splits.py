"""Seeds, and validation where a data set brings none: a tenth of what is there to train on."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.checks import check_int

_SEEDS = 2**64  # as many as torch's generators know


def check_seed(seed: int) -> int:
    """Return ``seed`` if it is one that torch's generators take.

    Raises:
        TypeError: no integer.
        ValueError: negative, or 2**64 and more.

    Example:
        >>> check_seed(7)
        7
    """
    if check_int("seed", seed, 0) >= _SEEDS:
        raise ValueError(f"seed: expected an integer less than 2**64, got {seed}; take a small one")
    return seed


def hold_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the examples to train and to validate on, one in ten at random.

    Args:
        count: examples in all, two at least.
        seed: of the split.

    Example:
        >>> train, validation = hold_out(60000, seed=0)
        >>> len(train), len(validation)
        (54000, 6000)
    """
    check_int("count", count, 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(check_seed(seed)))
    held = max(1, count // 10)
    return order[held:].sort().values, order[:held].sort().values
