"""Calls of attention over the k nearest that differ by their tensors alone, prepared once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo import gpu
from convnn_geo.gpu.found import _combine
from convnn_geo.gpu.launching import Launch, prepared
from convnn_geo.gpu.layout import result_strides, split
from convnn_geo.gpu.plans import Plan
from convnn_geo.gpu.rows import Tile, _attend_rows
from convnn_geo.gpu.search import Search, Ways


@dataclass(frozen=True)
class Shapes:
    """What calls have in common.

    Args:
        lead: leading axes of the result.
        n: queries.
        m: keys.
        k: chosen by each query.
        d: channels of queries and keys.
        c: channels of values.
        strides: of queries, keys, values, bias, mask, what distances are less by, and result,
            along examples, heads and rows.
        kinds: dtypes of queries, keys and values, and the device.
        given: whether there are a bias, a mask, something less, and kept weights.
    """

    lead: torch.Size
    n: int
    m: int
    k: int
    d: int
    c: int
    strides: tuple[int, ...]
    kinds: tuple[torch.dtype, torch.dtype, torch.dtype, torch.device]
    given: tuple[bool, bool, bool, bool]

    @functools.cached_property
    def _result(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (*self.lead, self.n, self.c), result_strides(self.lead, self.n, self.c)

    def result(self, value: Tensor) -> Tensor:
        """What :func:`~convnn_geo.gpu.layout.empty_result` makes, at once."""
        return value.new_empty_strided(*self._result)


@dataclass(frozen=True)
class Rows:
    """Whole rows of scores in registers.

    Args:
        shapes: of the tensors.
        tile: of the kernel's programs.
        stores: whether weights and places are kept.
    """

    shapes: Shapes
    tile: Tile
    stores: bool

    @functools.cached_property
    def _grid(self) -> tuple[int]:
        return (gpu.cdiv(self.shapes.n, self.tile.rows) * math.prod(self.shapes.lead),)

    @functools.cached_property
    def _launch(self) -> Launch:
        shapes, tile = self.shapes, self.tile
        biased, masked, lessened, kept = shapes.given
        return prepared(
            _attend_rows,
            shapes.kinds,
            (shapes.n, shapes.m, shapes.k, split(shapes.lead)[1], *shapes.strides),
            d=shapes.d,
            c=shapes.c,
            BLOCK_N=tile.rows,
            M=tile.columns,
            BLOCK_D=tile.axes,
            BLOCK_C=tile.channels,
            HAS_BIAS=biased,
            HAS_MASK=masked,
            HAS_LESS=lessened,
            HAS_KEEP=kept,
            STORES=self.stores,
            GATHERS=shapes.kinds[0] == torch.float32,  # not for tensor cores
            GROUPS=0 if masked else _groups(shapes.m, shapes.k),
            FULL=shapes.m // 64 * 64,
            num_warps=tile.warps,
        )

    def __call__(
        self, tensors: tuple[Tensor | None, ...], out: Tensor, scale: float, temperature: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Fill the result; weights and places where they are kept.

        ``tensors`` are queries, keys, values, bias, mask, what is less, and kept weights.
        """
        weight = place = None
        if self.stores:
            shape = (*self.shapes.lead, self.shapes.n, self.shapes.k)
            weight = out.new_empty(shape, dtype=torch.float32)
            place = torch.empty_like(weight, dtype=torch.int32)
        self._launch(self._grid, (*tensors, out, weight, place), (scale, temperature))
        return weight, place


@dataclass(frozen=True)
class Found:
    """A search first, then a softmax over what it has found.

    Args:
        shapes: of the tensors.
        plan: of the search by a bound; None where there is none.
    """

    shapes: Shapes
    plan: Plan | None

    @functools.cached_property
    def _search(self) -> Search:
        shapes = self.shapes
        (biased, masked, lessened, _), (dtype, *_, device) = shapes.given, shapes.kinds
        examples = math.prod(shapes.lead)
        return Search(
            sizes=(examples, shapes.n, shapes.m),
            k=shapes.k,
            d=shapes.d,
            longest=shapes.n,
            heads=split(shapes.lead)[1],
            strides=shapes.strides[:6] + shapes.strides[9:17],
            kinds=(
                *(dtype, torch.int32, device, torch.float32 if biased else None),
                *(torch.uint8 if masked else None, torch.float32 if lessened else None),
                *(None, dtype),
            ),
            ways=Ways(any_order=True),
            plan=self.plan,
        )

    @functools.cached_property
    def _grid(self) -> tuple[int]:
        return (gpu.cdiv(self.shapes.n, 16) * math.prod(self.shapes.lead),)

    @functools.cached_property
    def _launch(self) -> Launch:
        shapes = self.shapes
        steps = shapes.strides[6:9] + shapes.strides[17:]
        return prepared(
            _combine,
            shapes.kinds,
            (shapes.n, shapes.k, split(shapes.lead)[1], *steps),
            c=shapes.c,
            K=max(2, gpu.next_power_of_2(shapes.k)),
            BLOCK_N=16,
            BLOCK_C=max(16, min(256, gpu.next_power_of_2(shapes.c))),
            HAS_KEEP=shapes.given[3],
        )

    def __call__(
        self, tensors: tuple[Tensor | None, ...], out: Tensor, scale: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Fill the result; weights and places. ``tensors`` as :class:`Rows` takes them."""
        q, keys, value, bias, mask, less, keep = tensors
        if bias is None:  # what is found are products
            temperature /= scale
        found, place = self._search(q, keys, None, bias, scale, mask, None, None, less)  # type: ignore[arg-type]
        self._launch(self._grid, (found, value, keep, out, found, place), (temperature,))
        shape = (*self.shapes.lead, self.shapes.n, self.shapes.k)
        return found.view(shape), place.view(shape)


def _groups(m: int, k: int) -> int:
    """Into how many groups rows of ``m`` are divided, so that more than ``k`` hold somebody."""
    groups = max(64 if m >= 64 else 32, gpu.next_power_of_2(3 * k))
    return groups if groups <= m else 0
