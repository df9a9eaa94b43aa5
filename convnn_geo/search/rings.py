"""Search ring by ring: on a grid, by how far a place is plus how far a feature is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_geo import compiled, gpu
from convnn_geo.checks import all_finite
from convnn_geo.metrics import Angular, Combination, Differences, Distances, Feature
from convnn_geo.metrics.packed import pack, unpack
from convnn_geo.operators import is_traced, is_transformed, operator
from convnn_geo.points import Grid, Points
from convnn_geo.search.dense import Dense, measured_again
from convnn_geo.search.offsets import lists_all, offsets
from convnn_geo.search.query import Engine, Query
from convnn_geo.search.rows import flops_of_rows

LARGEST_K = 64
"""Neighbours, at most, that a thread of a GPU keeps."""
_PIXELS = 2
"""Pixels for each channel from which on a GPU looks around; counted, not measured."""


class _Parts(NamedTuple):
    """A mixture: its places and its features, with their weights."""

    place_weight: float | Tensor
    place: Differences
    weight: float | Tensor
    feature: Angular | Differences


class Rings(Engine):
    """Looks at places in the order of their distance, until that alone is too far.

    Features only add to how far a place is. So the k nearest of a mixture of both are mostly found
    close to each target, and most of an image is never looked at; what is found is exact. In C on
    the CPU, in Triton on GPUs.
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
        if query.target.pos is not None:
            return "the targets lie on no grid"
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
        whole = all(float(x).is_integer() for x in (*source.origin, *source.step))
        if not whole or source.index_of(target, query.target.device) is None:
            return "targets lie between the pixels"
        if gpu.refuses(query.target.device) is None:
            return _unfit_for_a_gpu(query)
        if query.target.device.type != "cpu":
            return "without Triton it is for images on the CPU"
        weights = [_number(w) for w, _ in query.bound.sharp().parts]
        if not all(0 <= weight < math.inf for weight in weights):
            return "a weight is negative, or not finite"
        return "there is no C compiler" if compiled.library() is None else None

    def pays(self, query: Query) -> bool:
        """Whether it is likely faster than all pairs: on the CPU it gives up where it is not.

        On a GPU nobody waits to see: there few pixels of many channels, of which most would be
        looked at, are left to products, which do the channels of a pair several times as fast.
        """
        if gpu.refuses(query.target.device) is not None or is_traced():
            return True
        parts: _Parts = _parts(query)  # type: ignore[assignment]
        return query.source.num_points >= _PIXELS * parts.feature.q.shape[-1]

    def run(self, query: Query) -> tuple[Tensor, Tensor, Tensor | None]:
        """At once for all examples.

        On the CPU as dense search where features are not finite, and where so many count so much
        that places tell little.
        """
        if is_traced():
            return _traced(query)
        parts: _Parts = _parts(query)  # type: ignore[assignment]
        lead = parts.feature.shape[:-2]
        q, keys = (
            t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
            for t in (parts.feature.q, parts.feature.k)
        )
        search = _in_triton if gpu.refuses(q.device) is None else _in_c
        found = search(query, parts, q, keys)
        if found is None:
            return Dense().run(query)
        values, index = (t.view(*lead, *t.shape[-2:]) for t in found)
        if query.exact:
            values, index, _ = measured_again(query, query.bound, index)
        return index, values, None


def _unfit_for_a_gpu(query: Query) -> str | None:
    """Why an image is none for our kernel, which nobody asks later whether it has found all."""
    grid: Grid = query.source.grid  # type: ignore[assignment]
    if query.k > LARGEST_K:
        return f"k={query.k} is over {LARGEST_K}, which a thread of a GPU keeps"
    if not lists_all(grid.size):
        return f"an image of {grid.size} is too large for offsets between all of its pixels"
    shape = query.bound.shape
    if math.prod(shape[:-2]) * max(shape[-2:]) >= 2**31:
        return "there are too many points in all to be numbered by 32 bits"
    return None


def _in_c(query: Query, parts: _Parts, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    if not (all_finite(q) and all_finite(keys)):
        return None
    grid, at = _grid_and_places(query)
    offset, far, border = offsets(*_of_offsets(grid, parts.place))
    weight = _number(parts.place_weight)
    return compiled.rings_nearest(
        *(_kind(parts), q, keys, _zeros(q, keys), grid.size, at, offset),
        *(far * weight, border * weight, _number(parts.weight), query.k, query.excluded),
    )


def _in_triton(query: Query, parts: _Parts, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Finite or not; nothing is asked of the device that the host would wait for."""
    from convnn_geo.gpu.rings import nearest

    grid, at = _grid_and_places(query)
    offset, far, _ = offsets(*_of_offsets(grid, parts.place), q.device)
    weights = torch.stack([_scalar(w, q.device) for w in (parts.place_weight, parts.weight)])
    return nearest(
        *(q, keys, _kind(parts), _zeros(q, keys), grid.size, at, offset, far, weights),
        *(query.k, query.excluded),
    )


def _grid_and_places(query: Query) -> tuple[Grid, Tensor]:
    """The grid of sources, and where on it each target is."""
    grid: Grid = query.source.grid  # type: ignore[assignment]
    at = grid.index_of(query.target.grid, query.target.device)  # type: ignore[arg-type]
    return grid, at  # type: ignore[return-value]


def _of_offsets(grid: Grid, place: Differences) -> tuple[Any, ...]:
    return grid.size, grid.step, place.p, bool(place.root), tuple(place.factors or ())


def _kind(parts: _Parts) -> str:
    if not isinstance(parts.feature, Differences):
        return "angles"
    return "roots" if parts.feature.root else "squares"


def _zeros(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Which vectors of length one or zero are zero."""
    return q.norm(dim=-1) < 0.5, keys.norm(dim=-1) < 0.5


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


def _scalar(weight: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.detach().double().reshape(())
    return torch.full((), weight, dtype=torch.float64, device=device)


def _of_positions(part: Distances, query: Query) -> bool:
    if type(part) is not Differences or part.factors is None or part.precision is not None:
        return False
    own = query.target.grid, query.source.grid
    met = part.grids or own
    return all(a is b or a == b for a, b in zip(met, own, strict=True))


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
    engine = rings if rings.refuses(query) is None and rings.pays(query) else Dense()
    return engine(query)[:2]


@_on_image.register_fake
def _shapes(
    numbers: Sequence[float], tensors: Sequence[Tensor], k: int, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (*unpack(numbers, tensors).shape[:-1], k)
    index = tensors[0].new_empty(shape, dtype=torch.long)
    return index, torch.empty_like(index, dtype=torch.float32)


_on_image.register_flops(flops_of_rows)  # as if all pairs were looked at
