"""Every search engine against the plain loop: the same neighbours, in the same order, ties too."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnn_geo import compiled, search
from convnn_geo.candidates import Subset
from convnn_geo.metrics import (
    Biased,
    BilinearForm,
    Custom,
    Feature,
    Metric,
    PaperMix,
    Spatial,
    as_metric,
    interpolate,
)
from convnn_geo.points import Grid, Points
from convnn_geo.search import (
    ENGINES,
    Query,
    clouds,
    engines,
    explain_search,
    find,
    k_smallest,
    knn,
    knn_graph,
)
from convnn_geo.search.nearest import implemented
from convnn_geo.search.query import SORTING
from convnn_geo.search.registry import explain_query
from convnn_geo.search.rows import Hidden, smallest_in_rows

quick = settings(deadline=None, max_examples=60, derandomize=True)


# -- the loop -----------------------------------------------------------------------------------


def unit(t):
    return torch.nn.functional.normalize(t, dim=-1)


LOOPS = {
    "euclidean": lambda x, y: (y.unsqueeze(1) - x).square().sum(-1).sqrt(),
    "squared_euclidean": lambda x, y: (y.unsqueeze(1) - x).square().sum(-1),
    "manhattan": lambda x, y: (y.unsqueeze(1) - x).abs().sum(-1),
    "minkowski": lambda x, y: (y.unsqueeze(1) - x).abs().pow(3).sum(-1).pow(1 / 3),
    # Summed pair by pair: in a matrix product equal rows may get unequal sums.
    "dot": lambda x, y: -(y.unsqueeze(1) * x).sum(-1),
    "cosine": lambda x, y: 1 - (unit(y).unsqueeze(1) * unit(x)).sum(-1),
}


def loop(x, y, k, metric="euclidean", batch_x=None, batch_y=None):
    """Index and distance in float64: a stable sort of each row, ties to the lowest index."""
    distance = LOOPS[metric](x.double(), y.double())
    if batch_x is not None:
        distance = distance.masked_fill(batch_y[:, None] != batch_x, math.inf)
    distance, index = distance.sort(dim=-1, stable=True)
    return index[:, :k], distance[:, :k]


def able(name, query):
    reason = ENGINES[name].refuses(query)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def installed():
    """Exact engines; those whose package is missing show as skipped.

    KeOps compiles for a while for each k and dimension: it has a test of its own, for the night.
    """
    names = []
    for name, engine in ENGINES.items():
        if engine.approximate or name == "keops":
            continue
        mark = pytest.mark.skipif(engine.missing() is not None, reason=f"{name} is not installed")
        names.append(pytest.param(name, marks=mark))
    return names


def is_loop(found, x, y, k, metric="euclidean", **batch):
    index, distance = loop(x, y, k, metric, **batch)
    assert found.index.dtype == torch.long and found.mask is None
    assert torch.equal(found.index, index)
    size = max(1.0, float(distance.abs().max()))
    torch.testing.assert_close(found.distance.double(), distance, rtol=2e-6, atol=4e-6 * size)


def cloud(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(4)).float()


def twice(x):
    order = torch.randperm(2 * len(x), generator=torch.Generator().manual_seed(5))
    return torch.cat([x, x])[order]


def after_relu(channels):
    x = cloud(80, channels).relu()
    x[::3] = 0
    return x


CLOUDS = {
    "plane": cloud(90, 2),
    "space": cloud(90, 3),
    "wide": cloud(70, 24),
    "integers on a line": integers(0, 9, 60, 1),
    "integers on a plane": integers(0, 5, 80, 2),
    "integers in space": integers(-2, 3, 90, 3),
    "wide integers": integers(-3, 4, 90, 16),
    "binary features": integers(0, 2, 90, 12),
    "wide integers far away": integers(0, 9, 60, 12) + 1e6,
    "integers a million away": integers(0, 9, 60, 2) + 1e6,
    "coincident points": torch.full((40, 3), 0.3),
    "constant features": torch.full((40, 20), 0.3),
    "each point twice": twice(cloud(40, 3)),
    "each wide point twice": twice(cloud(40, 40)),
    "after relu": after_relu(3),
    "wide after relu": after_relu(32),
    "over a hundred thousand": 1e6 * cloud(70, 3),
    "quarters": integers(0, 40, 80, 12) / 4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize(
    "case", [c for c in CLOUDS if CLOUDS[c].shape[1] > 8] + ["each point thrice"]
)
def test_products_may_round_as_they_like(monkeypatch, case, metric, dtype):
    """Each BLAS sums in orders of its own, so that even equal rows can get unequal products."""
    x = torch.cat([cloud(30, 12)] * 3) if case == "each point thrice" else CLOUDS[case]
    x = x.to(dtype)
    asked = [(k, own) for k in (1, 2, 7) for own in ("natural", "excluded")]

    def found():
        return [knn(x, k=k, metric=metric, backend="dense", self_point=own) for k, own in asked]

    expected = found()
    monkeypatch.setattr(compiled.build, "library", lambda: None)
    torch.manual_seed(0)
    rows = BilinearForm.rows

    def noisy(self, start=0, stop=None):
        products = rows(self, start, stop)
        if self.precision is not None:
            return products  # rounded by the call within
        rounding = self.rounding()[..., start:stop, :]
        return products + (torch.rand_like(products) - 0.5) * rounding

    def noisy_into(self, out):
        return out.copy_(noisy(self))

    monkeypatch.setattr(BilinearForm, "rows", noisy)
    monkeypatch.setattr(BilinearForm, "rows_into", noisy_into)
    for noisily, exactly in zip(found(), expected, strict=True):
        assert torch.equal(noisily.index, exactly.index)


@pytest.mark.parametrize("name", installed()[1:])
@pytest.mark.parametrize("case", CLOUDS)
@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean"])
def test_engines_are_the_loop_on_clouds(name, case, metric):
    x = CLOUDS[case]
    points = Points(x, x)
    able(name, Query(points, points, as_metric(metric), 1))
    for k in (1, 4, 9, len(x) - 1, len(x)):
        query = Query(points, points, as_metric(metric), k)
        if k == len(x) and ENGINES[name].refuses(query):
            continue
        is_loop(find(query, name), x, x, k, metric)


@pytest.mark.parametrize("case", CLOUDS)
@pytest.mark.parametrize("metric", ["euclidean", "manhattan", "minkowski"])
def test_slabs_of_one_row_change_nothing(case, metric):
    x = CLOUDS[case]
    whole = knn(x, None, 9, metric=metric, backend="dense")
    slabs = knn(x, None, 9, metric=metric, backend="dense", memory=1)
    assert torch.equal(whole.index, slabs.index)
    assert torch.equal(whole.distance, slabs.distance)


@pytest.mark.parametrize("case", ["wide", "each point twice", "each wide point twice", "space"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "manhattan", "minkowski"])
@pytest.mark.parametrize("name", installed()[1:])
def test_engines_are_the_loop_for_other_metrics(name, case, metric):
    x = CLOUDS[case]
    able(name, Query(Points(x, x), Points(x, x), as_metric(metric), 5))
    is_loop(knn(x, None, 5, metric=metric, backend=name), x, x, 5, metric)


@pytest.mark.parametrize("name", installed()[1:])
def test_bipartite_clouds(name):
    x, y = integers(0, 6, 50, 2), integers(-3, 9, 20, 2)
    able(name, Query(Points(y, y), Points(x, x), as_metric("euclidean"), 1))
    for k in (1, 7, 49):
        is_loop(knn(x, y, k, backend=name), x, y, k)


@pytest.mark.parametrize("name", installed()[1:])
def test_a_single_query(name):
    x = twice(cloud(75, 129))
    for metric in ("euclidean", "cosine", "dot"):
        able(name, Query(Points(x, x), Points(x, x), as_metric(metric), 1))
        for y in cloud(8, 129):
            is_loop(knn(x, y[None], 7, metric=metric, backend=name), x, y[None], 7, metric)


@pytest.mark.parametrize("name", installed()[1:])
@pytest.mark.parametrize("channels", [2, 16])
def test_dense_batches_are_their_examples(name, channels):
    x, y = integers(0, 4, 3, 40, channels), integers(0, 4, 3, 17, channels)
    able(name, Query(Points(y, y), Points(x, x), as_metric("euclidean"), 5))
    for memory in (None, 1, 4 * 17 * 40):
        found = knn(x, y, 5, backend=name, memory=memory)
        for b in range(3):
            index, distance = loop(x[b], y[b], 5)
            assert torch.equal(found.index[b], index)
            torch.testing.assert_close(found.distance[b].double(), distance)


@pytest.mark.parametrize("name", installed()[1:])
@pytest.mark.parametrize("channels", [2, 16])
@pytest.mark.parametrize(
    ("sizes_x", "sizes_y"),
    [
        ([9, 5, 7], [4, 1, 6]),
        ([9, 0, 7], [4, 0, 6]),
        ([6, 6, 6], [2, 2, 2]),
        ([5, 12, 30], [0, 3, 3]),
        ([40, 5, 8, 5], [3, 0, 9, 1]),
        ([5], [1]),
    ],
)
def test_ragged_batches_are_their_examples(name, channels, sizes_x, sizes_y):
    batch_x = torch.arange(len(sizes_x)).repeat_interleave(torch.tensor(sizes_x))
    batch_y = torch.arange(len(sizes_y)).repeat_interleave(torch.tensor(sizes_y))
    x, y = integers(0, 4, len(batch_x), channels), integers(-1, 5, len(batch_y), channels)
    for k in (1, 4, 5):
        try:
            found = knn(x, y, k, batch_x, batch_y, backend=name)
        except ValueError as error:
            able_message = "can't serve this query"
            assert name != "dense" and able_message in str(error)
            continue
        is_loop(found, x, y, k, batch_x=batch_x, batch_y=batch_y)


SIZES = [[1, 2, 3], [40, 1, 300, 7], [5] * 50, [700, 3, 90, 64], [16, 32, 33]]


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine", "dot", "spatial"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_clouds_of_a_batch_are_found_as_each_by_itself(metric, sizes, self_point, backend):
    """At once in C, where there is a compiler; more neighbours than a cloud has leave slots."""
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for x in (cloud(len(batch), 3), integers(0, 3, len(batch), 12)):
        for k in (1, 4, 20):
            options = {"metric": metric, "backend": backend, "self_point": self_point}
            found = knn(x, None, k, batch, **options, short="pad")
            start = 0
            for size in sizes:
                rows = slice(start, start + size)
                alone = knn(x[rows], None, k, **options, short="pad")
                there = torch.ones(size, k, dtype=torch.bool) if alone.mask is None else alone.mask
                seen = there if found.mask is None else found.mask[rows]
                assert torch.equal(seen, there)
                assert torch.equal(found.index[rows][there], alone.index[there] + start)
                torch.testing.assert_close(found.distance[rows], alone.distance)
                start += size
            least = min(sizes) - (self_point == "excluded")
            if k > least:
                with pytest.raises(ValueError, match=f"k={k} is larger than .*, {least}"):
                    knn(x, None, k, batch, **options)


def test_clouds_of_a_batch_are_searched_at_once(monkeypatch):
    """In C they are: none by itself, whatever their number; large ones go to a grid of cells."""
    if compiled.library() is None:
        pytest.skip("no C compiler")
    asked = []
    monkeypatch.setattr(clouds, "implemented", lambda *a: asked.append(a[1]) or implemented(*a))
    batch = torch.arange(60).repeat_interleave(torch.arange(1, 61))
    knn(cloud(len(batch), 3), None, 2, batch, short="pad")
    assert asked == []
    batch = torch.arange(2).repeat_interleave(torch.tensor([20_000, 30_000]))
    knn(cloud(len(batch), 3), None, 2, batch)
    assert [len(problem.q) for problem in asked] == [20_000, 30_000]


def test_clouds_may_be_numbered_with_gaps():
    x, close = cloud(12, 3), torch.tensor([0] * 4 + [1] * 5 + [2] * 3)
    for numbers in ([3, 7, 19], [0, 2**20, 2**60]):
        batch = torch.tensor(numbers)[close]
        assert torch.equal(knn(x, None, 3, batch).index, knn(x, None, 3, close).index)
        found = knn(x, x[4:], 3, batch, batch[4:]).index
        assert torch.equal(found, knn(x, x[4:], 3, close, close[4:]).index)


def test_a_metric_that_gives_nan_is_seen():
    x = cloud(9, 3)
    metric = Custom(lambda i, j: (i.x - j.x).sum(-1).sqrt())
    with pytest.raises(ValueError, match=r"Custom.*expected distances, got NaN from finite points"):
        knn(x, k=3, metric=metric)
    assert bool(knn(x, k=3, metric=metric, check=False).distance.isnan().any())


def test_what_is_no_metric_says_how_it_becomes_one():
    class Mine(Metric):
        def distances(self, target, source):
            return torch.cdist(target.x, source.x)

    with pytest.raises(
        TypeError, match=r"Mine.distances: expected Distances, got Tensor; .*Custom"
    ):
        knn(cloud(9, 3), k=3, metric=Mine())
    with pytest.raises(TypeError, match=r"got a function; Custom\("):
        knn(cloud(9, 3), k=3, metric=lambda i, j: i)
    with pytest.raises(TypeError, match=r"got ndarray; torch.from_numpy"):
        knn(cloud(9, 3).numpy(), k=3)
    with pytest.raises(TypeError, match=r"got torch.int32; .long\(\)"):
        knn(cloud(9, 3), k=3, batch_x=torch.zeros(9, dtype=torch.int32))


def test_explain_search_of_clouds():
    x, sizes = cloud(50, 3), [10, 40]
    even, uneven = (torch.arange(2).repeat_interleave(torch.tensor(s)) for s in ([25, 25], sizes))
    assert explain_search(x, None, 3, even) == explain_search(x.view(2, 25, 3), k=3)
    assert explain_search(x, None, 3, uneven) == explain_search(x[10:], k=3)
    both = {"batch_x": uneven, "batch_y": uneven[::2]}
    assert explain_search(x, x[::2], 3, **both) == explain_search(x[10:], x[10::2], k=3)
    with pytest.raises(ValueError, match="there is no batch_y"):
        explain_search(x, x[::2], 3, uneven)
    table = str(explain_search(x, k=3)).splitlines()
    assert table[0].split() == ["dense", "taken"] and len(table) == len(ENGINES)


def test_ragged_search_in_itself():
    batch = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 3])
    x = cloud(10, 3)
    is_loop(knn(x, None, 3, batch), x, x, 3, batch_x=batch, batch_y=batch)
    is_loop(knn(x, x, 3, batch, batch), x, x, 3, batch_x=batch, batch_y=batch)


def test_half_precision_is_searched_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        for channels in (3, 16):
            x = (integers(0, 30, 60, channels) / 8).to(dtype)
            found = knn(x, None, 6)
            assert found.distance.dtype == torch.float32
            is_loop(found, x, x, 6)
            if "torch_cluster" in engines() and not ENGINES["torch_cluster"].refuses(
                Query(Points(x, x), Points(x, x), as_metric("euclidean"), 6)
            ):
                is_loop(knn(x, None, 6, backend="torch_cluster"), x, x, 6)
    big = torch.tensor([[300.0, 0.0], [-300.0, 0.0], [301.0, 0.0]], dtype=torch.float16)
    assert knn(big, None, 3).index.tolist() == [[0, 2, 1], [1, 0, 2], [2, 0, 1]]


def test_autocast_does_not_change_neighbours():
    x = cloud(60, 24)
    expected = knn(x, None, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = knn(x, None, 5)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.distance, expected.distance)


# -- images -------------------------------------------------------------------------------------

METRICS = {
    "l2": (Spatial(), lambda o: o.square().sum(-1).sqrt()),
    "squared": (Spatial(squared=True), lambda o: o.square().sum(-1)),
    "l1": (Spatial("l1"), lambda o: o.abs().sum(-1)),
    "chebyshev": (Spatial("chebyshev"), lambda o: o.abs().amax(-1)),
    "norm 3": (Spatial(3), lambda o: o.abs().pow(3).sum(-1)),
    "half": (Spatial(scale=0.5), lambda o: o.square().sum(-1).sqrt() / 2),
}
SIZES = [(11,), (1, 7), (5, 9), (16, 3), (3, 4, 5)]


def on_grids(target, source, formula, k):
    offset = target.positions(dtype=torch.float64).unsqueeze(1) - source.positions(
        dtype=torch.float64
    )
    return formula(offset).sort(dim=-1, stable=True).indices[:, :k]


@pytest.mark.parametrize("name", installed())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_engines_are_the_loop_on_images(name, metric, size):
    grid = Grid(size)
    points = Points(torch.zeros(2, grid.num_points, 1), grid=grid)
    spatial, formula = METRICS[metric]
    able(name, Query(points, points, spatial, 1))
    for k in (1, 2, 5, 9, grid.num_points - 1, grid.num_points):
        query = Query(points, points, spatial, min(k, grid.num_points))
        if ENGINES[name].refuses(query):
            continue
        found = find(query, name)
        expected = on_grids(grid, grid, formula, k)
        assert torch.equal(found.index, expected.expand(found.index.shape))
        distance = spatial(points).gather(-1, expected).expand(found.index.shape)
        torch.testing.assert_close(found.distance, distance)


@pytest.mark.parametrize("name", ["grid", "dense"])
@pytest.mark.parametrize("metric", METRICS)
def test_axes_of_unequal_scale(name, metric):
    if metric == "half":
        return
    source = Grid((6, 16))
    points = Points(grid=source)
    formula = METRICS[metric][1]
    plain = METRICS[metric][0]
    for scale in ((2.0, 0.25), (1.0, 0.25)):
        scaled = Spatial(plain.p, plain.squared, scale=scale)
        factors = torch.tensor(scale, dtype=torch.float64)
        for k in (1, 9, 30):
            found = find(Query(points, points, scaled, k), name)
            expected = on_grids(source, source, lambda o, s=factors: formula(o * s), k)
            assert torch.equal(found.index, expected)


def test_scales_that_round_choose_alike_on_grid_and_dense():
    points = Points(grid=Grid((9, 14)))
    for scale in (0.1, (2 / 3, 2 / 5), (1e-3, 7.7)):
        for p in ("l1", "l2", "chebyshev", 3):
            for k in (5, 15):
                query = Query(points, points, Spatial(p, scale=scale), k)
                assert torch.equal(find(query, "grid").index, find(query, "dense").index)


@pytest.mark.parametrize("name", installed())
@pytest.mark.parametrize("metric", METRICS)
def test_a_padded_source_and_a_smaller_target(name, metric):
    spatial, formula = METRICS[metric]
    target = Grid((3, 5), origin=(0.5, 1.0), step=(2.0, 1.0))
    source = Grid((6, 7)).pad(((2, 2), (0, 3)))
    rows, columns = Points(grid=target), Points(torch.zeros(1, source.num_points, 1), grid=source)
    able(name, Query(rows, columns, spatial, 1))
    for k in (1, 4, 9, 16):
        found = find(Query(rows, columns, spatial, k), name)
        expected = on_grids(target, source, formula, k)
        assert torch.equal(found.index, expected.expand(found.index.shape))


@pytest.mark.parametrize("k", [1, 4, 12])
def test_targets_far_outside_the_grid(k):
    target, source = Grid((3, 3), origin=(-40.0, 5.0), step=(45.0, 9.0)), Grid((6, 8))
    for spatial, formula in METRICS.values():
        found = find(Query(Points(grid=target), Points(grid=source), spatial, k), "grid")
        assert torch.equal(found.index, on_grids(target, source, formula, k))


def test_grid_search_serves_the_ends_of_an_interpolation():
    points = Points.from_image(torch.randn(1, 3, 5, 6))
    ends = [
        (interpolate("spatial", "cosine", 0.0), None),
        (interpolate("cosine", "spatial", 1.0), None),
        (1 * Spatial(), None),
        (1 * Spatial() + 0 * Feature("cosine"), None),
        (interpolate("spatial", "cosine", 0.5), "more than positions"),
        (2 * Spatial(), "more than positions"),
    ]
    for metric, reason in ends:
        found = ENGINES["grid"].refuses(Query(points, points, metric, 3))
        assert found is None if reason is None else reason in found


def test_what_grid_search_found_is_kept_by_size(monkeypatch):
    module = sys.modules["convnn_geo.search.grid"]
    searched = []
    k_smallest = module.k_smallest
    monkeypatch.setattr(module, "k_smallest", lambda *a: searched.append(1) or k_smallest(*a))

    def near(height, width, dtype=torch.float32, most=None):
        image = Points.from_image(torch.randn(2, 3, height, width, dtype=dtype))
        return find(Query(image, image, Spatial(scale=1.25), 5), "grid")

    first = near(11, 13)
    count = len(searched)
    again = near(11, 13)
    assert count > 0 and len(searched) == count
    first.index.zero_()  # the caller's own
    assert torch.equal(near(11, 13).index, again.index) and again.index.any()
    assert near(11, 13, torch.float64).distance.dtype == torch.float64
    assert not torch.equal(near(13, 11).index, again.index)
    monkeypatch.setattr(module, "_MOST", 11 * 13 * 5 - 1)
    count = len(searched)
    assert torch.equal(near(11, 13).index, again.index) and len(searched) > count
    image = Points(grid=Grid((11, 13)))
    rows = dict(explain_query(Query(image, image, Spatial(), 5)))
    assert rows["grid"] == "what it finds is too much to be kept for the next call"


# -- torch_cluster ------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Numbers of neighbours that torch_cluster was asked for."""
    torch_cluster = pytest.importorskip("torch_cluster")
    asked, plain = [], torch_cluster.knn

    def spy(x, y, k, batch_x=None, batch_y=None, **kwargs):
        asked.append((len(y), k))
        return plain(x, y, k, batch_x, batch_y, **kwargs)

    monkeypatch.setattr(torch_cluster, "knn", spy)
    return asked


def test_torch_cluster_is_what_runs(calls):
    x = cloud(1500, 3)
    found = knn(x, None, 6, backend="torch_cluster")
    assert calls[0] == (1500, 7)
    dense = knn(x, None, 6, backend="dense")
    assert torch.equal(found.index, dense.index)
    assert torch.equal(found.distance, dense.distance)


def test_torch_cluster_is_asked_again_only_where_ties_cross_the_boundary(calls):
    grid = Grid((9, 9, 9)).positions()
    assert torch.equal(
        knn(grid, None, 7, backend="torch_cluster").index, knn(grid, None, 7, backend="dense").index
    )
    assert calls[0] == (729, 8)
    assert calls[1][0] < 729 and calls[1][1] == 32  # the inner points' 7 nearest are certain


def test_torch_cluster_with_every_point_coincident_is_asked_once(calls):
    x = torch.full((300, 2), 7.0)
    found = knn(x, None, 5, backend="torch_cluster")
    assert torch.equal(found.index, torch.arange(5).expand(300, 5))
    assert [k for _, k in calls] == [6]  # then only five points are left


def test_torch_cluster_with_ties_all_around_ends_in_the_dense_engine(calls):
    angle = torch.arange(300) * (torch.pi / 150)
    x = torch.stack([angle.cos(), angle.sin()], -1)
    knn(x, torch.zeros(1, 2), 5, backend="torch_cluster")
    assert [k for _, k in calls] == [6, 24, 96]


def test_torch_cluster_that_loses_neighbours_is_not_trusted(monkeypatch):
    torch_cluster = pytest.importorskip("torch_cluster")
    plain = torch_cluster.knn
    monkeypatch.setattr(torch_cluster, "knn", lambda *args: plain(*args)[:, :-1])
    x = cloud(50, 3)
    is_loop(knn(x, None, 4, backend="torch_cluster"), x, x, 4)


def test_the_tree_resolves_clusters_that_float32_coordinates_of_a_unit_box_would_not():
    pytest.importorskip("torch_cluster")
    x = torch.cat([cloud(200, 2) * 1e-3, cloud(5, 2) * 1e4])
    for name in ("torch_cluster", "dense"):
        found = knn(x, None, 6, backend=name)
        assert torch.equal(found.index[:200], loop(x, x, 6)[0][:200])


def test_sums_of_squares_are_searched_by_their_coordinates(calls):
    points = Points.from_image(integers(0, 3, 2, 2, 6, 7))
    metric = 0.5 * Spatial(squared=True) + 2 * Feature("squared_euclidean")
    query = Query(points, points, metric, 6)
    found, dense = find(query, "torch_cluster"), find(query, "dense")
    assert calls
    assert torch.equal(found.index, dense.index)
    torch.testing.assert_close(found.distance, dense.distance)


# -- NaN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "torch_cluster"])
@pytest.mark.parametrize("channels", [2, 3, 16])
@pytest.mark.parametrize("lost", [[0], [39], [17, 18, 30]], ids=str)
def test_points_of_nan_are_the_farthest_and_disturb_no_other(name, channels, lost):
    x = cloud(40, channels)
    kept = torch.tensor([i for i in range(40) if i not in lost])
    x[lost, 0] = math.nan
    able(name, Query(Points(x, x), Points(x, x), as_metric("euclidean"), 5))
    found = knn(x, None, 5, backend=name, check=False)
    assert torch.equal(found.index[kept], kept[loop(x[kept], x[kept], 5)[0]])
    assert found.distance[lost].isnan().all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        knn(x, None, 5, backend=name)


# -- masks and exclusions -----------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 16])
@pytest.mark.parametrize("memory", [None, 1])
def test_masks_and_exclusions(channels, memory):
    x = integers(0, 4, 2, 20, channels)
    points = Points(x, x)
    mask = torch.rand(2, 20, 20) < 0.4
    mask[0, 3] = False
    own = torch.arange(20)
    query = Query(points, points, Feature("squared_euclidean"), 6, Subset(mask=mask), own, memory)
    found = find(query)
    allowed = mask & (own[:, None] != own)
    distance = (x.double().unsqueeze(2) - x.double().unsqueeze(1)).square().sum(-1)
    key = distance.masked_fill(~allowed, math.inf)
    values, index = key.sort(dim=-1, stable=True)
    filled = values[..., :6].isfinite()
    assert torch.equal(found.mask, filled)
    assert torch.equal(found.index[filled], index[..., :6][filled])
    assert not found.mask[0, 3].any()


def test_a_mask_of_points_is_obeyed():
    x = integers(0, 4, 2, 12, 3)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 7:], mask[1, 2] = False, False
    found = knn(Points(x, x, mask), None, 7)
    for b in range(2):
        kept = mask[b].nonzero().flatten()
        assert torch.equal(found.index[b], kept[loop(x[b][kept], x[b], 7)[0]])
    with pytest.raises(ValueError, match="larger than the number of candidates, 7"):
        knn(Points(x, x, mask), None, 8)


def test_each_targets_own_candidates_break_ties_by_source():
    x = integers(0, 2, 15, 2)
    points = Points(x, x)
    index = torch.stack([torch.randperm(15)[:8] for _ in range(15)])
    mask = torch.rand(3, 15, 8) < 0.7
    found = find(Query(points, points, Feature("squared_euclidean"), 3, Subset(index, mask)))
    assert found.index.shape == found.mask.shape == (3, 15, 3)
    for b in range(3):
        for i in range(15):
            among = sorted(index[i][mask[b, i]].tolist())
            order = sorted(among, key=lambda j, i=i: ((x[i] - x[j]).square().sum().item(), j))[:3]
            assert found.index[b, i][found.mask[b, i]].tolist() == order


def test_no_neighbours_at_all():
    x = cloud(5, 3)
    found = find(Query(Points(x, x), Points(x, x), Spatial(), 0), "dense")
    assert found.index.shape == (5, 0)
    bound = Spatial().bind(Points(x, x), Points(x, x))
    first = search.with_self_first(found, bound, torch.arange(5))
    assert first.index.tolist() == [[0], [1], [2], [3], [4]]


def test_empty_targets_give_an_empty_answer():
    x = cloud(5, 3).double()
    found = knn(x, x[:0], 2)
    assert found.index.shape == found.distance.shape == (0, 2)
    assert found.distance.dtype == torch.float64
    assert knn(cloud(2, 5, 3), cloud(2, 0, 3), 2).index.shape == (2, 0, 2)
    assert knn(x, x[:0], 2, torch.zeros(5, dtype=torch.long)).index.shape == (0, 2)
    assert find(Query(Points(x[:0], x[:0]), Points(x, x), Spatial(), 2)).index.shape == (0, 2)


def test_distances_with_a_bias_are_not_searched_by_grid():
    points = Points.from_image(torch.zeros(1, 1, 3, 4))
    bound = Biased(Spatial().bind(points, points), torch.randn(12, 12))
    query = Query(points, points, Spatial(), 3, bind=lambda: bound)
    assert "bias" in ENGINES["grid"].refuses(query)
    assert torch.equal(find(query).index, bound.rows().argsort(-1)[:, :3])


def test_neighbours_alone_without_exact_distances():
    x = cloud(30, 16)
    points = Points(x, x)
    query = Query(points, points, Feature(), 4, exact=False)
    assert torch.equal(find(query).index, loop(x, x, 4)[0])


# -- choice and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_points_that_torch_is_yet_to_negate(backend):
    for d in (3, 20):
        x, y = torch.randn(300, d), torch.randn(40, d)
        found = knn(torch._neg_view(-x), torch._neg_view(-y), 5, backend=backend)
        assert torch.equal(found.index, knn(x, y, 5, backend=backend).index)


def test_directions_on_one_axis_are_searched_by_rows():
    """All of them tie, which a tree finds out point by point."""
    points = Points(torch.randn(2, 40, 1))
    rows = explain_query(Query(points, points, Feature("cosine"), 3))
    assert rows[-1] == ("dense", None)
    assert {reason for _, reason in rows} >= {"directions on one axis are two, so that all tie"}
    points = Points(torch.randn(2, 40, 2))
    rows = explain_query(Query(points, points, Feature("cosine"), 3))
    assert not any("one axis" in str(reason) for _, reason in rows)


def test_the_choice_is_explained():
    points = Points.from_image(torch.randn(1, 64, 8, 8))
    assert explain_query(Query(points, points, Spatial(), 3)) == [("grid", None)]
    rows = dict(explain_query(Query(points, points, Feature(), 3)))
    assert rows["grid"] == "the metric looks at more than positions"
    assert rows["dense"] is None
    assert explain_search(points, points, 3, metric="spatial") == [("grid", None)]
    x, y = torch.randn(2, 50, 3), torch.randn(2, 20, 3)
    asked = explain_query(Query(Points(y, y), Points(x, x), as_metric("cosine"), 4))
    assert explain_search(x, y, 4, metric="cosine") == asked
    masked = Points(x, x, torch.rand(2, 50) > 0.3)
    assert explain_search(masked, k=3)[-1] == ("dense", None)
    own, single = torch.arange(50), Points(x[0], x[0])
    for self_point, k in (("excluded", 4), ("first", 3)):
        asked = explain_query(Query(single, single, as_metric("cosine"), k, excluded=own))
        assert explain_search(x[0], k=4, metric="cosine", self_point=self_point) == asked
    assert engines() == [name for name in ENGINES if ENGINES[name].missing() is None]
    assert {"grid", "dense"} <= set(engines()) <= set(ENGINES)


X = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: knn(X, X, 2, backend="kd"), ValueError, "unknown search backend 'kd'.*dense"),
        (lambda: knn(X, X, 2, backend="grid"), ValueError, "grid.*can't serve.*positions"),
        (lambda: knn(X, X, 2, metric="cosinus"), ValueError, "unknown metric"),
        (lambda: knn(X, X, 0), ValueError, "at least 1"),
        (lambda: knn(X, X, 1.0), TypeError, "integer"),
        (lambda: knn(X, X, True), TypeError, "integer"),
        (lambda: knn(X, X, 5), ValueError, "larger than the number of candidates, 4"),
        (lambda: knn(X[:0], X, 1), ValueError, "larger than the number of candidates, 0"),
        (lambda: knn(X, X.double(), 1), TypeError, "float64"),
        (lambda: knn(X.long(), X, 1), TypeError, "floating"),
        (lambda: knn(X, X[:, :1], 1), ValueError, "dimensions differ"),
        (lambda: knn(X[None], X, 1), ValueError, "both"),
        (lambda: knn(X[None], X.expand(2, 4, 2), 1), ValueError, "batches differ"),
        (lambda: knn([1.0], X, 1), TypeError, "Tensor"),
        (lambda: knn(X[0], X, 1), ValueError, r"one number a point, pass x.unsqueeze"),
        (lambda: knn(X, X * math.inf, 1), ValueError, "NaN or infinite"),
        (lambda: knn(X, X, 1, torch.tensor([0, 1, 0, 1])), ValueError, "sorted"),
        (lambda: knn(X, X, 1, torch.tensor([-1, 0, 0, 1])), ValueError, "from 0"),
        (lambda: knn(X, X, 1, torch.zeros(3).long()), ValueError, "one number a point"),
        (lambda: knn(X, X, 1, torch.zeros(4)), (TypeError, ValueError), "batch_x"),
        (lambda: knn(X[None], X[None], 1, torch.zeros(4).long()), ValueError, "rows"),
        (
            lambda: knn(X, X, 2, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1])),
            ValueError,
            "larger than the number of candidates, 1",
        ),
        (
            lambda: knn(X, X, 1, torch.zeros(4).long(), torch.tensor([0, 0, 0, 1])),
            ValueError,
            "an example has targets but no sources",
        ),
        (
            lambda: find(Query(Points(X, X), Points(X, X), Spatial(), 5), "dense"),
            ValueError,
            "number of candidates, 4",
        ),
        (
            lambda: find(Query(Points(grid=Grid((2, 2))), Points(grid=Grid((2, 2))), Spatial(), 5)),
            ValueError,
            "number of candidates, 4",
        ),
        (
            lambda: find(
                Query(Points(X, X), Points(X, X), Spatial(), 3, Subset(torch.tensor([[0, 2]])))
            ),
            ValueError,
            "number of candidates, 2",
        ),
    ],
)
def test_bad_searches_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name", ["torch_cluster", "pyg_lib"])
def test_trees_say_what_they_refuse(name):
    def reason(query):
        return ENGINES[name].refuses(query)

    points = Points(X, X)
    if "not installed" in (reason(Query(points, points, Spatial(), 1)) or ""):
        pytest.skip("not installed")
    assert reason(Query(points, points, Spatial(), 3)) is None
    assert reason(Query(points, points, Spatial(), 4)) is None  # all there are: found by rows
    assert find(Query(points, points, Spatial(), 4), name).index.tolist() == [[0, 1, 2, 3]] * 4
    assert "Euclidean" in reason(Query(points, points, Spatial("l1"), 1))
    assert "Euclidean" in reason(Query(points, points, Custom(lambda i, j: i.x[..., 0]), 1))
    masked = Query(points, points, Spatial(), 1, Subset(mask=torch.ones(4, 4).bool()))
    assert "restricted" in reason(masked)


def test_engines_that_are_missing_name_the_extra(monkeypatch):
    monkeypatch.setattr("convnn_geo.search.torch_cluster.importable", lambda name: False)
    with pytest.raises(ValueError, match=r"convnn-geo\[cluster\]"):
        knn(X, X, 1, backend="torch_cluster")


# -- the k smallest -----------------------------------------------------------------------------

SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38]


def is_stable_sort(values, k):
    """By the compiled selection and by torch's and numpy's."""
    expected = values.sort(dim=-1, stable=True)
    for library in (compiled.library, lambda: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "library", library)
            best, index = k_smallest(values, k)
        assert torch.equal(index, expected.indices[..., :k])
        assert torch.equal(best.nan_to_num(7.5), values.gather(-1, index).nan_to_num(7.5))


@quick
@given(
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=1, max_size=40),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_k_smallest_are_those_of_a_stable_sort(row, data, dtype):
    k = data.draw(st.integers(0, len(row)))
    is_stable_sort(torch.tensor([row, row[::-1]], dtype=dtype), k)


@quick
@given(
    st.integers(0, 2**31),
    st.sampled_from([511, 512, 513, 640, 700, 1030, 2100]),
    st.sampled_from([1, 2, 9, 16, 17, 64, 128, 129, 256, 257]),
    st.sampled_from([1, 2, 50, 10**6]),
    st.booleans(),
    st.booleans(),
)
def test_the_k_smallest_of_long_rows(seed, m, k, levels, special, near):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (3, 2, m), generator=generator).float() - levels // 2
    if near:
        values = 1 + 1.2e-7 * values
    if special:
        where = torch.randint(m, (6,), generator=generator)
        values[0, 0, where] = torch.tensor(SPECIAL)[torch.randint(11, (6,), generator=generator)]
        values[2, 1] = math.nan
    is_stable_sort(values, k)


@quick
@given(
    st.integers(0, 2**31),
    st.sampled_from([12, 40, 513, 1030]),
    st.sampled_from([1, 2, 9, 17, 128, 256, 257]),
    st.sampled_from([1e-30, 1e-9, 3e-8, 1.0, 1e40]),
    st.booleans(),
)
def test_the_k_smallest_of_float64(seed, m, k, step, special):
    """Float32 tells none of them, some, or all apart, or holds none."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(3 * m, (3, 2, m), generator=generator).double() - m
    values[0] = 1 + step * values[0]
    values[1] *= step
    if special:
        where = torch.randint(m, (6,), generator=generator)
        values[0, 0, where] = torch.tensor(SPECIAL).double()[where % len(SPECIAL)]
        values[2, 1] = math.nan
    is_stable_sort(values, min(k, m))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 1e-45, math.inf, -math.inf, math.nan])
def test_the_k_smallest_of_equal_values_are_the_first(value):
    for m in (5, 197, 1500):
        is_stable_sort(torch.full((2, m), value), min(m, 9))
    is_stable_sort(torch.arange(1500.0).flip(0)[None], 9)


def test_the_k_smallest_where_denormals_are_flushed():
    values = torch.full((2, 600), 1.0)
    values[:, 100:] = 0.0
    assert torch.set_flush_denormal(True)
    try:
        assert k_smallest(values, 3)[1].tolist() == [[100, 101, 102]] * 2
    finally:
        torch.set_flush_denormal(False)


def test_selection_is_compiled_here():
    assert compiled.library() is not None or shutil.which("cc") is None


def test_selection_works_without_a_compiler(monkeypatch, tmp_path):
    compile_ = compiled.library.__wrapped__  # not the cached one
    for name, value in (
        ("CONVNN_GEO_COMPILE", "0"),
        ("CC", "no_such_compiler"),
        ("CC", "false"),  # a compiler that fails
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            assert compile_() is None
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_selection_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_ = compiled.library.__wrapped__
    assert compile_() is not None
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert compile_() is not None
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and the library


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_k_smallest_of_half_precision(dtype):
    is_stable_sort(torch.randint(5, (4, 30)).to(dtype), 7)


def test_the_k_smallest_of_nothing():
    for shape in ((0, 5), (5, 0), (2, 0, 3)):
        k = min(2, shape[-1])
        best, index = k_smallest(torch.zeros(shape), k)
        assert best.shape == index.shape == (*shape[:-1], k)


def test_the_k_smallest_leave_their_input_alone():
    values = torch.randn(3, 600)
    before = values.clone()
    is_stable_sort(values, 5)
    assert torch.equal(values, before)


@pytest.mark.parametrize("channels", [3, 16])
def test_rows_longer_than_a_cache(channels):
    """As short ones: no step changes from some number of sources on."""
    x = integers(0, 6, 70_000, channels)
    found = knn(x, x[:3], 20, backend="dense")
    distance = (x[:3, None].double() - x.double()).square().sum(-1)
    assert torch.equal(found.index, distance.sort(dim=-1, stable=True).indices[:, :20])


@pytest.mark.parametrize("missing", ["batch_x", "batch_y"])
def test_batches_come_in_pairs(missing):
    batches = {"batch_x": torch.tensor([0, 0, 1, 1]), "batch_y": torch.tensor([0, 1])}
    x = torch.rand(4, 2)
    batches[missing] = None
    with pytest.raises(ValueError, match=f"names 2 examples, but there is no {missing}"):
        knn(x, x[:2], 1, **batches)
    with pytest.raises(ValueError, match="an example has targets but no sources"):
        knn(x, x[:2], 1, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2]))
    nobody = torch.zeros(0, dtype=torch.long)
    assert knn(x[:0], None, 1, nobody).index.shape == (0, 1)
    one = torch.zeros(4 if missing == "batch_y" else 2, dtype=torch.long)
    name = "batch_x" if missing == "batch_y" else "batch_y"
    assert knn(x, x[:2], 1, **{name: one}).index.shape == (2, 1)  # of one example there is no doubt


def test_slabs_leave_room_for_sorting_where_that_takes_more():
    here, there = Points(X), Points(X.to("meta"))
    metric, memory = as_metric("euclidean"), SORTING * 2**20
    assert Query(here, here, metric, 1, memory=memory).slab == memory
    assert Query(there, there, metric, 1, memory=memory).slab == 2**20
    assert SORTING > 6 and Query(there, there, metric, 1).slab * SORTING <= 2**28


def test_rows_are_searched_in_bounded_memory():
    # A slab of 64 KiB: no step may see more than a slab's share of rows.
    x = torch.zeros(300, 3)
    points = Points(x, x)
    seen = []

    class Spy(type(Spatial().bind(points, points))):
        def rows(self, start=0, stop=None):
            out = super().rows(start, stop)
            seen.append(out.numel() * 4)
            return out

    bound = Spatial().bind(points, points)
    smallest_in_rows(Spy(bound.q, bound.k, bound.p), 2, Hidden(), 2**16, torch.float32)
    assert len(seen) > 1 and max(seen) <= 2**16


@pytest.mark.parametrize("name", [n for n in ("dense", "torch_cluster") if n in engines()])
@pytest.mark.parametrize("dimension", [3, 16, 192])
@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine"])
def test_tight_clusters_far_from_the_middle_are_told_apart(name, dimension, metric):
    # Products of float32 cancel: |q|^2 + |k|^2 - 2 <q, k> of these is mostly rounding.
    torch.manual_seed(0)
    center = 1e3 * torch.randn(6, dimension).repeat_interleave(20, 0)
    x = center + 1e-2 * torch.randn(120, dimension)
    wide = x.double()
    if metric == "cosine":
        wide = (x / x.norm(dim=-1, keepdim=True)).double()
    expected = (wide[:, None] - wide).square().sum(-1)
    found = knn(x, None, 9, metric=metric, backend=name)
    assert found.index[:, 0].tolist() == list(range(120))
    assert (found.distance.diff(dim=-1) >= 0).all()
    chosen, smallest = expected.gather(-1, found.index), expected.sort(-1).values[:, :9]
    torch.testing.assert_close(chosen, smallest, rtol=1e-6, atol=0)


def test_a_scale_of_the_axes_breaks_no_ties():
    # 1 / 3 is rounded: coordinates that are scaled before they are subtracted lie unevenly.
    points = Points(torch.zeros(1, 99, 4), grid=Grid((9, 11)))
    for metric in (Spatial(scale=1 / 3), PaperMix(0.3)):
        query = Query(points, points, metric, 3)
        index = find(query, "dense").index.reshape(9, 11, 3)
        middle = torch.arange(99).view(9, 11)[1:-1, 1:-1]
        if metric.__class__ is Spatial:  # itself, then the pixel above, then the one to the left
            assert torch.equal(index[1:-1, 1:-1, 1], middle - 11)
            assert torch.equal(index[1:-1, 1:-1, 2], middle - 1)
        assert torch.equal(
            index[1:-1, 1:-1] - middle[..., None], (index[1, 1] - 12).expand(7, 9, 3)
        )


def test_numbers_may_be_numpys():
    """As they come out of ``np.arange`` and the like."""
    x = torch.randn(20, 4)
    found = knn(x, k=np.int64(3), max_distance=np.float32(1.5), memory=np.int32(2**20))
    expected = knn(x, k=3, max_distance=1.5, memory=2**20)
    assert torch.equal(found.index, expected.index) and torch.equal(found.mask, expected.mask)
    assert type(found.k) is int
    with pytest.raises(TypeError, match="k: expected an integer, got"):
        knn(x, k=np.bool_(True))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("masked", [False, True])
def test_little_memory_changes_nothing(masked, metric):
    """Targets come some at a time, and masks may have examples of their own."""
    torch.manual_seed(0)
    x, y = torch.randint(-2, 3, (40, 6)).float(), torch.randint(-2, 3, (30, 6)).float()
    mask = torch.rand(2, 30, 40) < 0.7 if masked else None
    query = search.Query(Points(y), Points(x), as_metric(metric), 5, Subset(mask=mask))
    found = search.find(replace(query, memory=100), "dense")
    wanted = search.find(query, "dense")
    assert torch.equal(found.index, wanted.index)
    assert torch.equal(found.distance, wanted.distance)


class Ranged(Metric):
    """By the range of all points, without a word that it looks at them."""

    def distances(self, target, source):
        rows = source.features
        scale = 1 / (rows.amax(-2, keepdim=True) - rows.amin(-2, keepdim=True))
        points = Points(target.features * scale), Points(source.features * scale)
        return as_metric("euclidean").distances(*points)


def test_a_metric_of_ones_own_is_bound_cloud_by_cloud():
    x = torch.cat([cloud(30, 2), cloud(31, 2) * torch.tensor([1.0, 50.0])])
    batch = torch.tensor([0] * 30 + [1] * 31)
    found = knn(x, None, 3, batch, metric=Ranged()).index
    assert torch.equal(found[:30], knn(x[:30], k=3, metric=Ranged()).index)
    assert torch.equal(found[30:], knn(x[30:], k=3, metric=Ranged()).index + 30)


@pytest.mark.parametrize("size", [3, 300])
def test_empty_slots_name_the_nearest(size):
    """So that nobody looks into another cloud, where a NaN would show in gradients."""
    batch = torch.tensor([0] * 9 + [1] * size + [2])
    found = knn(cloud(len(batch), 3), None, 12, batch, short="pad", self_point="excluded")
    for row, (index, mask) in enumerate(zip(found.index, found.mask, strict=True)):
        among = batch[index] if bool(mask.any()) else batch[index[mask]]
        assert bool((among == batch[row]).all())
        assert bool((index[~mask] == (index[0] if bool(mask.any()) else 0)).all())


def test_explain_search_refuses_what_knn_refuses():
    batch = torch.tensor([0] * 2 + [1] * 68)
    for ask in (knn, explain_search):
        with pytest.raises(ValueError, match="k=5 is larger than the number of candidates, 2"):
            ask(cloud(70, 2), None, 5, batch)
        ask(cloud(70, 2), None, 5, batch, short="pad")
    assert explain_search(cloud(3, 2), k=5, short="pad") == explain_search(cloud(3, 2), k=3)


@pytest.mark.filterwarnings("error")
def test_a_batch_vector_may_be_a_column_of_a_table():
    batch = torch.arange(3).repeat_interleave(torch.tensor([10, 20, 5]))
    table, x = torch.stack([batch, 7 - batch], 1), cloud(35, 3)
    found = knn(x, None, 4, table[:, 0]).index
    assert torch.equal(found, knn(x, None, 4, batch).index)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "spatial", "manhattan"])
@pytest.mark.parametrize("learns", [False, True])
def test_distances_of_edges_with_gradient_and_without(metric, learns):
    """As the search has measured them, or measured again where something learns."""
    x, batch = cloud(60, 12), torch.arange(2).repeat_interleave(30)
    edges, distance = knn_graph(
        x.requires_grad_(learns), 5, batch, metric=metric, return_distance=True
    )
    assert distance.requires_grad == learns
    source, target = edges
    wanted = as_metric(metric)(Points(x.detach(), x.detach()))[target, source]
    torch.testing.assert_close(distance.detach(), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not knn_graph(x, 5, batch, return_distance=True)[1].requires_grad


def test_a_graph_is_of_rows():
    with pytest.raises(ValueError, match=r"got x of shape \(1, 10, 3\)"):
        knn_graph(torch.rand(1, 10, 3), 3)
