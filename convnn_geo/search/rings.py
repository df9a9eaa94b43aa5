"""Search ring by ring: on a grid, by how far a place is plus how far a feature is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_geo import compiled
from convnn_geo.caching import keep
from convnn_geo.checks import all_finite
from convnn_geo.metrics import Angular, Combination, Differences, Distances, Feature
from convnn_geo.metrics.packed import pack, unpack
from convnn_geo.operators import is_traced, is_transformed, operator
from convnn_geo.points import Grid, Points
from convnn_geo.search.dense import Dense, measured_again
from convnn_geo.search.query import Engine, Query

_MOST = 2**20
"""Offsets, at most, that are sorted and kept: 20 MiB."""


class _Parts(NamedTuple):
    """A mixture: its places and its features, with their weights."""

    place_weight: float | Tensor
    place: Differences
    weight: float | Tensor
    feature: Angular | Differences


class Rings(Engine):
    """Looks at places in the order of their distance, until that alone is too far: in C.

    Features only add to how far a place is. So the k nearest of a mixture of both are mostly found
    close to each target, and most of an image is never looked at; what is found is exact.
    """

    name = "rings"

    def refuses(self, query: Query) -> str | None:
        """Needs an image, all candidates, and a mixture of a spatial and a feature distance."""
        if is_transformed():
            return "torch.func transforms it, which knows no operator of lists"
        target, source = query.target.grid, query.source.grid
        if target is None or source is None or query.source.pos is not None:
            return "the points lie on no grid"
        if len(source.size) > 3:
            return "it is for grids of up to three axes"
        if query.target.pos is not None or query.target.device.type != "cpu":
            return "it is for images on the CPU"
        if query.subset.index is not None or query.subset.mask is not None:
            return "candidates are restricted; it searches all sources only"
        if query.dtype != torch.float32:
            return "its distances are float32, and these need float64"
        if query.problem is not None:
            return "the metric's order is that of points, or of products: other engines serve these"
        if _parts(query) is None:
            return "the metric is no sum of a distance of positions and one of features"
        if is_traced():
            return None  # what is traced is looked at when it runs
        if not 0 < query.k <= source.num_points - (query.excluded is not None):
            return "no neighbours are asked for, or more than there are"
        weights = [_number(w) for w, _ in query.bound.sharp().parts]
        if not all(0 <= weight < math.inf for weight in weights):
            return "a weight is negative, or not finite"
        whole = all(float(x).is_integer() for x in (*source.origin, *source.step))
        if not whole or source.index_of(target) is None:
            return "targets lie between the pixels"
        return "there is no C compiler" if compiled.library() is None else None

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """At once for all examples.

        As dense search where features are not finite, and where so many count so much that places
        tell little.
        """
        if is_traced():
            return _traced(query)
        parts: _Parts = _parts(query)  # type: ignore[assignment]
        q, keys = parts.feature.q, parts.feature.k
        if not (all_finite(q) and all_finite(keys)):
            return Dense().run(query)
        grid: Grid = query.source.grid  # type: ignore[assignment]
        lead = parts.feature.shape[:-2]
        q, keys = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (q, keys))
        kind = "angles"
        if isinstance(parts.feature, Differences):
            kind = "roots" if parts.feature.root else "squares"
        zeros = (q.norm(dim=-1) < 0.5, keys.norm(dim=-1) < 0.5)
        place = parts.place
        scale = None if place.scale is None else tuple(place.scale.flatten().tolist())
        offset, far, border = _offsets(grid.size, grid.step, place.p, place.root, scale)
        weight = _number(parts.place_weight)
        at: Tensor = grid.index_of(query.target.grid)  # type: ignore[arg-type, assignment]
        found = compiled.rings_nearest(
            *(kind, q, keys, zeros, grid.size, at, offset, far * weight, border * weight),
            *(_number(parts.weight), query.k, query.excluded),
        )
        if found is None:
            return Dense().run(query)
        values, index = (t.view(*lead, *t.shape[-2:]) for t in found)
        if query.exact:
            values, index, _ = measured_again(query, query.bound, index)
        return index, values, None


def _parts(query: Query) -> _Parts | None:
    """A mixture of one distance of positions and one of features, both non-negative."""
    bound = query.bound.sharp()
    if type(bound) is not Combination or len(bound.parts) != 2:
        return None
    for (first, place), (second, feature) in (bound.parts, bound.parts[::-1]):
        plain = all(not isinstance(w, Tensor) or w.numel() == 1 for w in (first, second))
        if plain and _of_positions(place, query) and _of_features(feature):
            return _Parts(first, place, second, feature)  # type: ignore[arg-type]
    return None


def _number(weight: float | Tensor) -> float:
    return weight.item() if isinstance(weight, Tensor) else weight


def _of_positions(part: Distances, query: Query) -> bool:
    if type(part) is not Differences or part.precision is not None or part.k.ndim != 2:
        return False
    points = (part.q, query.target.position), (part.k, query.source.position)
    return all(
        t.shape == position.shape and (is_traced() or torch.equal(t, position))
        for t, position in points
    )


def _of_features(part: Distances) -> bool:
    if not isinstance(part, (Angular, Differences)) or part.precision is not None:
        return False
    if part.q.dtype != torch.float32:
        return False
    if type(part) is Differences:
        return part.p == 2 and part.scale is None
    return type(part) is Angular and part.b is None and not part.direct


def _traced(query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
    """One operator, which looks at values and sizes when it runs."""
    target: Grid = query.target.grid  # type: ignore[assignment]
    source: Grid = query.source.grid  # type: ignore[assignment]
    index, values = _on_image(
        *pack(query.bound.sharp()),  # type: ignore[misc]
        *(query.k, query.excluded, query.exact, query.slab),
        *(target.size, target.origin, target.step, source.size, source.origin, source.step),
    )
    return index, values, None


@operator("nearest_on_image")
def _on_image(
    numbers: Sequence[float],
    tensors: Sequence[Tensor],
    k: int,
    own: Tensor | None,
    exact: bool,
    slab: int,
    target_size: Sequence[int],
    target_origin: Sequence[float],
    target_step: Sequence[float],
    source_size: Sequence[int],
    source_origin: Sequence[float],
    source_step: Sequence[float],
) -> tuple[Tensor, Tensor]:
    target = Grid(tuple(target_size), tuple(target_origin), tuple(target_step))
    source = Grid(tuple(source_size), tuple(source_origin), tuple(source_step))
    points, bound = (Points(grid=target), Points(grid=source)), unpack(numbers, tensors)
    query = Query(*points, Feature(), k, excluded=own, memory=slab, bind=lambda: bound, exact=exact)
    rings = Rings()
    engine = Dense() if rings.refuses(query) else rings
    return engine(query)[:2]


@_on_image.register_fake
def _shapes(
    numbers: Sequence[float], tensors: Sequence[Tensor], k: int, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (*unpack(numbers, tensors).shape[:-1], k)
    index = tensors[0].new_empty(shape, dtype=torch.long)
    return index, torch.empty_like(index, dtype=torch.float32)


@keep(4)
def _offsets(
    size: tuple[int, ...],
    step: tuple[float, ...],
    p: float,
    root: bool,
    scale: tuple[float, ...] | None,
) -> tuple[Tensor, Tensor, float]:
    """Offsets between pixels ``(count, axes)``, nearest first, and how far they lead.

    And how far the nearest leads that is left out: infinite where none is.
    """
    half = [length - 1 for length in size]
    while math.prod(2 * h + 1 for h in half) > _MOST:
        half[half.index(max(half))] = max(half) // 2
    factors = None if scale is None else torch.tensor(scale, dtype=torch.float64)

    def distance(offset: Tensor) -> Tensor:
        moved, here = offset * torch.tensor(step), torch.zeros(1, len(size))
        return Differences(moved, here, p, root, scale=factors).double().rows().flatten()

    ends = torch.diag(torch.tensor(half) + 1)[[h < n - 1 for h, n in zip(half, size, strict=True)]]
    border = distance(ends).min().item() if len(ends) else math.inf
    ranges = [torch.arange(-h, h + 1) for h in half]
    offset = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).flatten(0, -2)
    far = distance(offset)
    order = far.argsort(stable=True)
    order = order[far[order] < border]
    return offset[order].int(), far[order], border
