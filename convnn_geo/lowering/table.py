"""The table of rules, in the order in which they are tried."""

from __future__ import annotations

import textwrap
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from convnn_geo import gpu
from convnn_geo.checks import check_name
from convnn_geo.lowering.attention import Attention, MaskedAttention
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
from convnn_geo.operation import Operation
from convnn_geo.pairs import Pairs
from convnn_geo.typing import BACKENDS

RULES: tuple[Rule, ...] = (
    Convolution(),
    Pooling(),
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
        if backend not in ("auto", rule.backend):
            passed.append((rule, other))
            continue
        reason = rule.refuses(op)
        if reason is None:
            return rule, passed
        passed.append((rule, reason))
    reasons = "; ".join(f"{rule.name}: {why}" for rule, why in passed if rule.backend == backend)
    raise ValueError(
        f"backend={backend!r} can't run this layer: {reasons}. Use backend='auto', which falls "
        "back to 'gather'"
    )


def run(op: Operation, backend: str = "auto") -> Tensor:
    """Run an operation by the first rule that can: ``(..., n, d)``."""
    rule, _ = choose(op, backend)
    return rule.run(op)


def run_with_weights(op: Operation, backend: str = "auto") -> tuple[Tensor, Pairs, Tensor | None]:
    """The same by a rule that has the weights at hand: the result, the pairs, their weights.

    Fused attention has none with a gradient: ``"triton"`` then searches by Triton, and weighs and
    sums by gather.
    """
    if backend == "triton":
        reason = gpu.refuses(op.value.device)
        if reason is not None:
            raise ValueError(f"backend='triton' can't run this layer: {reason}")
        taps = TritonTaps()
        if taps.refuses(op) is None:
            return taps.run_with_weights(op)
        return Gather().run_with_weights(op, triton_search(op))
    wanted = "message_passing" if backend == "message_passing" else "gather"
    rule = next(r for r in RULES if isinstance(r, Aggregation) and r.backend == wanted)
    return rule.run_with_weights(op)


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
    op = layer.operation(*args, **kwargs)
    rule, passed = choose(op, getattr(layer, "backend", "auto"))
    lines = [f"{name} runs by: {rule.name}"]
    lines += [f"  {other.name:<{_WIDTH}} refused: {reason}" for other, reason in passed]
    lines += _search_line(op, rule)
    return "\n".join(lines)


def _explain_part(branch: nn.Module, *args: Any, **kwargs: Any) -> str:
    ours = hasattr(branch, "operation") or hasattr(branch, "branches")
    text = explain(branch, *args, **kwargs) if ours else f"{type(branch).__name__}: as it is"
    return textwrap.indent(text, "  ")


def _search_line(op: Operation, rule: Rule) -> list[str]:
    from convnn_geo.search.registry import explain_query

    if not isinstance(rule, Aggregation) or op.whole:
        return []
    if op.search != "auto":
        return [f"  {'search':<{_WIDTH}} {op.search} (asked for)"]
    search = rule.search(op)
    if search != "auto":
        return [f"  {'search':<{_WIDTH}} {search} (as backend={rule.backend!r} has it)"]
    *passed, (chosen, _) = explain_query(op.query())
    names: dict[str, list[str]] = {}
    for name, reason in passed:
        names.setdefault(str(reason), []).append(name)
    reasons = "; ".join(f"{', '.join(who)}: {reason}" for reason, who in names.items())
    return [f"  {'search':<{_WIDTH}} {chosen}" + (f" ({reasons})" if reasons else "")]
