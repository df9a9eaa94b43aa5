"""Rings on a GPU, or under TRITON_INTERPRET=1, find what a search of all pairs finds."""

import math
from dataclasses import replace

import pytest
import torch
from ring_cases import MIXTURE, PLACES, RINGS, agree, image
from triton_cases import DEVICE, TRITON

from convnn_geo import gpu
from convnn_geo.metrics import Feature, Spatial, interpolate
from convnn_geo.nn import ConvNN2d
from convnn_geo.points import Grid, Points
from convnn_geo.search import Query, find
from convnn_geo.search.registry import explain_query
from convnn_geo.search.rings import LARGEST_K

pytestmark = TRITON


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Arguments of searches; more targets a program, for whose number an interpreter takes time."""
    from convnn_geo.gpu import rings

    if gpu.interpreted():
        monkeypatch.setattr(rings, "LANES", 128)
    seen, nearest = [], rings.nearest
    monkeypatch.setattr(rings, "nearest", lambda *args: seen.append(args) or nearest(*args))
    return seen


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("feature", ["cosine", "euclidean", "squared_euclidean"])
def test_the_same_as_dense_search(launches, place, feature):
    points = image(2, 2, 5, 9, device=DEVICE)
    for lam, k in ((0.3, 4), (0.95, 1)):
        metric = interpolate(PLACES[place], Feature(feature), lam)
        agree(Query(points, points, metric, 1), (k,))
    assert len(launches) == 4


def test_without_the_point_itself():
    points, own = image(1, 3, 5, 9, device=DEVICE), torch.arange(45, device=DEVICE)
    metric = 0.3 * Spatial() + 2 * Feature("cosine")
    agree(Query(points, points, metric, 1, excluded=own), (3,))
    agree(Query(points, points, metric, 1, excluded=own.flip(0)), (3,))


def test_all_there_are_and_more_than_a_thread_keeps():
    points = image(1, 2, 2, 9, device=DEVICE)
    own = torch.arange(18, device=DEVICE)
    agree(Query(points, points, MIXTURE, 1), (18,))
    agree(Query(points, points, MIXTURE, 1, excluded=own), (17,))
    points = image(1, 2, 9, 8, device=DEVICE)
    assert str(LARGEST_K) in RINGS.refuses(Query(points, points, MIXTURE, LARGEST_K + 1))


def test_other_targets_than_sources():
    """As strides and margins make them; one example for all, too."""
    source = image(2, 3, 5, 9, device=DEVICE).pad(((1, 0), (1, 2)))
    grid = Grid((3, 3), step=(2.0, 3.0))
    target = Points(torch.randn(2, 9, 3, device=DEVICE), grid=grid)
    agree(Query(target, source, MIXTURE, 1), (5,))
    agree(Query(Points(target.x[:1], grid=grid), source, MIXTURE, 1), (5,))


@pytest.mark.parametrize("size", [(20,), (2, 3, 4)])
def test_lines_and_volumes(size):
    points = Points.from_image(torch.randn(2, 3, *size, device=DEVICE))
    agree(Query(points, points, MIXTURE, 1), (3,))


def test_many_examples_fill_several_programs():
    points = image(5, 2, 3, 9, device=DEVICE)
    agree(Query(points, points, MIXTURE, 1), (2,))


@pytest.mark.parametrize("feature", ["cosine", "euclidean"])
def test_what_is_not_finite_is_last(feature):
    x = torch.randn(1, 3, 6, 7)
    x[0, :, 2, 3], x[0, 1, 4, 4] = math.nan, math.inf
    points = Points.from_image(x.to(DEVICE))
    query = Query(points, points, interpolate("spatial", feature, 0.5), 5)
    found, dense = find(query, "rings"), find(query, "dense")
    sound = points.x[0].isfinite().all(-1)
    assert torch.equal(found.index[0][sound], dense.index[0][sound])
    torch.testing.assert_close(found.distance[0][sound], dense.distance[0][sound])
    assert bool(found.distance[0][~sound].isfinite().logical_not().all())


def test_places_that_count_against_do_not_end_the_search():
    """Of weights that are tensors nobody looks at the values."""
    points = image(1, 3, 6, 7, device=DEVICE)
    query = Query(points, points, interpolate("spatial", "cosine", 0.5), 5)
    bound = query.bound
    for weights in ((-0.5, 1.0), (0.5, -1.0)):
        parts = [
            (torch.tensor(w, device=DEVICE), part)
            for w, (_, part) in zip(weights, bound.parts, strict=True)
        ]
        agree(replace(query, bind=lambda parts=parts: type(bound)(parts)), (5,))


def test_few_pixels_of_many_channels_are_left_to_products():
    for channels, engine in ((10, "rings"), (11, "dense")):
        points = Points.from_image(torch.randn(1, channels, 4, 5, device=DEVICE))
        query = Query(points, points, MIXTURE, 3)
        assert RINGS.refuses(query) is None
        reasons = explain_query(query)
        assert reasons[-1] == (engine, None)
        assert ("products do sooner" in str(reasons)) == (engine == "dense")


def test_a_layer_that_learns_its_place(launches):
    metric = interpolate("spatial", "euclidean", 0.5, learnable=True)
    layer = ConvNN2d(3, 4, k=5, metric=metric, weighting="softmax").to(DEVICE)
    x, found = torch.randn(2, 3, 6, 7, device=DEVICE, requires_grad=True), []
    for search in ("auto", "dense"):
        layer.search = search
        out = layer(x)
        wanted = [x, *layer.parameters()]
        found.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    assert len(launches) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
