"""Gradients of attention over the k nearest: calls that differ by their tensors alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.backward import of_targets
from convnn_geo.gpu.choosers import Lists, of_sources
from convnn_geo.gpu.launching import Launch, prepared
from convnn_geo.gpu.layout import Seen, laid_out, seen, split, strides

ROWS, AT_ONCE, WARPS = 16, (4, 8), 4
"""Targets of a program, neighbours of each read at once in rows of 128 bytes, and warps.

The first number is for up to 16 neighbours, which leave registers to more programs. Pairs that take
slots are as many as threads at least: up to Triton 3.4 only one of several threads with the same
pair was told its slot.
"""
HALVES, FLOATS = (16, 64, 2, 3), (4, 32, 4, 3)
"""Sources of a program, pairs whose rows it reads at once, warps and loads on their way.

Tensor cores multiply 16 rows, used or not; of float32 threads multiply each.
"""


@dataclass(frozen=True)
class Gradients:
    """What calls have in common.

    Args:
        lead: leading axes of the result.
        sizes: targets, neighbours, sources, and channels of what is compared and of values.
        kinds: dtypes of queries, keys, values and the result's gradient, and the device.
        whole: which of queries, keys and values have the result's leading axes.
        strides: of those four, along examples, heads and rows.
        keeps: whether weights were dropped.
        biased: whether a bias learns.
        fixed: whether sums over pairs have a fixed order.
    """

    lead: torch.Size
    sizes: tuple[int, int, int, int, int]
    kinds: tuple[Any, ...]
    whole: tuple[bool, ...]
    strides: tuple[int, ...]
    keeps: bool
    biased: bool
    fixed: bool

    @functools.cached_property
    def _results(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the gradients."""
        n, _, m, d, c = self.sizes
        shapes = [(*self.lead, *rows) for rows in ((n, d), (m, d), (m, c))]
        kinds = [
            kind if own else torch.float32
            for kind, own in zip(self.kinds[:3], self.whole, strict=True)
        ]
        shapes.append((*self.lead, m) if self.biased else (0,))
        return list(zip(shapes, [*kinds, torch.float32], strict=True))

    @functools.cached_property
    def _packed(self) -> bool:
        """Whether what is sent is sent as bfloat16, to which products would round it anyway."""
        return not self.biased and set(self.kinds[:4]) == {torch.bfloat16}

    @functools.cached_property
    def _examples(self) -> int:
        return math.prod(self.lead)

    @functools.cached_property
    def _blocks(self) -> dict[str, int]:
        """Channels, and those of a tile."""
        *_, d, c = self.sizes
        axes, channels = (max(16, gpu.next_power_of_2(size)) for size in (d, c))
        return {"d": d, "c": c, "BLOCK_D": axes, "BLOCK_C": channels}

    @functools.cached_property
    def _of_targets(self) -> tuple[Launch, tuple[int]]:
        n, k, m, *_ = self.sizes
        at_once, blocks = AT_ONCE[k > 16], self._blocks
        _, key, value, *_ = self.kinds
        wide = max(blocks["BLOCK_D"] * key.itemsize, blocks["BLOCK_C"] * value.itemsize)
        launch = prepared(
            of_targets,
            (*self.kinds, *self.whole),
            (n, m, k, split(self.lead)[1], *self.strides[3:]),
            **blocks,
            BLOCK_N=ROWS,
            J=max(1, min(at_once, at_once * 128 // wide)),
            PAIRS=gpu.next_power_of_2(max(32 * WARPS, min(ROWS * k, 64 * WARPS))),
            HAS_KEEP=self.keeps,
            HAS_SLOT=self.fixed,
            PACKED=self._packed,
            num_warps=WARPS,
        )
        return launch, (gpu.cdiv(n, ROWS) * self._examples,)

    @functools.cached_property
    def _of_sources(self) -> tuple[Launch, tuple[int]]:
        (n, k, m, *_), blocks = self.sizes, self._blocks
        sources, some, warps, stages = FLOATS if torch.float32 in self.kinds[::3] else HALVES
        launch = prepared(
            of_sources,
            (*self.kinds, *self.whole),
            (n * k, m, split(self.lead)[1], *self.strides[:3], *self.strides[9:]),
            **blocks,
            S=sources,
            P=max(16, min(some, some * 64 // max(blocks["BLOCK_D"], blocks["BLOCK_C"]))),
            PACKED=self._packed,
            HAS_BIAS=self.biased,
            num_warps=warps,
            num_stages=stages,
        )
        return launch, (gpu.cdiv(m, sources) * self._examples,)

    def __call__(
        self,
        tensors: Sequence[Tensor],
        keep: Tensor | None,
        weight: Tensor,
        place: Tensor,
        scale: float,
        temperature: float,
        of_pairs: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients; ``tensors`` are queries, keys, values and the result's gradient."""
        q, keys, value, grad = tensors
        new = weight.new_empty if grad.numel() else weight.new_zeros
        to_q, to_keys, to_value, to_bias = [new(size, dtype=kind) for size, kind in self._results]
        to_pairs = weight.new_zeros(weight.shape if of_pairs else 0)
        if grad.numel():
            n, _, m, *_ = self.sizes
            lists = Lists.of(weight, place, self._examples, m, self.fixed)
            slope, mean = torch.empty_like(weight), weight.new_empty(self._examples * n)
            sent = place.new_empty(*place.shape, 2 if self._packed else 4)
            given = (keys, value, keep, grad, weight, place, lists.slot, lists.start, lists.count)
            launch, grid = self._of_targets
            launch(grid, (*given, to_q, slope, mean, sent), (scale, temperature))
            launch, grid = self._of_sources
            launch(grid, (sent, lists.start, q, grad, to_keys, to_value, to_bias), (scale,))
            if of_pairs:
                mean = mean.view(*weight.shape[:-1], 1)
                to_pairs = weight * (mean - slope).masked_fill(weight == 0, 0.0) / temperature
        return to_q, to_keys, to_value, to_bias, to_pairs


@gpu.on_its_device
def attend_backward(
    q: Tensor,
    keys: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    temperature: float,
    grad: Tensor,
    weight: Tensor,
    place: Tensor,
    biased: bool = True,
    of_pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to queries, keys, values and bias in the result's leading shape.

    And to distances of pairs ``(..., n, k)``, empty unless those ``of_pairs`` are asked for.

    They have their tensors' types; float32, to be summed, where leading axes were broadcast. That
    of a bias is in float32, and empty unless ``biased``. Under
    ``torch.use_deterministic_algorithms`` sums over pairs have a fixed order.
    """
    tensors, pairs = (q, keys, value, grad), place.shape
    which = (keep is not None, biased, torch.are_deterministic_algorithms_enabled())
    all_seen = (seen(q), seen(keys), seen(value), seen(grad))
    call = _plain(all_seen, pairs, *which)
    if call is None:
        laid = [laid_out(t, pairs[:-2], 2) for t in tensors]
        tensors, steps = zip(*laid, strict=True)
        call = _call(*_common(all_seen, pairs), sum(steps, ()), *which)
    weight, place = weight.float().contiguous(), place.int().contiguous()
    keep = None if keep is None else keep.float().expand(weight.shape).contiguous()
    return call(tensors, keep, weight, place, scale, temperature, of_pairs)


_call = functools.lru_cache(1024)(Gradients)
"""The same for the same arguments, so that what follows from these is found but once."""


@functools.lru_cache(1024)
def _plain(
    tensors: tuple[Seen, ...], pairs: torch.Size, keeps: bool, biased: bool, fixed: bool
) -> Gradients | None:
    """The call for tensors that can be read as they lie; None where one can't."""
    steps: tuple[int, ...] = ()
    for shape, stride, *_ in tensors:
        found = strides(shape, stride, pairs[:-2])
        if found is None:
            return None
        steps += found
    return _call(*_common(tensors, pairs), steps, keeps, biased, fixed)


def _common(tensors: tuple[Seen, ...], pairs: torch.Size) -> tuple[Any, ...]:
    """What :class:`Gradients` begins with, of queries, keys, values and the result's gradient."""
    lead, (q, keys, value, _) = pairs[:-2], (shape for shape, *_ in tensors)
    kinds = (*[dtype for *_, dtype, _ in tensors], tensors[0][-1])
    whole = tuple([shape[:-2] == lead for shape in (q, keys, value)])
    return lead, (*pairs[-2:], *keys[-2:], value[-1]), kinds, whole
