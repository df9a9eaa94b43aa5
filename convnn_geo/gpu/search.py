"""The k nearest of many targets: by a bound where that helps, by insertion where it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.insertion import _nearest
from convnn_geo.gpu.launching import launch
from convnn_geo.gpu.plans import multiprocessors, plan
from convnn_geo.gpu.survivors import _nearest_survivors

SPARE = 4
"""Neighbours more than k, at least, that are kept where their order is to be settled."""


@dataclass(frozen=True)
class Rounding:
    """How products stand for squared differences, so that what they can't tell apart is settled.

    Args:
        center: ``(b, d)``, that products are taken about.
        q: ``(n, d)``, less the center.
        keys: ``(m, d)``, less the center.
        square: ``(n,)``, what is to be added to a product's value.
        slack: ``(n,)``, how far off differences of values may be.
        rough: how many times as far where factors are rounded to TF32.
    """

    center: Tensor
    q: Tensor
    keys: Tensor
    square: Tensor
    slack: Tensor
    rough: float


@gpu.on_its_device
def nearest(
    q: Tensor,
    keys: Tensor,
    k: int,
    starts: tuple[Tensor, Tensor] | None,
    longest: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    heads: int = 1,
    direct: bool = False,
    own: Tensor | None = None,
    angles: bool = False,
    rounding: Rounding | None = None,
    integers: torch.dtype = torch.int32,
    any_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Values and places ``(n, k)`` of the nearest in each example, in order, ties by place.

    Args:
        q: ``(n, d)``, examples one after the other; float32, bfloat16 or float16. Without starts
            ``(b, heads, n, d)``, and places of all heads come one after the other.
        keys: ``(m, d)``, or ``(b, heads, m, d)``.
        k: at most what the smallest example has, and 256.
        starts: ``(b + 1,)`` each, where examples start in ``q`` and in ``keys``, int64; None where
            examples are of equal size.
        longest: targets of the largest example.
        bias: ``(m,)``, or ``(b, heads, m)``, or None; distances are ``bias - scale <q, key>``.
        scale: of the product; without a bias it is 1.
        mask: ``(b, heads, n, m)`` for examples of equal size, True where allowed.
        heads: examples that share the mask's first axis.
        direct: by squared differences instead; for few axes.
        own: ``(n,)``, a source that each target is not to find; -1 for none.
        angles: vectors have length one, or zero: these have squared distance 2 from all.
        rounding: neighbours that products do not tell apart come in the order of their squared
            differences, summed in float64 and rounded to float32.
        integers: type of the places.
        any_order: the nearest may come in any order.

    Returns:
        Values in float32, and places; these count within the example. What is hidden has value
        infinity and comes last, after NaN.
    """
    d = q.shape[-1]
    if starts is None:
        (b, heads, n, _), m = q.shape, keys.shape[-2]
        examples, targets = b * heads, b * heads * n
        strides = (*q.stride()[:-1], *keys.stride()[:-1])
        strides += (0, 0) if bias is None else bias.stride()[:-1]
    else:
        examples, targets, n, m = len(starts[0]) - 1, len(q), 0, 0
        strides = (0, 0, d, 0, 0, d, 0, 0)
    strides += (0, 0, 0) if mask is None else mask.stride()[:-1]
    values = q.new_empty(targets, k, dtype=torch.float32)
    places, missed = torch.empty_like(values, dtype=integers), None
    if not values.numel():
        return values, places
    mask = None if mask is None else mask.view(torch.uint8)
    numbers = (n, m, k, heads, *strides)
    begin: tuple[Tensor | None, Tensor | None] = starts or (None, None)
    kinds = {
        "RAGGED": not n,
        "DIRECT": direct,
        "ANGLES": angles,
        "SETTLE": rounding is not None,
        "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None,
        "HAS_OWN": own is not None,
    }
    chosen = plan(m or len(keys) // examples, k, d, q.dtype, direct, rounding is not None)
    if chosen is not None:
        missed = values.new_empty(targets, dtype=torch.uint8)
        blocks = gpu.cdiv(longest, chosen.rows)
        programs = min(blocks * examples, chosen.programs * multiprocessors(q.device))
        lists = missed.new_empty(programs * chosen.scratch, dtype=torch.int32)
        near, slack, rough = (q, keys), None, 1.0
        if rounding is not None:
            near, slack, rough = (rounding.q, rounding.keys), rounding.slack, rounding.rough
        launch(
            _nearest_survivors,
            (programs,),
            (
                *near,
                bias,
                mask,
                own,
                q,
                keys,
                slack,
                *begin,
                values,
                places,
                missed,
                lists,
            ),
            (blocks, examples, *numbers),
            (scale, rough),
            d=d,
            LISTS=chosen.lists,
            LENGTH=chosen.length,
            LISTED=chosen.listed,
            BLOCK_N=chosen.rows,
            BLOCK_M=chosen.columns,
            BLOCK_D=chosen.axes,
            STAGES=chosen.stages,
            ANY_ORDER=any_order,
            EVEN=n > 0 and m % chosen.columns == 0,
            **kinds,
            num_warps=chosen.warps,
            enable_fp_fusion=not direct,  # sums of squares round as torch's do
        )
    kept = k
    center = square = slack = None
    if rounding is not None:
        center, square, slack = rounding.center, rounding.square, rounding.slack
        kept = max(16, gpu.next_power_of_2(k + SPARE))
        if kept > gpu.LARGEST_K:
            kept = k + SPARE
        if n:  # of clouds each keeps what it can
            kept = min(kept, m - (own is not None))
    width = max(16, gpu.next_power_of_2(kept))
    wide = width > (64 if rounding is None else 32)  # so that registers hold what is kept
    block = 16 if wide else 32
    blocks = gpu.cdiv(longest, block)
    launch(
        _nearest,
        (blocks * examples,),
        (q, keys, bias, mask, own, center, square, slack, *begin, values, places, missed),
        (blocks, kept, *numbers),
        (scale,),
        d=d,
        K=width,
        BLOCK_N=block,
        BLOCK_M=64,
        BLOCK_D=max(16, min(64 if q.dtype != torch.float32 else 32, gpu.next_power_of_2(d))),
        CENTERED=rounding is not None,
        MISSED=missed is not None,
        **kinds,
        num_warps=8 if width >= (256 if rounding is None else 64) else 4,
        enable_fp_fusion=not direct,
    )
    return values, places
