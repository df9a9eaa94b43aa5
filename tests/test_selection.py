"""Whom to keep, against a loop over targets that sorts and counts by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from convnn_geo.candidates import (
    All,
    Block,
    Causal,
    Congruent,
    Random,
    Strided,
    Subset,
    Window,
)
from convnn_geo.metrics import Feature, Spatial
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Grid, Points
from convnn_geo.search import Query
from convnn_geo.selection import Every, Given, KNearest, Radius

CANDIDATES = {
    "all": All(),
    "causal": Causal(),
    "block": Block(2),
    "congruent": Congruent(2),
    "window": Window(3, padding=1),
    "circular": Window(3, padding=1, padding_mode="circular"),
    "shift": Window(3, border="shift"),
    "strided": Strided(3),
    "random": Random(7, seed=1).eval(),
    "random per example": Random(7, seed=1, per_example=True).eval(),
    "block of a sample": Block(2) & Random(7, seed=2).eval(),
}
METRICS = {"feature": Feature("squared_euclidean"), "spatial": Spatial("l1")}


@pytest.fixture
def points():
    """Two images of 5 x 4 pixels with many equal features."""
    generator = torch.Generator().manual_seed(7)
    return Points.from_image(torch.randint(0, 3, (2, 2, 5, 4), generator=generator).float())


def allowed(subset, b, i, m):
    """Sources that target i of example b may choose, ascending."""

    def row(t):
        t = t[b if len(t) > 1 else 0] if t.ndim == 3 else t
        return t[i if len(t) > 1 else 0]

    index = torch.arange(m) if subset.index is None else row(subset.index)
    kept = torch.ones(len(index), dtype=torch.bool) if subset.mask is None else row(subset.mask)
    return sorted(index[kept].tolist())


def compare(found, points, metric, subset, choose, k):
    """``choose(i, ordered)`` is the expected list of neighbours of target i."""
    m = points.num_points
    distance = metric(points)
    distance = distance.expand(2, m, m)
    index = found.index.expand(2, m, k)
    mask = torch.ones(2, m, k, dtype=torch.bool) if found.mask is None else found.mask
    mask = mask.expand(2, m, k)
    for b, i in itertools.product(range(2), range(m)):
        among = allowed(subset, b, i, m)
        ordered = sorted(among, key=lambda j, b=b, i=i: (distance[b, i, j].item(), j))
        expected = choose(i, ordered)
        assert index[b, i][mask[b, i]].tolist() == expected
        assert mask[b, i].tolist() == [True] * len(expected) + [False] * (k - len(expected))
        far = found.distance.expand(2, m, k)[b, i][mask[b, i]]
        torch.testing.assert_close(far, distance[b, i, expected])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
@pytest.mark.parametrize(("k", "dilation"), [(1, 1), (3, 1), (2, 3)])
def test_the_nearest_candidates(points, metric, name, self_point, k, dilation):
    metric = METRICS[metric]
    subset = CANDIDATES[name](points, points)
    selection = KNearest(k, dilation, self_point, short="pad")
    own = torch.arange(20)
    found = selection(Query(points, points, metric, 1, subset), own)

    def choose(i, ordered):
        if self_point != "natural":
            ordered = [j for j in ordered if j != i]
        if self_point == "first":
            ordered = [i, *ordered]
        return ordered[: k * dilation : dilation]

    compare(found, points, metric, subset, choose, k)


@pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_too_few_candidates_are_an_error_or_padded(points, self_point, dilation):
    query = Query(points, points, METRICS["feature"], 1)
    own = torch.arange(20)
    most = {"natural": 20, "first": 20, "excluded": 19}[self_point] // dilation
    full = KNearest(most, dilation, self_point)(query, own)
    assert full.mask is None or full.mask.all()
    with pytest.raises(ValueError, match=r"needs .* candidates, but there are"):
        KNearest(most + 1, dilation, self_point)(query, own)
    padded = KNearest(30, dilation, self_point, short="pad")(query, own)
    assert padded.k == 30
    filled = math.ceil({"natural": 20, "first": 20, "excluded": 19}[self_point] / dilation)
    assert (padded.mask.sum(-1) == filled).all()
    assert torch.equal(padded.index[..., :most], full.index)
    assert (padded.distance[..., filled:] == torch.inf).all()


@pytest.mark.parametrize("self_point", ["first", "excluded"])
def test_a_sample_with_or_without_the_point_itself(points, self_point):
    # Nine candidates of which some targets are members: none is taken twice, none is missed.
    subset = Strided(3)(points, points)
    members = subset.index[0].tolist()
    k = 9
    found = KNearest(k, self_point=self_point, short="pad")(
        Query(points, points, METRICS["feature"], 1, subset), torch.arange(20)
    )
    for b, i in itertools.product(range(2), range(20)):
        mask = torch.ones(k).bool() if found.mask is None else found.mask[b, i]
        chosen = found.index[b, i][mask].tolist()
        assert len(set(chosen)) == len(chosen)
        if self_point == "first":
            assert chosen[0] == i and set(chosen[1:]) <= set(members) - {i}
            assert len(chosen) == k
        else:
            assert set(chosen) == set(members) - {i}


def test_the_point_itself_comes_first_whatever_its_distance():
    x = torch.tensor([[[1.0], [5.0], [2.0]]])
    points = Points(x)
    query = Query(points, points, Feature("dot"), 1)
    natural = KNearest(2)(query, None)
    first = KNearest(2, self_point="first")(query, torch.arange(3))
    assert natural.index.tolist() == [[[1, 2]] * 3]
    assert first.index.tolist() == [[[0, 1], [1, 2], [2, 1]]]
    assert first.distance.tolist() == [[[-1, -5], [-25, -10], [-4, -10]]]


def test_targets_that_are_some_of_the_sources():
    source = Points.from_image(torch.randn(1, 3, 4, 6))
    grid = Grid((2, 3), (1, 0), (2, 2))
    own = source.grid.index_of(grid)
    target = Points(source.x[:, own], grid=grid)
    query = Query(target, source, Feature(), 1)
    first = KNearest(3, self_point="first")(query, own)
    assert torch.equal(first.index[0, :, 0], own)
    excluded = KNearest(3, self_point="excluded")(query, own)
    assert torch.equal(first.index[..., 1:], excluded.index[..., :2])
    assert not (excluded.index == own[:, None]).any()


def test_padding_points_of_a_ragged_batch_are_never_chosen():
    x = torch.randn(2, 6, 3)
    mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    points = Points(x, mask=mask)
    subset = Subset().restrict(mask.unsqueeze(-2))
    found = KNearest(4, short="pad")(Query(points, points, Feature(), 1, subset), None)
    assert found.mask[0].all()
    assert found.mask[1].sum(-1).tolist() == [2] * 6
    assert (found.index[1][found.mask[1]] < 2).all()


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
@pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
def test_padding_that_names_a_source_twice_lets_it_be_chosen_once(points, mode, self_point):
    window = Window(3, padding=2, dilation=2, padding_mode=mode)
    subset = window(points, points)
    found = KNearest(8, self_point=self_point)(
        Query(points, points, METRICS["feature"], 1, subset), torch.arange(20)
    )
    kept = found.mask.expand(2, 20, 8)
    for b, i in itertools.product(range(2), range(20)):
        chosen = found.index[b, i][kept[b, i]].tolist()
        among = set(subset.index[i].tolist()) - ({i} if self_point == "excluded" else set())
        assert len(set(chosen)) == len(chosen) == min(8, len(among)) and set(chosen) <= among
    near = Radius(1e6, 9)(Query(points, points, METRICS["feature"], 1, subset), None)
    assert torch.equal(
        near.mask.sum(-1)[0], torch.tensor([len(set(r.tolist())) for r in subset.index])
    )
    every = Every()(Query(points, points, METRICS["feature"], 1, subset), None)
    assert every.mask is None and torch.equal(every.index, subset.index)


def test_without_repeats_no_mask_is_made(points):
    subset = Window(3, padding=1, padding_mode="circular")(points, points)
    assert KNearest(3)(Query(points, points, METRICS["feature"], 1, subset), None).mask is None


@pytest.mark.parametrize(
    ("candidates", "most", "others"),
    [
        (Window(3, padding=1), 9, 8),
        (Window(3, border="shift"), 9, 8),
        (Window(2, padding=1, dilation=2), 4, 4),  # a centre that is no place of the window
        (Window((1, 9), padding=(0, 4)), 4, 3),  # over the image's width
        (Window((1, 9), padding=(0, 4), padding_mode="replicate"), 4, 3),
        (Block(2), 4, 3),
        (Block((2, 9)), 8, 7),
        (Congruent(2), 6, 5),
        (Causal(), 20, 19),
        (Block(3) & Causal(), 9, 9),
        (Strided(3), 9, 9),
    ],
    ids=str,
)
def test_too_few_candidates_are_an_error_wherever_sizes_tell(points, candidates, most, others):
    own = torch.arange(20)
    query = Query(points, points, METRICS["feature"], 1, candidates(points, points))
    for self_point, limit in (("natural", most), ("excluded", others), ("first", others + 1)):
        assert KNearest(limit, self_point=self_point)(query, own).k == limit
        message = f"k={limit + 1} needs {limit + 1} candidates, but there are {limit}"
        with pytest.raises(ValueError, match=message):
            KNearest(limit + 1, self_point=self_point)(query, own)
        padded = KNearest(limit + 1, self_point=self_point, short="pad")(query, own)
        assert padded.k == limit + 1 and not padded.mask[..., -1].any()


# -- radius -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all", "window", "strided", "causal"])
@pytest.mark.parametrize(("r", "max_k"), [(0.0, 4), (1.0, 3), (2.0, 20), (2.0, 25)])
def test_those_within_a_radius(points, name, r, max_k):
    metric = METRICS["spatial"]
    subset = CANDIDATES[name](points, points)
    found = Radius(r, max_k)(Query(points, points, metric, 1, subset), None)
    distance = metric(points)

    def choose(i, ordered):
        return [j for j in ordered if distance[i, j] <= r][:max_k]

    compare(found, points, metric, subset, choose, max_k)


def test_a_radius_measures_what_the_metric_says_even_where_search_need_not():
    points = Points(torch.tensor([[0.0], [2.0], [3.0]]))
    query = Query(points, points, Feature("euclidean"), 1, exact=False)
    found = Radius(2.5, 3)(query, None)
    assert found.mask.tolist() == [[True, True, False], [True] * 3, [True, True, False]]


# -- every --------------------------------------------------------------------------------------


def test_every_candidate_in_order_of_source(points):
    found = Every()(Query(points, points, Feature(), 1), None)
    assert found.complete and found.distance is None and found.mask is None
    assert torch.equal(found.index, torch.arange(20).expand(20, 20))
    subset = Causal()(points, points)
    found = Every()(Query(points, points, Feature(), 1, subset), None)
    assert found.complete and torch.equal(found.mask, subset.mask)
    subset = Strided(2)(points, points)
    found = Every()(Query(points, points, Feature(), 1, subset), None)
    assert torch.equal(found.index, subset.index.expand(20, 4)) and not found.complete
    window = Window(3, padding=1)(points, points)
    found = Every()(Query(points, points, Feature(), 1, window), None)
    assert torch.equal(found.index, window.index) and torch.equal(found.mask, window.mask)
    mask = torch.rand(2, 1, 20) < 0.5
    found = Every()(Query(points, points, Feature(), 1, Subset().restrict(mask)), None)
    assert torch.equal(found.mask, mask.expand(2, 20, 20))


def test_given_is_what_was_given(points):
    hood = Neighborhood(torch.zeros(20, 1, dtype=torch.long), 20)
    assert Given(hood)(Query(points, points, Feature(), 1), None) is hood


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: KNearest(0), ValueError, "k: .*at least 1"),
        (lambda: KNearest(2.0), TypeError, "integer"),
        (lambda: KNearest(2, dilation=0), ValueError, "dilation"),
        (lambda: KNearest(2, self_point="last"), ValueError, "natural, first, excluded"),
        (lambda: KNearest(2, short="cut"), ValueError, "error, pad"),
        (lambda: Radius(-1.0, 3), ValueError, "at least 0"),
        (lambda: Radius(math.inf, 3), ValueError, "finite"),
        (lambda: Radius(1.0, 0), ValueError, "max_k"),
    ],
)
def test_bad_selections_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("self_point", ["first", "excluded"])
def test_a_self_policy_needs_targets_among_the_sources(points, self_point):
    with pytest.raises(ValueError, match="among the sources"):
        KNearest(2, self_point=self_point)(Query(points, points, Feature(), 1), None)
