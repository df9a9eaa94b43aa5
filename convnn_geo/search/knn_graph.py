"""search.knn_graph: the k-NN graph of a point set, in PyG's form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from convnn_geo.checks import check_floating, check_name, check_tensor
from convnn_geo.metrics import Metric, as_metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Points
from convnn_geo.search.knn import knn
from convnn_geo.search.ragged import part_of

FLOWS = ("source_to_target", "target_to_source")


def knn_graph(
    x: Tensor | Points,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    metric: Metric | str = "euclidean",
    backend: str = "auto",
    *,
    max_distance: float | None = None,
    short: str = "error",
    return_distance: bool = False,
    memory: int | None = None,
    check: bool = True,
) -> EdgeIndex | tuple[EdgeIndex, Tensor]:
    """Edges to each point from its ``k`` nearest, as ``torch_geometric.nn.knn_graph`` has them.

    Args:
        x: ``(n, c)``, or :class:`Points` with such rows.
        k: neighbours.
        batch: ``(n,)``, sorted example numbers.
        loop: whether a point may be its own neighbour.
        flow: ``"source_to_target"``: row 0 of the edges has the neighbours, row 1 the points;
            ``"target_to_source"``: the other way round.
        metric: a metric or its name. A tensor serves as both features and positions.
        backend: an engine of :func:`engines`, or ``"auto"``.
        max_distance: farther neighbours give no edge.
        short: what becomes of a k over the number of candidates: ``"error"``, ``"truncate"`` to
            what the smallest example has, or ``"pad"``: points get as many edges as there are.
        return_distance: return the distance of each edge, too, with gradient.
        memory: bytes that a slab of distances may take.
        check: refuse non-finite values.

    Returns:
        An :class:`torch_geometric.EdgeIndex` ``(2, E)``, sorted by point, then by rank; and
        distances ``(E,)`` where asked for.

    Raises:
        ValueError, TypeError: as :func:`knn`.

    Example:
        >>> import torch
        >>> from convnn_geo.search import knn_graph
        >>> edge_index, distance = knn_graph(
        ...     torch.tensor([[0.0], [1.0], [3.0]]), k=1, return_distance=True
        ... )
        >>> edge_index.tolist(), edge_index.sort_order, distance.tolist()
        ([[1, 0, 1], [0, 1, 2]], 'col', [1.0, 1.0, 2.0])
    """
    points, metric = graph_points(x, loop, flow), as_metric(metric)
    found = knn(
        points,
        None,
        k,
        batch,
        None,
        metric,
        backend,
        self_point="natural" if loop else "excluded",
        max_distance=max_distance,
        short=short,
        memory=memory,
        check=check,
    )
    return graph(found, points, batch, metric, flow, return_distance)


def graph_points(x: Tensor | Points, loop: bool, flow: str) -> Points:
    """The points of a graph, whose options are sound."""
    check_name("flow", flow, FLOWS)
    if not isinstance(loop, (bool, int)):
        hint = "; batch comes third" if isinstance(loop, Tensor) else ""
        raise TypeError(f"loop: expected True or False, got {type(loop).__name__}{hint}")
    if isinstance(x, Points):
        return x
    check_floating("x", check_tensor("x", x))
    if x.ndim != 2:
        raise ValueError(
            f"knn_graph: expected rows (n, c) and a batch vector, got x of shape {tuple(x.shape)}; "
            "flatten the examples, or use knn"
        )
    return Points(x, x)


def graph(
    found: Neighborhood,
    points: Points,
    batch: Tensor | None,
    metric: Metric,
    flow: str,
    return_distance: bool,
) -> EdgeIndex | tuple[EdgeIndex, Tensor]:
    """What has been found as the edges of a graph."""
    if found.index.ndim != 2:
        raise ValueError(
            f"knn_graph: expected rows (n, c) and a batch vector, got neighbours of shape "
            f"{tuple(found.index.shape)}; flatten the examples, or use knn"
        )
    edges, _, slot = found.edges()
    if flow == "target_to_source":
        edges = edges.flip(0)
    edge_index = EdgeIndex(
        edges,
        sparse_size=(found.num_sources, found.num_sources),
        sort_order="col" if flow == "source_to_target" else "row",
    )
    if not return_distance:
        return edge_index
    learns = metric.learnable or any(
        t is not None and t.requires_grad for t in (points.x, points.pos)
    )
    if found.distance is None or (learns and torch.is_grad_enabled()):
        distance = _distances(metric, points, batch, found.index)
    else:
        distance = found.distance  # as the search has measured them: to do so again takes as long
    return edge_index, distance.flatten().index_select(0, slot)


def _distances(metric: Metric, points: Points, batch: Tensor | None, index: Tensor) -> Tensor:
    """Distances of pairs ``(n, k)``; cloud by cloud where all points of a cloud have a say."""
    if batch is None or not any(getattr(part, "by_set", False) for part in metric.modules()):
        return metric.pairs(points, points, index)
    found, start = [], 0
    for size in torch.bincount(batch).tolist():
        cloud = part_of(points, start, size)
        inside = (index[start : start + size] - start).clamp_min(0)  # empty slots name source 0
        found.append(metric.pairs(cloud, cloud, inside))
        start += size
    return torch.cat(found) if found else metric.pairs(points, points, index)
