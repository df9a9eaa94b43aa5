"""Weights of chosen pairs, against loops over neighbours."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from convnn_geo.metrics import Feature, Spatial, interpolate
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.nn import ConvNN2d, ConvNNAttention, PointConvNN
from convnn_geo.pairs import Pairs
from convnn_geo.points import Points
from convnn_geo.weighting import (
    Gaussian,
    InverseDistance,
    Ones,
    PositionMLP,
    Similarity,
    Softmax,
    Weighting,
    as_weighting,
    weighting_names,
)

N, M, K = 5, 6, 4
MASKS = ["none", "some", "shared"]


def make_mask(kind):
    """No mask, one an example with an empty and a full row, or one for all examples."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, N, K, generator=generator) < 0.5
    mask[0, 1], mask[1, 2] = False, True
    return mask if kind == "some" else mask[0]


def make_pairs(metric, x_i, x_j, mask=None, dtype=None, complete=False):
    generator = torch.Generator().manual_seed(4)
    pos = torch.rand(2, M, 2, generator=generator, dtype=x_j.dtype)
    target, source = Points(x_i, pos[:, :N]), Points(x_j, pos)
    index = torch.randint(M, (2, N, K), generator=generator)
    if complete:
        index = torch.arange(M).expand(N, M)
    hood = Neighborhood(index, M, mask=mask, complete=complete)
    value = x_j if dtype is None else x_j.to(dtype)
    return Pairs(target, source, value, lambda: metric.bind(target, source), hood)


def make_points(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, N, 3, generator=generator, dtype=dtype),
        torch.randn(2, M, 3, generator=generator, dtype=dtype),
    )


def softmax(scores):
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def inverse(distances):
    near = [1 / (d + 1e-8) for d in distances]
    return [n / sum(near) for n in near]


#: weighting, metric, the weights of the distances of one target's neighbours
CASES = {
    "softmax": (Softmax(), Feature("scaled_dot"), lambda d: softmax([-v for v in d])),
    "warm softmax": (Softmax(2.5), Feature("euclidean"), lambda d: softmax([-v / 2.5 for v in d])),
    "gaussian": (
        Gaussian(0.7),
        Feature("squared_euclidean"),
        lambda d: [math.exp(-v / (2 * 0.49)) for v in d],
    ),
    "normalised gaussian": (
        Gaussian(0.7, normalize=True),
        Spatial(squared=True),
        lambda d: softmax([-v / (2 * 0.49) for v in d]),
    ),
    "inverse distance": (InverseDistance(), Feature("euclidean"), inverse),
    "cosine similarity": (Similarity(), Feature("cosine"), lambda d: [1 - v for v in d]),
    "dot similarity": (Similarity(), Feature("dot"), lambda d: [-v for v in d]),
    "mixed similarity": (
        Similarity(),
        0.5 * Feature("cosine") + 2 * Feature("euclidean"),
        lambda d: [0.5 - v for v in d],
    ),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_loop(case, kind):
    weighting, metric, formula = CASES[case]
    mask = make_mask(kind)
    pairs = make_pairs(metric, *make_points(), mask)
    found = weighting(pairs)
    distance = metric.pairs(pairs.target, pairs.source, pairs.neighborhood.index)
    kept = torch.ones(2, N, K, dtype=torch.bool) if mask is None else mask.expand(2, N, K)
    for b in range(2):
        for i in range(N):
            expected = [0.0] * K
            slots = kept[b, i].nonzero().flatten().tolist()
            if slots:
                for slot, weight in zip(
                    slots, formula(distance[b, i, slots].tolist()), strict=True
                ):
                    expected[slot] = weight
            torch.testing.assert_close(found[b, i].tolist(), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_every_source_as_neighbour(case):
    weighting, metric, formula = CASES[case]
    pairs = make_pairs(metric, *make_points(), complete=True)
    found = weighting(pairs)
    distance = metric(pairs.target, pairs.source)
    for b in range(2):
        for i in range(N):
            expected = formula(distance[b, i].tolist())
            torch.testing.assert_close(found[b, i].tolist(), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_weights_have_the_right_gradient(case, kind):
    weighting, metric, _ = CASES[case]
    mask = make_mask(kind)
    if case == "normalised gaussian":  # of positions, so that there is one of features to check
        metric = Feature("squared_euclidean")
    x_i, x_j = (t.requires_grad_() for t in make_points())

    def weights(x_i, x_j):
        return weighting(make_pairs(metric, x_i, x_j, mask))

    assert torch.autograd.gradcheck(weights, (x_i, x_j), fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_targets_without_neighbours_weigh_nothing_and_have_no_gradient(case):
    weighting, metric, _ = CASES[case]
    mask = torch.zeros(2, N, K, dtype=torch.bool)
    mask[1, 0, 2] = True
    metric = interpolate(metric, Feature("dot"), 0.0, learnable=True)
    x_i, x_j = (t.requires_grad_() for t in make_points())
    found = weighting(make_pairs(metric, x_i, x_j, mask))
    assert not found[~mask].any() and found[mask].isfinite().all()
    grads = torch.autograd.grad(found.sum(), (x_i, x_j, metric.lam), allow_unused=True)
    for grad in grads:
        assert grad is not None and grad.isfinite().all()
    assert not grads[0][0].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("far", [math.nan, math.inf, 1e30])
def test_what_an_empty_slot_points_at_does_not_matter(case, far):
    weighting, metric, _ = CASES[case]
    mask = torch.ones(2, N, K, dtype=torch.bool)
    x_i, x_j = make_points()
    pairs = make_pairs(metric, x_i, x_j)
    mask &= pairs.neighborhood.index != 0
    expected = weighting(make_pairs(metric, x_i, x_j, mask))
    x_j[:, 0] = far
    found = weighting(make_pairs(metric, x_i, x_j, mask))
    assert torch.equal(found, expected)


def test_a_very_near_empty_slot_does_not_overflow():
    # A dot product of 1e4 is a distance of -1e4, whose Gaussian is infinite.
    x_i, x_j = make_points()
    x_i.requires_grad_()
    index = make_pairs(Feature("dot"), x_i, x_j).neighborhood.index
    mask = index != 0
    for scale in (1e4, -1e4):
        x = x_j.clone()
        x[:, 0] = scale
        weight = Gaussian(0.1)(make_pairs(Feature("dot"), x_i, x * 1e-2, mask))
        (grad,) = torch.autograd.grad(weight[mask].clamp_max(1e3).sum(), x_i)
        assert not weight[~mask].any() and grad.isfinite().all()


def test_a_distance_below_zero_is_no_negative_weight():
    # Products have negative distances, and rounding can put 1 - <u, u> below 0.
    pairs = make_pairs(Feature("dot"), *make_points())
    assert (pairs.distance < 0).any()
    weight = InverseDistance()(pairs)
    assert (weight >= 0).all()
    torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight[..., 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_computed_in_float32_and_come_as_the_values_do(case, dtype):
    weighting, metric, _ = CASES[case]
    x_i, x_j = make_points(torch.float32)
    expected = weighting(make_pairs(metric, x_i, x_j))
    found = weighting(make_pairs(metric, x_i, x_j, dtype=dtype))
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weighting(make_pairs(metric, x_i, x_j)), expected)


def test_ones():
    assert Ones()(make_pairs(Feature(), *make_points())) is None
    mask = make_mask("some")
    found = Ones()(make_pairs(Feature(), *make_points(), mask))
    assert found.dtype == torch.float64 and torch.equal(found, mask.double())


def test_dropout_drops_in_training_alone():
    pairs = make_pairs(Feature(), *make_points())
    weighting = Softmax(dropout=0.5)
    expected = Softmax()(pairs)
    dropped = weighting(pairs)
    zero = dropped == 0
    assert 0 < zero.sum() < zero.numel()
    torch.testing.assert_close(dropped[~zero], 2 * expected[~zero])
    assert torch.equal(weighting.eval()(pairs), expected)


# -- networks on positions ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_relative_positions(channels, kind):
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, channels)).double()
    mask = make_mask(kind)
    pairs = make_pairs(Feature(), *make_points(), mask)
    found = PositionMLP(mlp)(pairs)
    assert found.shape == ((2, N, K) if channels == 1 else (2, N, K, 3))
    for b in range(2):
        for i in range(N):
            for slot in range(K):
                j = pairs.neighborhood.index[b, i, slot]
                offset = pairs.source.pos[b, j] - pairs.target.pos[b, i]
                expected = mlp(offset)
                if mask is not None and not mask.expand(2, N, K)[b, i, slot]:
                    expected = torch.zeros_like(expected)
                torch.testing.assert_close(found[b, i, slot].reshape(-1), expected)


def test_weights_of_relative_positions_learn():
    torch.manual_seed(1)
    mlp = nn.Linear(2, 3).double()
    pairs = make_pairs(Feature(), *make_points(), make_mask("some"))
    assert torch.autograd.gradcheck(
        lambda w, b: PositionMLP(lambda p: nn.functional.linear(p, w, b).tanh())(pairs),
        (mlp.weight, mlp.bias),
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_on_a_grid_serve_a_batch_of_images(channels):
    # Positions of a grid have no batch axis, so the weights have none to be told by.
    mlp = nn.Linear(2, channels)
    points = Points.from_image(torch.randn(4, 3, 2, 4))
    hood = Neighborhood(torch.randint(8, (8, 5)), 8)
    pairs = Pairs(points, points, points.x, lambda: Feature().bind(points, points), hood)
    weight = PositionMLP(mlp)(pairs)
    per_channel = weight.ndim == points.x.ndim + 1
    assert per_channel == (channels > 1)
    weighed = points.x[:, hood.index] * (weight if per_channel else weight[..., None])
    offset = points.position[hood.index] - points.position[:, None]
    expected = points.x[:, hood.index] * mlp(offset)
    torch.testing.assert_close(weighed, expected)


# -- choice -------------------------------------------------------------------------------------


def test_names_resolve():
    assert weighting_names() == ["gaussian", "inverse_distance", "ones", "similarity", "softmax"]
    for name in weighting_names():
        assert isinstance(as_weighting(name), Weighting)
    assert isinstance(as_weighting(Softmax), Softmax)
    weighting = Gaussian(2.0)
    assert as_weighting(weighting) is weighting
    with pytest.raises(ValueError, match="gaussian, inverse_distance, ones"):
        as_weighting("soft")


def test_which_weights_let_the_metric_learn():
    learning = {name: as_weighting(name).uses_distance for name in weighting_names()}
    assert learning == {
        "gaussian": True,
        "inverse_distance": True,
        "ones": False,
        "similarity": True,
        "softmax": True,
    }
    assert not PositionMLP(nn.Identity()).uses_distance


@pytest.mark.parametrize("case", CASES)
def test_copies(case):
    weighting, metric, _ = CASES[case]
    pairs = make_pairs(metric, *make_points())
    again = copy.deepcopy(weighting)
    again.load_state_dict(weighting.state_dict())
    assert torch.equal(again(pairs), weighting(pairs))
    assert repr(again) == repr(weighting)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Softmax(0.0), "greater than 0"),
        (lambda: Softmax(-1.0), "greater than 0"),
        (lambda: Softmax(dropout=1.5), r"dropout: expected a number in \[0, 1\]"),
        (lambda: Softmax(dropout=-0.5), r"dropout: expected a number in \[0, 1\], got -0.5"),
        (lambda: Gaussian(0), "greater than 0"),
        (lambda: Gaussian(math.nan), "finite"),
        (lambda: InverseDistance(0.0), "greater than 0"),
    ],
)
def test_bad_weightings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_gaussian_squares_what_took_a_root_whatever_else_is_done():
    """A bias of zeros changes nothing, nor whether a place at an end is learned."""
    x, weighting = torch.randn(1, 6, 4), Gaussian(2.0, normalize=True)
    layer = ConvNNAttention(4, 1, k=3, weighting=weighting, metric="euclidean")
    torch.testing.assert_close(layer(x, attn_mask=torch.zeros(6, 6))[0], layer(x)[0])
    image, found = torch.randn(1, 3, 6, 5), []
    for learnable in (False, True):
        metric = interpolate("spatial", "cosine", 0.0, learnable)
        torch.manual_seed(0)
        found.append(ConvNN2d(3, 2, k=4, metric=metric, weighting=Gaussian(2.0))(image))
    torch.testing.assert_close(*found)
    squared = [Spatial(squared=True), Feature("cosine"), Spatial() + Feature("cosine")]
    rooted = [Spatial(), Feature(), Feature("manhattan"), 2 * Spatial(), Spatial() + Feature()]
    assert not any(m.rooted for m in squared) and all(m.rooted for m in rooted)


def test_gaussian_by_hand():
    pos = torch.tensor([[0.0], [2.0]])
    layer = PointConvNN(1, 1, k=2, kernel="sum", weighting="gaussian")
    expected = torch.tensor([[1.0 + 3 * math.exp(-2)], [math.exp(-2) + 3.0]])
    torch.testing.assert_close(layer(torch.tensor([[1.0], [3.0]]), pos), expected)
