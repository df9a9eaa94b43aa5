"""The nearest on a grid by how far a place is plus how far a feature is, ring by ring.

Offsets come in the order of how far they lead. A thread has one target, looks at the source at each
of them, and keeps its nearest in registers, in order, until the place alone is farther than the
k-th: features only add to that. Sums are in double precision, and compared as they are in single.
Targets side by side look at sources side by side, channel by channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.kept import NOBODY, also, any_of, inserted, nobody
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.pairs import place_of, value_of
from convnn_geo.gpu.tiles import ordered

LANES = 32
"""Targets of a program, one a thread."""
AHEAD = 4
"""Offsets that are looked at before the lists are: their loads do not wait for one another."""


@triton.jit
def _moved(place, step, size):
    """A place on an axis after a step, and whether it is on the grid."""
    place += step
    return place, (place >= 0) & (place < size)


@triton.jit
def _source(place, offset_ptr, at, count, planes, rows, columns):
    """The source at an offset, 0 where that leads off the grid, and whether it does not."""
    there, offset_ptr = at < count, offset_ptr + at
    plane, inside = _moved(place[0], tl.load(offset_ptr, mask=there, other=0), planes)
    row, within = _moved(place[1], tl.load(offset_ptr + count, mask=there, other=0), rows)
    inside = inside & within
    step = tl.load(offset_ptr + 2 * count, mask=there, other=0)
    column, within = _moved(place[2], step, columns)
    inside = inside & within & there
    return tl.where(inside, (plane * rows + row) * columns + column, 0), inside


@triton.jit
def _added(sums, q, key_ptr, sources, AHEAD: tl.constexpr):
    """Sums with the squared difference in one more channel."""
    difference = tl.load(key_ptr + sources[0]).to(tl.float64) - q
    found = (sums[0] + difference * difference,)
    for i in tl.static_range(1, AHEAD):
        difference = tl.load(key_ptr + sources[i]).to(tl.float64) - q
        found = also(found, sums[i] + difference * difference)
    return found


@triton.jit(do_not_specialize=["targets", "n", "m", "count", "planes", "rows", "columns", "c"])
def _look_around(
    q_ptr,
    key_ptr,
    zero_q_ptr,
    zero_key_ptr,
    at_ptr,
    own_ptr,
    offset_ptr,
    far_ptr,
    weight_ptr,
    value_ptr,
    place_ptr,
    targets,
    n,
    m,
    count,
    planes,
    rows,
    columns,
    c,
    K: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
    ANGLES: tl.constexpr,
    ROOTS: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """The ``K`` nearest of some targets; ``targets`` are those of all examples."""
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = at < targets
    at = tl.minimum(at, targets - 1)
    example, target = (at // n).to(tl.int64), at % n
    here = tl.load(at_ptr + target).to(tl.int32)
    place = (here // columns // rows, here // columns % rows, here % columns)
    q = q_ptr + example * c * n + target
    key = key_ptr + example * c * m
    of_place, of_feature = tl.load(weight_ptr), tl.load(weight_ptr + 1)
    adds = (of_place >= 0) & (of_feature >= 0)  # or a source farther away may be nearer
    alone = at < 0
    if ANGLES:
        alone = tl.load(zero_q_ptr + at) != 0
    own = at
    if HAS_OWN:
        own = tl.load(own_ptr + target).to(tl.int32)

    best, first, searching = nobody(K, LANES), 0, real
    while any_of(searching):
        source, inside = _source(place, offset_ptr, first, count, planes, rows, columns)
        sources, insides = (source,), (inside,)
        sums = (tl.zeros([LANES], tl.float64),)
        for i in tl.static_range(1, AHEAD):
            source, inside = _source(place, offset_ptr, first + i, count, planes, rows, columns)
            sources, insides = also(sources, source), also(insides, inside)
            sums = also(sums, sums[0])
        x_ptr, channel_ptr = q, key
        for _ in range(c):
            sums = _added(sums, tl.load(x_ptr).to(tl.float64), channel_ptr, sources, AHEAD)
            x_ptr += n
            channel_ptr += m
        for i in tl.static_range(AHEAD):
            near = sums[i]
            if ROOTS:
                near = tl.sqrt(near)
            if ANGLES:
                zero = alone | (tl.load(zero_key_ptr + example * m + sources[i]) != 0)
                near = tl.where(zero, 1.0, near * 0.5)
            far = tl.load(far_ptr + first + i, mask=first + i < count, other=0.0)
            code = ordered((of_place * far + of_feature * near).to(tl.float32))
            looked = insides[i]
            if HAS_OWN:
                looked = looked & (sources[i] != own)
            pair = tl.where(looked, (code.to(tl.int64) << 32) | sources[i], NOBODY)
            if any_of(pair < best[K - 1]):
                best = inserted(best, pair, K)
        first += AHEAD
        far = tl.load(far_ptr + first, mask=first < count, other=0.0)
        beyond = tl.where(adds, of_place * far, -float("inf")).to(tl.float32)
        enough = beyond > value_of(~best[K - 1])
        searching = searching & (first < count) & (enough == 0)
    to = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64) * K
    for i in tl.static_range(0, K):
        tl.store(value_ptr + to + i, value_of(~best[i]), mask=real)
        tl.store(place_ptr + to + i, place_of(~best[i]).to(tl.int64), mask=real)


@gpu.on_its_device
def nearest(
    q: Tensor,
    keys: Tensor,
    kind: str,
    zeros: tuple[Tensor, Tensor],
    size: Sequence[int],
    at: Tensor,
    offset: Tensor,
    far: Tensor,
    weights: Tensor,
    k: int,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and places ``(b, n, k)`` by ``weights @ (far, feature)``, in order, ties by place.

    Args:
        q: ``(b, n, c)``, float32.
        keys: ``(b, m, c)``, likewise, in raster order.
        kind: of features: ``"angles"``, of vectors of length one or zero, ``"squares"`` of
            differences, or ``"roots"`` of these.
        zeros: ``(b, n)`` and ``(b, m)``, which vectors are zero.
        size: of the grid of sources, up to three axes.
        at: ``(n,)``, the place of each target on it.
        offset: ``(3, count)`` in int32, all that lead from a target to a source.
        far: ``(count,)`` in float64, how far each of them leads, in order.
        weights: ``(2,)`` in float64, of places and of features.
        k: at most the number of sources, without the own, and 64 or so.
        own: ``(n,)``, a source that each target is not to find; -1 for none.

    Returns:
        float32 and int64. NaN comes after infinity.
    """
    (b, n, c), m = q.shape, keys.shape[1]
    channels = (t.transpose(-1, -2).contiguous() for t in (q, keys))
    flags = (t.contiguous().view(torch.uint8) for t in zeros)
    values = q.new_empty(b, n, k)
    places = torch.empty_like(values, dtype=torch.int64)
    launch(
        _look_around,
        (gpu.cdiv(b * n, LANES),),
        (*channels, *flags, at, own, offset, far, weights, values, places),
        (b * n, n, m, len(far), *[1] * (3 - len(size)), *size, c),
        K=k,
        LANES=LANES,
        AHEAD=AHEAD,
        ANGLES=kind == "angles",
        ROOTS=kind == "roots",
        HAS_OWN=own is not None,
        num_warps=LANES // 32,
        enable_fp_fusion=False,
    )
    return values, places
