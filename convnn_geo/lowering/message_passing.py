"""The operator on edges, by PyG's message passing: the semantics that all else must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from convnn_geo.kernels import Kernel
from convnn_geo.lowering.rules import Aggregation
from convnn_geo.operation import Operation
from convnn_geo.pairs import EdgePairs, Pairs
from convnn_geo.shapes import broadcast_shapes


class EdgeAggregation(MessagePassing):
    """A kernel as PyG message passing: ``message = rho_ij * x_j`` into slot ``(i, rank)``."""

    def __init__(self) -> None:
        super().__init__(aggr=None)

    def forward(
        self,
        kernel: Kernel,
        x: tuple[Tensor, Tensor | None],
        edge_index: Tensor,
        rank: Tensor,
        weight: Tensor | None,
        pos: tuple[Tensor, Tensor] | None,
        shape: tuple[int, ...],
        k: int,
    ) -> Tensor:
        """Messages of sources ``x[0] (M, c)`` to targets of leading shape ``(..., n)``."""
        size = (x[0].shape[0], math.prod(shape))
        target = x[1] if kernel.needs_target else None
        out = self.propagate(
            edge_index,
            kernel=kernel,
            x=(x[0], target),
            pos=pos,
            weight=weight,
            rank=rank,
            shape=shape,
            k=k,
            size=size,
        )
        own = None if x[1] is None else x[1].view(*shape, -1)
        return kernel.finish(out, own)

    def message(
        self,
        x_i: Tensor | None,
        x_j: Tensor,
        pos_i: Tensor | None,
        pos_j: Tensor | None,
        weight: Tensor | None,
        kernel: Kernel,
    ) -> Tensor:
        """What a source sends along an edge."""
        offset = None if pos_i is None or pos_j is None else pos_j - pos_i
        message = kernel.message(EdgePairs(x_i, x_j, offset))
        if weight is None:
            return message
        return message * (weight if weight.ndim == message.ndim else weight.unsqueeze(-1))

    def aggregate(
        self,
        inputs: Tensor,
        index: Tensor,
        rank: Tensor,
        shape: tuple[int, ...],
        k: int,
        kernel: Kernel,
    ) -> Tensor:
        """What a target makes of its messages."""
        if kernel.knows("scatter"):
            return kernel.scatter(inputs, index, rank, shape, k)
        return Kernel.scatter(kernel, inputs, index, rank, shape, k)


_EDGES = EdgeAggregation()


class MessagePassingRule(Aggregation):
    """Neighbours as edges of disjoint graphs, one an example."""

    name = "message_passing"
    backend = "message_passing"

    def aggregate(self, op: Operation, pairs: Pairs, weight: Tensor | None) -> Tensor:
        """Turn the neighbourhood into edges, and propagate."""
        lead = broadcast_shapes(
            pairs.value.shape[:-2],
            pairs.neighborhood.index.shape[:-2],
            () if pairs.mask is None else pairs.mask.shape[:-2],
        )
        hood = pairs.neighborhood.expand(*lead)
        n, k = hood.num_targets, hood.k
        edge_index, rank, slot = hood.edges()
        if weight is not None:
            per_channel = weight.ndim == pairs.value.ndim + 1
            trailing = weight.shape[-3:] if per_channel else weight.shape[-2:]
            weight = weight.expand(*lead, *trailing)
            weight = weight.flatten(0, -2 if per_channel else -1)[slot]
        pos = None
        if op.kernel.needs_offset:
            pos = (_rows(op.source.position, lead), _rows(op.target.position, lead))
        target = None if op.target.x is None else _rows(op.target.x, lead)
        x = _rows(pairs.value, lead), target
        return _EDGES(op.kernel, x, edge_index, rank, weight, pos, (*lead, n), k)


def _rows(tensor: Tensor, lead: torch.Size) -> Tensor:
    return tensor.expand(*lead, *tensor.shape[-2:]).reshape(-1, tensor.shape[-1])
