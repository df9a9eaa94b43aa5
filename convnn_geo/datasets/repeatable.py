"""Randomness that depends on nothing but seed, epoch and the example's number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from convnn_geo.checks import check_int


class Repeatable(Dataset):
    """A data set with random transforms, whose examples can be had again.

    Example ``number`` is drawn under torch's generator seeded by (seed, epoch, number), which is
    then put back as it was. Order, workers, processes and resuming change nothing.

    Args:
        dataset: map-style; its randomness comes from torch's global CPU generator.
        seed: of the draws.

    Example:
        >>> class Noise(Dataset):
        ...     def __len__(self):
        ...         return 4
        ...
        ...     def __getitem__(self, number):
        ...         return torch.randn(1)
        >>> noise = Repeatable(Noise(), seed=0)
        >>> torch.equal(noise[2], noise[2]), torch.equal(noise[2], noise[3])
        (True, False)
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = check_int("seed", seed, 0)
        # Shared, so that workers that live on from epoch to epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from here on; epoch 0 until called."""
        self._epoch.fill_(check_int("epoch", epoch, 0))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        entropy = (self.seed, int(self._epoch), number)
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0]))
            return self.dataset[number]
