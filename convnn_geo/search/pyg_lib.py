"""Search by pyg-lib, through PyG: what took ``torch_cluster.knn``'s place there."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from convnn_geo.search.torch_cluster import TorchCluster


class PygLib(TorchCluster):
    """``torch_geometric.nn.knn`` where pyg-lib serves it (PyG 2.8)."""

    name = "pyg_lib"

    def missing(self) -> str | None:
        """pyg-lib must have its own k-NN."""
        import torch_geometric.typing

        if getattr(torch_geometric.typing, "WITH_KNN", False):
            return None
        return "pyg-lib >= 0.6 is not installed"

    def _knn(self) -> Callable[..., Tensor]:
        return importlib.import_module("torch_geometric.nn").knn
