"""search.radius and search.radius_graph: all points within a distance, nearest first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from convnn_geo.checks import check_int, check_limit
from convnn_geo.metrics import Metric, as_metric
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Points
from convnn_geo.search.growing import within_reach
from convnn_geo.search.knn import knn
from convnn_geo.search.knn_graph import graph, graph_points


def radius(
    x: Tensor | Points,
    y: Tensor | Points | None,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int | None = 32,
    *,
    metric: Metric | str = "euclidean",
    backend: str = "auto",
    self_point: str = "natural",
    memory: int | None = None,
    check: bool = True,
) -> Neighborhood:
    """For each point of ``y`` those of ``x`` within ``r``, as ``torch_geometric.nn.radius``.

    Where more than ``max_num_neighbors`` are, the nearest are taken, on every engine and device.

    Args:
        x: sources, ``(m, c)``, or dense examples ``(b, m, c)``, or :class:`Points`.
        y: targets, ``(n, c)`` or ``(b, n, c)``; None for ``x`` itself.
        r: the largest distance, itself included; in the metric's unit, squared for a squared one.
        batch_x: ``(m,)``, sorted example numbers of the rows of ``x``, as in PyG.
        batch_y: ``(n,)``, likewise.
        max_num_neighbors: slots of a target, at most; None for no limit.
        metric: a metric or its name. A tensor serves as both features and positions.
        backend: an engine of :func:`engines`, or ``"auto"``.
        self_point: of a set searched in itself: ``"natural"``, ``"first"`` or ``"excluded"``.
        memory: bytes that a slab of distances may take.
        check: refuse non-finite values.

    Returns:
        A :class:`Neighborhood` with ``index`` and ``distance`` ``(n, slots)`` or ``(b, n, slots)``,
        nearest first, and a ``mask`` of the slots that are filled. There are ``max_num_neighbors``
        slots, or as many as the largest example has sources; without a limit as many as the
        fullest target needs. Where a program is traced, which knows neither, there are as many as
        the limit, or the sources in all.

    Raises:
        ValueError, TypeError: as :func:`knn`.

    Example:
        >>> import torch
        >>> from convnn_geo.search import radius
        >>> x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.2], [9.0]])
        >>> found = radius(x, y, 1.0, max_num_neighbors=2)
        >>> found.mask.tolist(), found.index[found.mask].tolist()
        ([[True, True], [False, False]], [0, 1])
    """
    check_limit("r", r, 0.0)
    most = _slots(x, batch_x, max_num_neighbors)

    def ask(k: int) -> Neighborhood:
        return knn(
            *(x, y, k, batch_x, batch_y, metric, backend),
            self_point=self_point,
            max_distance=r,
            short="pad",
            memory=memory,
            check=check,
        )

    found = within_reach(ask, most, as_metric(metric), *_points(x), *_points(y))
    return found if max_num_neighbors is None else found.padded(most)


def radius_graph(
    x: Tensor | Points,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int | None = 32,
    flow: str = "source_to_target",
    *,
    metric: Metric | str = "euclidean",
    backend: str = "auto",
    return_distance: bool = False,
    memory: int | None = None,
    check: bool = True,
) -> EdgeIndex | tuple[EdgeIndex, Tensor]:
    """Edges to each point from those within ``r``, as ``torch_geometric.nn.radius_graph``.

    Where more than ``max_num_neighbors`` are, the nearest are taken, on every engine and device.

    Args:
        x: ``(n, c)``, or :class:`Points` with such rows.
        r: the largest distance, itself included; in the metric's unit, squared for a squared one.
        batch: ``(n,)``, sorted example numbers.
        loop: whether a point may be its own neighbour.
        max_num_neighbors: edges of a point, at most; None for no limit.
        flow: as :func:`knn_graph` takes it.
        metric: a metric or its name. A tensor serves as both features and positions.
        backend: an engine of :func:`engines`, or ``"auto"``.
        return_distance: return the distance of each edge, too, with gradient.
        memory: bytes that a slab of distances may take.
        check: refuse non-finite values.

    Returns:
        What :func:`knn_graph` does.

    Raises:
        ValueError, TypeError: as :func:`knn`.

    Example:
        >>> import torch
        >>> from convnn_geo.search import radius_graph
        >>> radius_graph(torch.tensor([[0.0], [1.0], [3.0], [9.0]]), r=2.0).tolist()
        [[1, 0, 2, 1], [0, 1, 1, 2]]
    """
    check_limit("r", r, 0.0)
    points, metric = graph_points(x, loop, flow), as_metric(metric)
    most = _slots(x, batch, max_num_neighbors)

    def ask(k: int) -> Neighborhood:
        return knn(
            *(points, None, k, batch, None, metric, backend),
            self_point="natural" if loop else "excluded",
            max_distance=r,
            short="pad",
            memory=memory,
            check=check,
        )

    found = within_reach(ask, most, metric, points)
    return graph(found, points, batch, metric, flow, return_distance)


def _points(x: Tensor | Points | None) -> list[Points]:
    """What values there are to look at; what is no set of points is left to others."""
    if isinstance(x, Points):
        return [x]
    return [Points(x)] if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 else []


def _slots(x: Tensor | Points, batch: Tensor | None, most: int | None) -> int:
    """Of a target: no more than there are sources for it. What is no batch is left to others."""
    if most is not None:
        most = check_int("max_num_neighbors", most)
    if isinstance(x, Points):
        held = x.num_points
    else:
        held = x.shape[-2] if isinstance(x, Tensor) and x.ndim > 1 else 1
    if isinstance(batch, Tensor) and batch.numel() and not torch.compiler.is_compiling():
        held = int(batch.unique(return_counts=True)[1].max())
    return max(1, held if most is None else min(most, held))
