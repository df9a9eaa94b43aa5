"""Every layer in its modes, in one form: what the contract suites run over.

A case's tensors and its output have the batch as their first axis, whatever the layer takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convnn_geo import metrics
from convnn_geo.candidates import Random
from convnn_geo.nn import (
    Branching,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    ConvNNAttention,
    NeighborConv,
    PointConvNN,
)

SLOW = ("gather", "message_passing")
ALL = ("native", *SLOW)


@dataclass(frozen=True)
class Case:
    """A layer in one mode.

    Args:
        name: for the test's id.
        make: builds the layer, from ``backend=`` and further options.
        inputs: floating-point inputs from a batch size and a size variant, 0 or 1.
        call: applies the layer.
        backends: that can run it, besides ``"auto"``; none where the layer takes no backend.
        points: candidates that a point of variant 0 has.
        vary: makes the layer of k neighbours, where the mode has a k; for k = 1 and k = n.
    """

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    call: Callable[..., Tensor]
    backends: tuple[str, ...]
    points: int
    vary: Callable[[int], nn.Module] | None = None

    def layer(
        self, backend: str = "auto", seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> Any:
        """The layer with reproducible parameters."""
        torch.manual_seed(seed)
        options = {"backend": backend} if self.backends else {}
        return self.make(**options).to(dtype)

    def sample(self, batch: int = 2, variant: int = 0, seed: int = 1) -> tuple[Tensor, ...]:
        """Random float64 inputs."""
        torch.manual_seed(seed)
        return self.inputs(batch, variant)


def _image(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


SIZES = {
    1: ((7,), (5,)),
    2: ((4, 5), (5, 3)),
    3: ((2, 3, 4), (3, 2, 3)),
}
CLASSES = {1: ConvNN1d, 2: ConvNN2d, 3: ConvNN3d}


def _conv(name: str, axes: int, backends: tuple[str, ...], *args: Any, **options: Any) -> Case:
    n = torch.Size(SIZES[axes][0]).numel()

    def vary(k: int) -> nn.Module:
        return CLASSES[axes](4, 6, k=k, metric="cosine").double()

    return Case(
        f"conv{axes}d-{name}",
        lambda **more: CLASSES[axes](4, 6, *args, **options, **more),
        lambda b, variant: (torch.randn(b, 4, *SIZES[axes][variant], dtype=torch.float64),),
        _image,
        backends,
        n,
        vary if name == "feature" else None,
    )


def _attend(layer: nn.Module, x: Tensor, weights: bool = False) -> Tensor:
    return layer(x, x, x, need_weights=weights)[0]


def _attention(name: str, backends: tuple[str, ...], **options: Any) -> Case:
    return Case(
        f"attention-{name}",
        lambda **more: ConvNNAttention(8, 2, **options, **more),
        lambda b, variant: (torch.randn(b, (6, 9)[variant], 8, dtype=torch.float64),),
        _attend,
        backends,
        6,
        (lambda k: ConvNNAttention(8, 2, k=k).double()) if name == "k" else None,
    )


def _cloud(layer: nn.Module, x: Tensor, pos: Tensor) -> Tensor:
    b, n = x.shape[:2]
    batch = torch.arange(b).repeat_interleave(n)
    return layer(x.flatten(0, 1), pos.flatten(0, 1), batch).unflatten(0, (b, n))


def _point(name: str, **options: Any) -> Case:
    return Case(
        f"point-{name}",
        lambda **more: PointConvNN(4, 6, k=3, **options, **more),
        lambda b, variant: (
            torch.randn(b, (7, 5)[variant], 4, dtype=torch.float64),
            torch.randn(b, (7, 5)[variant], 3, dtype=torch.float64),
        ),
        _cloud,
        SLOW,
        7 - (options.get("self_point") == "excluded"),
        lambda k: PointConvNN(4, 6, k=k, **options).double(),
    )


def _graph(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """A ring: each point hears the three before it."""
    b, n = x.shape[:2]
    source = (torch.arange(n)[:, None] + torch.arange(3)) % n
    target = torch.arange(n)[:, None].expand(n, 3)
    ring = torch.stack([source.flatten(), target.flatten()])
    edges = torch.cat([ring[:, :0], *(ring + e * n for e in range(b))], 1)
    return layer(x.flatten(0, 1), edges, weight.flatten(0, 1)).unflatten(0, (b, n))


def _neighbor(name: str, **options: Any) -> Case:
    return Case(
        f"neighbor-{name}",
        lambda **more: NeighborConv(4, 6, k=3, **options, **more),
        lambda b, variant: (
            torch.randn(b, (7, 5)[variant], 4, dtype=torch.float64),
            torch.randn(b, 3 * (7, 5)[variant], dtype=torch.float64),
        ),
        _graph,
        (),
        7,
    )


def _mixed() -> metrics.Metric:
    return 0.3 * metrics.Spatial() + 0.7 * metrics.Feature("euclidean")


def _spread(axes: int) -> list[Case]:
    """The four modes of a layer over images."""
    return [
        _conv("window", axes, ALL, 3, stride=2, padding=1, groups=2),
        _conv("feature", axes, SLOW, k=4, metric="cosine"),
        _conv("window-k", axes, SLOW, 3, padding=1, k=2, metric="euclidean"),
        _conv("mixed", axes, SLOW, k=4, metric=_mixed()),
    ]


CASES: list[Case] = [
    *(case for axes in (1, 2, 3) for case in _spread(axes)),
    _conv("even", 2, ALL, 2, padding=1, dilation=2),
    _conv("softmax", 2, SLOW, k=4, metric=_mixed(), weighting="softmax"),
    _conv("separable", 2, SLOW, k=4, metric="cosine", kernel="separable"),
    _conv("strided", 2, SLOW, k=3, metric="cosine", stride=2, padding=1, groups=2),
    _attention("plain", ALL),
    _attention("k", SLOW, k=3),
    _attention("taps", SLOW, k=3, kernel="standard"),
    _attention("taps-depthwise", SLOW, k=3, kernel="depthwise", order="raster"),
    _attention("taps-separable", SLOW, k=3, kernel="separable", metric="cosine"),
    _attention("taps-per-head", SLOW, k=3, kernel="standard", taps_per_head=True),
    _point("static"),
    _point("dynamic", metric="euclidean", weighting="softmax", self_point="excluded"),
    _neighbor("rank"),
    _neighbor("mean", aggr="mean"),
    Case(
        "branching",
        lambda **more: Branching(4, 6, 3, ratio=0.5, k=4, metric="cosine", **more),
        lambda b, variant: (torch.randn(b, 4, *SIZES[2][variant], dtype=torch.float64),),
        _image,
        SLOW,
        20,
    ),
]
CASES.append(
    Case(
        "branching-pixels",
        lambda **more: Branching(
            4, 6, ratio=0.5, other="attention", num_heads=2, k=4, metric="cosine", **more
        ),
        lambda b, variant: (torch.randn(b, 4, *SIZES[2][variant], dtype=torch.float64),),
        _image,
        SLOW,
        20,
    )
)
NAMES = [case.name for case in CASES]

RANDOM_CASES: list[Case] = [
    _conv("random", 2, SLOW, k=3, metric="cosine", candidates=Random(5), self_point="first"),
    _attention("random", SLOW, k=2, candidates=Random(4), dropout=0.3),
    _attention("dropout", ALL, dropout=0.3),
    Case(
        "branching-random",
        lambda **more: Branching(4, 6, 3, k=3, metric="cosine", candidates=Random(5), **more),
        lambda b, variant: (torch.randn(b, 4, *SIZES[2][variant], dtype=torch.float64),),
        _image,
        SLOW,
        20,
    ),
]
