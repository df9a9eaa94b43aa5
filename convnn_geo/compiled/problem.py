"""A search by products, laid out as products.h has it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn_geo.compiled import build
from convnn_geo.shapes import broadcast_shapes

KINDS = ("points", "angles", "products")
WANTED = ("order", "values", "set")
LARGEST_K = 256
"""GROUPS of select.h."""
LONGEST_ROW = 2**20
"""Sources: a block of rows is in cache up to some 2^15, and still far ahead of torch beyond."""

_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Layout(ctypes.Structure):
    """``Problem`` of products.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "k", "wanted")),
        *((name, _LONG) for name in ("examples", "heads", "n", "m", "d")),
        *((name, _POINTER) for name in ("q", "keys", "bias")),
        *((name, _LONG) for name in ("q_example", "q_head", "q_row")),
        *((name, _LONG) for name in ("key_example", "key_head", "key_row")),
        *((name, _LONG) for name in ("bias_example", "bias_head")),
        ("mask", _POINTER),
        *((name, _LONG) for name in ("mask_example", "mask_head", "mask_row")),
        ("less", _POINTER),
        *((name, _LONG) for name in ("less_example", "less_head", "less_row")),
        ("own", _POINTER),
        ("scale", ctypes.c_double),
        *((name, _POINTER) for name in ("target_start", "source_start", "source_stop")),
    )


class AttentionLayout(ctypes.Structure):
    """``Attention`` of attention.c."""

    _fields_ = (
        ("problem", Layout),
        ("width", _LONG),
        ("value", _POINTER),
        *((name, _LONG) for name in ("value_example", "value_head", "value_row")),
        ("keep", _POINTER),
        ("temperature", ctypes.c_float),
    )


@dataclass(frozen=True)
class Runs:
    """Examples of unequal size: runs of the rows ``(n, d)`` of targets and ``(m, d)`` of sources.

    Args:
        target_start: ``(examples + 1,)``, where each example's targets start; one follows another.
        source_start: ``(examples,)``, where its sources start.
        source_stop: ``(examples,)``, and stop.
    """

    target_start: Tensor
    source_start: Tensor
    source_stop: Tensor

    @property
    def targets(self) -> Tensor:
        """How many each example has."""
        return self.target_start.diff()

    @property
    def sources(self) -> Tensor:
        """How many each example has."""
        return self.source_stop - self.source_start


class Described:
    """A search laid out for C, and the tensors that the layout points to.

    Args:
        kind: of :data:`KINDS`.
        q: ``(..., n, d)``.
        keys: ``(..., m, d)``.
        k: neighbours.
        bias: ``(..., m)`` or None.
        scale: of products.
        mask: ``(..., n | 1, m)`` or None.
        own: ``(n,)`` or None.
        wanted: of :data:`WANTED`.
        lead: leading axes of what else belongs to the result.
        less: ``(..., n | 1, m)`` or None, what each pair's distance is less by.
        runs: examples of unequal size; ``q`` and ``keys`` then have no leading axes.
    """

    def __init__(
        self,
        kind: str,
        q: Tensor,
        keys: Tensor,
        k: int,
        bias: Tensor | None = None,
        scale: float = 1.0,
        mask: Tensor | None = None,
        own: Tensor | None = None,
        wanted: str = "order",
        lead: tuple[int, ...] = (),
        less: Tensor | None = None,
        runs: Runs | None = None,
    ) -> None:
        self.lead = broadcast_shapes(
            q.shape[:-2],
            keys.shape[:-2],
            () if bias is None else bias.shape[:-1],
            () if mask is None else mask.shape[:-2],
            () if less is None else less.shape[:-2],
            lead,
        )
        self.n, self.m, self.d = q.shape[-2], keys.shape[-2], q.shape[-1]
        self.heads = self.lead[-1] if self.lead else 1
        given = ((q, 2), (keys, 2), (bias, 1), (mask, 2), (less, 2))
        longest = self.m if runs is None or not len(runs.sources) else int(runs.sources.max())
        self.served = (
            _served(q, keys, k, bias, mask, own, less)
            and longest <= LONGEST_ROW
            and all(tensor is None or one_outer(tensor, axes, self.lead) for tensor, axes in given)
        )
        if not self.served:
            return
        self._kept: list[Tensor] = []
        at_bias, bias_strides = (None, [0, 0]) if bias is None else self.spread(bias, 1)
        (at_mask, mask_strides), (at_less, less_strides) = (
            (None, [0, 0, 0]) if pairs is None else self.of_pairs(pairs) for pairs in (mask, less)
        )
        (at_q, q_strides), (at_keys, key_strides) = self.spread(q, 2), self.spread(keys, 2)
        examples, n, m = self.lead.numel(), self.n, self.m
        starts: list[int | None] = [None] * 3
        self.pairs = examples * n * m
        if runs is not None:
            parts = (runs.target_start, runs.source_start, runs.source_stop)
            starts = [self.flat(part) for part in parts]
            sizes = torch.stack([runs.targets, runs.sources])
            examples, (n, m) = sizes.shape[1], sizes.amax(1).tolist()
            self.pairs = int(sizes.prod(0).sum())
        self.layout = Layout(
            *(KINDS.index(kind), k, WANTED.index(wanted), examples, self.heads, n, m, self.d),
            *(at_q, at_keys, at_bias, *q_strides, *key_strides, *bias_strides),
            *(at_mask, *mask_strides, at_less, *less_strides),
            *(None if own is None else self.flat(own), scale, *starts),
        )

    @property
    def products(self) -> int:
        """How many a search takes; to choose costs some a pair, too."""
        return self.pairs * (self.d + 16)

    @property
    def address(self) -> int:
        """Of the layout."""
        return ctypes.addressof(self.layout)

    def spread(self, tensor: Tensor, axes: int) -> tuple[int, list[int]]:
        """Where a tensor lies, and its strides along (example, head, rows); 0 for shared ones."""
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        leading = len(self.lead)
        if leading > 2:  # all but the last are examples; a copy where their strides don't agree
            tensor = _with_outer(tensor, axes, leading)
            tensor = tensor.flatten(0, leading - 2)
        self._kept.append(tensor)
        lead = (self.lead[:-1].numel(), self.lead[-1]) if leading > 2 else self.lead
        wide = tensor.expand(*lead, *tensor.shape[-axes:])
        return tensor.data_ptr(), [*[0] * (2 - len(lead)), *wide.stride()[:-1]]

    def of_pairs(self, tensor: Tensor) -> tuple[int, list[int]]:
        """The same of what may be shared by all targets."""
        at, strides = self.spread(tensor, 2)
        return at, [*strides[:2], 0 if tensor.shape[-2] == 1 else strides[2]]

    def flat(self, tensor: Tensor) -> int:
        """Where a tensor lies, contiguous."""
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


def _with_outer(tensor: Tensor, axes: int, leading: int) -> Tensor:
    """With so many leading axes, the first of size 1 where it has fewer."""
    return tensor[(None,) * (leading + axes - tensor.ndim)]


def one_outer(tensor: Tensor, axes: int, lead: torch.Size) -> bool:
    """Whether leading axes but the last can be one: all share a tensor there, or each has its own.

    Where some share it, copies would have to be made of it.
    """
    if len(lead) < 3:
        return True
    outer = _with_outer(tensor, axes, len(lead)).shape[: len(lead) - 1]
    return outer == lead[:-1] or outer.numel() == 1


def _served(
    q: Tensor,
    keys: Tensor,
    k: int,
    bias: Tensor | None,
    mask: Tensor | None,
    own: Tensor | None,
    less: Tensor | None,
) -> bool:
    floats = [t for t in (q, keys, bias, less) if t is not None]
    here = all(build.here(t) for t in floats)
    here = here and (mask is None or mask.dtype == torch.bool)
    n, m = q.shape[-2], keys.shape[-2]
    some = q.numel() > 0 and 0 < k <= min(LARGEST_K, m)
    fits = all(t is None or (t.shape[-1] == m and t.shape[-2] in (1, n)) for t in (mask, less))
    fits = fits and (bias is None or bias.shape[-1] == m)
    fits = fits and q.shape[-1] == keys.shape[-1] and (own is None or len(own) == n)
    fits = fits and (own is None or own.ndim == 1)
    return here and some and fits and build.library() is not None
