"""Validation where a data set brings none: a tenth of what is there to train on."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.checks import check_int


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
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, count // 10)
    return order[held:].sort().values, order[:held].sort().values
