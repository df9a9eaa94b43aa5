"""search.radius and radius_graph: against the plain loop, and against torch_cluster's."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from convnn_geo.metrics import Feature
from convnn_geo.search import knn, knn_graph, radius, radius_graph


def cloud(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


BATCH = torch.tensor([0] * 30 + [1] * 3 + [3] * 40)


def loop(x, y, r, most, batch_x, batch_y, excluded=False):
    """Places of each target's neighbours, nearest first."""
    distance = torch.cdist(y.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.masked_fill(batch_y[:, None] != batch_x, torch.inf)
    if excluded:
        distance.fill_diagonal_(torch.inf)
    order = distance.argsort(dim=-1, stable=True)[:, :most]
    near = distance.gather(-1, order) <= r
    return [row[keep].tolist() for row, keep in zip(order, near, strict=True)]


@pytest.mark.parametrize("dimension", [2, 3, 12])
@pytest.mark.parametrize("most", [1, 5, 73, 100])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_neighbours_are_those_within_the_radius(dimension, most, backend):
    x, y = cloud(73, dimension), cloud(50, dimension, seed=1)
    batch_y = torch.tensor([0] * 20 + [1] * 20 + [3] * 10)
    r = {2: 0.15, 3: 0.25, 12: 1.15}[dimension]
    found = radius(x, y, r, BATCH, batch_y, most, backend=backend)
    assert found.index.shape == found.mask.shape == (50, min(most, 40))  # the largest
    rows = [i[m].tolist() for i, m in zip(found.index, found.mask, strict=True)]
    assert rows == loop(x, y, r, most, BATCH, batch_y)
    assert 0 in map(len, rows) and (most == 1 or max(map(len, rows)) > 1)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_the_graph_has_an_edge_for_each(own, flow):
    x, r = cloud(73, 3), 0.3
    graph, distance = radius_graph(x, r, BATCH, own, 6, flow, return_distance=True)
    rows = loop(x, x, r, 6, BATCH, BATCH, excluded=not own)
    wanted = [[j, i] for i, row in enumerate(rows) for j in row]
    edges = graph.as_tensor() if flow == "source_to_target" else graph.as_tensor().flip(0)
    assert edges.t().tolist() == wanted
    torch.testing.assert_close(distance, (x[edges[0]] - x[edges[1]]).norm(dim=-1))
    assert bool((distance <= r).all())


def test_the_same_as_torch_clusters():
    """Which takes any where there are too many: here are never too many."""
    torch_cluster = pytest.importorskip("torch_cluster")
    x, r = cloud(73, 3), 0.3
    theirs = torch_cluster.radius_graph(x, r, BATCH, max_num_neighbors=73)
    ours = radius_graph(x, r, BATCH, max_num_neighbors=73)
    assert sorted(ours.t().tolist()) == sorted(theirs.t().tolist())


def test_distances_learn_and_the_radius_itself_is_within():
    x = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    graph, distance = radius_graph(x, 2.0, return_distance=True)
    assert graph.tolist() == [[1, 0, 2, 1], [0, 1, 1, 2]]
    distance.sum().backward()
    assert x.grad.tolist() == [[-2.0], [0.0], [2.0]]
    squared = radius_graph(x.detach(), 4.0, metric="squared_euclidean")
    assert squared.tolist() == graph.tolist()


def test_no_more_slots_than_sources():
    x, batch = torch.rand(60, 3), torch.arange(60) // 20
    for most in (10**12, None):
        edges = radius_graph(x, math.inf, batch, loop=True, max_num_neighbors=most)
        assert edges.shape == (2, 3 * 20 * 20)
    found = radius(x, None, 0.5, batch, max_num_neighbors=10**12)
    assert found.index.shape == (60, 20)
    fullest = int(found.mask.sum(-1).max())
    assert radius(x, None, 0.5, batch, max_num_neighbors=None).index.shape == (60, fullest)
    assert radius(x, x[:2], math.inf, max_num_neighbors=None).index.shape == (2, 60)
    assert radius(x, x[:2] + 9, 0.5, max_num_neighbors=None).index.shape == (2, 0)
    assert knn(x, k=3, max_distance=math.inf).mask.all()


def test_few_points_and_none():
    assert radius_graph(torch.zeros(1, 3), 1.0).shape == (2, 0)
    assert radius_graph(torch.zeros(0, 3), 1.0).shape == (2, 0)
    found = radius(torch.zeros(4, 3), torch.zeros(0, 3), 1.0)
    assert found.index.shape == (0, 4)
    many = torch.zeros(40, 3)  # all coincide: the first come first
    assert radius(many, None, 0.0, max_num_neighbors=3).index.tolist() == [[0, 1, 2]] * 40
    assert torch.equal(radius_graph(many, 0, None, False, 3), knn_graph(many, 3))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: radius(cloud(4, 3), None, -1.0), "r: .*at least 0, got -1"),
        (lambda: radius_graph(cloud(4, 3), float("nan")), "r: .*finite"),
        (
            lambda: radius_graph(cloud(4, 3), 1.0, max_num_neighbors=0),
            "max_num_neighbors: .*1, got 0",
        ),
        (lambda: radius_graph(cloud(4, 3), 1.0, torch.tensor([1, 0, 0, 0])), "sorted"),
        (lambda: radius(cloud(4, 3), cloud(4, 2), 1.0), "dimensions differ"),
        (lambda: radius(cloud(4, 3) / 0, None, 1.0), "finite"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("most", [40, 500, None])
def test_slots_grow_with_the_fullest_target(most):
    """Few lie among many others, most do not: no n x n slots are made for them."""
    torch.manual_seed(0)
    x = torch.cat([torch.rand(300, 3) * 0.01, torch.rand(700, 3) + 1.0])
    asked, distance = [], torch.cdist(x.double(), x.double())
    module = importlib.import_module("convnn_geo.search.radius")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "knn", lambda *a, **kw: asked.append(a[2]) or knn(*a, **kw))
        edges = radius_graph(x, 0.1, max_num_neighbors=most)
    count = ((distance <= 0.1).sum(1) - 1).clamp_max(most or 1000)
    assert torch.equal(edges[1].bincount(minlength=1000), count)
    assert asked == {40: [32, 40], 500: [32, 128, 500], None: [32, 128, 512]}[most]
    assert (distance[edges[0], edges[1]] <= 0.1 + 1e-6).all()


def test_a_metric_that_learns_is_asked_once():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    metric = Feature("euclidean", query=net, key=net)
    radius(torch.randn(200, 3), None, 10.0, max_num_neighbors=None, metric=metric)
    assert net[1].num_batches_tracked == 1
