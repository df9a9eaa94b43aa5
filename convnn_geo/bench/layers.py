"""What layers cost, forward and backward, beside torch's and PyG's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import EdgeConv, PointTransformerConv

from convnn_geo import recipes
from convnn_geo.bench import inputs
from convnn_geo.bench.measure import percentiles, sample, watch_memory
from convnn_geo.bench.worker import CALLED, READY
from convnn_geo.extras import require
from convnn_geo.nn import ConvNN2d, ConvNNAttention
from convnn_geo.points import Points

NEIGHBORS = 9


@dataclass(frozen=True)
class Cell:
    """One layer on one input.

    Args:
        layer: its name.
        family: that it belongs to, one of :func:`families`.
        input: a name that :func:`inputs.points` knows.
        n: points an example.
        channels: in and out.
        batch: examples.
        device: where.
        seconds: that samples of forward take, and those with backward.
        seed: of the points and the weights.
    """

    layer: str
    family: str
    input: str = "random"
    n: int = 1024
    channels: int = 64
    batch: int = 1
    device: str = "cpu"
    seconds: float = 0.5
    seed: int = 0

    def no_larger(self, other: Cell) -> bool:
        """Whether this is the same layer on no more of the same input."""
        return (
            replace(self, n=other.n, channels=other.channels, batch=other.batch) == other
            and self.n <= other.n
            and self.channels <= other.channels
            and self.batch <= other.batch
        )


@dataclass(frozen=True)
class Result:
    """Seconds and MiB of a cell, forward alone and with backward; NaN where there are none.

    Args:
        cell: what was measured.
        note: why there is no result; empty where there is one.
    """

    cell: Cell
    note: str = ""
    forward: float = math.nan
    forward_p10: float = math.nan
    forward_p90: float = math.nan
    forward_memory: float = math.nan
    both: float = math.nan
    both_p10: float = math.nan
    both_p90: float = math.nan
    both_memory: float = math.nan


def families() -> list[str]:
    """Names of the families of layers.

    Example:
        >>> families()
        ['convolution', 'attention', 'edge convolution', 'point transformer']
    """
    return list(_FAMILIES)


def baseline(family: str) -> str:
    """The layer of a family that the others are compared with.

    Example:
        >>> baseline("convolution")
        'nn.Conv2d'
    """
    return next(iter(_FAMILIES[family]))


def cells(
    names: Sequence[str],
    sources: Sequence[str],
    n: Sequence[int],
    channels: Sequence[int],
    batch: Sequence[int],
    device: str = "cpu",
    seconds: float = 0.5,
) -> list[Cell]:
    """All combinations that inputs have points for, small ones first, layers side by side.

    Example:
        >>> [c.layer for c in cells(["convolution"], ["random"], [64], [8], [1])]
        ['nn.Conv2d', 'ConvNN2d', 'ConvNN2d, k = 9 by cosine']
    """
    grid = itertools.product(sorted(n), sorted(batch), sorted(channels), sources, names)
    return [
        Cell(layer, family, source, size, width, examples, device, seconds)
        for size, examples, width, source, family in grid
        if inputs.suits(source, size, width)
        for layer in _FAMILIES[family]
    ]


def measure(cell: Cell) -> Iterator[str | Result]:
    """Measure a cell, in the stages that :class:`Worker` asks for."""
    points = inputs.points(cell.input, cell.n, cell.channels, cell.batch, cell.seed)
    torch.manual_seed(cell.seed)
    forward, x = _FAMILIES[cell.family][cell.layer](points, cell.device)

    def alone() -> None:
        with torch.no_grad():
            forward(x)

    def both() -> None:
        forward(x.detach().requires_grad_()).sum().backward()

    yield READY
    with watch_memory(cell.device) as memory:
        alone()
    yield CALLED
    times = sample(alone, cell.seconds)
    both()  # makes room for the gradients of weights, which stay
    with watch_memory(cell.device) as more:
        both()
    yield Result(
        cell,
        "",
        *(*percentiles(times), memory.added),
        *(*percentiles(sample(both, cell.seconds)), more.added),
    )


Forward = Callable[[Tensor], Tensor]
Build = Callable[[Points, str], tuple[Forward, Tensor]]


def _on_image(
    build: Callable[[int], nn.Module], points: Points, device: str
) -> tuple[Forward, Tensor]:
    x = points.features.transpose(1, 2).unflatten(-1, inputs.sides(points.num_points))
    return build(x.shape[1]).to(device), x.contiguous().to(device)


def _on_tokens(
    build: Callable[[int, int], nn.Module], points: Points, device: str
) -> tuple[Forward, Tensor]:
    x = points.features.to(device)
    layer = build(x.shape[-1], 4 if x.shape[-1] % 4 == 0 else 1).to(device)
    return partial(_attend, layer), x


def _attend(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x, x, x, need_weights=False)[0]
    return out


class _Attention(nn.Module):
    """scaled_dot_product_attention between the projections that attention has."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, *others: Tensor, need_weights: bool = False) -> tuple[Tensor]:
        q, k, v = self.into(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)),)


def _on_cloud(
    build: Callable[[int, int], Callable[..., Tensor]], points: Points, device: str
) -> tuple[Forward, Tensor]:
    pos = points.position.expand(*points.features.shape[:2], -1).flatten(0, 1).to(device)
    b, n, channels = points.features.shape
    batch = torch.arange(b, device=device).repeat_interleave(n)
    layer = build(channels, pos.shape[-1])
    if isinstance(layer, nn.Module):
        layer = layer.to(device)
    return partial(_of_x, layer, pos, batch), points.features.flatten(0, 1).to(device)


def _of_x(layer: Callable[..., Tensor], pos: Tensor, batch: Tensor, x: Tensor) -> Tensor:
    return layer(x, pos, batch)


def _mlp(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(2 * channels, channels), nn.ReLU(), nn.Linear(channels, channels)
    )


def _pyg_edge_conv(channels: int, axes: int) -> nn.Module:
    return _OnGraph(EdgeConv(_mlp(channels)), by_feature=True)


def _pyg_transformer(channels: int, axes: int) -> nn.Module:
    return _OnGraph(PointTransformerConv(channels, channels, nn.Linear(axes, channels)))


class _OnGraph(nn.Module):
    """A PyG layer on the graph that torch_cluster builds in each forward, as DGCNN has it."""

    def __init__(self, layer: nn.Module, by_feature: bool = False) -> None:
        super().__init__()
        self.layer, self.by_feature = layer, by_feature
        self.knn_graph = require("torch_cluster", extra="cluster").knn_graph

    def forward(self, x: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        edges = self.knn_graph(x if self.by_feature else pos, NEIGHBORS, batch, loop=True)
        out: Tensor = self.layer(x, edges) if self.by_feature else self.layer(x, pos, edges)
        return out


_FAMILIES: Mapping[str, Mapping[str, Build]] = {
    "convolution": {
        "nn.Conv2d": partial(_on_image, lambda c: nn.Conv2d(c, c, 3, padding=1)),
        "ConvNN2d": partial(_on_image, lambda c: ConvNN2d(c, c, 3, padding=1)),
        "ConvNN2d, k = 9 by cosine": partial(
            _on_image, lambda c: ConvNN2d(c, c, k=NEIGHBORS, metric="cosine")
        ),
    },
    "attention": {
        "scaled_dot_product_attention": partial(_on_tokens, _Attention),
        "nn.MultiheadAttention": partial(
            _on_tokens, lambda c, heads: nn.MultiheadAttention(c, heads, batch_first=True)
        ),
        "ConvNNAttention": partial(_on_tokens, ConvNNAttention),
        "ConvNNAttention, k = 9": partial(
            _on_tokens, lambda c, heads: ConvNNAttention(c, heads, k=NEIGHBORS)
        ),
    },
    "edge convolution": {
        "PyG EdgeConv": partial(_on_cloud, _pyg_edge_conv),
        "dynamic_edge_conv": partial(
            _on_cloud, lambda c, axes: recipes.dynamic_edge_conv(c, c, NEIGHBORS, _mlp(c))
        ),
    },
    "point transformer": {
        "PyG PointTransformerConv": partial(_on_cloud, _pyg_transformer),
        "point_transformer": partial(
            _on_cloud, lambda c, axes: recipes.point_transformer(c, c, NEIGHBORS, axes=axes)
        ),
    },
}
"""The first of each family is what the others are compared with."""
