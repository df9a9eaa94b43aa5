"""Search ring by ring: mixtures of place and feature on images, as dense search finds them."""

from __future__ import annotations

import pytest
import torch
from ring_cases import MIXTURE, PLACES, RINGS, agree, image

from convnn_geo import compiled, recipes
from convnn_geo.candidates import Random
from convnn_geo.encodings import Encoding
from convnn_geo.metrics import (
    Combination,
    Differences,
    Encoded,
    Feature,
    Mahalanobis,
    Metric,
    PaperMix,
    Spatial,
    interpolate,
)
from convnn_geo.metrics.packed import pack
from convnn_geo.nn import ConvNN1d, ConvNN2d, ConvNN3d
from convnn_geo.points import Grid, Points
from convnn_geo.search import ENGINES, Query, explain_search, find, knn, offsets

needs_compiler = pytest.mark.skipif(compiled.library() is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("feature", ["cosine", "euclidean", "squared_euclidean"])
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_the_same_as_dense_search(place, feature, channels):
    points = image(2, channels, 10, 7)
    for lam in (0.05, 0.7, 0.99):
        metric = interpolate(PLACES[place], Feature(feature), lam)
        agree(Query(points, points, metric, 1), (1, 9, 70))


@needs_compiler
def test_sums_in_any_order_and_without_the_point_itself():
    points, own = image(1, 3, 9, 8), torch.arange(72)
    for metric in (
        0.3 * Spatial() + 2 * Feature("cosine"),
        Feature("cosine") + 0.1 * Spatial("l1"),
    ):
        agree(Query(points, points, metric, 1, excluded=own), (7,))
        agree(Query(points, points, metric, 1, excluded=own.flip(0)), (71,))


@needs_compiler
@pytest.mark.parametrize("metric", ["l1", "chebyshev"])
def test_sums_that_differ_by_rounding_alone(metric):
    """Of whole numbers: what is as far on paper is as far to both, or to neither."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 3, 12, 11), generator=generator).float()
    points = Points.from_image(x)
    for feature in ("cosine", "euclidean"):
        agree(Query(points, points, interpolate(Spatial(metric), Feature(feature), 0.7), 1), (9,))


@needs_compiler
@pytest.mark.parametrize("feature", ["euclidean", "squared_euclidean"])
def test_squares_too_large_for_single_precision(feature):
    x = 1e15 * image(1, 20, 10, 9).x
    x[:, ::7] *= 1e5  # differences whose squares are over 3e38
    points = Points(x, grid=Grid((10, 9)))
    metric = 1e16 * Spatial() + (1e-3 if feature == "euclidean" else 1e-22) * Feature(feature)
    agree(Query(points, points, metric, 1), (9, 50))


@needs_compiler
def test_more_neighbours_than_anyone_sorts_at_once():
    points = image(1, 17, 20, 18)
    for lam in (0.01, 0.3):
        agree(Query(points, points, interpolate("spatial", "euclidean", lam), 1), (300, 360))


@needs_compiler
def test_other_targets_than_sources():
    """As strides and margins make them; one example for all, too."""
    source, metric = image(2, 3, 12, 9).pad(((2, 2), (1, 1))), interpolate("spatial", "cosine", 0.6)
    grid = Grid((6, 3), step=(2.0, 3.0))
    target = Points(torch.randn(2, 18, 3), grid=grid)
    agree(Query(target, source, metric, 1), (5,))
    agree(Query(Points(target.x[:1], grid=grid), source, metric, 1), (5,))


@needs_compiler
@pytest.mark.parametrize(
    "layer, shape",
    [
        (recipes.interpolated_conv2d(3, 4, 7, stride=2, padding=3, lam=0.8), (2, 3, 20, 17)),
        (
            ConvNN2d(3, 4, k=5, metric=interpolate("spatial", "cosine", 0.5), padding=1),
            (1, 3, 8, 9),
        ),
        (ConvNN2d(3, 4, k=5, metric=0.2 * Spatial() + Feature(), self_point="first"), (1, 3, 8, 9)),
        (
            ConvNN2d(
                3,
                4,
                k=5,
                metric=interpolate("spatial", "euclidean", 0.5, learnable=True),
                weighting="softmax",
            ),
            (1, 3, 8, 9),
        ),
        (ConvNN1d(3, 4, k=5, metric=0.2 * Spatial() + Feature("cosine")), (2, 3, 30)),
        (ConvNN3d(3, 4, k=5, metric=0.2 * Spatial() + Feature("cosine")), (1, 3, 4, 5, 6)),
    ],
)
def test_layers(layer, shape, monkeypatch):
    x, asked = torch.randn(*shape, requires_grad=True), []
    run = type(RINGS).run
    monkeypatch.setattr(type(RINGS), "run", lambda self, q: asked.append(q) or run(self, q))
    found = {}
    for search in ("auto", "dense"):
        layer.search = search
        out = layer(x)
        found[search] = [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]
    assert len(asked) == 1  # who is not told takes rings
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


@needs_compiler
def test_most_of_a_large_image_is_never_looked_at():
    """What would be 4 GB of distances takes a moment; a few of them say that it is right."""
    points = Points.from_image(torch.rand(1, 3, 180, 180))
    metric = interpolate("spatial", "cosine", 0.7)
    assert explain_search(points, k=9, metric=metric)[-1] == ("rings", None)
    found = knn(points, k=9, metric=metric)
    some = torch.tensor([0, 179, 16_000, 32_399])
    rows = metric(Points(points.x[:, some], pos=points.position[some]), points)
    assert torch.equal(found.index[:, some], rows.argsort(dim=-1, stable=True)[..., :9])


@needs_compiler
def test_what_is_not_finite_goes_to_dense_search():
    points = image(1, 3, 9, 8)
    points.x[0, 5] = torch.nan
    query = Query(points, points, interpolate("spatial", "cosine", 0.5), 4)
    found, wanted = find(query, "rings"), find(query, "dense")
    assert torch.equal(found.index, wanted.index)


CLOUD = Points(torch.randn(9, 3), torch.rand(9, 2))
DOUBLE = Points(torch.randn(1, 72, 3).double(), grid=Grid((9, 8)))


@needs_compiler
@pytest.mark.parametrize(
    "query, why",
    [
        (Query(CLOUD, CLOUD, MIXTURE, 3), "on no grid"),
        (Query(*[image(1, 3, 9, 8)] * 2, Feature("cosine"), 3), "other engines serve these"),
        (Query(*[image(1, 3, 9, 8)] * 2, PaperMix(0.5), 3), "other engines serve these"),
        (
            Query(*[image(1, 3, 9, 8)] * 2, interpolate("spatial", "dot", 0.5), 3),
            "no sum of a distance",
        ),
        (Query(*[image(1, 3, 9, 8)] * 2, Spatial() + Mahalanobis(3) + Feature(), 3), "no sum of a"),
        (Query(*[image(1, 3, 9, 8)] * 2, interpolate("spatial", "manhattan", 0.5), 3), "no sum of"),
        (
            Query(*[Points(image(1, 3, 9, 8).x.double(), grid=Grid((9, 8)))] * 2, MIXTURE, 3),
            "float64",
        ),
        (
            Query(
                Points(torch.randn(1, 4, 3), grid=Grid((2, 2), origin=(0.5, 0.5))),
                image(1, 3, 9, 8),
                MIXTURE,
                3,
            ),
            "between the pixels",
        ),
        (
            Query(*[image(1, 3, 9, 8)] * 2, MIXTURE, 3, Random(5)(*[image(1, 3, 9, 8)] * 2)),
            "candidates are restricted",
        ),
    ],
)
def test_refusals(query, why):
    assert why in str(RINGS.refuses(query))
    with pytest.raises(ValueError, match="search backend 'rings' can't serve this query"):
        find(query, "rings")


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)
    points = image(1, 3, 9, 8)
    query = Query(points, points, MIXTURE, 3)
    assert RINGS.refuses(query) == "there is no C compiler"
    assert find(query).index.shape == (1, 72, 3)


@pytest.mark.parametrize("compiled_", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_the_operator_keeps_the_rules_of_torch(monkeypatch, compiled_, exact):
    """Inside it rings or, without a compiler, dense search finds the same."""
    if not compiled_:
        monkeypatch.setattr(compiled, "library", lambda: None)
    points, own = image(2, 3, 9, 8), torch.arange(72)
    query = Query(points, points, MIXTURE, 4, excluded=own, exact=exact)
    grid = (points.grid.size, points.grid.origin, points.grid.step)
    arguments = (*pack(query.bound), 4, own, exact, query.slab, *grid, *grid)
    operator = torch.ops.convnn_geo.nearest_on_image.default
    torch.library.opcheck(operator, arguments)
    index, values = operator(*arguments)
    found = find(query, "dense")
    assert torch.equal(index, found.index)
    torch.testing.assert_close(values, found.distance)


@needs_compiler
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("learnable", [False, True])
def test_transforms_go_by_dense_search(learnable):
    """torch.func maps no operator that takes lists."""
    metric = interpolate("spatial", "cosine", 0.5, learnable)
    layer = ConvNN2d(3, 4, k=5, metric=metric, weighting="softmax")
    x = torch.randn(3, 3, 7, 6)
    mapped = torch.func.vmap(lambda one: layer(one[None])[0])(x)
    torch.testing.assert_close(mapped, layer(x))
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    found = torch.func.grad(lambda t: layer(t).square().sum())(x)
    torch.testing.assert_close(found, leaf.grad)
    out, slope = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(out, layer(x))
    assert bool(slope.abs().sum() > 0)


class Mine(Metric):
    """Distances of the user's own that look like a mixture of place and feature."""

    def __init__(self, shift=0.0, first=1.0, second=1.0):
        super().__init__()
        self.shift, self.first, self.second = shift, first, second

    def distances(self, target, source):
        place = Differences(target.position + self.shift, source.position)
        feature = Differences(target.features, source.features)
        return Combination([(self.first, place), (self.second, feature)])


@needs_compiler
@pytest.mark.parametrize(
    "metric",
    [
        Mine(shift=3.0),
        Mine(second=-1.0),
        Mine(first=torch.tensor([1.0, 0.5]).view(2, 1, 1)),
        Mine(first=torch.tensor(float("nan"))),
    ],
)
def test_what_only_looks_like_a_mixture_is_refused(metric):
    points = image(2, 3, 8, 8)
    query = Query(points, points, metric, 3)
    assert RINGS.refuses(query) is not None
    assert torch.equal(find(query).index, find(query, "dense").index)


@needs_compiler
def test_places_that_are_features_too():
    """A target's features are not its place, though all sources' are."""
    grid = Grid((8, 8))
    source = Points(grid.positions(), grid=grid)
    target = Points(torch.rand(64, 2) * 8, grid=grid)
    for metric in (Spatial() + Feature(), Feature() + Spatial()):
        query = Query(target, source, metric, 3)
        assert torch.equal(find(query).index, find(query, "dense").index)


@needs_compiler
def test_no_neighbours_and_all_of_them():
    points, own = image(1, 3, 4, 4), torch.arange(16)
    for k, excluded in ((0, None), (16, own), (16, None), (15, own)):
        query = Query(points, points, MIXTURE, k, excluded=excluded)
        assert (RINGS.refuses(query) is None) == (k > 0 and (k < 16 or excluded is None))
        found, wanted = find(query), find(query, "dense")
        assert torch.equal(found.index, wanted.index)
    layer = ConvNN2d(3, 4, k=1, metric=MIXTURE, self_point="first")
    x = torch.randn(1, 3, 6, 6)
    expected = torch.nn.functional.conv2d(x, layer.weight.view(4, 3, 1, 1), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@needs_compiler
@pytest.mark.parametrize("lam, dense", [(0.5, False), (0.9999, True)])
def test_where_places_tell_little_all_pairs_are_looked_at(monkeypatch, lam, dense):
    asked, run = [], type(ENGINES["dense"]).run
    monkeypatch.setattr(
        type(ENGINES["dense"]), "run", lambda self, q: asked.append(q) or run(self, q)
    )
    points = Points.from_image(torch.randn(1, 3, 40, 40))
    agree(Query(points, points, interpolate("spatial", "cosine", lam), 9), (9,))
    assert len(asked) == 2 + 2 * dense  # by name, and where rings gave up


@needs_compiler
@pytest.mark.parametrize("lam, dense", [(0.3, False), (0.95, True)])
def test_of_a_large_image_offsets_are_kept_up_to_a_border(monkeypatch, lam, dense):
    """What may lie beyond it is not left out."""
    monkeypatch.setattr(offsets, "_MOST", 200)
    points = Points.from_image(torch.randn(1, 3, 14, 13))
    metric = interpolate(Spatial(scale=1.0), Feature("cosine"), lam)
    offset, far, border = offsets.offsets((14, 13), (1.0, 1.0), 2.0, True, (1.0,))
    assert offset.shape[1] <= 200 and 0 < border < 13 and bool((far < border).all())
    asked, run = [], type(ENGINES["dense"]).run
    monkeypatch.setattr(
        type(ENGINES["dense"]), "run", lambda self, q: asked.append(q) or run(self, q)
    )
    agree(Query(points, points, metric, 5), (5,))
    assert len(asked) == 2 + 2 * dense


def test_four_axes():
    grid = Grid((3, 3, 3, 3))
    points = Points(torch.randn(1, 81, 2), grid=grid)
    query = Query(points, points, MIXTURE, 4)
    assert "up to three axes" in str(RINGS.refuses(query))
    assert find(query).index.shape == (1, 81, 4)


class Moved(Encoding):
    """Positions elsewhere than on the grid."""

    on = "metric"

    def forward(self, points):
        return Points(points.x, points.position.clamp_min(1).log() * 8)


class Turned(Metric):
    """Of positions on another grid of as many points."""

    def distances(self, target, source):
        grid = Grid(target.grid.size[::-1])
        return Spatial().distances(Points(target.x, grid=grid), Points(source.x, grid=grid))


@needs_compiler
@pytest.mark.parametrize("place", [Encoded("spatial", Moved()), Turned()], ids=["moved", "turned"])
def test_positions_that_are_not_the_grids(place):
    points = image(1, 3, 9, 7)
    query = Query(points, points, 0.5 * place + Feature("cosine"), 5)
    assert "no sum of a distance of positions" in RINGS.refuses(query)
    assert torch.equal(find(query).index, find(query, "dense").index)


@needs_compiler
@pytest.mark.parametrize("channels", [3, 9, 40])
def test_features_near_to_each_other(channels):
    """Whose lengths float32 rounds: products of these measure more than angles."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 1, 1, generator=generator)
    points = Points.from_image(x + 3e-4 * torch.randn(1, channels, 9, 8, generator=generator))
    agree(Query(points, points, 1e-7 * Spatial("l1") + Feature("cosine"), 1), (9,))


@needs_compiler
def test_offsets_are_those_of_float64_whatever_the_default_is():
    points = Points.from_image(torch.rand(1, 2, 1, 700) * 600)
    query = Query(points, points, Spatial() + Feature("euclidean"), 5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        first = find(query, "rings")
    finally:
        torch.set_default_dtype(torch.float32)
    for one in (first, find(query, "rings")):
        assert torch.equal(one.index, find(query, "dense").index)
