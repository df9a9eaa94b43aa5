"""Our own kernel for GPUs: tiles of sources stream past targets, the nearest stay in registers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.search.launches import Clouds, launch, serves
from convnn_geo.search.points import PointEngine
from convnn_geo.search.problem import Problem
from convnn_geo.search.query import Query
from convnn_geo.search.rows import Hidden
from convnn_geo.shapes import broadcast_shapes

WORTH_CELLS = 16384
"""Points a cloud of few axes from which on its cells tell more than all launches cost."""
EMPTY = 32
"""Times as many targets as there are, at most, for which there are programs."""
SPARE = 2
"""A neighbour after the k-th, and the target itself."""


class Triton(PointEngine):
    """Brute force in one kernel, without a matrix of distances; up to 256 neighbours.

    By differences in up to eight dimensions, by products in more; whom these, in float32, do not
    tell apart the kernel settles in float64, and nobody waits for the device.
    """

    name = "triton"
    whole = True

    def missing(self) -> str | None:
        """Triton must be installed, and have something to run on."""
        return gpu.refuses(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def limit(self, device: torch.device) -> int | None:
        """What fits into registers: k, and as many more as tell whether its end is sure."""
        return gpu.LARGEST_K + SPARE

    def refuses(self, query: Query) -> str | None:
        """As every engine for points, compared in float32 on a GPU."""
        reason = gpu.refuses(query.target.device)
        if reason is None and query.dtype != torch.float32:
            return "its distances are float32, and these need float64"
        if reason is None and query.k > gpu.LARGEST_K:
            return f"k={query.k} is over its limit of {gpu.LARGEST_K}"
        return super().refuses(query) if reason is None else reason

    def nearest(self, problem: Problem, k: int, hidden: Hidden, slab: int) -> tuple[Tensor, Tensor]:
        """At once, order and all, but where differences are scaled by axes."""
        q, keys, bias, own = problem.q, problem.keys, problem.bias, hidden.own
        spare = keys.shape[-2] - (own is not None)
        served = serves(problem) and hidden.mask is None and q.numel() > 0
        if not served or not 0 < k <= spare:
            return super().nearest(problem, k, hidden, slab)
        lead = broadcast_shapes(q.shape[:-2], keys.shape[:-2])
        q, keys = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (q, keys))
        if bias is not None:
            bias = bias.expand(*lead, bias.shape[-1]).reshape(-1, bias.shape[-1])
        if own is not None:
            own = own.expand(*lead, own.shape[-1]).reshape(-1)
        found = launch(replace(problem, q=q, keys=keys, bias=bias), k, own)
        values, places = (t.view(*lead, -1, k) for t in found)
        return values, places

    def propose(self, prepared: Tensor, q: Tensor, asked: int) -> Tensor:
        """Of what the kernel does not compare itself: by points that stand for it."""
        points = Problem("points", q, prepared, None, 1.0, torch.float32)
        return launch(points, asked)[1].view(*q.shape[:2], asked)


def in_clouds(
    problem: Problem,
    k: int,
    batch_x: Tensor,
    batch_y: Tensor,
    excluded: bool,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """The nearest of each target in its own cloud, in all clouds at once: values and places.

    Args:
        problem: between all rows ``(n, d)`` and ``(m, d)``.
        k: neighbours.
        batch_x: ``(m,)``, sorted, the cloud of each source.
        batch_y: ``(n,)``, likewise of each target.
        excluded: whether the targets, which are the sources, do not find themselves.
        backend: who was asked for.

    Returns:
        ``(n, k)`` each; places count all sources. None where a cloud has fewer than ``k``, where
        clouds are worth a search each, and where one is far larger than most.
    """
    if not batch_y.numel() or not batch_x.numel() or k < 1:
        return None
    count = 1 + int(torch.maximum(batch_x[-1], batch_y[-1]))
    few_axes = problem.q.shape[-1] <= 3
    if backend == "auto" and few_axes and len(batch_x) >= WORTH_CELLS * count:
        return None
    same = batch_y is batch_x
    batch_x = batch_x.contiguous()  # a column of a table, say
    batch_y = batch_x if same else batch_y.contiguous()
    numbers = torch.arange(count + 1, device=batch_x.device)
    starts = torch.searchsorted(batch_y, numbers), torch.searchsorted(batch_x, numbers)
    targets, sources = (start.diff() for start in starts)
    most = sources.new_tensor(len(batch_x))
    longest, least = torch.stack([targets.max(), sources.where(targets > 0, most).min()]).tolist()
    if k > least - excluded or count * longest > EMPTY * max(len(batch_y), 2**15):
        return None
    own = None
    if excluded:
        own = torch.arange(len(batch_y), device=batch_y.device) - starts[0][batch_y]
    values, places = launch(problem, k, own, Clouds(longest, starts, (batch_y, batch_x)))
    return values, places + starts[1][batch_y].unsqueeze(-1)
