"""Points about a center that they lie near, so that products tell apart whom an offset would blur.

All that a search by products needs of its points beforehand, in one pass over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.launching import launch

_SAMPLE = tl.constexpr(128)
"""Sources whose mean is the center: any point near most of them would do."""
_GOLDEN = tl.constexpr(2654435769)
"""2^32 over the golden ratio: its multiples meet no image's width."""
_BLOCK = 64
"""Points of a program."""


@triton.jit(do_not_specialize=["n"])
def _mean(
    point_ptr, start_ptr, center_ptr, longest_ptr, n, d: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Of some of an example's points, far apart in no regular order; and nobody is longest yet."""
    example = tl.program_id(0).to(tl.int64)
    first, count = example * n, tl.cast(n, tl.int64)
    if RAGGED:
        first = tl.load(start_ptr + example)
        count = tl.load(start_ptr + example + 1) - first
    share = tl.arange(0, _SAMPLE).to(tl.int64) * _GOLDEN & 0xFFFFFFFF  # of 2^32
    rows = first + (share * count >> 32)
    for start in range(0, d, BLOCK_D):
        axes = start + tl.arange(0, BLOCK_D)
        there = (rows < first + count)[:, None] & (axes < d)[None, :]
        x = tl.load(point_ptr + rows[:, None] * d + axes[None, :], mask=there, other=0.0)
        center = tl.sum(x * (1 / _SAMPLE), 0).to(tl.float32)
        tl.store(center_ptr + example * d + axes, center, mask=axes < d)
    tl.store(longest_ptr + example, 0)


@triton.jit(do_not_specialize=["total", "n"])
def _center(
    point_ptr, center_ptr, example_ptr, centered_ptr, square_ptr, bias_ptr, longest_ptr, total, n,
    d: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ANGLES: tl.constexpr,
    RAGGED: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Points less their example's center, and the squares of their lengths.

    Of ``SOURCES`` also the longest of each example, and squares as distances need them: those of
    zero vectors among ``ANGLES``, which have length one by definition, are one more.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = rows < total
    if RAGGED:
        example = tl.load(example_ptr + rows, mask=real, other=-1)
    else:
        example = tl.where(real, rows // n, -1)
    at, of = rows.to(tl.int64)[:, None] * d, example.to(tl.int64)[:, None] * d
    square, own = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK_D):
        axes = start + tl.arange(0, BLOCK_D)
        there = real[:, None] & (axes < d)[None, :]
        x = tl.load(point_ptr + at + axes[None, :], mask=there, other=0.0)
        center = tl.load(center_ptr + of + axes[None, :], mask=there, other=0.0)
        own += tl.sum(x * x, 1).to(tl.float32)
        x = (x - center).to(tl.float32)
        square += tl.sum(x * x, 1)
        tl.store(centered_ptr + at + axes[None, :], x, mask=there)
    tl.store(square_ptr + rows, square, mask=real)
    if SOURCES:
        if ANGLES:
            tl.store(bias_ptr + rows, square + tl.where(own < 0.25, 1.0, 0.0), mask=real)
        # As integers positive floats keep their order, and NaN comes last.
        longest = tl.sqrt_rn(square).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        first, last = tl.min(tl.where(real, example, 0x7FFFFFFF), 0), tl.max(example, 0)
        if first == last:
            tl.atomic_max(longest_ptr + last, tl.max(tl.where(real, longest, 0), 0), sem="relaxed")
        else:
            tl.atomic_max(longest_ptr + example, longest, mask=real, sem="relaxed")


@dataclass(frozen=True)
class Centered:
    """Targets and sources about a center for each example.

    Args:
        q: ``(..., n, d)``, targets less their center.
        keys: ``(..., m, d)``, sources less theirs.
        square: ``(..., n)``, of each target's length.
        bias: ``(..., m)``: ``square + bias - 2 <q, key>`` is a squared distance.
        longest: ``(b,)``, length of each example's longest source.
    """

    q: Tensor
    keys: Tensor
    square: Tensor
    bias: Tensor
    longest: Tensor


@gpu.on_its_device
def centered(
    q: Tensor,
    keys: Tensor,
    alike: bool,
    angles: bool,
    starts: Tensor | None = None,
    batch: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> Centered:
    """Points in float32 about the centers of their examples.

    Args:
        q: targets ``(b, n, d)``, or ``(n, d)`` of examples that are not of one size; contiguous,
            in float32 or float64.
        keys: sources, likewise.
        alike: whether targets are the sources.
        angles: zero vectors have squared distance 2 from all, others length one.
        starts: ``(b + 1,)``, where examples start among sources, and
        batch: ``(n,)`` and ``(m,)``, the example of each point, where they are not of one size.
    """
    d, examples = keys.shape[-1], len(keys) if starts is None else len(starts) - 1
    center = keys.new_empty(examples, d, dtype=torch.float32)
    longest = torch.empty(examples, dtype=torch.int32, device=keys.device)
    wide = min(64, gpu.next_power_of_2(d))
    plain: dict[str, Any] = {"d": d, "BLOCK_D": wide, "RAGGED": starts is not None}
    size = keys.shape[-2] if starts is None else 0
    launch(_mean, (examples,), (keys, starts, center, longest), (), (size,), **plain)

    def about(points: Tensor, example: Tensor | None, sources: bool) -> tuple[Tensor, ...]:
        moved = torch.empty_like(points, dtype=torch.float32)
        square = moved.new_empty(points.shape[:-1])
        bias = torch.empty_like(square) if sources and angles else square
        total = square.numel()
        tensors = (points, center, example, moved, square, bias, longest)
        launch(
            _center,
            (gpu.cdiv(total, _BLOCK),),
            tensors,
            (),
            (total, points.shape[-2]),
            BLOCK=_BLOCK,
            ANGLES=angles,
            SOURCES=sources,
            **plain,
        )
        return moved, square, bias

    of_keys, square, bias = about(keys, batch[1], True)
    of_q = of_keys
    if not alike:
        of_q, square, _ = about(q, batch[0], False)
    return Centered(of_q, of_keys, square, bias, longest.view(torch.float32))
