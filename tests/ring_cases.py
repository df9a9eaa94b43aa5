"""What rings find is compared with, on the CPU and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from convnn_geo.metrics import Spatial, interpolate
from convnn_geo.points import Points
from convnn_geo.search import ENGINES, find

RINGS = ENGINES["rings"]
PLACES = {
    "l2": Spatial(),
    "l1": Spatial("l1"),
    "chebyshev": Spatial("chebyshev", scale=2 / 3),
    "p": Spatial(3.0, scale=(0.5, 2.0)),
}


MIXTURE = interpolate("spatial", "cosine", 0.5)


def image(*shape, seed=0, device=None):
    """With rows that are zero, and rows that are alike: ties."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
    x[:, :, 2:4] = 0
    x[:, :, 6:9] = x[:, :, 6:7]
    return Points.from_image(x)


def agree(query, numbers):
    """With all distances in float64, compared in float32; and with dense search."""
    every = torch.arange(query.source.num_points, device=query.target.device)
    every = every.expand(query.target.num_points, -1)
    rows = query.bound.refined().at(every).float()
    if query.excluded is not None:
        rows.scatter_(-1, query.excluded[:, None].expand(*rows.shape[:-1], 1), torch.inf)
    distance, index = rows.sort(dim=-1, stable=True)
    for k in numbers:
        for exact in (True, False):
            asked = replace(query, k=k, exact=exact)
            assert RINGS.refuses(asked) is None
            found, dense = find(asked, "rings"), find(asked, "dense")
            for one in (found, dense):
                assert torch.equal(one.index, index[..., :k])
                torch.testing.assert_close(one.distance, distance[..., :k], rtol=2e-6, atol=2e-6)
            assert found.mask is None and found.num_sources == dense.num_sources
