"""Attention by torch's own: softmax over every candidate of a bilinear metric."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.candidates import All, Block, Both, Candidates, Causal, Congruent
from convnn_geo.checks import all_finite
from convnn_geo.compiled import LARGEST_K
from convnn_geo.kernels import Sum
from convnn_geo.lowering.rules import Rule
from convnn_geo.metrics import BilinearForm, full_precision
from convnn_geo.operation import Operation
from convnn_geo.operators import is_watched
from convnn_geo.points import Grid
from convnn_geo.search.nearest import by_rows
from convnn_geo.search.problem import Problem
from convnn_geo.search.rows import Hidden
from convnn_geo.selection import Every, KNearest, Selection
from convnn_geo.shapes import broadcast_shapes
from convnn_geo.weighting import Softmax

_SPARSE = 12
"""Bytes of a neighbour's index and distance; a source in a mask takes one."""


def by_mask(candidates: Candidates) -> bool:
    """Whether candidates are all sources, or a mask over them. Of others nothing is known."""
    if type(candidates) is Both:
        return by_mask(candidates.first) and by_mask(candidates.second)
    return type(candidates) in (All, Block, Causal, Congruent)


def simply_nearest(chosen: Selection) -> bool:
    """Whether those that are kept are the k nearest, and nothing else."""
    plain = type(chosen) is KNearest and chosen.dilation == 1
    return plain and chosen.self_point == "natural"


def over_candidates(op: Operation) -> str | None:
    """Why there are fewer candidates than the k that are asked for; None where there are not."""
    chosen: KNearest = op.selection  # type: ignore[assignment]
    enough = chosen.short == "pad" or chosen.k <= chosen.spare(op.subset, op.source.num_points)
    return None if enough else f"k={chosen.k} is over the number of candidates"


def by_rows_of_distances(op: Operation) -> bool:
    """Whether the search that was asked for may be one of rows of distances."""
    return op.search in ("auto", "dense")


def _keeps_all(op: Operation) -> bool:
    """Whether every candidate is kept: in a sum their order does not count."""
    chosen = op.selection
    if type(chosen) is KNearest and type(op.candidates) is All:
        m = op.source.num_points
        return simply_nearest(chosen) and (
            chosen.k == m or (chosen.k > m and chosen.short == "pad")
        )
    return type(chosen) is Every


def _unlike_attention(op: Operation) -> str | None:
    """Why an operation is no softmax by a bilinear metric over a mask of sources."""
    if type(op.kernel) is not Sum:
        return f"the kernel is {type(op.kernel).__name__}, not Sum"
    if type(op.weighting) is not Softmax:
        return f"weights are {type(op.weighting).__name__}, not Softmax"
    if not by_mask(op.candidates):
        return f"candidates of {type(op.candidates).__name__} are named by index"
    return "the metric is not bilinear" if op.product is None else None


class Attention(Rule):
    """``F.scaled_dot_product_attention``.

    With ``d(i, j) = a_i + b_j - scale <q_i, k_j>``, softmax over j forgets ``a_i``, and ``b_j``
    becomes one more channel: queries get a 1, keys get ``-b_j / scale``. So mixtures of positions
    and features run as one attention call, too. Torch's fused kernels have no second derivative;
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` or ``backend="gather"`` has.
    """

    name = "attention"
    backend = "native"

    def refuses(self, op: Operation) -> str | None:
        """Needs softmax over all candidates of a bilinear metric, and a sum."""
        reason = _unlike_attention(op)
        if reason is None and not _keeps_all(op):
            return f"{type(op.selection).__name__} keeps part of the candidates"
        return reason

    def run(self, op: Operation) -> Tensor:
        """Attend."""
        plain = op.mask is None and op.source.mask is None and op.bias is None
        causal = plain and type(op.candidates) is Causal
        return _attend(op, None if causal else op.subset.mask, causal)


def _attend(op: Operation, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Over what a mask ``(..., n | 1, m)`` allows."""
    if op.bias is not None:
        bias = op.bias / op.weighting.temperature  # type: ignore[operator]
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return _by_torch(_form(op), op.value, op.weighting, mask, causal)  # type: ignore[arg-type]


def _form(op: Operation) -> BilinearForm:
    if op.product is None:
        raise TypeError("attention lowering needs a bilinear metric")
    return op.product


def _by_torch(
    form: BilinearForm,
    value: Tensor,
    weighting: Softmax,
    mask: Tensor | None,
    causal: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` by distances of this form; a mask may be of floats."""
    scale = form.scale / weighting.temperature
    q, k, dtype = form.q, form.k, value.dtype
    if form.b is not None:
        with full_precision(value.device):
            one = q.new_ones(()).expand(*q.shape[:-1], 1)
            q = torch.cat([q, one], -1)
            b = (form.b / -form.scale).unsqueeze(-1)
            k = torch.cat([k, b.expand(*k.shape[:-1], 1)], -1)
        dtype = q.dtype  # half precision would round b, which may be large, to whole units
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    dropout = weighting.dropout if weighting.training else 0.0
    q, k, v = _alike(q.to(dtype), k.to(dtype), value.to(dtype), mask)
    lead = q.shape[:-2]
    if len(lead) > 2:  # torch's fused attention takes two leading axes
        q, k, v = (tensor.flatten(0, -4) for tensor in (q, k, v))
        if mask is not None and mask.ndim > 3:
            mask = mask.expand(*lead, *mask.shape[-2:]).flatten(0, -4)
    if mask is not None and mask.ndim == 3 and q.ndim == 4:
        mask = mask.unsqueeze(0)  # of three axes it takes none
    with nullcontext() if form.b is None else full_precision(value.device):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
        )
    return out.reshape(*lead, *out.shape[-2:])[..., : value.shape[-1]].to(value.dtype)


class AttentionInClasses(Attention):
    """The same class by class, where points may choose those of their own class alone.

    Such are blocks, as Swin's windows are, and every ``stride``-th point. Points of a class are put
    side by side, so that nobody looks at pairs of two classes.
    """

    name = "block_attention"

    def refuses(self, op: Operation) -> str | None:
        """Needs blocks, or every ``stride``-th point, of one grid of pixels, and no other mask."""
        reason = super().refuses(op)
        if reason is not None:
            return reason
        if type(op.candidates) not in (Block, Congruent):
            return f"candidates are {type(op.candidates).__name__}, no classes of points"
        grid = op.source.grid
        if grid is None or op.target.grid != grid or grid != Grid(grid.size):
            return "targets and sources are not the pixels of one grid"
        if not all(isinstance(length, int) for length in grid.size):
            return "sizes are open, and how many classes there are follows from them"
        masks = (op.mask, op.bias, op.source.mask, op.target.mask)
        if any(mask is not None for mask in masks):
            return "a mask or a bias is of pairs of all classes"
        return None

    def run(self, op: Operation) -> Tensor:
        """Attend class by class."""
        candidates: Block | Congruent = op.candidates  # type: ignore[assignment]
        classes = candidates.classes(op.source.grid, op.value.device)  # type: ignore[arg-type]
        index = classes.index.flatten()

        def taken(tensor: Tensor, axis: int) -> Tensor:
            return tensor.index_select(axis, index).unflatten(axis, classes.index.shape)

        form = _form(op)
        form = replace(
            form,
            q=taken(form.q, -2),
            k=taken(form.k, -2),
            a=None,
            b=None if form.b is None else taken(form.b, -1),
        )
        mask = None if classes.mask is None else classes.mask.unsqueeze(-2)
        out = _by_torch(form, taken(op.value, -2), op.weighting, mask)  # type: ignore[arg-type]
        return out.flatten(-3, -2).index_select(-2, classes.place)


class MaskedAttention(Attention):
    """The same over a mask of the neighbours: of many among few, a mask is less than their copies.

    What is not chosen must be finite: to a product nothing is not the same as 0 times infinity.
    """

    name = "masked_attention"

    def refuses(self, op: Operation) -> str | None:
        """Needs more neighbours than are sought in C, of at most twelve times as many sources."""
        reason = _unlike_attention(op)
        if reason is not None:
            return reason
        if type(op.selection) is not KNearest or op.target.mask is not None:
            return "the neighbours are not the k nearest of each target"
        if over_candidates(op):
            return over_candidates(op)
        k, m = op.selection.k, op.source.num_points
        if k <= LARGEST_K:
            return f"k={k} is at most {LARGEST_K}, which are listed, not masked"
        if m > _SPARSE * k:
            return f"a mask of {m} sources is more than k={k} neighbours with their distances"
        if op.value.device.type != "cpu" or is_watched():
            return "whether all is finite is looked at on the CPU, where nobody traces"
        form = op.product
        if form is None or not all(all_finite(t) for t in (form.q, form.k, op.value)):
            return "not all features and values are finite"
        return None

    def run(self, op: Operation) -> Tensor:
        """Search, and attend to whom was found."""
        index, m = _chosen(op), op.source.num_points
        mask = index.new_zeros(*index.shape[:-1], m + 1, dtype=torch.bool)
        return _attend(op, mask.scatter_(-1, index, True)[..., :m].contiguous())


def _chosen(op: Operation) -> Tensor:
    """The neighbours ``(..., n, k)``, in any order, and the number of sources where there is none.

    Of the k nearest the order is left open: to settle it costs several times what attention does.
    """
    chosen, m = op.selection, op.source.num_points
    simply = simply_nearest(chosen) and by_rows_of_distances(op) and op.bias is None
    if type(chosen) is KNearest and simply:
        with torch.no_grad(), full_precision(op.value.device):
            query, k = op.query(), min(chosen.k, m)
            problem = Problem.of(op.bound, query.dtype)
            if problem is not None:
                hidden = Hidden(op.subset.mask)
                values, places = by_rows(problem, k, hidden, query.slab, any_order=True)
                return places.where(values != torch.inf, m)
    found = op.neighborhood()
    return found.index if found.mask is None else found.index.where(found.mask, m)


def _alike(q: Tensor, k: Tensor, value: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The same leading axes for each, and as many channels.

    Torch counts on leading axes that broadcast where it writes scores out, and to masks it does
    not broadcast them at all: a metric of positions alone knows of no batch. Channels are filled
    up by zeros: torch's fused attention takes no others, and on a GPU wants a multiple of eight.
    Without it the scores are written out, at three times the cost.
    """
    widths = {tensor.shape[-1] for tensor in (q, k, value)}
    width = max(widths) if len(widths) == 1 else -(-max(widths) // 8) * 8
    leading = broadcast_shapes(
        *(tensor.shape[:-2] for tensor in (q, k, value)), () if mask is None else mask.shape[:-2]
    )
    padded = (
        tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))
        for tensor in (q, k, value)
    )
    return [tensor.expand(*leading, *tensor.shape[-2:]) for tensor in padded]
