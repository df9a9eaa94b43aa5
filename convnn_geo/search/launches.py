"""A search by our kernels in all examples at once, be they of one size or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from convnn_geo.search.problem import Problem

if TYPE_CHECKING:
    from convnn_geo.gpu.search import Rounding

_ROUGH = 1.05 * 2**-7
"""How much more is to be allowed for where products are of TF32, of the product of two lengths.

A factor that loses all but ten bits is off by 2^-10 of itself, so a product by 2^-9 of both
lengths' product, and a difference of two products by 2^-8 of it; squared distances have them twice.
A twentieth more covers products of errors.
"""


@dataclass(frozen=True)
class Clouds:
    """Clouds of unequal size, their rows ``(n, d)`` and ``(m, d)`` after one another.

    Args:
        longest: targets of the largest.
        starts: ``(b + 1,)`` twice, where clouds start among targets and among sources.
        batch: ``(n,)`` and ``(m,)``, the cloud of each; contiguous.
    """

    longest: int
    starts: tuple[Tensor, Tensor]
    batch: tuple[Tensor, Tensor]


def serves(problem: Problem) -> bool:
    """Whether distances are of a kind, and compared in a dtype, that the kernels have."""
    if problem.axes is not None or problem.dtype != torch.float32:
        return False
    return problem.kind != "products" or problem.scale > 0


def launch(
    problem: Problem, k: int, own: Tensor | None = None, clouds: Clouds | None = None
) -> tuple[Tensor, Tensor]:
    """Values as the problem compares them, and places, ``(b n, k)`` of all examples.

    Args:
        problem: targets ``(b, n, d)``, sources ``(b, m, d)`` and biases ``(b, m)``, or ``(n, d)``,
            ``(m, d)`` and ``(m,)`` of clouds.
        k: neighbours; places count within each example.
        own: ``(b n,)``, a source that each target is not to find; -1 for none.
        clouds: how examples lie that are not of one size.
    """
    from convnn_geo.gpu.search import nearest

    q, keys, bias, scale = problem.q, problem.keys, problem.bias, problem.scale
    same = _same(q, keys)
    q = q.contiguous()
    keys = q if same else keys.contiguous()
    rounding = None
    if problem.kind == "products":
        if bias is None and scale != 1:
            bias = keys.new_zeros(keys.shape[:-1])
        rounding = _of_products(q, keys, bias, scale, problem.exact, clouds)
    elif not _is_direct(q):
        rounding, bias = _of_points(q, keys, same, problem, clouds)
        scale = 2.0
    longest, starts = (q.shape[1], None) if clouds is None else (clouds.longest, clouds.starts)
    if clouds is None:  # as the kernels take it: with an axis of heads
        q, keys = q.unsqueeze(1), keys.unsqueeze(1)
        bias = None if bias is None else bias.unsqueeze(1)
    angles = problem.kind == "angles"
    values, places = nearest(
        *(q, keys, k, starts, longest, bias, scale),
        direct=rounding is None,
        own=own,
        angles=angles,
        rounding=rounding,
        integers=torch.int64,
    )
    return values / 2 if angles else values, places


def _of_points(
    q: Tensor, keys: Tensor, same: bool, problem: Problem, clouds: Clouds | None
) -> tuple[Rounding, Tensor]:
    """How products stand for squared differences, and the bias that makes them so."""
    from convnn_geo.gpu.centered import centered
    from convnn_geo.gpu.search import Rounding

    alike = same and (clouds is None or _same(*clouds.batch))
    where = () if clouds is None else (clouds.starts[1], clouds.batch)
    points = centered(q, keys, alike, problem.kind == "angles", *where)
    share = 2 * (q.shape[-1] + 4) * torch.finfo(torch.float32).eps
    # The product of two lengths is at most a quarter of the square of their sum.
    share, rough = share, share + _ROUGH / 4
    near = (points.q, points.keys)
    return Rounding(near, points.square, points.longest, share, rough, problem.exact), points.bias


def _of_products(
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    scale: float,
    exact: bool,
    clouds: Clouds | None,
) -> Rounding:
    """How products in float32 stand for themselves: a bias counts as one more axis."""
    from convnn_geo.gpu.search import Rounding

    near = (q.float(), keys.float())
    square, length = near[0].square().sum(-1), near[1].square().sum(-1).sqrt() * scale
    if bias is not None:
        square, length = square + 1, torch.hypot(length, bias.float())
    if clouds is None:
        longest = length.amax(-1)
    else:
        longest = length.new_zeros(len(clouds.starts[0]) - 1)
        longest.scatter_reduce_(0, clouds.batch[1], length, "amax")
    share = (q.shape[-1] + 16) * torch.finfo(torch.float32).eps
    fine = scale - float(np.float32(scale))
    return Rounding(near, square, longest, share, share + _ROUGH / 2, exact, True, fine)


def _same(q: Tensor, keys: Tensor) -> bool:
    if q.shape != keys.shape or q.stride() != keys.stride():
        return False
    return q.data_ptr() == keys.data_ptr()


def _is_direct(q: Tensor) -> bool:
    """Whether axes are so few that differences cost no more than products, and float32 has them."""
    return q.shape[-1] <= 8 and q.dtype == torch.float32
