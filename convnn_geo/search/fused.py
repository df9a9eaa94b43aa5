"""Dense search in C on the CPU: a few rows of products at a time, chosen from while in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.search.problem import Problem
from convnn_geo.search.rows import Hidden

ROOMY = 2**23
"""Bytes of a slab from which on nobody has asked for less than the default."""
_MOST = 2**28
"""Bytes of copies of sources, at most."""
_ROWS = 8
"""Rows of products, and of what is chosen from, that a thread has."""


def _fits(problem: Problem, sources: int, slab: int) -> bool:
    """Whether rows of so many products may be made in C.

    Each thread has a few of them and a copy of one example's sources: too much where memory is
    bounded tightly.
    """
    copies = sources * (problem.keys.shape[-1] + _ROWS) * 4 * torch.get_num_threads()
    if copies > slab < ROOMY or copies > _MOST:
        return False
    single = problem.q.dtype == problem.keys.dtype == problem.dtype == torch.float32
    return problem.axes is None and single


def serves(problem: Problem, k: int, slab: int, sources: int | None = None) -> bool:
    """Whether a search may be made in C, on the CPU, as far as can be told without looking."""
    plain = 0 < k <= compiled.LARGEST_K and problem.q.device.type == "cpu"
    sources = problem.keys.shape[-2] if sources is None else sources
    return plain and compiled.library() is not None and _fits(problem, sources, slab)


def serves_runs(problem: Problem, k: int, slab: int) -> bool:
    """Whether examples of unequal size may be searched at once."""
    return problem.q.ndim == problem.keys.ndim == 2 and serves(problem, k, slab, 1)


def in_runs(
    problem: Problem, k: int, runs: compiled.Runs, excluded: bool, slab: int
) -> tuple[Tensor, Tensor] | None:
    """The nearest of each target in its own example: values and places ``(n, k)`` among all.

    Infinite and -1 where an example has fewer. None where that is not served.

    Args:
        excluded: whether the targets, which are the sources, do not find themselves.
    """
    if not _fits(problem, int(runs.sources.max()), slab):
        return None
    own = None
    if excluded:
        number = torch.arange(len(problem.q), device=problem.q.device)
        own = number - runs.target_start[:-1].repeat_interleave(runs.targets)
    found = compiled.products_nearest(
        *(problem.kind, problem.q, problem.keys, k, problem.bias, problem.scale),
        *(None, own, problem.exact, runs),
    )
    if found is None:
        return None
    values, places = found
    places += runs.source_start.repeat_interleave(runs.targets).unsqueeze(-1)
    return values, places.masked_fill_(values == torch.inf, -1)


def by_fused_rows(
    problem: Problem, k: int, hidden: Hidden, slab: int
) -> tuple[Tensor, Tensor] | None:
    """The nearest in C, a few rows of products at a time; None where that is not served."""
    if not _fits(problem, problem.keys.shape[-2], slab):
        return None
    return compiled.products_nearest(
        problem.kind,
        problem.q,
        problem.keys,
        k,
        problem.bias,
        problem.scale,
        hidden.mask,
        hidden.own,
        problem.exact,
    )
