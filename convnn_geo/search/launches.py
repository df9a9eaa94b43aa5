"""A search by our kernels in all examples at once, be they of one size or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUGH = 1.05 * 2**-9
"""How much more is to be allowed for where products are of TF32.

A factor that loses all but ten bits is off by 2^-10 of itself, so a product by 2^-9 of both
lengths' product, a value by 2^-8, and a difference of two values by 2^-7 of it; which is at most a
quarter of the square of the lengths' sum. A twentieth more covers products of errors.
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


def launch(
    q: Tensor,
    keys: Tensor,
    k: int,
    own: Tensor | None = None,
    angles: bool = False,
    clouds: Clouds | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Squared distances, half of them for angles, and places, ``(b n, k)`` of all examples.

    Args:
        q: targets ``(b, n, d)``, or ``(n, d)`` of clouds.
        keys: sources, likewise.
        k: neighbours; places count within each example.
        own: ``(b n,)``, a source that each target is not to find; -1 for none.
        angles: vectors have length one, or zero.
        clouds: how examples lie that are not of one size.
        exact: whether distances are as differences have them; otherwise they only tell the order.
    """
    from convnn_geo.gpu.centered import centered
    from convnn_geo.gpu.search import Rounding, nearest

    same, d = _same(q, keys), q.shape[-1]
    q = q.contiguous()
    keys = q if same else keys.contiguous()
    bias = rounding = None
    if not _is_direct(q):
        alike = same and (clouds is None or _same(*clouds.batch))
        where = () if clouds is None else (clouds.starts[1], clouds.batch)
        points = centered(q, keys, alike, angles, *where)
        bias = points.bias
        rounding = Rounding(points, _share(d), _share(d) + _ROUGH, exact)
    longest, starts = (q.shape[1], None) if clouds is None else (clouds.longest, clouds.starts)
    if clouds is None:  # as the kernels take it: with an axis of heads
        q, keys = q.unsqueeze(1), keys.unsqueeze(1)
        bias = None if bias is None else bias.unsqueeze(1)
    values, places = nearest(
        *(q, keys, k, starts, longest, bias, 2.0),
        direct=rounding is None,
        own=own,
        angles=angles,
        rounding=rounding,
        integers=torch.int64,
    )
    return values / 2 if angles else values, places


def _same(q: Tensor, keys: Tensor) -> bool:
    if q.shape != keys.shape or q.stride() != keys.stride():
        return False
    return q.data_ptr() == keys.data_ptr()


def _is_direct(q: Tensor) -> bool:
    """Whether axes are so few that differences cost no more than products."""
    return q.shape[-1] <= 8


def _share(d: int) -> float:
    """Of the square of the sum of two lengths, that rounding may make up."""
    return 2 * (d + 4) * torch.finfo(torch.float32).eps
