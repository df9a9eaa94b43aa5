"""Cases of graph layers and point-cloud layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import EdgeConv, PointNetConv, PointTransformerConv

from convnn_geo import recipes
from convnn_geo.verify import naive
from convnn_geo.verify.case import add

_BATCH = torch.tensor([0] * 7 + [1] * 5 + [2] * 9)
_ROWS = _BATCH.numel()
_CLOUDS: dict[str, Tensor | None] = {"ragged": _BATCH, "one cloud": None}


def _cloud(recipe: str, name: str, peer: str, build: Any, channels: int, reference: Any) -> None:
    """A layer on clouds, ragged and single."""
    for kind, batch in _CLOUDS.items():
        every = torch.zeros(_ROWS, dtype=torch.long) if batch is None else batch
        add(
            recipe,
            f"{name}, {kind}",
            peer,
            build,
            [(_ROWS, channels), (_ROWS, 3)],
            lambda layer, x, pos, e=every: reference(layer, x, pos, e),
            lambda layer, x, pos, b=batch: layer(x, pos, b),
        )


def _vig(layer: Any, x: Tensor, k: int, dilation: int) -> Tensor:
    out = []
    for points in x.flatten(2).transpose(1, 2):
        ys = []
        for i in range(points.shape[0]):
            near = naive.nearest(
                lambda a, b, p=points: naive.cosine(p[a], p[b]),  # type: ignore[misc]
                i,
                range(points.shape[0]),
                k * dilation,
            )[::dilation]
            most = torch.stack([points[j] - points[i] for j in near]).amax(0)
            ys.append(layer.kernel.update(torch.cat([points[i], most])))
        out.append(torch.stack(ys, -1))
    return torch.stack(out).unflatten(-1, x.shape[2:])


for _k, _dilation in ((1, 1), (4, 1), (3, 2), (20, 1)):
    add(
        "vig",
        f"k = {'n' if _k == 20 else _k}, dilation {_dilation}",
        "double loop",
        partial(recipes.vig, 3, 4, _k, _dilation),
        [(2, 3, 4, 5)],
        partial(_vig, k=_k, dilation=_dilation),
    )


def _edge_conv(layer: Any) -> EdgeConv:
    """PyG's layer around the same network, put in after construction, which would reset it."""
    peer = EdgeConv(nn.Identity())
    peer.nn = layer.kernel.mlp
    return peer


def _point_net(layer: Any) -> PointNetConv:
    peer = PointNetConv(nn.Identity(), add_self_loops=False)
    peer.local_nn = layer.kernel.mlp
    return peer


_MLP = lambda c, d: nn.Sequential(nn.Linear(c, 8), nn.Tanh(), nn.Linear(8, d))  # noqa: E731

for _k in (1, 5):
    _cloud(
        "edge_conv",
        f"k = {_k}",
        "torch_geometric EdgeConv",
        lambda k=_k, **kw: recipes.edge_conv(4, 6, k, _MLP(8, 6), **kw),
        4,
        lambda layer, x, pos, b, k=_k: _edge_conv(layer)(x, naive.knn_edges(pos, b, k)),
    )
    _cloud(
        "dynamic_edge_conv",
        f"k = {_k}",
        "torch_geometric EdgeConv",
        lambda k=_k, **kw: recipes.dynamic_edge_conv(4, 6, k, _MLP(8, 6), **kw),
        4,
        lambda layer, x, pos, b, k=_k: _edge_conv(layer)(x, naive.knn_edges(x, b, k)),
    )


def _transformer(layer: Any, x: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
    kernel = layer.kernel
    peer = PointTransformerConv(4, 6)
    peer.pos_nn, peer.attn_nn = kernel.position, kernel.attention
    peer.lin, peer.lin_src, peer.lin_dst = kernel.value, kernel.key, kernel.query
    return peer(x, pos, naive.knn_edges(pos, batch, 5))


_cloud(
    "point_transformer",
    "k = 5",
    "torch_geometric PointTransformerConv",
    lambda **kw: recipes.point_transformer(4, 6, 5, _MLP(3, 6), _MLP(6, 6), **kw),
    4,
    _transformer,
)
_cloud(
    "set_abstraction",
    "radius 1.5",
    "torch_geometric PointNetConv",
    lambda **kw: recipes.set_abstraction(4, 6, 1.5, 21, _MLP(7, 6), **kw),
    4,
    lambda layer, x, pos, b: _point_net(layer)(x, pos, naive.radius_edges(pos, b, 1.5)),
)


def _gravnet(layer: Any, x: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
    kernel, space = layer.kernel, layer.metric.query(x)
    sent, out = kernel.value(x), []
    edges = naive.knn_edges(space, batch, 4)
    for i in range(x.shape[0]):
        near = edges[0][edges[1] == i].tolist()
        messages = torch.stack(
            [(-10 * (space[i] - space[j]).square().sum()).exp() * sent[j] for j in near]
        )
        both = torch.cat([messages.mean(0), messages.amax(0)])
        out.append(kernel.own(x[i]) + kernel.update(both))
    return torch.stack(out)


_cloud("grav_net", "k = 4", "double loop", partial(recipes.grav_net, 4, 6, 3, 5, 4), 4, _gravnet)


def _point_conv(layer: Any, x: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
    edges = naive.knn_edges(pos, batch, 4)
    out = [
        sum(layer.weighting.mlp(pos[j] - pos[i]) * x[j] for j in edges[0][edges[1] == i].tolist())
        for i in range(x.shape[0])
    ]
    return torch.stack(out)


_cloud(
    "point_conv",
    "k = 4",
    "double loop",
    lambda **kw: recipes.point_conv(4, 4, _MLP(3, 4), **kw),
    4,
    _point_conv,
)
