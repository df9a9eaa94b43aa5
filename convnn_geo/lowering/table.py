"""The table of rules, in the order in which they are tried."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from convnn_geo import gpu
from convnn_geo.checks import check_name
from convnn_geo.lowering.attention import Attention, AttentionInClasses, MaskedAttention
from convnn_geo.lowering.convolution import Convolution, Pooling
from convnn_geo.lowering.message_passing import MessagePassingRule
from convnn_geo.lowering.neighbor_attention import NeighborAttention, TritonAttention
from convnn_geo.lowering.rules import (
    Aggregation,
    Gather,
    Rule,
    TritonTaps,
    triton_search,
)
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operation import Operation
from convnn_geo.search.registry import explain_query
from convnn_geo.selection import Given
from convnn_geo.typing import BACKENDS

RULES: tuple[Rule, ...] = (
    Convolution(),
    Pooling(),
    AttentionInClasses(),
    Attention(),
    NeighborAttention(),
    TritonAttention(),
    MaskedAttention(),
    Gather(),
    MessagePassingRule(),
    TritonTaps(),
)
"""``gather`` ends the search of ``"auto"``: what comes after it runs when asked for."""

_WIDTH = max(len(rule.name) for rule in RULES)


def choose(op: Operation, backend: str = "auto") -> tuple[Rule, list[tuple[Rule, str]]]:
    """The rule that runs an operation, and the reason of each that does not."""
    check_name("backend", backend, BACKENDS)
    passed: list[tuple[Rule, str]] = []
    other = f"backend={backend!r} was asked for"
    for rule in RULES:
        if op.with_weights and not rule.weighs:
            passed.append((rule, "weights are asked for, too (need_weights=False asks for none)"))
            continue
        if backend not in ("auto", rule.backend):
            passed.append((rule, other))
            continue
        reason = rule.refuses(op)
        if reason is None:
            return rule, passed
        passed.append((rule, reason))
    if op.with_weights and (backend != "triton" or gpu.refuses(op.value.device) is None):
        # Whatever searches, somebody must weigh and sum.
        return next((rule, passed) for rule in RULES if rule.name == Gather.name)
    reasons = "; ".join(f"{rule.name}: {why}" for rule, why in passed if rule.backend == backend)
    raise ValueError(
        f"backend={backend!r} can't run this layer: {reasons}. Use backend='auto', which takes "
        "whatever can"
    )


def run(op: Operation, backend: str = "auto") -> Tensor:
    """Run an operation by the first rule that can: ``(..., n, d)``."""
    rule, _ = choose(op, backend)
    return rule.run(op)


def run_with_weights(
    op: Operation, backend: str = "auto"
) -> tuple[Tensor, Neighborhood, Tensor | None]:
    """The same by a rule that has the weights at hand: the result, who was chosen, the weights."""
    rule, _ = choose(op, backend)
    return rule.run_with_weights(op, triton_search(op) if backend == "triton" else None)


def explain(layer: Any, *args: Any, **kwargs: Any) -> str:
    """Which rule runs a layer on this input, and why the faster ones refuse.

    Example:
        >>> import torch
        >>> from convnn_geo import lowering, recipes
        >>> layer = recipes.feature_conv2d(3, 8, k=9, metric="cosine")
        >>> print(lowering.explain(layer, torch.zeros(1, 3, 6, 6)))
        ConvNN2d runs by: gather
          convolution        refused: candidates are All, not a Window
          pooling            refused: the kernel is Taps, neither Mean nor Max
          block_attention    refused: the kernel is Taps, not Sum
          attention          refused: the kernel is Taps, not Sum
          neighbor_attention refused: the kernel is Taps, not Sum
          triton_attention   refused: the kernel is Taps, not Sum
          masked_attention   refused: the kernel is Taps, not Sum
          search             ... (grid: the metric looks at more than positions...)
    """
    name = type(layer).__name__
    branches = getattr(layer, "branches", None)
    if branches is not None:
        parts = [_explain_part(branch, *args, **kwargs) for branch in branches]
        return "\n".join([f"{name} runs its branches:", *parts])
    if isinstance(layer, MessagePassing):
        return f"{name} runs by: message_passing (torch_geometric's propagate)"
    if not hasattr(layer, "operation"):
        raise TypeError(
            f"explain: expected a layer of convnn_geo.nn, got {name}; "
            "for a model, explain its layers one by one"
        )
    op = operation_of(layer, *args, **kwargs)
    backends = (getattr(part, "backend", None) for part in layer.modules())  # also of what it wraps
    backend = next((name for name in backends if isinstance(name, str)), "auto")
    rule, passed = choose(op, backend)
    lines = [f"{name} runs by: {rule.name}"]
    lines += [f"  {other.name:<{_WIDTH}} refused: {reason}" for other, reason in passed]
    lines += _search_line(op, rule, backend)
    return "\n".join(lines)


def operation_of(layer: Any, *args: Any, **kwargs: Any) -> Operation:
    """The operation that a layer's ``forward`` would run for these arguments."""
    bound = inspect.signature(layer.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    takes = inspect.signature(layer.operation).parameters
    op: Operation = layer.operation(**{k: v for k, v in bound.arguments.items() if k in takes})
    return op


def _explain_part(branch: nn.Module, *args: Any, **kwargs: Any) -> str:
    ours = hasattr(branch, "operation") or hasattr(branch, "branches")
    text = explain(branch, *args, **kwargs) if ours else f"{type(branch).__name__}: as it is"
    return textwrap.indent(text, "  ")


def _search_line(op: Operation, rule: Rule, backend: str) -> list[str]:
    if not isinstance(rule, Aggregation) or op.whole:
        return []
    if isinstance(op.selection, Given):
        return [f"  {'search':<{_WIDTH}} none: neighbours are those of {op.selection.origin}"]
    query = op.selection.asked(op.query(), op.own())
    if query is None:
        return []
    if op.search != "auto":
        return [f"  {'search':<{_WIDTH}} {op.search} (asked for)"]
    search = triton_search(op) if backend == "triton" else rule.search(op)
    if search != "auto":
        return [f"  {'search':<{_WIDTH}} {search} (as backend={backend!r} has it)"]
    *passed, (chosen, _) = explain_query(query)
    names: dict[str, list[str]] = {}
    for name, reason in passed:
        names.setdefault(str(reason), []).append(name)
    reasons = "; ".join(f"{', '.join(who)}: {reason}" for reason, who in names.items())
    return [f"  {'search':<{_WIDTH}} {chosen}" + (f" ({reasons})" if reasons else "")]
