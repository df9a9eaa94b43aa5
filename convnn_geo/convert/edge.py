"""What PyG's DynamicEdgeConv may become."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convnn_geo.convert.weights import NotApplicable
from convnn_geo.kernels import EdgeMLP
from convnn_geo.nn import PointConvNN
from convnn_geo.operation import Operation

_REDUCE = {"max": "max", "mean": "mean", "add": "sum", "sum": "sum"}


class DynamicEdgeConvNN(nn.Module):
    """Our layer with the forward of PyG's ``DynamicEdgeConv``.

    Args:
        convolution: the layer, over features.

    Shapes:
        - **x:** :math:`(N, c)`, or a pair of sources and targets
        - **batch:** :math:`(N)`, sorted, or a pair
        - **output:** :math:`(N, d)`, a row a target
    """

    def __init__(self, convolution: PointConvNN) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor | tuple[Tensor, Tensor], batch: Any = None) -> Tensor:
        """Build the graph from the features and convolve."""
        return self.convolution(x, batch=batch)

    def operation(self, x: Tensor | tuple[Tensor, Tensor], batch: Any = None) -> Operation:
        """The layer on these clouds, as an operation."""
        return self.convolution.operation(x, batch=batch)


def edge(layer: Any, k: int | None = None, metric: Any = "euclidean", **options: Any) -> nn.Module:
    """The same network on the edges to the ``k`` nearest."""
    if not isinstance(layer.aggr, str) or layer.aggr not in _REDUCE:
        raise NotApplicable(f"its aggr is {layer.aggr!r}; expected one of: {', '.join(_REDUCE)}")
    kernel = EdgeMLP(layer.nn, reduce=_REDUCE[layer.aggr])
    channels = _sizes(layer.nn, ("in_features", "in_channels"))
    outs = _sizes(layer.nn, ("out_features", "out_channels"))
    if not channels or channels[0] <= 0 or not outs:
        raise NotApplicable("its network does not say how many channels it takes")
    chosen = {"short": "pad", **options}  # small clouds give fewer neighbours, as in PyG
    k = layer.k if k is None else k
    return DynamicEdgeConvNN(PointConvNN(channels[0] // 2, outs[-1], k, metric, kernel, **chosen))


def exact(layer: Any) -> nn.Module:
    """The same layer with the same network."""
    return edge(layer)


def _sizes(network: nn.Module, names: tuple[str, ...]) -> list[int]:
    """Channels that the network's layers name, in order."""
    found = (getattr(part, name, None) for part in network.modules() for name in names)
    return [number for number in found if isinstance(number, int)]
