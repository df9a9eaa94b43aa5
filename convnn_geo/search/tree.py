"""Searches by compiled k-NN of PyG's family: torch_cluster and pyg_lib."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from convnn_geo.search.dense import search_rows
from convnn_geo.search.query import Engine, Query

_MAX_K_CUDA = 100


class _Tree(Engine):
    """Asks a compiled k-NN for one neighbour more and puts its answer into our order.

    Distances are recomputed, neighbours sorted by (distance, index), and targets whose k-th and
    (k + 1)-th neighbour are closer than rounding are searched again by the dense engine.
    """

    def refuses(self, query: Query) -> str | None:
        """Needs Euclidean coordinates, all candidates, and one point more than k."""
        if not query.plain:
            return "candidates are restricted; it searches all sources only"
        if query.k + 1 > query.source.num_points:
            return f"needs more than k={query.k} sources, got {query.source.num_points}"
        if query.target.device.type == "cuda" and query.k + 1 > _MAX_K_CUDA:
            return f"k={query.k} is over its limit of {_MAX_K_CUDA - 1} on CUDA"
        coordinates = query.bound.coordinates()
        if coordinates is None:
            return "the metric's order is not that of Euclidean distances of points"
        if coordinates[0].dtype == torch.float64 and query.target.device.type == "cuda":
            return "float64 on CUDA"
        return None

    def worthwhile(self, query: Query) -> str | None:
        """A tree wins on the CPU, on many points of few dimensions."""
        coordinates = query.bound.coordinates()
        if query.target.device.type != "cpu":
            return "the tree is the CPU's; brute force on the GPU"
        if coordinates is not None and coordinates[0].shape[-1] > 3:
            return f"a tree gains little in {coordinates[0].shape[-1]} dimensions"
        if query.source.num_points < 1024:
            return f"a tree gains little on {query.source.num_points} points"
        return None

    def _knn(self) -> Callable[..., Tensor]:
        raise NotImplementedError

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """Search, sort, and repair ties at the boundary."""
        q, k = query.bound.coordinates()  # type: ignore[misc]
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        (n, d), m = q.shape[-2:], k.shape[-2]
        examples = math.prod(lead)
        sources, targets = (t.expand(*lead, -1, d).reshape(-1, d).contiguous() for t in (k, q))
        # Centred and scaled to the unit box: squared distances over 1e10 are dropped on CUDA.
        low, high = sources.amin(0), sources.amax(0)
        extent = (high - low).amax().clamp_min(torch.finfo(q.dtype).tiny)
        sources, targets = (sources - low) / extent, (targets - low) / extent
        batch = torch.arange(examples, device=q.device)
        edges = self._knn()(
            sources,
            targets,
            query.k + 1,
            batch.repeat_interleave(m),
            batch.repeat_interleave(n),
        )
        if edges.shape[1] != examples * n * (query.k + 1):
            return search_rows(query, query.bound)  # it left neighbours out
        index = edges[1].view(*lead, n, query.k + 1) % m
        index = index.sort(-1).values
        distance = query.bound.at(index)
        order = distance.argsort(dim=-1, stable=True)
        distance, index = distance.gather(-1, order), index.gather(-1, order)
        last, beyond = distance[..., -2], distance[..., -1]
        slack = 16 * torch.finfo(distance.dtype).eps
        tied = beyond - last <= slack * (beyond.abs() + extent * extent * slack)
        index, distance = index[..., :-1], distance[..., :-1]
        if bool(tied.any()):
            again, exact, _ = search_rows(query, query.bound, wanted=tied)
            index = torch.where(tied.unsqueeze(-1), again, index)
            distance = torch.where(tied.unsqueeze(-1), exact, distance)
        return index, distance, None


class TorchCluster(_Tree):
    """``torch_cluster.knn``: a KD-tree on the CPU, brute force on CUDA."""

    name = "torch_cluster"

    def refuses(self, query: Query) -> str | None:
        """As every tree, and torch_cluster must be importable."""
        if not _importable("torch_cluster"):
            return "torch_cluster is not installed: pip install 'convnn-geo[cluster]'"
        return super().refuses(query)

    def _knn(self) -> Callable[..., Tensor]:
        return importlib.import_module("torch_cluster").knn  # type: ignore[no-any-return]


class PygLib(_Tree):
    """``torch_geometric.nn.knn`` where pyg-lib serves it (PyG 2.8)."""

    name = "pyg_lib"

    def refuses(self, query: Query) -> str | None:
        """As every tree, and pyg-lib must be importable."""
        import torch_geometric.typing

        if not getattr(torch_geometric.typing, "WITH_KNN", False):
            return "pyg-lib >= 0.6 is not installed"
        return super().refuses(query)

    def _knn(self) -> Callable[..., Tensor]:
        return importlib.import_module("torch_geometric.nn").knn  # type: ignore[no-any-return]


@functools.cache
def _importable(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # built for another torch
        return False
    return True
