"""Our own kernel for GPUs: tiles of sources stream past targets, the nearest stay in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.search.nearest import Problem, referee
from convnn_geo.search.points import PointEngine
from convnn_geo.search.query import Query
from convnn_geo.search.rows import Hidden
from convnn_geo.shapes import broadcast_shapes

SPARE = 2
"""A neighbour after the k-th, and the target itself."""


class Triton(PointEngine):
    """Brute force in one kernel, without a matrix of distances; up to 256 neighbours.

    By differences in up to eight dimensions, by products of centred points in more.
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
        """As every engine for points, of float32 on a GPU."""
        reason = gpu.refuses(query.target.device)
        if reason is None and query.problem is not None and query.problem.q.dtype != torch.float32:
            return "its distances are float32, and these need float64"
        if reason is None and query.k > gpu.LARGEST_K:
            return f"k={query.k} is over its limit of {gpu.LARGEST_K}"
        return super().refuses(query) if reason is None else reason

    def nearest(self, problem: Problem, k: int, hidden: Hidden, slab: int) -> tuple[Tensor, Tensor]:
        """In one launch, order and all, where neighbours are told apart by differences."""
        spare = problem.keys.shape[-2] - (hidden.own is not None)
        plain = problem.kind in ("points", "angles") and problem.axes is None
        if not plain or hidden.mask is not None or not problem.q.numel() or not 0 < k <= spare:
            return super().nearest(problem, k, hidden, slab)
        lead = broadcast_shapes(problem.q.shape[:-2], problem.keys.shape[:-2])
        q, keys = (
            t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
            for t in (problem.q, problem.keys)
        )
        own = hidden.own
        if own is not None:
            own = own.expand(*lead, own.shape[-1]).reshape(-1)
        values, places = launch(q, keys, k, own, problem.kind == "angles")
        values, places = (t.view(*lead, -1, k) for t in (values, places))
        if problem.exact and not _direct(q):
            values = referee(problem.bound(), places, slab, problem.dtype)
        return values, places

    def slack(self, q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        """That of ``|k|^2 - 2 <q, k>`` about the keys' mean, or of differences."""
        if _direct(q):
            return super().slack(q, keys, value)
        center = keys.mean(-2, keepdim=True)
        return _slack((q - center).norm(dim=-1), (keys - center).norm(dim=-1), q.shape[-1])

    def propose(self, prepared: Tensor, q: Tensor, asked: int) -> Tensor:
        """Of what is no point: by coordinates that stand for it."""
        return launch(q, prepared, asked)[1].view(*q.shape[:2], asked)


def launch(
    q: Tensor, keys: Tensor, k: int, own: Tensor | None = None, angles: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared distances, half of them for angles, and places ``(b n, k)`` of all examples."""
    from convnn_geo.gpu.search import Rounding, nearest

    (n, d), m = q.shape[1:], keys.shape[1]
    q, keys = q.contiguous(), keys.contiguous()
    bias = rounding = None
    if not _direct(q):
        center = keys.mean(-2, keepdim=True)
        sides = [t - center for t in ((keys,) if _same(q, keys) else (q, keys))]
        lengths = [side.norm(dim=-1) for side in sides]
        bias = lengths[-1].square()
        slack = _slack(lengths[0], lengths[-1], d)
        if angles:  # a zero key has squared length 1 by definition
            bias = bias + (keys.square().sum(-1) < 0.25)
        rounding = Rounding(
            center=center.flatten(0, 1),
            q=sides[0].unsqueeze(1),
            keys=sides[-1].unsqueeze(1),
            square=lengths[0].square().flatten(),
            slack=slack.flatten(),
            rough=_rough(d),
            least=m,
        )
        bias = bias.unsqueeze(1)
    values, places = nearest(
        *(q.unsqueeze(1), keys.unsqueeze(1), k, None, n, bias, 2.0),
        direct=_direct(q),
        own=own,
        angles=angles,
        rounding=rounding,
        integers=torch.int64,
    )
    return values / 2 if angles else values, places


def _same(q: Tensor, keys: Tensor) -> bool:
    return q.data_ptr() == keys.data_ptr() and q.shape == keys.shape


def _direct(q: Tensor) -> bool:
    return q.shape[-1] <= 8


def _slack(q: Tensor, keys: Tensor, d: int) -> Tensor:
    """Of differences between values, from lengths about the center."""
    length = q + keys.amax(-1, keepdim=True)
    return _share(d) * length.square()


def _share(d: int) -> float:
    """Of the square of the sum of two lengths, that rounding may make up."""
    return 2 * (d + 4) * torch.finfo(torch.float32).eps


def _rough(d: int) -> float:
    """How much more is to be allowed for where products are of TF32.

    A factor that loses all but ten bits is off by 2^-10 of itself, so a product by 2^-9 of both
    lengths' product, a value by 2^-8, and a difference of two values by 2^-7 of it; which is at
    most a quarter of the square of the lengths' sum. A twentieth more covers products of errors.
    """
    return 1 + 1.05 * 2**-9 / _share(d)
