"""How a search by a bound is spread over a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from convnn_geo import gpu

SHORTEST = 192
"""Sources from which on a bound is worth a second pass."""


@dataclass(frozen=True)
class Plan:
    """Tiles, lists and programs.

    Args:
        rows: of a tile.
        columns: of a tile, and as many groups.
        axes: multiplied at once.
        lists: that a row's survivors are appended to, one for each thread that holds some of it.
        length: of each list, a power of two.
        listed: survivors of a row, at most, that are sorted.
        ahead: places for these before the first list, where they are not laid over the lists.
        warps: of a program.
        stages: tiles on their way from memory.
        programs: on each multiprocessor.
    """

    rows: int
    columns: int
    axes: int
    lists: int
    length: int
    listed: int
    ahead: int
    warps: int
    stages: int
    programs: int

    @property
    def scratch(self) -> int:
        """Integers that a program needs for its lists."""
        return 2 * self.rows * (self.ahead + self.lists * self.length)


def plan(
    m: int, k: int, d: int, dtype: torch.dtype, direct: bool, rough: bool = False
) -> Plan | None:
    """For ``k`` of ``m`` sources; None where a bound is no help, or registers don't suffice.

    ``rough``: products of float32 are only rough, so that tensor cores make them.
    """
    if m < SHORTEST or k > 32:
        return None
    return _plan(k, d, dtype, direct, rough)


@functools.cache
def _plan(k: int, d: int, dtype: torch.dtype, direct: bool, rough: bool) -> Plan:
    listed = max(16 if direct else 32, gpu.next_power_of_2(2 * k))
    axes = max(16, min(64, gpu.next_power_of_2(d)))
    if direct:
        return Plan(8, 128, axes, 32, 16, listed, listed, 1, 1, 16)
    if dtype != torch.float32 or rough:
        return Plan(64, 128, axes, 4, 32, listed, 0, 4, 2, 2)
    return Plan(32, 64, min(32, axes), 8, 32, listed, 0, 4, 2, 2)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few, where one is only interpreted."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
