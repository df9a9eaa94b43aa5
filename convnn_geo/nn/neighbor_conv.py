"""NeighborConv: the operator as a PyG MessagePassing layer, on any graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.inits import reset

from convnn_geo.checks import (
    casts,
    check_alike,
    check_edges,
    check_floating,
    check_int,
    check_layer,
    check_tensor,
    check_values,
    looks_at_values,
)
from convnn_geo.kernels import Taps
from convnn_geo.neighborhood import Neighborhood, edge_rank
from convnn_geo.weighting import Ones, Weighting, as_weighting


class NeighborConv(MessagePassing):
    r"""Message passing with one weight matrix a neighbour: the semantics of ConvNN on graphs.

    .. math:: y_i = \sum_{j \in N(i)} W_{\mathrm{rank}(i, j)}\, \rho_{ij}\, x_j + b

    See https://arxiv.org/abs/2606.14725.

    Args:
        in_channels: channels of the sources; a tuple ``(source, target)`` for bipartite graphs,
            -1 to take them from the first input.
        out_channels: channels of the output.
        k: taps; edges of rank ``k`` and beyond are an error.
        groups: groups of channels; ``groups=heads`` keeps taps inside heads.
        heads: blocks of channels that edge weights ``(E, heads)`` weigh apart.
        bias: learn an additive bias.
        weighting: of given distances: ``"softmax"``, ``"gaussian"`` (of squared ones), ...
        aggr: ``"taps"``, or any PyG aggregation (``"mean"``, ``"max"``, ``["sum", "std"]``, an
            instance), after which one matrix takes the place of the taps.
        **kwargs: of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **x:** :math:`(n, c)`, or :math:`((m, c), (n, c'))` for bipartite graphs
        - **edge_index:** :math:`(2, E)`, a tensor or an ``EdgeIndex``
        - **edge_weight:** :math:`(E)`, :math:`(E, heads)` or :math:`(E, c)`
        - **rank:** :math:`(E)`, the tap of each edge; by distance where given, else by order of
          appearance among the edges of a target. Edges that share target and rank are added up;
          inside :func:`convnn_geo.checking` they are refused
        - **distance:** :math:`(E)`, for the weighting
        - **output:** :math:`(n, d)`

    Raises:
        ValueError: wrong shapes, channels, ranks, devices.
        TypeError: wrong dtypes.

    Example:
        >>> import torch
        >>> from convnn_geo.nn import NeighborConv
        >>> from convnn_geo.search import knn
        >>> x = torch.randn(10, 4)
        >>> edge_index, rank = knn(x, x, k=3).to_edge_index()
        >>> NeighborConv(4, 8, k=3)(x, edge_index, rank=rank).shape
        torch.Size([10, 8])
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        k: int,
        groups: int = 1,
        heads: int = 1,
        bias: bool = True,
        weighting: Weighting | str = "ones",
        aggr: Any = "taps",
        **kwargs: Any,
    ) -> None:
        self.by_rank = isinstance(aggr, str) and aggr == "taps"
        if aggr is None:
            raise ValueError("aggr: expected 'taps', or a name or module of PyG's, got None")
        if kwargs.get("decomposed_layers", 1) != 1:
            raise ValueError("decomposed_layers: the taps take all channels at once; leave it out")
        super().__init__(aggr=None if self.by_rank else aggr, **kwargs)
        self.in_channels = in_channels
        self.out_channels = check_int("out_channels", out_channels)
        self.k, self.groups = check_int("k", k), check_int("groups", groups)
        self.heads = check_int("heads", heads)
        self.weighting = as_weighting(weighting)
        if self.weighting.uses_offset:
            raise ValueError(
                f"NeighborConv: weights of {type(self.weighting).__name__} depend on positions, "
                "which edges do not have; compute them and pass edge_weight= to forward"
            )
        if isinstance(in_channels, tuple) and len(in_channels) != 2:
            raise ValueError(
                f"in_channels: expected a number or (source, target), got {in_channels}"
            )
        for channels in self._channels:
            if channels != -1:
                check_int("in_channels", channels)
        source = self._channels[0]
        if out_channels % groups:
            raise ValueError(f"groups={groups} must divide out_channels={out_channels}")
        self.weight: Any  # a parameter, uninitialized until the channels are known
        if source == -1:
            self.weight = UninitializedParameter()
        else:
            self.weight = nn.Parameter(torch.empty(self._shape(source)))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self._reset_taps()

    @property
    def _channels(self) -> tuple[int, int]:
        """Of sources and of targets, -1 for any."""
        given = self.in_channels
        return given if isinstance(given, tuple) else (given, -1)

    def _shape(self, channels: int) -> tuple[int, int, int]:
        for name, parts in (("groups", self.groups), ("heads", self.heads)):
            if channels % parts:
                raise ValueError(f"{name}={parts} must divide in_channels={channels}")
        if not self.by_rank:
            probe = self.aggr_module
            with torch.no_grad():
                index = torch.zeros(1, dtype=torch.long)
                out = probe(torch.zeros(1, channels), index, dim_size=1, dim=-2)
            channels = out.shape[-1]
        return (self.out_channels, channels // self.groups, self.k if self.by_rank else 1)

    def reset_parameters(self) -> None:
        """As :class:`torch.nn.Conv1d` does; a lazy layer waits for its first input."""
        super().reset_parameters()
        reset(self.weighting)
        self._reset_taps()

    def _reset_taps(self) -> None:
        """The layer's own parameters alone: its parts may be trained already."""
        if is_lazy(self.weight):
            return
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not is_lazy(self.weight):
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        self.weight, weight = None, self.weight  # it has no values to detach
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.weight = destination[prefix + "weight"] = weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "weight")
        if saved is not None and is_lazy(self.weight) and not is_lazy(saved):
            self.weight.materialize(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        rank: Tensor | None = None,
        distance: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Pass messages along ``edge_index``."""
        pair = x if isinstance(x, tuple) else (x, x)
        source = pair[0]
        rank, distance = _column("rank", rank), _column("distance", distance)
        self._check(*pair, edge_index, edge_weight, rank, distance)
        if distance is None and self.weighting.uses_distance:
            raise ValueError(
                f"NeighborConv: weights of {type(self.weighting).__name__} depend on distances; "
                "pass distance=, one number an edge"
            )
        if is_lazy(self.weight):
            dtype = self.weight.dtype if casts(source.device) else source.dtype
            self.weight.materialize(self._shape(source.shape[-1]), source.device, dtype)
            if self.bias is not None:
                self.bias.data = self.bias.data.to(source.device, dtype)
            self._reset_taps()
        if size is None:
            targets = source.shape[0] if pair[1] is None else pair[1].shape[0]
            size = (source.shape[0], targets)
            if self.flow == "target_to_source":
                size = (targets, source.shape[0])
        i, j = (1, 0) if self.flow == "source_to_target" else (0, 1)
        directed = edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index
        directed = directed if j == 0 else directed.flip(0)  # sources above targets
        _check_range(directed, size[j], size[i])
        if self.by_rank or distance is not None:
            rank = self._rank(directed, rank, distance)
        if distance is not None and rank is not None and self.weighting.uses_distance:
            weight = self._weights(directed, rank, distance, size[i], size[j], source)
            edge_weight = weight if edge_weight is None else _times(edge_weight, weight)
        out = self.propagate(edge_index, x=source, edge_weight=edge_weight, rank=rank, size=size)
        return out

    def _rank(self, edges: Tensor, rank: Tensor | None, distance: Tensor | None) -> Tensor:
        if rank is not None and self.by_rank and looks_at_values():
            _check_distinct(edges[1], rank)
        rank = edge_rank(edges, distance) if rank is None else rank
        if not self.by_rank or not rank.numel():
            return rank
        inside = (rank < self.k).all() & (rank >= 0).all()
        if rank.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(inside)  # no waiting for the device
        elif not bool(inside):
            raise ValueError(
                f"NeighborConv: ranks run from {int(rank.min())} to {int(rank.max())}, the layer's "
                f"k={self.k} taps from 0 to {self.k - 1}; raise k, drop edges, or pass rank="
            )
        return rank

    def _weights(
        self, edges: Tensor, rank: Tensor, distance: Tensor, n: int, m: int, source: Tensor
    ) -> Tensor | None:
        """The weighting on distances of edges, ``(E,)``."""
        k = self.k if self.by_rank else None
        hood = Neighborhood.from_edge_index(edges, n, m, rank, distance, k)
        weight = self.weighting(_Slots(hood, source))
        return None if weight is None else weight[edges[1], rank]

    def message(self, x_j: Tensor, edge_weight: Tensor | None) -> Tensor:
        """``rho_ij x_j``, head by head."""
        if edge_weight is None:
            return x_j
        return _times(x_j, edge_weight)

    def aggregate(
        self,
        inputs: Tensor,
        index: Tensor,
        rank: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
    ) -> Tensor:
        """Into slots ``(target, rank)`` and through all taps at once, or PyG's aggregation."""
        n = 0 if dim_size is None else dim_size
        if not self.by_rank or rank is None:
            out = super().aggregate(inputs, index, ptr=ptr, dim_size=dim_size)
            return Taps(self.weight, self.bias, self.groups).reduce(out.unsqueeze(-2), None)
        return Taps(self.weight, self.bias, self.groups).scatter(inputs, index, rank, (n,), self.k)

    def _check(self, x: Any, target: Any, edge_index: Any, *per_edge: Tensor | None) -> None:
        for name, rows, wanted in zip(
            ("x", "x (target)"), (x, target), self._channels, strict=True
        ):
            if rows is None and name != "x":
                continue
            check_floating(name, check_tensor(name, rows, 2))
            if wanted != -1 and rows.shape[-1] != wanted:  # which may be symbols: no set of both
                raise ValueError(
                    f"{name}: expected {wanted} channels, got shape {tuple(rows.shape)}"
                )
        check_edges(edge_index, x.device)
        if not is_lazy(self.weight):
            check_layer("x", x, self.weight)
        for name, value in zip(("edge_weight", "rank", "distance"), per_edge, strict=True):
            if value is None:
                continue
            check_tensor(name, value, (1, 2) if name == "edge_weight" else 1)
            if (value.dtype == torch.long) != (name == "rank"):
                kind = "dtype torch.int64" if name == "rank" else "a floating-point tensor"
                raise TypeError(f"{name}: expected {kind}, got {value.dtype}")
            if value.shape[0] != edge_index.shape[1]:
                raise ValueError(
                    f"{name}: expected one row an edge, got {value.shape[0]} for "
                    f"{edge_index.shape[1]} edges"
                )
            # What a product makes of both must be of the layer's dtype still.
            fits = torch.promote_types(value.dtype, x.dtype) == x.dtype
            if name == "edge_weight" and not (fits and value.device == x.device):
                check_alike("x", x, name, value)
        check_values("x", x, target)

    def __repr__(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, k={self.k}"]
        parts += [f"{n}={getattr(self, n)}" for n in ("groups", "heads") if getattr(self, n) != 1]
        parts += [] if self.bias is not None else ["bias=False"]
        parts += [] if self.by_rank else [f"aggr={self.aggr!r}"]
        if not isinstance(self.weighting, Ones):
            parts.append(f"weighting={self.weighting}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _check_range(edges: Tensor, sources: int, targets: int) -> None:
    """Raise where an edge leaves the graph; on the CPU only, where looking costs no waiting."""
    if edges.device.type != "cpu" or torch.compiler.is_compiling() or not edges.numel():
        return
    low, high = edges.amin(1).tolist(), edges.amax(1).tolist()
    for name, first, last, count in zip(
        ("sources", "targets"), low, high, (sources, targets), strict=True
    ):
        if first < 0 or last >= count:
            raise ValueError(
                f"edge_index: {name} are numbered from {first} to {last}, but there are {count}"
            )


def _check_distinct(target: Tensor, rank: Tensor) -> None:
    """Raise where two edges of one target have the same rank: one tap would see their sum."""
    met, count = torch.stack([target, rank]).unique(dim=1, return_counts=True)
    if bool((count > 1).any()):
        target, rank = met[:, count > 1][:, 0]
        raise ValueError(
            f"rank: {int(count.max())} edges of target {int(target)} have rank {int(rank)}; "
            "give each its own"
        )


def _column(name: str, value: Any) -> Any:
    """One number an edge ``(E,)``, also where it comes as attributes ``(E, 1)`` do."""
    if value is None or check_tensor(name, value).ndim != 2 or value.shape[1] != 1:
        return value
    return value.squeeze(1)


def is_lazy(weight: Tensor) -> bool:
    """Whether a layer still waits for its channels."""
    return isinstance(weight, UninitializedParameter)


@dataclass(frozen=True)
class _Slots:
    """What a weighting asks of pairs, for distances of edges put into slots ``(n, k)``."""

    neighborhood: Neighborhood
    value: Tensor

    @property
    def distance(self) -> Tensor:
        return self.neighborhood.distance  # type: ignore[return-value]

    @property
    def squared_distance(self) -> Tensor:
        return self.distance

    @property
    def similarity(self) -> Tensor:
        return -self.distance

    @property
    def mask(self) -> Tensor | None:
        return self.neighborhood.mask


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x (E, c)`` or ``(E,)`` by weights ``(E,)``, ``(E, heads)`` or ``(E, c)``."""
    if weight is None:
        return x
    if x.ndim == 1:
        return x * weight if weight.ndim == 1 else x[:, None] * weight
    if weight.ndim == 1:
        return x * weight[:, None]
    if x.shape[-1] % weight.shape[-1]:
        raise ValueError(
            f"edge_weight: {weight.shape[-1]} heads must divide {x.shape[-1]} channels"
        )
    return (x.unflatten(-1, (weight.shape[-1], -1)) * weight.unsqueeze(-1)).flatten(-2)
