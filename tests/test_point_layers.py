"""Layers of networks of points, each against a loop over clouds or a layer of torch's or PyG's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convnn_geo import convert, recipes
from convnn_geo.kernels import GravNet
from convnn_geo.lowering import explain
from convnn_geo.metrics import interpolate
from convnn_geo.models import create_model
from convnn_geo.models.point_layers import POINT_LAYERS, point_layer
from convnn_geo.nn import Branching, PointConvNN
from convnn_geo.nn.point_attention import PointAttention
from convnn_geo.selection import KNearest, Radius
from convnn_geo.weighting import PositionMLP

SIZES = (7, 4, 1)


@pytest.fixture
def clouds():
    """Features, positions and clouds of 12 points, of which one is alone."""
    generator = torch.Generator().manual_seed(0)
    x, pos = (torch.randn(sum(SIZES), c, dtype=torch.float64, generator=generator) for c in (6, 3))
    return x, pos, torch.arange(3).repeat_interleave(torch.tensor(SIZES))


def build(name, **options):
    return point_layer(name, 3, options)(6, 6).double()


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", POINT_LAYERS.names())
def test_gradients_reach_every_parameter(name, clouds):
    layer = build(name)
    layer(*clouds).square().sum().backward()
    for parameter in layer.parameters():
        assert bool(parameter.grad.isfinite().all() and parameter.grad.any())


def test_recipes_of_points_are_all_there():
    gives = {name: getattr(recipes, name).__annotations__["return"] for name in recipes.names()}
    found = {name for name, layer in gives.items() if layer == "PointConvNN"}
    assert len(found) == 6 and found < set(POINT_LAYERS.names())


@pytest.mark.parametrize("name", POINT_LAYERS.names())
def test_every_option_that_is_named_is_taken(name, clouds):
    """By the layer itself: a name that it does not know would be a TypeError."""
    samples = {
        **{"k": 2, "max_k": 2, "r": 0.5, "ratio": 0.5, "lam": 0.2, "num_heads": 2, "groups": 1},
        **{"metric": "euclidean", "kernel": "standard", "weighting": "ones", "bias": True},
        **{"learnable": False, "taps_per_head": True, "candidates": None, "self_point": "first"},
        **{"selection": KNearest(2, short="pad"), "short": "pad", "order": "rank"},
        **{"encoding": "coordinates", "backend": "gather", "search": "dense"},
        **{"space_dimensions": 2, "propagate_dimensions": 3},
    }
    options = POINT_LAYERS.options(name)
    assert set(options) <= set(samples)
    for option in options:
        layer = build(name, **{option: samples[option]})
        assert layer(*clouds).shape == (12, 6)


@pytest.mark.parametrize(
    "name, options", [("attention", {}), ("attention", {"num_heads": 3}), ("kvt", {"k": 3})]
)
def test_attention_is_that_of_torch_cloud_by_cloud(name, options, clouds):
    layer = build(name, **options)
    x, pos, batch = clouds
    inner, heads = layer.attention, options.get("num_heads", 1)
    peer = nn.MultiheadAttention(6, heads, batch_first=True).double()
    peer.load_state_dict(inner.state_dict())
    for cloud in range(3):
        own = x[batch == cloud]
        mask = None
        if name == "kvt":
            query, key, _ = (own @ inner.in_proj_weight.T + inner.in_proj_bias).chunk(3, -1)
            best = (query @ key.T).topk(min(3, len(own))).indices
            mask = torch.ones(len(own), len(own), dtype=torch.bool).scatter(1, best, False)
        equal(layer(*clouds)[batch == cloud], peer(own, own, own, attn_mask=mask)[0])
    assert torch.equal(layer(x, pos + 1, batch), layer(*clouds))  # features alone
    equal(layer(x[:7]), layer(*clouds)[:7])  # no batch: one cloud
    assert explain(layer, *clouds).startswith("PointAttention runs by")


def test_attention_with_taps_by_a_loop(clouds):
    layer = build("convnn_attention", k=3)
    x, _, batch = clouds
    inner = layer.attention
    nn.init.normal_(inner.taps)
    query, key, value = (x @ inner.in_proj_weight.T + inner.in_proj_bias).chunk(3, -1)
    expected = torch.zeros(12, 6, dtype=torch.float64)
    for i in range(12):
        there = (batch == batch[i]).nonzero().flatten()
        score = key[there] @ query[i] / 6**0.5
        best = score.argsort(descending=True)[:3]
        for rank, weight in enumerate(score[best].softmax(0)):
            expected[i] += inner.taps[:, 0, rank] * weight * value[there[best[rank]]]
    equal(layer(*clouds), inner.out_proj(expected))


def test_conv_looks_at_positions_alone(clouds):
    layer = build("conv", k=3)
    x, pos, batch = clouds
    expected = torch.zeros(12, 6, dtype=torch.float64)
    for i in range(12):
        there = (batch == batch[i]).nonzero().flatten()
        best = (pos[there] - pos[i]).square().sum(1).argsort()[:3]
        for rank, j in enumerate(there[best]):
            expected[i] += layer.weight[:, :, rank] @ x[j]
    equal(layer(*clouds), expected + layer.bias)
    same = build("convnn", k=3, lam=0.0)
    same.load_state_dict(layer.state_dict())
    equal(same(*clouds), layer(*clouds))


def test_branching_is_both_and_a_linear_layer(clouds):
    layer = build("branching", ratio=1 / 3, k=3, metric="euclidean")
    assert type(layer) is Branching
    assert (layer.neighbors.out_channels, layer.other.out_channels) == (2, 4)
    near = PointConvNN(6, 2, 3, "euclidean", short="pad").double()
    near.load_state_dict(layer.neighbors.state_dict())
    away = PointConvNN(6, 4, 3, "spatial", short="pad").double()
    away.load_state_dict(layer.other.state_dict())
    equal(layer(*clouds), layer.pointwise(torch.cat([near(*clouds), away(*clouds)], 1)))
    with pytest.raises(ValueError, match=r"got 0\.05 of out_channels=6, which is 0"):
        build("branching", ratio=0.05)
    assert build("branching", ratio=0.0).neighbors is None
    ends = build("branching", ratio=1.0)
    assert ends.other is None and ends.pointwise is None
    assert explain(layer, *clouds).count("PointConvNN runs by") == 2


def test_recipes_get_what_they_are_asked_for(clouds):
    layer = build("grav_net", k=3, space_dimensions=2, propagate_dimensions=5)
    assert isinstance(layer.kernel, GravNet) and layer.kernel.value.out_features == 5
    assert layer.metric.query.out_features == 2 and layer.selection.short == "pad"
    layer = build("set_abstraction", r=0.5, max_k=3)
    assert isinstance(layer.selection, Radius) and layer.selection.r == 0.5
    x, pos, _ = clouds
    far = point_layer("set_abstraction", 3, {"r": 1e-3})(6, 6).double()
    alone = far.kernel.mlp(torch.cat([x, torch.zeros_like(pos)], 1))
    equal(far(*clouds), alone)  # a small ball holds the point itself
    layer = build("point_conv", k=2)
    assert layer.k == 2 and layer.weighting.mlp[0].in_features == 3
    with pytest.raises(ValueError, match="point_conv keeps channels: expected out_channels=6"):
        point_layer("point_conv", 3, {})(6, 8)
    with pytest.raises(ValueError, match="attention keeps channels: expected out_channels=6"):
        PointAttention(6, 8)


def test_attention_among_points_is_no_sequence(clouds):
    model = nn.ModuleList([build(name) for name in ("attention", "kvt", "branching")])
    before = [layer(*clouds) for layer in model]
    with pytest.raises(ValueError, match="no layer that can move"):
        convert.set_interpolation(model, 0.5)
    assert all(torch.equal(a, layer(*clouds)) for a, layer in zip(before, model, strict=True))


@pytest.mark.parametrize("name", POINT_LAYERS.names())
def test_networks_are_reported_copied_and_reloaded(name, clouds):
    _, pos, batch = clouds
    model = create_model("point_segmenter", name, width=0.125).double().eval()
    report = convert.report(model, pos, batch)
    kind = {"attention": "PointAttention", "branching": "Branching"}.get(name, "PointConvNN")
    kind = "PointAttention" if name in ("kvt", "convnn_attention") else kind
    assert [line.now for line in report.lines] == [kind] * 3
    assert all(line.flops and line.lowering for line in report.lines)
    before = model(pos, batch)
    assert torch.equal(copy.deepcopy(model)(pos, batch), before)
    other = create_model("point_segmenter", name, width=0.125).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(pos, batch), before)


def test_layers_do_not_share_what_learns():
    metric = interpolate("spatial", "cosine", learnable=True)
    make = point_layer("convnn", 3, {"metric": metric, "lam": 1.0, "weighting": "softmax"})
    first, second = make(6, 6), make(6, 6)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    weighting = PositionMLP(nn.Linear(3, 6))
    both = point_layer("branching", 3, {"weighting": weighting})(6, 6)
    parts = (weighting, both.neighbors.weighting, both.other.weighting)
    assert len({id(part.mlp.weight) for part in parts}) == 3


@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
@pytest.mark.parametrize("name", POINT_LAYERS.names())
def test_autocast_lowers_features_and_leaves_positions(name, backend):
    """As after nn.Linear, which gives bfloat16: distances are those of the float32 positions."""
    torch.manual_seed(0)
    batch = torch.arange(2).repeat_interleave(20)
    pos = torch.randn(40, 3) + 100  # which bfloat16 would round together
    first, layer = nn.Linear(3, 8), point_layer(name, 3, {"backend": backend})(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x = first(pos - 100)
        found = layer(x, pos, batch)
        assert x.dtype == found.dtype == torch.bfloat16
        found.float().square().sum().backward()
    wanted = layer(x.float(), pos, batch)
    error = (found.float() - wanted).abs() / wanted.abs().amax()
    assert float((error < 0.03).float().mean()) > 0.97
    used = [*first.parameters(), *layer.parameters()]
    assert any(p.grad is not None for p in used) and all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in used
    )


def test_without_autocast_features_and_positions_have_one_dtype():
    layer = PointConvNN(8, 8, k=4).bfloat16()
    x, pos = torch.randn(9, 8).bfloat16(), torch.randn(9, 3)
    with pytest.raises(TypeError, match=r"x is torch.bfloat16 but pos torch.float32"):
        layer(x, pos)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"pos torch\.float64"),
    ):
        layer(x, pos.double())
