"""Searches by compiled k-NN of PyG's family: torch_cluster and pyg_lib."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from convnn_geo.metrics import BilinearForm, Distances
from convnn_geo.points import gather_rows
from convnn_geo.search.dense import search_rows
from convnn_geo.search.query import Engine, Query

_MAX_K_CUDA, _MAX_K_CPU = 100, 256


class _Tree(Engine):
    """Asks a compiled k-NN for one neighbour more and puts its answer into our order.

    Distances are recomputed and neighbours sorted by (distance, index). Targets whose k-th and
    last neighbour are closer than rounding are searched again, for more neighbours and at last
    by the dense engine.
    """

    def refuses(self, query: Query) -> str | None:
        """Needs Euclidean coordinates, all candidates, and one point more than k."""
        if torch.compiler.is_compiling():
            return "a compiled k-NN can't be traced"
        if not query.plain:
            return "candidates are restricted; it searches all sources only"
        if query.k + 1 > query.source.num_points:
            return f"needs more than k={query.k} sources, got {query.source.num_points}"
        if query.target.device.type == "cuda" and query.k + 1 > _MAX_K_CUDA:
            return f"k={query.k} is over its limit of {_MAX_K_CUDA - 1} on CUDA"
        if query.bound.dimension is None:
            return "the metric's order is not that of Euclidean distances of points"
        return None

    def worthwhile(self, query: Query) -> str | None:
        """A tree wins on the CPU, on many points of few dimensions."""
        dimension = query.bound.dimension
        if query.target.device.type != "cpu":
            return "the tree is the CPU's; brute force on the GPU"
        if dimension is not None and dimension > 3:
            return f"a tree gains little in {dimension} dimensions"
        if query.source.num_points < 1024:
            return f"a tree gains little on {query.source.num_points} points"
        return None

    @abstractmethod
    def _knn(self) -> Callable[..., Tensor]:
        """The compiled search: ``knn(sources, targets, k, batch, batch)``."""

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """Search, sort, and repair ties at the boundary."""
        index = self._nearest(query, query.bound, query.k + 1)
        return index, query.bound.at(index), None

    def _nearest(self, query: Query, bound: Distances, asked: int) -> Tensor:
        """Ask for ``asked`` neighbours, and for more where ties reach past them."""
        q, k = bound.coordinates()  # type: ignore[misc]
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        (n, d), m = q.shape[-2:], k.shape[-2]
        examples, cuda = math.prod(lead), q.is_cuda
        sources, targets = (t.expand(*lead, -1, d).reshape(-1, d).contiguous() for t in (k, q))
        if not bool(sources.isfinite().all() and targets.isfinite().all()):
            return search_rows(query, bound)[0]  # a tree of NaN is no tree
        extent = torch.ones((), dtype=q.dtype, device=q.device)
        if cuda:  # to the unit box: squared distances over 1e10 are dropped
            low, high = sources.amin(0), sources.amax(0)
            extent = (high - low).amax().clamp_min(torch.finfo(q.dtype).tiny)
            sources, targets = (sources - low) / extent, (targets - low) / extent
        batch = torch.arange(examples, device=q.device)
        edges = self._knn()(
            sources,
            targets,
            asked,
            batch.repeat_interleave(m),
            batch.repeat_interleave(n),
        )
        if edges.shape[1] != examples * n * asked:
            return search_rows(query, bound)[0]  # it left neighbours out
        index = (edges[1].view(*lead, n, asked) % m).sort(-1).values
        sharp = bound.sharp()
        value, order = sharp.at(index).sort(dim=-1, stable=True)
        index = index.gather(-1, order)
        last, beyond = value[..., query.k - 1], value[..., -1]
        rounding = (d + 4) * torch.finfo(value.dtype).eps
        slack = rounding * (beyond.abs() + (1.0 if isinstance(sharp, BilinearForm) else 0.0))
        if cuda:
            far = (q - gather_rows(k, index[..., -1:]).squeeze(-2)).norm(dim=-1)
            slack = slack + 2 * rounding * extent * far
        tied = ~(beyond - last > slack)
        index = index[..., : query.k]
        if not bool(tied.any()):
            return index
        first = tied.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        rows = first[..., : int(tied.sum(-1).max())].unsqueeze(-2)
        part, more = bound.targets(rows), 4 * asked
        if more <= min(m, _MAX_K_CUDA if cuda else _MAX_K_CPU):
            again = self._nearest(query, part, more)
        else:
            again = search_rows(query, part)[0]
        return index.scatter(-2, rows.transpose(-1, -2).expand(again.shape), again)


class TorchCluster(_Tree):
    """``torch_cluster.knn``: a KD-tree on the CPU, brute force on CUDA."""

    name = "torch_cluster"

    def refuses(self, query: Query) -> str | None:
        """As every tree, and torch_cluster must be importable."""
        if not _importable("torch_cluster"):
            return "torch_cluster is not installed: pip install 'convnn-geo[cluster]'"
        return super().refuses(query)

    def _knn(self) -> Callable[..., Tensor]:
        return importlib.import_module("torch_cluster").knn


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
        return importlib.import_module("torch_geometric.nn").knn


@torch.compiler.assume_constant_result
def _importable(name: str) -> bool:
    return _imports(name)


@functools.cache
def _imports(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # built for another torch
        return False
    return True
