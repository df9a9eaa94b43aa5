"""NeighborGraph: edges to the k nearest, by any metric and any engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.utils import to_undirected

from convnn_geo.checks import (
    check_finite,
    check_floating,
    check_int,
    check_limit,
    check_name,
    check_tensor,
)
from convnn_geo.metrics import Metric, Spatial, as_metric
from convnn_geo.points import Points
from convnn_geo.search import ENGINES, knn_graph
from convnn_geo.search.knn import SHORT
from convnn_geo.search.knn_graph import FLOWS
from convnn_geo.transforms.base import Transform

_DISTANCES = ("edge_weight", "edge_attr")


@functional_transform("neighbor_graph")
class NeighborGraph(Transform):
    r"""Edges from the k nearest points to each point, in ``data.edge_index`` (``neighbor_graph``).

    .. math:: \{(j, i) : j \in k\text{NN}(i)\}

    A superset of :class:`torch_geometric.transforms.KNNGraph` that needs no pyg-lib:
    ``NeighborGraph(k)`` makes the graph of ``KNNGraph(k)``, sorted by target, then distance, with
    ties to the lowest index. Clouds of a batch stay apart. Edges of an earlier graph are replaced.

    Positions are ``data.pos``, features ``data.x``, and the metric looks at what it is made for;
    where there is no ``data.x``, positions serve as features. So the graph of
    ``KNNGraph(k, cosine=True)`` is that of ``metric="cosine", features="pos"``.

    Args:
        k: neighbours.
        loop: whether a point may be its own neighbour.
        force_undirected: add the reverse of each edge; of two distances the smaller stays.
        flow: ``"source_to_target"``, or ``"target_to_source"`` for edges from each point to its
            neighbours.
        metric: a metric or its name.
        backend: an engine of :func:`convnn_geo.search.engines`, or ``"auto"``.
        features: the attribute that serves as features; ``data.x`` by default.
        max_distance: leave out neighbours farther than this.
        short: what becomes of a cloud with too few points for k neighbours: ``"error"``,
            ``"truncate"`` or ``"pad"`` as in :func:`convnn_geo.search.knn`. KNNGraph takes as many
            as there are, as ``"pad"`` does.
        distance: where distances go: ``"edge_weight"``, ``(E,)``, or ``"edge_attr"``, ``(E, 1)``.

    Shapes:
        - **pos:** :math:`(n, p)`
        - **x:** :math:`(n, c)`
        - **batch:** :math:`(n)`, sorted
        - **edge_index:** :math:`(2, E)`

    Raises:
        TypeError: no ``Data``, integer positions or features.
        ValueError: nothing to measure by, k < 1, a cloud with too few points, unknown names,
            features for a metric of positions, non-finite values, an unsorted batch.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> cloud = Data(pos=torch.tensor([[0.0], [1.0], [3.0]]))
        >>> data = NeighborGraph(k=1, distance="edge_weight")(cloud)
        >>> data.edge_index.tolist(), data.edge_weight.tolist()
        ([[1, 0, 1], [0, 1, 2]], [1.0, 1.0, 2.0])
    """

    def __init__(
        self,
        k: int = 6,
        loop: bool = False,
        force_undirected: bool = False,
        flow: str = "source_to_target",
        metric: Metric | str = "spatial",
        backend: str = "auto",
        *,
        features: str | None = None,
        max_distance: float | None = None,
        short: str = "error",
        distance: str | None = None,
    ) -> None:
        self.k = check_int("k", k)
        self.loop = loop
        self.force_undirected = force_undirected
        self.flow = check_name("flow", flow, FLOWS)
        self.metric = as_metric(metric)
        self.backend = check_name("search backend", backend, ["auto", *ENGINES])
        if features is not None and isinstance(self.metric, Spatial):
            raise ValueError(
                f"features={features!r}: {self.metric} looks at positions alone; leave features "
                "out, or choose a metric of features"
            )
        self.features = features
        if max_distance is not None:
            check_limit("max_distance", max_distance)
        self.max_distance = max_distance
        self.short = check_name("short", short, SHORT)
        if distance is not None:
            check_name("place for distances", distance, _DISTANCES)
        self.distance = distance

    def forward(self, data: Data) -> Data:
        """The data with its edges."""
        points = self._points(data)
        with torch.no_grad():  # data that is saved carries no graph of a learnable metric
            edges, distance = knn_graph(
                points,
                self.k,
                data.batch,
                self.loop,
                self.flow,
                self.metric,
                self.backend,
                max_distance=self.max_distance,
                short=self.short,
                return_distance=True,
                check=False,
            )
        edge_index = edges.as_tensor()
        if self.force_undirected:
            edge_index, distance = to_undirected(
                edge_index, distance, points.num_points, reduce="min"
            )
        for stale in _DISTANCES:
            if stale in data:
                del data[stale]
        data.edge_index = edge_index
        if self.distance is not None:
            data[self.distance] = distance if self.distance == "edge_weight" else distance[:, None]
        return data

    def _points(self, data: Data) -> Points:
        """What the metric is given; positions alone where it looks at nothing else."""
        if not isinstance(data, Data):
            raise TypeError(
                f"NeighborGraph: expected a Data, got {type(data).__name__}; of a HeteroData, give "
                "it the points of one type: Data(pos=data['point'].pos)"
            )
        pos = _rows(data, "pos")
        if isinstance(self.metric, Spatial):
            if pos is None:
                raise ValueError(
                    f"NeighborGraph: {self.metric} needs positions data.pos; got {data}"
                )
            return Points(pos=pos)
        name = self.features or "x"
        x = _rows(data, name)
        if x is None and (pos is None or self.features is not None):
            raise ValueError(f"NeighborGraph: {self.metric} needs features data.{name}; got {data}")
        return Points(pos if x is None else x, pos)


def _rows(data: Data, name: str) -> Tensor | None:
    """An attribute as rows ``(n, c)``; None where it lacks."""
    if name not in data:
        return None
    value: Any = check_tensor(f"data.{name}", data[name], (1, 2))
    check_floating(f"data.{name}", value)
    check_finite(f"data.{name}", value)
    return value.unsqueeze(-1) if value.ndim == 1 else value
