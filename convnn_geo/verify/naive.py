"""Double loops over targets and sources: slow, plain, and independent of the library's code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Allowed = Sequence[Sequence[int]]


def nearest(
    distance: Callable[[int, int], Tensor], i: int, sources: Sequence[int], k: int
) -> list[int]:
    """The ``k`` sources of smallest distance to ``i``, ties to the lowest index."""
    return sorted(sources, key=lambda j: (distance(i, j).item(), j))[:k]


def _between(
    distance: Callable[[Tensor, Tensor], Tensor], points: Tensor, i: int, j: int
) -> Tensor:
    return distance(points[i], points[j])


def knn_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    raster: bool = False,
) -> Tensor:
    """Feature k-NN convolution of images ``(b, c, h, w)``, taps ``(d, c, k)`` by rank."""
    rows = x.flatten(2).transpose(1, 2)
    out = []
    for points in rows:
        n, ys = points.shape[0], []
        for i in range(n):
            chosen = nearest(partial(_between, distance, points), i, range(n), weight.shape[2])
            chosen = sorted(chosen) if raster else chosen
            ys.append(sum(weight[:, :, t] @ points[j] for t, j in enumerate(chosen)) + bias)
        out.append(torch.stack(ys, -1))
    return torch.stack(out).unflatten(-1, x.shape[2:])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine distance of two vectors."""
    return 1 - (a @ b) / (a.norm() * b.norm())


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of two vectors."""
    return (a - b).square().sum().sqrt()


def attention(
    layer: Any,
    x: Tensor,
    allowed: Allowed,
    k: int | None = None,
    score: Callable[[Tensor, Tensor, int, int], Tensor] | None = None,
) -> Tensor:
    """Self-attention of tokens ``(b, n, c)`` by loops over heads, queries and allowed keys."""
    heads = layer.num_heads
    q, key, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    d = q.shape[-1] // heads
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(x.shape[1]):
                scores = {
                    j: (q[b, i, part] @ key[b, j, part]) / math.sqrt(d)
                    if score is None
                    else score(q[b, i, part], key[b, j, part], i, j)
                    for j in allowed[i]
                }
                kept = sorted(scores, key=lambda j: (-scores[j].item(), j))[:k]
                weights = torch.stack([scores[j] for j in kept]).softmax(0)
                out[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, kept, strict=True))
    return layer.out_proj(out)


def neighborhood(length: int, kernel_size: int, dilation: int, causal: bool) -> list[list[int]]:
    """Keys of neighbourhood attention along one axis, by NATTEN's rules."""
    keys = []
    for i in range(length):
        peers = list(range(i % dilation, length, dilation))
        at = peers.index(i)
        if causal:
            keys.append(peers[max(at - kernel_size + 1, 0) : at + 1])
        else:
            start = min(max(at - kernel_size // 2, 0), len(peers) - kernel_size)
            keys.append(peers[start : start + kernel_size])
    return keys


def product(rows: list[list[int]], cols: list[list[int]]) -> list[list[int]]:
    """Keys on a grid whose axes have these keys, in raster order."""
    width = len(cols)
    return [[r * width + c for r in row for c in col] for row in rows for col in cols]


def swin(size: tuple[int, int], block: int, shift: int) -> list[list[int]]:
    """Keys of (shifted) window attention by Swin's cyclic roll and its mask of regions."""
    h, w = size
    place = torch.arange(h * w).view(h, w).roll((-shift, -shift), (0, 1))
    region = torch.zeros(h, w, dtype=torch.long)
    count = 0
    cuts = (
        (slice(0, -block), slice(-block, -shift), slice(-shift, None)) if shift else (slice(None),)
    )
    for rows in cuts:
        for cols in cuts:
            region[rows, cols] = count
            count += 1
    keys: list[list[int]] = [[] for _ in range(h * w)]
    for top in range(0, h, block):
        for left in range(0, w, block):
            window = (slice(top, top + block), slice(left, left + block))
            ids, regions = place[window].flatten(), region[window].flatten()
            for i, r in zip(ids.tolist(), regions.tolist(), strict=True):
                keys[i] = sorted(ids[regions == r].tolist())
    return keys


def clouds(batch: Tensor) -> list[list[int]]:
    """For each point the points of its cloud."""
    return [(batch == b).nonzero().flatten().tolist() for b in batch]


def knn_edges(features: Tensor, batch: Tensor, k: int) -> Tensor:
    """Edges (source, target) of the k nearest in the same cloud, the point itself included."""
    edges = []
    for i, members in enumerate(clouds(batch)):
        chosen = nearest(lambda a, b: euclidean(features[a], features[b]), i, members, k)
        edges += [(j, i) for j in chosen]
    return torch.tensor(edges).T


def radius_edges(pos: Tensor, batch: Tensor, r: float) -> Tensor:
    """Edges (source, target) within a radius in the same cloud."""
    edges = [
        (j, i)
        for i, members in enumerate(clouds(batch))
        for j in members
        if euclidean(pos[i], pos[j]).item() <= r
    ]
    return torch.tensor(edges).T
