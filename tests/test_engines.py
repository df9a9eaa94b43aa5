"""Engines for points, the choice among them, and what knn and knn_graph do with k."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_geometric import EdgeIndex

from convnn_geo import compiled
from convnn_geo.metrics import Feature, PaperMix, Spatial, as_metric
from convnn_geo.points import Grid, Points
from convnn_geo.search import (
    ENGINES,
    Query,
    costs,
    engines,
    find,
    k_smallest,
    knn,
    knn_graph,
)
from convnn_geo.search.coincident import Thinned
from convnn_geo.search.registry import explain_query

EXACT = [n for n in engines() if not ENGINES[n].approximate and n not in ("grid", "rings", "keops")]
APPROXIMATE = [n for n in engines() if ENGINES[n].approximate]


def naive(x, y, k, own=None):
    """Neighbours by the double loop, in float64: distance, then index."""
    distance = (y.double()[:, None] - x.double()).square().sum(-1)
    if own is not None:
        distance[torch.arange(len(y)), own] = torch.inf
    value, index = distance.to(x.dtype).sort(dim=-1, stable=True)
    return index[:, :k], value[:, :k].double().sqrt().to(x.dtype)


def clouds(kind, n, d):
    """Clouds that are hard in different ways; distances of their integer points are exact."""
    torch.manual_seed(n + d)
    if kind == "uniform":
        return torch.randint(0, 2**10, (n, d)).float()
    if kind == "lattice":
        return torch.randint(0, 4, (n, d)).float()
    if kind == "coincident":
        return torch.full((n, d), 3.0)
    if kind == "flat":
        return torch.randint(0, 2**8, (n, d)).float() * (torch.arange(d) % 2 == 0)
    if kind == "clusters":
        return torch.randint(0, 3, (n, d)).float() * 1e3 + torch.randint(0, 3, (n, d)).float()
    outlier = torch.randint(0, 32, (n, d)).float()
    outlier[0] = 1e3
    return outlier


X3 = torch.rand(5, 3)
KINDS = ["uniform", "lattice", "coincident", "flat", "clusters", "outlier"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("name", EXACT)
def test_every_engine_finds_the_same_in_the_same_order(name, d, kind):
    if name == "cells" and d > 3:
        pytest.skip("cells are for up to 3 dimensions")
    x = clouds(kind, 700, d)
    for y, own in ((None, None), (clouds(kind, 90, d) + 1, None), (None, torch.arange(700))):
        for k in (1, 9, 40):
            self_point = "natural" if own is None else "excluded"
            found = knn(x, y, k, backend=name, self_point=self_point)
            index, distance = naive(x, x if y is None else y, k, own)
            assert torch.equal(found.index, index)
            torch.testing.assert_close(found.distance, distance, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_cells_by_torch_are_the_cells_in_c(monkeypatch, d, kind):
    x, y = clouds(kind, 700, d), clouds(kind, 200, d) - 2
    expected = knn(x, y, 7, backend="dense"), knn(x, k=7, backend="dense", self_point="excluded")
    monkeypatch.setattr(compiled, "library", lambda: None)
    monkeypatch.setattr("convnn_geo.search.kd_tree.installed", lambda name: False)
    found = knn(x, y, 7, backend="cells"), knn(x, k=7, backend="cells", self_point="excluded")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.distance, other.distance)


def test_cells_leave_tight_clusters_to_a_tree():
    x = torch.rand(3000, 3) * 1e-3
    x[:3] = torch.eye(3) * 1e3
    assert compiled.library() is None or compiled.cells_nearest(x, x, 9, None) is None
    assert torch.equal(knn(x, k=9, backend="cells").index, knn(x, k=9, backend="dense").index)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("d", [3, 17])
def test_squares_over_the_range_of_floats_are_no_crash(name, d):
    if name == "cells" and d > 3:
        pytest.skip("cells are for up to 3 dimensions")
    x = torch.randn(50, d) * 1e19
    index = knn(x, k=4, backend=name).index
    assert index.min() >= 0 and index.max() < 50
    if d == 3:
        assert torch.equal(index, knn(x, k=4, backend="dense").index)


@pytest.mark.parametrize("name", EXACT)
def test_no_targets_in_half_precision(name):
    x, batch = torch.randn(40, 3).half(), torch.arange(40) // 20
    found = knn(x, x[:0], 1, batch, batch[:0], backend=name)
    assert found.index.shape == (0, 1) and found.distance.dtype == torch.float32


@pytest.mark.parametrize("name", [n for n in EXACT if n != "dense"])
@pytest.mark.parametrize("own", [False, True])
def test_each_example_of_a_batch_is_searched_as_if_alone(name, own):
    torch.manual_seed(0)
    x = torch.stack([torch.rand(600, 3), torch.rand(600, 3) * 1e-3, torch.rand(600, 3)])
    x[1, :3] = torch.eye(3) * 1e3  # a tight cluster, which cells leave to a tree
    x[2, ::2] = x[2, 1]
    for y in (None,) if own else (None, torch.rand(3, 40, 3)):
        self_point = "excluded" if own else "natural"
        found = knn(x, y, 5, backend=name, self_point=self_point, memory=2**16)
        other = knn(x, y, 5, backend="dense", self_point=self_point)
        assert torch.equal(found.index, other.index)
        assert torch.equal(found.distance, other.distance)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("name", [n for n in EXACT if n != "dense"])
def test_of_many_points_in_one_place_the_first_are_found(monkeypatch, name, compile):
    if not compile:
        monkeypatch.setattr(compiled.build, "library", lambda: None)
    x = torch.randint(0, 2**10, (900, 3)).float()
    x[::2] = x[1]
    x[7], x[9] = -0.0, 0.0
    for y, own in ((None, None), (x[:50], None), (None, torch.arange(900))):
        found = knn(x, y, 9, backend=name, self_point="natural" if own is None else "excluded")
        index, distance = naive(x, x if y is None else y, 9, own)
        assert torch.equal(found.index, index)
        torch.testing.assert_close(found.distance, distance, rtol=3e-7, atol=0)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5]), max_size=40), st.integers(1, 6))
def test_thinned_points_are_the_first_in_each_place(values, most):
    points = torch.tensor(values).view(-1, 1).repeat(1, 2)
    thinned = Thinned.of(points, most)
    wanted = [i for i, v in enumerate(values) if values[:i].count(v) < most]
    kept = list(range(len(values))) if thinned is None else thinned.kept.tolist()
    assert kept == wanted
    if thinned is not None:
        number = thinned.renumbered(torch.arange(-1, len(values))).tolist()
        assert number == [-1] + [wanted.index(i) if i in wanted else -1 for i in range(len(values))]


@pytest.mark.parametrize("name", [n for n in EXACT if n not in ("dense", "cells")])
@pytest.mark.parametrize("kind", ["dot", "scaled_dot"])
def test_products_are_distances_with_one_more_axis(name, kind):
    x, y = torch.randn(400, 6), torch.randn(50, 6)
    found, dense = (knn(x, y, 5, metric=kind, backend=b) for b in (name, "dense"))
    assert torch.equal(found.index, dense.index)
    torch.testing.assert_close(found.distance, dense.distance)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "cells"])
@pytest.mark.parametrize("metric", ["cosine", PaperMix(0.3), 0.3 * Spatial() + 0.7 * Feature()])
def test_metrics_reach_trees_by_their_coordinates(name, metric):
    points = Points(torch.randn(300, 4), torch.rand(300, 2))
    metric = as_metric(metric)
    query = Query(points, points, metric, 6)
    if ENGINES[name].refuses(query):
        pytest.skip(ENGINES[name].refuses(query))
    assert torch.equal(find(query, name).index, find(query, "dense").index)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_engines_find_most_and_keep_the_order(name):
    x = torch.rand(2000, 3)
    exact = knn(x, k=8, backend="dense")
    found = knn(x, k=8, backend=name)
    assert (found.distance.diff(dim=-1) >= 0).all()
    assert (found.index.sort(-1).values.diff(dim=-1) > 0).all()  # each counted once
    torch.testing.assert_close(found.distance, Feature().pairs(Points(x), Points(x), found.index))
    recall = (found.index[:, :, None] == exact.index[:, None]).any(-1).float().mean()
    assert recall > 0.9
    assert torch.equal(found.index, knn(x, k=8, backend=name).index)
    without = knn(x, k=3, backend=name, self_point="excluded")
    assert (without.index != torch.arange(2000)[:, None]).all()
    points = Points(x, x)
    assert dict(explain_query(Query(points, points, Spatial(), 8)))[name].startswith("approximate")


class StandInBVH:
    """What torchbvh.BVH is on a GPU: ties in any order, -1 where there are fewer points."""

    def __init__(self, points):
        assert points.is_contiguous() and points.dtype == torch.float32
        self.points = points.flip(-2)

    def knn(self, queries, k):
        assert k in (4, 8, 16) and queries.is_contiguous() and len(queries) == len(self.points)
        distance = (queries[:, :, None] - self.points[:, None]).square().sum(-1)
        value, index = distance.sort(dim=-1, stable=True)
        missing = max(0, k - index.shape[-1])
        index = self.points.shape[-2] - 1 - index[..., :k]
        return (
            torch.nn.functional.pad(index, (0, missing), value=-1),
            torch.nn.functional.pad(value[..., :k], (0, missing), value=torch.inf),
        )


def stand_in_flash_knn(x, c, k, *, return_distances):
    """What flashlib.flash_knn is on a GPU: factors of products are cut to the bits of TF32."""
    assert not return_distances and k <= c.shape[-2]

    def cut(t):
        return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    value = c.square().sum(-1).unsqueeze(-2) - 2 * cut(x) @ cut(c).transpose(-1, -2)
    return value.topk(k, dim=-1, largest=False).indices.int()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "d"), [("torchbvh", 2), ("torchbvh", 3), ("flashlib", 12)])
def test_engines_of_others_for_gpus_by_stand_ins(monkeypatch, name, d, kind):
    monkeypatch.setitem(sys.modules, "torchbvh", types.SimpleNamespace(BVH=StandInBVH))
    flash_knn = types.SimpleNamespace(flash_knn=stand_in_flash_knn)
    monkeypatch.setitem(sys.modules, "flashlib", flash_knn)
    engine = ENGINES[name]
    assert "GPU" in engine.refuses(Query(Points(X3), Points(X3), Feature(), 1))
    for n, own in ((400, None), (400, torch.arange(400)), (11, None)):
        x = clouds(kind, n, d)
        if kind == "uniform" and name == "flashlib":  # what TF32 can't tell apart
            x = torch.rand(n, d) + (torch.arange(n)[:, None] % 2) * 200
        for k in (1, 9):
            query = Query(Points(x), Points(x), Feature(), k, excluded=own)
            place, distance, mask = engine(query)
            found = find(query, "dense")
            assert mask is None and torch.equal(place, found.index)
            assert torch.equal(distance, found.distance)
    pair = torch.stack([clouds(kind, 300, d), clouds("lattice", 300, d)])
    query = Query(Points(pair), Points(pair), Feature("squared_euclidean"), 5)
    assert torch.equal(engine(query)[0], find(query, "dense").index)


@pytest.mark.slow
@pytest.mark.skipif("keops" not in engines(), reason="pykeops is not installed")
def test_keops_is_the_dense_engine():
    x = clouds("lattice", 300, 3)
    assert torch.equal(knn(x, k=5, backend="keops").index, knn(x, k=5, backend="dense").index)


# -- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs.table.cache_clear()
    costs._expected.cache_clear()
    yield tmp_path
    costs.table.cache_clear()
    costs._expected.cache_clear()


def cost(engine, n, seconds, dimension=3):
    return {
        **{"engine": engine, "device": "cpu", "dimension": dimension},
        **{"n": n, "m": n, "k": 9, "batch": 1, "seconds": seconds},
    }


def test_auto_takes_what_was_fastest_in_the_case_most_like_this(cache):
    cells = [cost("dense", 100, 1.0), cost("cells", 100, 2.0)]
    cells += [cost("dense", 10000, 9.0), cost("cells", 10000, 3.0), cost("dense", 100, 1.0, 64)]
    assert costs.save(cells) == cache / "convnn_geo" / "costs.json"
    assert json.loads(costs.user_table().read_text()) == cells

    def choice(n, dimension):
        points = Points(torch.rand(n, dimension))
        rows = explain_query(Query(points, points, Feature(), 9))
        assert rows[-1][1] is None and all(reason for _, reason in rows[:-1])
        return rows[-1][0], dict(rows)

    assert choice(90, 3)[0] == "dense"
    name, reasons = choice(5000, 3)
    assert name == "cells" and reasons["dense"].startswith("slower")
    assert choice(5000, 60)[0] == "dense"


def test_between_and_beyond_measured_cases_costs_grow_as_they_did(cache):
    """Here dense by the square of n; what was measured once costs the same wherever it is."""
    cells = [cost("dense", 100, 1.0), cost("dense", 1000, 100.0), cost("cells", 1000, 150.0)]
    wide = [cost("dense", 100, 8.0, 30), cost("dense", 1000, 800.0, 30)]
    costs.save(cells + wide)

    def seconds(n, dimension=3):
        points = Points(torch.rand(n, dimension))
        return costs.expected(Query(points, points, Feature(), 9))

    assert seconds(100) == {"dense": 1.0} and seconds(1000) == {"dense": 100.0, "cells": 150.0}
    assert seconds(200) == {"dense": pytest.approx(4.0)}
    assert seconds(2000) == {"dense": pytest.approx(400.0), "cells": pytest.approx(150.0)}
    growth = math.log(8) / math.log(10)  # of dimension
    assert seconds(200, 20)["dense"] == pytest.approx(32.0 * (20 / 30) ** growth)
    assert seconds(10) == {"dense": 1.0}  # a call has costs of its own


def test_what_was_not_measured_goes_to_our_kernels_where_they_run(monkeypatch):
    from convnn_geo import gpu

    def choice(n, dimension):
        points = Points(torch.rand(n, dimension))
        return explain_query(Query(points, points, Feature(), 9))[-1]

    monkeypatch.setattr("convnn_geo.search.registry.expected", lambda query: {})
    assert choice(5000, 3) == ("cells", None) and choice(5000, 64) == ("dense", None)
    monkeypatch.setattr(gpu, "refuses", lambda device: None)
    assert choice(5000, 3) == ("triton", None) and choice(40000, 64) == ("triton", None)
    assert choice(40000, 3) == ("cells", None)


def test_costs_are_those_of_the_directions_in_which_points_vary():
    """Of a unit vector in three dimensions there are two; of directions alone none are left out."""
    points = Points(torch.rand(50, 3), torch.rand(50, 2))
    mixture = 0.3 * Spatial(squared=True) + 0.7 * Feature("cosine")

    def like(metric, dimension):
        plain = Points(torch.rand(50, dimension))
        wanted = costs.expected(Query(plain, plain, Feature(), 9))
        return costs.expected(Query(points, points, metric, 9)) == wanted

    assert like(mixture, 4) and like(Feature("cosine"), 5) and like(Feature(), 3)


def test_an_engine_for_directions_is_chosen_without_looking_where_there_are_no_values():
    x = torch.randn(3000, 3)
    find = lambda x: knn(x, k=4, metric="cosine", check=False).index  # noqa: E731
    wanted = find(x)
    assert torch.equal(torch.func.vmap(find)(x[None])[0], wanted)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert find(mode.from_tensor(x)).shape == wanted.shape


def test_directions_that_many_share_are_not_left_to_trees():
    """Those of colours are equal but for rounding, and what a tree can't tell is searched again."""
    torch.manual_seed(0)
    few = torch.rand(500, 3)[torch.randint(500, (20000,))] * (1 + torch.rand(20000, 1))
    colours, random = (Points(x) for x in (few, torch.rand(20000, 3)))
    rows = explain_query(Query(colours, colours, Feature("cosine"), 9))
    assert rows[-1] == ("dense", None)
    if ENGINES["kd_tree"].missing() is None:
        assert dict(rows)["kd_tree"].startswith("many directions are the same")
        assert explain_query(Query(random, random, Feature("cosine"), 9))[-1] == ("kd_tree", None)
        placed = Points(torch.rand(20000, 3), torch.rand(20000, 2))
        metric = 0.3 * Spatial(squared=True) + 0.7 * Feature("cosine")
        assert explain_query(Query(placed, placed, metric, 9))[-1] == ("kd_tree", None)


@pytest.mark.parametrize("text", ["{", "null", "[1]", '[{"engine": "dense"}]', "[]"])
def test_a_table_that_cannot_be_read_is_none(cache, text):
    (cache / "convnn_geo").mkdir()
    costs.user_table().write_text(text)
    assert knn(torch.rand(50, 3), k=4).index.shape == (50, 4)


def test_costs_of_another_device_stay(cache):
    costs.save([cost("dense", 100, 1.0)])
    costs.save([{**cost("cells", 100, 2.0), "device": "cuda"}])
    costs.save([cost("dense", 100, 3.0)])
    kept = json.loads(costs.user_table().read_text())
    assert [(cell["device"], cell["seconds"]) for cell in kept] == [("cuda", 2.0), ("cpu", 3.0)]


def test_few_coordinates_in_float64_go_to_a_tree():
    points = Points(torch.rand(1500, 3), torch.rand(1500, 2))
    rows = explain_query(
        Query(points, points, 0.3 * Spatial(squared=True) + 0.7 * Feature("cosine"), 9)
    )
    if ENGINES["kd_tree"].missing() is None:
        assert rows[-1] == ("kd_tree", None)
        assert dict(rows)["dense"] == "a tree is faster for few coordinates in float64"


def test_the_shipped_table_is_sound():
    cells = json.loads(costs.SHIPPED.read_text())
    assert {cell["engine"] for cell in cells} <= set(ENGINES)
    assert not any(ENGINES[cell["engine"]].approximate for cell in cells)
    assert all(cell["seconds"] > 0 for cell in cells)


# -- knn ----------------------------------------------------------------------------------------

LINE = torch.tensor([0.0, 1.0, 3.0, 7.0])[:, None]


def test_the_point_itself():
    assert knn(LINE, k=2, self_point="excluded").index.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    first = torch.zeros(4, 1)
    assert knn(first, k=2, self_point="first").index.tolist() == [[0, 1], [1, 0], [2, 0], [3, 0]]
    with pytest.raises(ValueError, match="searched in itself"):
        knn(LINE, LINE.clone(), 1, self_point="excluded")
    with pytest.raises(ValueError, match="besides the point itself"):
        knn(LINE, k=4, self_point="excluded")


def test_a_largest_distance_empties_slots():
    found = knn(LINE, k=3, max_distance=2.0)
    assert found.mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert knn(LINE, k=3, metric="dot", max_distance=-5.0).mask.sum(-1).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="max_distance"):
        knn(LINE, k=3, max_distance=math.nan)


def test_too_large_a_k():
    with pytest.raises(ValueError, match="larger than the number of candidates, 4"):
        knn(LINE, k=5)
    assert knn(LINE, k=5, short="truncate").index.shape == (4, 4)
    padded = knn(LINE, k=6, short="pad")
    assert padded.mask.tolist() == [[True] * 4 + [False] * 2] * 4
    assert (padded.distance[:, 4:] == math.inf).all()
    lonely = knn(LINE[:1], k=2, self_point="excluded", short="pad")
    assert lonely.mask.tolist() == [[False, False]]
    with pytest.raises(ValueError, match="short"):
        knn(LINE, k=5, short="drop")


@pytest.mark.parametrize("name", ["auto", *EXACT])
@pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
def test_ragged_clouds_are_their_clouds(name, self_point):
    sizes = [300, 1, 0, 700, 5]
    x = clouds("lattice", sum(sizes), 3)
    batch = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    found = knn(x, k=6, batch_x=batch, backend=name, self_point=self_point, short="pad")
    start = 0
    for size in sizes:
        if size:
            rows = slice(start, start + size)
            alone = knn(x[rows], k=6, backend="dense", self_point=self_point, short="pad")
            mask = torch.ones(size, 6).bool() if alone.mask is None else alone.mask
            assert torch.equal(found.mask[rows], mask)
            assert torch.equal(found.index[rows][mask], (alone.index + start)[mask])
            assert torch.equal(found.distance[rows], alone.distance)
        start += size
    truncated = knn(x, k=6, batch_x=batch, backend=name, short="truncate")
    assert truncated.index.shape == (sum(sizes), 1) and truncated.mask is None


def test_small_clouds_are_searched_together(monkeypatch):
    batch = torch.arange(60) // 6
    asked = []
    module = sys.modules["convnn_geo.search.knn"]  # the package has the function of that name
    monkeypatch.setattr(module, "find", lambda query, name: asked.append(1) or find(query, name))
    knn(torch.rand(60, 3), k=3, batch_x=batch)
    assert len(asked) == 1


@pytest.mark.slow
def test_a_million_points_in_bounded_memory():
    x = torch.rand(10**6, 3)
    found = knn(x, k=16)
    some = torch.randint(10**6, (20,))
    assert torch.equal(found.index[some], knn(x, x[some], 16, backend="dense").index)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("distance", [1e3, 1e5])
def test_targets_far_from_the_sources_find_the_same(monkeypatch, compile, distance):
    """Their distances round to float32 so coarsely that many tie."""
    if not compile:
        monkeypatch.setattr(compiled.build, "library", lambda: None)
    torch.manual_seed(0)
    x = torch.randint(-9, 9, (3000, 16)).float()
    y = torch.randint(-9, 9, (8, 16)).float() + distance
    index, _ = naive(x, y, 200)
    for name in [n for n in EXACT if n != "cells"]:
        assert torch.equal(knn(x, y, 200, backend=name).index, index), name


@pytest.mark.parametrize("name", [n for n in EXACT if n != "cells"])
def test_searches_with_their_checks_are_traced_whole(name):
    x = torch.randn(40, 12)
    found = torch.compile(lambda p: knn(p, k=4, backend=name).index, fullgraph=True)(x)
    assert torch.equal(found, knn(x, k=4, backend=name).index)


# -- knn_graph ----------------------------------------------------------------------------------


def test_distances_of_edges_are_those_of_their_cloud():
    torch.manual_seed(0)
    x, batch = torch.rand(60, 3) * torch.arange(1, 61)[:, None], torch.tensor([0] * 20 + [1] * 40)
    edges, distance = knn_graph(x, 4, batch, metric="paper_mix", return_distance=True)
    for cloud in (0, 1):
        own = batch == cloud
        _, alone = knn_graph(x[own], 4, metric="paper_mix", return_distance=True)
        torch.testing.assert_close(distance[own[edges[1]]], alone)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_the_graph_is_torch_clusters(loop, flow):
    torch_cluster = pytest.importorskip("torch_cluster")
    x, batch = torch.rand(60, 3), torch.arange(60) // 20
    edge_index = knn_graph(x, 4, batch, loop=loop, flow=flow)
    other = torch_cluster.knn_graph(x, 4, batch, loop=loop, flow=flow)
    assert isinstance(edge_index, EdgeIndex) and edge_index.sparse_size() == (60, 60)
    edge_index.validate()
    assert {tuple(e) for e in edge_index.t().tolist()} == {tuple(e) for e in other.t().tolist()}


def test_distances_of_edges_have_a_gradient():
    x = torch.rand(20, 3, requires_grad=True)
    edge_index, distance = knn_graph(x, 3, return_distance=True)
    source, target = edge_index.as_tensor()
    torch.testing.assert_close(distance, (x[source] - x[target]).norm(dim=-1))
    distance.sum().backward()
    assert x.grad.abs().sum() > 0
    near, short = knn_graph(x, 3, max_distance=0.2, return_distance=True)
    assert near.shape[1] == short.numel() == int((distance <= 0.2).sum())


@pytest.mark.parametrize("name", ["auto", *EXACT])
def test_no_examples_have_no_neighbours(name):
    assert knn(torch.zeros(0, 300, 3), k=3, backend=name).index.shape == (0, 300, 3)


def test_graphs_of_nothing_and_of_too_much():
    assert knn_graph(LINE[:0], 3).shape == (2, 0)
    assert knn_graph(LINE, 9, short="pad").shape == (2, 12)
    with pytest.raises(ValueError, match="flatten"):
        knn_graph(LINE[None], 1)
    with pytest.raises(ValueError, match="flow"):
        knn_graph(LINE, 1, flow="down")


# -- orders that rounding could change ----------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "p"),
    [(Spatial("chebyshev"), math.inf), (Feature("minkowski", p=10.0), 10), (Spatial("l1"), 1)],
)
@pytest.mark.parametrize("d", [3, 9, 40])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
def test_other_norms_keep_their_order(metric, p, d, scale):
    x = torch.randn(60, d) * scale
    found = knn(x, k=5, metric=metric)
    distance = torch.cdist(x.double(), x.double(), p)
    torch.testing.assert_close(
        distance.gather(-1, found.index), distance.sort(-1).values[:, :5], rtol=1e-5, atol=0
    )


def test_many_sums_differ_by_rounding_alone():
    """Of tenths, which float32 rounds; in float64 what is as far on paper is as far."""
    x = torch.randint(0, 3, (60, 40), generator=torch.Generator().manual_seed(0)) * 0.1
    distance = torch.cdist(x.double(), x.double(), 1).float()
    order = distance.sort(stable=True).indices[:, :20]
    assert torch.equal(knn(x, k=20, metric=Feature("manhattan")).index, order)


def test_vectors_that_differ_by_their_last_bits():
    x = torch.randn(1, 64) * torch.arange(1, 151)[:, None]
    for name in EXACT:
        if name not in ("cells", "faiss"):
            found = knn(x, k=1, metric="pearson", backend=name)
            assert (found.distance < 1e-14).all()


def test_a_run_of_equal_keys_hides_nobody_who_is_nearer():
    # 20 keys at a distance that float32 products can't tell from that of the nearest.
    torch.manual_seed(0)
    q = torch.randn(50, 64)
    near = q + 0.1 * torch.randn(50, 64)
    for target, nearest in zip(q, near, strict=True):
        same = (target + (nearest - target) * (1 + 1e-6)).expand(20, 64)
        x = torch.cat([same, nearest[None]])
        distance = (x.double() - target).norm(dim=-1).float()
        expected = distance.sort(stable=True).indices[:3]
        for name in ("dense", "kd_tree"):
            if name in EXACT:
                assert torch.equal(knn(x, target[None], 3, backend=name).index[0], expected)


def test_scaled_positions_tie_alike_in_float64():
    points = Points(torch.zeros(1, 49, 1, dtype=torch.float64), grid=Grid((7, 7)))
    query = Query(points, points, Spatial(scale=0.3), 9)
    assert torch.equal(find(query, "grid").index, find(query, "dense").index)


def test_the_paper_mix_far_from_the_origin_and_of_one_number():
    x = torch.randint(0, 50, (60, 8)).float()
    near, far = (knn(t, k=5, metric=PaperMix(0.5)) for t in (x, x + 2**20))
    torch.testing.assert_close(near.distance, far.distance, rtol=1e-5, atol=1e-6)
    assert knn(torch.ones(1, 1), k=1, metric=PaperMix(0.5)).index.tolist() == [[0]]


def test_more_than_there_is_cannot_be_selected():
    for k in (-1, 4):
        with pytest.raises(ValueError, match="from 0 to 3"):
            k_smallest(torch.zeros(2, 3), k)


# -- one operator -----------------------------------------------------------------------------


#: KeOps compiles for each case, pynndescent for half a minute.
TRACED = ["auto", *(n for n in (*EXACT, *APPROXIMATE) if n != "pynndescent")]


def cloud_for(engine):
    """Points that the engine serves."""
    return torch.randn(60, 3 if engine == "cells" else 12)


@pytest.mark.parametrize("engine", TRACED)
@pytest.mark.parametrize("kind", ["points", "angles", "products"])
def test_the_operator_keeps_the_rules_of_torch(engine, kind):
    dimension = 3 if engine == "cells" else 12
    q, keys = torch.randn(2, 7, dimension), torch.randn(2, 30, dimension)
    bias = torch.randn(2, 30) if kind == "products" else None
    arguments = (kind, q, keys, bias, None, 1.0, False, True, 4, None, None, 2**20, engine)
    torch.library.opcheck(torch.ops.convnn_geo.nearest.default, arguments)


@pytest.mark.parametrize("engine", TRACED)
def test_the_search_is_traced_whole(engine):
    x = cloud_for(engine)

    def find(points):
        return knn(points, k=4, backend=engine, check=False).index

    fast = torch.compile(find, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(x), find(x))


class Finder(torch.nn.Module):
    def __init__(self, engine):
        super().__init__()
        self.engine = engine

    def forward(self, points):
        found = knn(points, k=4, backend=self.engine, check=False)
        return found.index, found.distance


@pytest.mark.parametrize("engine", TRACED)
def test_the_search_is_exported(engine):
    x = cloud_for(engine)
    program = torch.export.export(Finder(engine), (x,))
    for found, wanted in zip(program.module()(x), Finder(engine)(x), strict=True):
        assert torch.equal(found, wanted)
