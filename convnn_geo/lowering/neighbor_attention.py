"""Attention over the k nearest keys as one operator: no scores of size n m, no copies of keys.

What :class:`Gather` does in four steps (search, distances of the chosen pairs, softmax, product)
is done here a few rows at a time, in C; by torch where that is not served. Backward goes over the
chosen pairs alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo import compiled, gpu
from convnn_geo.kernels import Sum
from convnn_geo.lowering.attending import attend
from convnn_geo.lowering.attention import (
    by_mask,
    by_rows_of_distances,
    over_candidates,
    simply_nearest,
)
from convnn_geo.lowering.rules import Again, Rule
from convnn_geo.metrics import (
    Angular,
    Biased,
    BilinearForm,
    Differences,
    Feature,
    Interpolation,
    Metric,
)
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operation import Operation, show_nan
from convnn_geo.operators import directly, is_transformed
from convnn_geo.search.problem import Problem
from convnn_geo.selection import KNearest
from convnn_geo.shapes import broadcast_shapes
from convnn_geo.weighting import Softmax

_WIDEST = 2048
"""Bytes of a row, at most, of which backward holds several in shared memory."""


_Attended: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""The result, weights before dropout and places, and what dropout keeps."""


class _OneOperator(Rule):
    """A rule that searches, weighs and sums in one operator."""

    weighs = True

    @abstractmethod
    def _attended(self, op: Operation) -> _Attended:
        """Search, weigh and sum."""

    def run(self, op: Operation) -> Tensor:
        """Attend."""
        return self._attended(op)[0]

    def run_with_weights(
        self, op: Operation, search: str | None = None
    ) -> tuple[Tensor, Neighborhood, Tensor]:
        """Attend; of an operation that asks for weights."""
        out, weight, place, keep = self._attended(op)
        weight = weight if keep is None else weight * keep
        return out, Neighborhood(place.long(), op.source.num_points), weight.to(op.value.dtype)


class NeighborAttention(_OneOperator):
    """Search, softmax and sum in one pass over rows that stay in cache, on the CPU."""

    name = "neighbor_attention"
    backend = "compiled"

    def refuses(self, op: Operation) -> str | None:
        """Needs softmax over the k nearest by a dot product, a cosine or squared distances."""
        reason = _refuses(op)
        if reason is not None:
            return reason
        if op.value.device.type != "cpu":
            return f"the points are on {op.value.device}, not on the CPU"
        if not _is_one_form(_unbiased(op)):
            return "the metric is neither a dot product, nor cosine, nor squared distances"
        if torch.float64 in (op.value.dtype, _unbiased(op).dtype):
            return "values or distances are torch.float64"
        if not torch.compiler.is_compiling() and compiled.library() is None:
            return "there is no C compiler, or CONVNN_GEO_COMPILE is 0"
        return _over(op, compiled.LARGEST_K)

    def _attended(self, op: Operation) -> _Attended:
        problem = Problem.of(_unbiased(op), torch.float32)
        if problem is None:
            raise TypeError("neighbor_attention needs points or products")
        points = (problem.kind, problem.q, problem.keys)
        return _run(op, *points, problem.bias, problem.scale, "compiled")

    def again(self, op: Operation) -> Again | None:
        """Where features are what is multiplied."""
        problem = Problem.of(op.bound, torch.float32)
        if problem is None or problem.kind != "products":
            return None
        return _again(op, problem.q, problem.keys, problem.bias, problem.scale, "compiled")


class TritonAttention(_OneOperator):
    """The same by Triton: scores pass through registers; any bilinear metric, half precision."""

    name = "triton_attention"
    backend = "triton"

    def refuses(self, op: Operation) -> str | None:
        """Needs softmax over the k nearest by a bilinear metric, and a GPU."""
        reason = _refuses(op) or gpu.refuses(op.value.device)
        if reason is not None:
            return reason
        form = _form(op)
        if form is None:
            return "the metric is not bilinear"
        if op.value.dtype == torch.float64:
            return "values are torch.float64"
        width = max(form.q.shape[-1], op.value.shape[-1])
        if width * op.value.dtype.itemsize > _WIDEST:
            return f"heads of {width} channels are too wide to be held where backward needs them"
        if op.target.num_points * _filled(op) >= 2**31:
            return "a head has more pairs than 32 bits count"
        return _over(op, gpu.LARGEST_K)

    def _attended(self, op: Operation) -> _Attended:
        form = _form(op)
        if form is None:
            raise TypeError("triton_attention needs a bilinear metric")
        return _run(op, "products", form.q, form.k, form.b, form.scale, "triton")

    def again(self, op: Operation) -> Again | None:
        """Where features are what is multiplied."""
        form = _form(op)
        return None if form is None else _again(op, form.q, form.k, form.b, form.scale, "triton")


def _form(op: Operation) -> BilinearForm | None:
    """Distances as one product: of the features themselves where the metric is just that.

    Products of halves are exact in float32, so tensor cores give its distances.
    """
    metric: Metric | None = op.metric
    while isinstance(metric, Interpolation):
        metric = metric.end
    if type(metric) is not Feature or metric.kind not in ("dot", "scaled_dot"):
        return op.product
    q, keys = op.target.features, op.source.features
    plain = metric.query is None and metric.key is None and q.dtype == keys.dtype
    if not plain or q.dtype != op.value.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return op.product
    return BilinearForm(q, keys, scale=1.0 if metric.kind == "dot" else q.shape[-1] ** -0.5)


def _run(
    op: Operation,
    kind: str,
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    scale: float,
    engine: str,
) -> _Attended:
    weighting: Softmax = op.weighting  # type: ignore[assignment]
    k = _filled(op)
    keep, mask = None, op.subset.mask
    if weighting.training and weighting.dropout:  # of weights in the shape that gather has them
        pairs = [t.shape[:-2] for t in (q, keys, mask, op.bias) if t is not None]
        lead = broadcast_shapes(*pairs)
        ones = op.value.new_ones(*lead, q.shape[-2], k, dtype=torch.float32)
        keep = F.dropout(ones, weighting.dropout)
    less = None if op.bias is None else op.bias.to(torch.float32)
    inputs = [t for t in (q, keys, op.value, bias, less) if t is not None]
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    out, weight, place = attend(
        *(kind, q, keys, op.value, bias, mask, keep, k),
        *(float(scale), float(weighting.temperature), engine, trains or op.with_weights, less),
    )
    # Of queries that are not finite the operators make NaN by themselves; in Triton unless a mask
    # hides all keys from them, and where the metric looks at the features.
    shown = engine == "compiled" or (mask is None and q is op.target.x)
    out = out if shown and op.target.pos is None else show_nan(out, op)
    return out, weight, place, keep


def _again(
    op: Operation, q: Tensor, keys: Tensor, bias: Tensor | None, scale: float, engine: str
) -> Again | None:
    """:meth:`Rule.again` where products of features, and softmax of these, are all there is."""
    weighting: Softmax = op.weighting  # type: ignore[assignment]
    plain = q is op.target.x and keys is op.source.x and op.subset.mask is None
    plain = plain and bias is None and op.bias is None
    positions = op.target.pos is not None or op.source.pos is not None
    if not plain or positions or weighting.dropout:
        return None
    k, options = _filled(op), (float(scale), float(weighting.temperature), engine)
    alone = _alone() if engine == "triton" else None

    def run(q: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        learns = q.requires_grad or keys.requires_grad or value.requires_grad
        trains = learns and torch.is_grad_enabled()
        if alone is not None and not trains:
            return directly(alone, q, keys, value, k, *options[:2])
        return attend("products", q, keys, value, *[None] * 3, k, *options, trains, None)[0]

    return run


def _alone() -> Callable[..., Tensor]:
    from convnn_geo.gpu import attention  # imports triton

    return attention.alone


def _filled(op: Operation) -> int:
    """Slots of a target that can hold a neighbour."""
    selection: KNearest = op.selection  # type: ignore[assignment]
    return min(selection.k, op.source.num_points)


def _over(op: Operation, limit: int) -> str | None:
    k = _filled(op)
    return None if k <= limit else f"k={k} is over {limit}"


def _refuses(op: Operation) -> str | None:
    """Why an operation is no attention over the k nearest that runs as one operator."""
    chosen = op.selection
    if type(op.kernel) is not Sum:
        return f"the kernel is {type(op.kernel).__name__}, not Sum"
    if type(op.weighting) is not Softmax:
        return f"weights are {type(op.weighting).__name__}, not Softmax"
    if type(chosen) is not KNearest or not simply_nearest(chosen):
        return "neighbours are not simply the k nearest"
    if not by_mask(op.candidates) or op.target.mask is not None:
        return f"candidates of {type(op.candidates).__name__} are no mask over all sources"
    if not by_rows_of_distances(op):
        return f"search={op.search!r} was asked for"
    if is_transformed():
        return "torch.func and forward-mode gradients go by gather"
    return over_candidates(op)


def _unbiased(op: Operation) -> Any:
    """Distances, without what is added to scores."""
    return op.bound.inner if isinstance(op.bound, Biased) else op.bound


def _is_one_form(bound: Any) -> bool:
    """Whether distances are those that :class:`Problem` compares, but for a constant a row."""
    if isinstance(bound, Differences):
        return bound.p == 2 and not bound.root and bound.scale is None and bound.wide
    if isinstance(bound, Angular):
        return bound.wide
    return isinstance(bound, BilinearForm) and bound.precision is None
