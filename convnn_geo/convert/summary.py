"""What a converted model consists of: a line a layer, with parameters, FLOPs and lowerings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from convnn_geo.checks import check_instance
from convnn_geo.convert.flops import counted
from convnn_geo.convert.known import is_ours, kind, places
from convnn_geo.lowering import choose
from convnn_geo.nn import ConvNNAttention
from convnn_geo.nn.taps import TapLayer


@dataclass(frozen=True)
class Line:
    """A layer of a report.

    Args:
        name: in the model.
        was: class of the layer that was replaced; empty where none was.
        now: class of the layer that is there.
        parameters: numbers in it.
        flops: of the run; None without inputs.
        lowering: how it ran; None without inputs.
        left: why the last conversion left it as it is; empty where it did not, or was not asked to.
    """

    name: str
    was: str
    now: str
    parameters: int
    flops: int | None = None
    lowering: str | None = None
    left: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`report` found; ``print`` shows a table.

    Args:
        lines: a line a layer that was converted, or could be.
        other_parameters: numbers in all other layers.
        other_flops: of all other layers; None without inputs.
    """

    lines: tuple[Line, ...]
    other_parameters: int
    other_flops: int | None = None

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return self.other_parameters + sum(line.parameters for line in self.lines)

    @property
    def left(self) -> dict[str, str]:
        """Layers that the last conversion left as they are, by name, and why."""
        return {line.name: line.left for line in self.lines if line.left}

    @property
    def flops(self) -> int | None:
        """Of the run; None without inputs."""
        if self.other_flops is None:
            return None
        return self.other_flops + sum(line.flops or 0 for line in self.lines)

    def __str__(self) -> str:
        rows = [("layer", "was", "is", "parameters", "FLOPs", "lowering")]
        for line in self.lines:
            run = (_short(line.flops), line.lowering or "")
            rows.append((line.name, line.was, line.now, f"{line.parameters:,}", *run))
        others = f"{self.other_parameters:,}", _short(self.other_flops), ""
        rows.append(("other layers", "", "", *others))
        rows.append(("total", "", "", f"{self.parameters:,}", _short(self.flops), ""))
        used = range(len(rows[0]) if self.flops is not None else 4)
        widths = [max(len(row[place]) for row in rows) for place in used]
        table = [
            "  ".join(
                row[place].rjust(widths[place])
                if place in (3, 4)
                else row[place].ljust(widths[place])
                for place in used
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*table, *(f"left {name}: {why}" for name, why in self.left.items())])


def report(model: nn.Module, *inputs: Any, **options: Any) -> Report:
    """What a model consists of, layer by layer.

    FLOPs are two a multiply-add, of one run in eval mode on the inputs, whichever lowering runs.
    Those of torch's layers, and of ``NeighborConv``, are what ``torch.utils.flop_counter`` counts:
    products of matrices, convolutions and attention. Of ours the search for neighbours by features,
    the kernel, its weights and the projections of attention are counted from shapes; encodings and
    the networks of metrics, weightings and kernels as torch counts them. Left out are the search by
    positions alone, additions that belong to no product, softmax and other functions of a number,
    and comparisons: the choice of the k nearest, sorting, maxima.

    Args:
        model: any torch model, converted or not.
        *inputs: of its forward; without them neither FLOPs nor lowerings are known.
        **options: of its forward, by name.

    Example:
        >>> from convnn_geo import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 2))
        >>> print(convert.report(convert.to_convnn(model), torch.zeros(1, 3, 4, 4)))
        layer         was     is        parameters   FLOPs  lowering
        0             Conv2d  ConvNN2d         224   6.91k  convolution
        other layers                           258     512
        total                                  482   7.42k
    """
    check_instance("model", model, nn.Module)
    for value in inputs:
        if isinstance(value, (tuple, torch.Size)) and all(isinstance(n, int) for n in value):
            raise TypeError(f"inputs: expected tensors, got a shape; pass torch.randn{value}")
    found = places(model, lambda layer: kind(layer) is not None or is_ours(layer))
    layers = {names[0]: layer for layer, names in found}
    meter = _Meter(layers)
    run = bool(inputs or options)
    if run:
        meter.run(model, inputs, options)
    counted: set[int] = set()
    lines = []
    for name, layer in layers.items():
        flops = meter.flops.get(name, 0) if run else None
        lowering = " + ".join(dict.fromkeys(meter.rules.get(name, ()))) or "torch"
        lines.append(
            Line(
                name=name,
                was=getattr(layer, "converted_from", ""),
                now=type(layer).__name__,
                parameters=_numbers(layer, counted),
                flops=flops,
                lowering=lowering if run else None,
                left=getattr(layer, "left_because", ""),
            )
        )
    rest = meter.total - sum(line.flops or 0 for line in lines) if run else None
    return Report(tuple(lines), _numbers(model, counted), rest)


@dataclass
class _Meter:
    """FLOPs and lowerings of one run, layer by layer."""

    layers: dict[str, nn.Module]
    flops: dict[str, int] = field(default_factory=dict)
    rules: dict[str, list[str]] = field(default_factory=dict)
    total: int = 0

    def run(self, model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Run the model once, watched; nothing in it changes."""
        self._inside: list[str] = []
        self._starts: list[int] = []
        self._correction = 0
        handles = []
        for name, layer in self.layers.items():
            handles += self._watch(name, layer)
        try:
            with _quietly(model), FlopCounterMode(display=False) as counter:
                self._counter = counter
                model(*inputs, **options)
                self.total = self._now()
        finally:
            for handle in handles:
                handle.remove()

    def _now(self) -> int:
        return self._counter.get_total_flops() + self._correction

    def _watch(self, name: str, layer: nn.Module) -> list[Any]:
        def enter(*_: Any) -> None:
            self._inside.append(name)
            self._starts.append(self._now())

        def leave(*_: Any) -> None:
            self._inside.pop()
            self.flops[name] = self.flops.get(name, 0) + self._now() - self._starts.pop()

        handles: list[Any] = [layer.register_forward_pre_hook(enter, prepend=True)]
        for part in layer.modules():
            if isinstance(part, (TapLayer, ConvNNAttention)):
                handles += self._watch_ours(part)
        return [*handles, layer.register_forward_hook(leave)]

    def _watch_ours(self, part: nn.Module) -> list[Any]:
        """In the place of what torch counts inside a layer of ours goes what its shapes say."""

        def enter(*_: Any) -> None:
            self._starts.append(self._now())

        def leave(part: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            op, flops = counted(part, *args, **kwargs)
            rule, _ = choose(op, part.backend)  # type: ignore[arg-type]
            self.rules.setdefault(self._inside[-1], []).append(rule.name)
            self._correction += self._starts.pop() + flops - self._now()

        return [
            part.register_forward_pre_hook(enter),
            part.register_forward_hook(leave, with_kwargs=True),
        ]


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient, by kernels that torch's counter knows; undone afterwards.

    The counter asks what needs a gradient for where it came from, which nothing says without one.
    """
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        for parameter in learns:
            parameter.requires_grad_(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in learns:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


def _numbers(module: nn.Module, counted: set[int]) -> int:
    """Numbers in parameters that were not counted yet."""
    fresh = {id(p): p for p in module.parameters() if id(p) not in counted}
    counted.update(fresh)
    return sum(p.numel() for p in fresh.values())


def _short(flops: int | None) -> str:
    """``1.81G`` for 1,814,073,344."""
    if flops is None:
        return ""
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if flops >= unit:
            return f"{flops / unit:.2f}{name}"
    return str(flops)
