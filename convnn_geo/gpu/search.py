"""The k nearest of many targets: by a bound where that helps, by insertion where it does not."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.insertion import _nearest
from convnn_geo.gpu.launching import Launch, prepared
from convnn_geo.gpu.plans import Plan, multiprocessors, plan
from convnn_geo.gpu.survivors import _nearest_survivors

SPARE = 4
"""Neighbours more than k, at least, that are kept where their order is to be settled."""


@dataclass(frozen=True)
class Rounding:
    """How products in float32 stand for distances, so that what they can't tell apart is settled.

    Args:
        near: targets and sources as products take them.
        square: ``(..., n)``, of each target's length.
        longest: ``(b,)``, length of each example's longest source.
        share: by which differences may be off, of the square of the sum of two lengths, or of
            their product.
        rough: the same where factors are rounded to TF32.
        exact: whether values are wanted as distances are; otherwise good to rounding.
        products: whether distances are ``bias - scale <q, key>``, not squared differences.
        fine: what a float32, as kernels take numbers, cannot hold of that scale.
    """

    near: tuple[Tensor, Tensor]
    square: Tensor
    longest: Tensor
    share: float
    rough: float
    exact: bool
    products: bool = False
    fine: float = 0.0


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
    less: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and places ``(n, k)`` of the nearest in each example, in order, ties by place.

    Args:
        q: ``(n, d)``, examples one after the other; float32, bfloat16 or float16, or, where
            rounding is told, float64. Without starts ``(b, heads, n, d)``, and places of all heads
            come one after the other.
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
        rounding: neighbours that products do not tell apart come in the order of their distances,
            summed in float64 and rounded to float32.
        integers: type of the places.
        any_order: the nearest may come in any order.
        less: ``(b, heads, n, m)`` for examples of equal size, what distances are less by; not with
            rounding.

    Returns:
        Values in float32, and places; these count within the example. What is hidden has value
        infinity and comes last, after NaN.
    """
    if starts is None:
        (b, heads, n, d), m = q.shape, keys.shape[-2]
        sizes = (b * heads, n, m)
        strides = (*q.stride()[:-1], *keys.stride()[:-1])
        strides += (0, 0) if bias is None else bias.stride()[:-1]
    else:
        d = q.shape[-1]
        sizes = (len(starts[0]) - 1, 0, 0)
        longest = gpu.cdiv(longest, 32) * 32  # whose clouds vary meet the same searches again
        strides = (0, 0, d, 0, 0, d, 0, 0)
    strides += (0, 0, 0) if mask is None else mask.stride()[:-1]
    strides += (0, 0, 0) if less is None else less.stride()[:-1]
    usual = sizes[2] or len(keys) // max(1, sizes[0])
    near = q.dtype if rounding is None else rounding.near[0].dtype
    chosen = plan(usual, k, d, near, direct, rounding is not None)
    given = tuple([None if t is None else t.dtype for t in (bias, mask, less, own)])
    kinds = (near, integers, q.device, *given, q.dtype)
    ways = Ways(direct, angles, any_order=any_order)
    if rounding is not None:
        ways = ways._replace(settled=True, products=rounding.products, exact=rounding.exact)
    search = similar(sizes, k, d, longest, heads, strides, kinds, ways, chosen)
    return search(q, keys, starts, bias, scale, mask, own, rounding, less)


class Ways(NamedTuple):
    """How distances are compared, and whom that finds.

    Args:
        direct: by differences.
        angles: those of vectors of length one, or zero.
        settled: in float64 where products in float32 do not tell.
        products: and then by products, not by differences.
        exact: and then values are those in float64.
        any_order: the nearest may come in any order.
    """

    direct: bool = False
    angles: bool = False
    settled: bool = False
    products: bool = False
    exact: bool = False
    any_order: bool = False


@dataclass(frozen=True)
class Search:
    """Searches that differ by their tensors alone.

    Args:
        sizes: examples; targets and sources of each, or 0 where they differ.
        k: neighbours.
        d: axes.
        longest: targets of the largest example, at most.
        heads: examples that share the mask's first axis.
        strides: of targets, sources, bias, mask and what distances are less by, along examples,
            heads and rows.
        kinds: dtype of targets and sources as products take them, that of places, the device,
            dtypes of a bias, a mask, what distances are less by, and sources not to be found, or
            None, and that of targets.
        ways: in which distances are compared.
        plan: of the search by a bound; None where there is none.
    """

    sizes: tuple[int, int, int]
    k: int
    d: int
    longest: int
    heads: int
    strides: tuple[int, ...]
    kinds: tuple[Any, ...]
    ways: Ways
    plan: Plan | None

    @functools.cached_property
    def _numbers(self) -> tuple[int, ...]:
        return (*self.sizes[1:], self.k, self.heads, *self.strides)

    @functools.cached_property
    def _kinds(self) -> dict[str, bool]:
        (*_, bias, mask, less, own, _), ways = self.kinds, self.ways
        return {
            "RAGGED": not self.sizes[1],
            "DIRECT": ways.direct,
            "ANGLES": ways.angles,
            "PRODUCTS": ways.products,
            "SETTLE": ways.settled,
            "HAS_BIAS": bias is not None,
            "HAS_MASK": mask is not None,
            "HAS_LESS": less is not None,
            "HAS_OWN": own is not None,
        }

    @functools.cached_property
    def _by_bound(self) -> tuple[Launch, int, int]:
        """The kernel's launch, programs, and numbers that these need."""
        plan: Plan = self.plan  # type: ignore[assignment]
        examples, n, m = self.sizes
        blocks = gpu.cdiv(self.longest, plan.rows)
        programs = min(blocks * examples, plan.programs * multiprocessors(self.kinds[2]))
        launch = prepared(
            _nearest_survivors,
            self.kinds,
            (blocks, examples, *self._numbers),
            d=self.d,
            LISTS=plan.lists,
            LENGTH=plan.length,
            LISTED=plan.listed,
            AHEAD=plan.ahead,
            BLOCK_N=plan.rows,
            BLOCK_M=plan.columns,
            BLOCK_D=plan.axes,
            STAGES=plan.stages,
            ANY_ORDER=self.ways.any_order,
            EVEN=n > 0 and m % plan.columns == 0,
            **self._kinds,
            num_warps=plan.warps,
            enable_fp_fusion=not self.ways.direct,  # sums of squares round as torch's do
        )
        return launch, programs, programs * plan.scratch

    @functools.cached_property
    def _by_insertion(self) -> tuple[Launch, int]:
        """The kernel's launch, and programs."""
        (examples, n, m), kept, settled = self.sizes, self.k, self.ways.settled
        if settled:
            kept = max(16, gpu.next_power_of_2(kept + SPARE))
            if kept > gpu.LARGEST_K:
                kept = self.k + SPARE
            if n:  # of clouds each keeps what it can
                kept = min(kept, m - (self.kinds[6] is not None))
        width = max(16, gpu.next_power_of_2(kept))
        wide = width > (32 if settled else 64)  # so that registers hold what is kept
        block = 16 if wide else 32
        blocks = gpu.cdiv(self.longest, block)
        most = 64 if self.kinds[0] != torch.float32 else 32
        launch = prepared(
            _nearest,
            self.kinds,
            (blocks, kept, *self._numbers),
            d=self.d,
            K=width,
            BLOCK_N=block,
            BLOCK_M=64,
            BLOCK_D=max(16, min(most, gpu.next_power_of_2(self.d))),
            EXACT=self.ways.exact,
            MISSED=self.plan is not None,
            **self._kinds,
            num_warps=8 if width >= (64 if settled else 256) else 4,
            enable_fp_fusion=not self.ways.direct,
        )
        return launch, blocks * examples

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        starts: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        scale: float,
        mask: Tensor | None,
        own: Tensor | None,
        rounding: Rounding | None,
        less: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Values and places."""
        targets = self.sizes[0] * self.sizes[1] if starts is None else len(q)
        values = q.new_empty(targets, self.k, dtype=torch.float32)
        places, missed = torch.empty_like(values, dtype=self.kinds[1]), None
        if not values.numel():
            return values, places
        mask = None if mask is None else mask.view(torch.uint8)
        begin: tuple[Tensor | None, Tensor | None] = starts or (None, None)
        near, square, longest, fine, share, rough = (q, keys), None, None, 0.0, 0.0, 0.0
        if rounding is not None:
            near, square, longest = rounding.near, rounding.square, rounding.longest
            fine, share, rough = rounding.fine, rounding.share, rounding.rough
        given = (*near, bias, mask, less, own, q, keys, square, longest, *begin, values, places)
        if self.plan is not None:
            launch, programs, room = self._by_bound
            missed = values.new_empty(targets, dtype=torch.uint8)
            lists = missed.new_empty(room, dtype=torch.int32)
            launch((programs,), (*given, missed, lists), (scale, fine, rough))
        launch, programs = self._by_insertion
        launch((programs,), (*given, missed), (scale, fine, share))
        return values, places


similar = functools.lru_cache(1024)(Search)
"""The same for the same arguments, so that what follows from these is found but once."""
