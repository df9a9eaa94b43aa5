"""Layers of other models become ours: the same at the ends, and in between another."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_geometric.nn import DynamicEdgeConv, EdgeConv

from convnn_geo import convert, recipes
from convnn_geo.candidates import Window
from convnn_geo.convert import NotApplicable, Rule, spec
from convnn_geo.convert.flops import looks_at_features
from convnn_geo.metrics import Feature, Interpolation, Spatial, interpolate
from convnn_geo.nn import ConvNN1d, ConvNN2d, ConvNN3d, ConvNNAttention
from convnn_geo.points import Points
from convnn_geo.selection import Every, KNearest

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVNN = {1: ConvNN1d, 2: ConvNN2d, 3: ConvNN3d}


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def known(model):
    return [m for m in model.modules() if convert.known.kind(m) is not None]


# Whole models


VISION = [
    ("resnet18", {}, 224),
    ("vgg11", {"init_weights": False}, 64),
    ("densenet121", {}, 32),
    pytest.param("vit_b_16", {"image_size": 32}, 32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "options", "side"), VISION)
def test_torchvision_models_give_the_same_logits(name, options, side):
    model = getattr(pytest.importorskip("torchvision").models, name)(**options).eval()
    nn.init.normal_(list(model.modules())[-1].weight, std=0.02)  # torchvision's ViT starts at zeros
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        before = model(x)
        assert before.std() > 1e-3
        count = len(known(model))
        assert convert.to_convnn(model) is model
        assert known(model) == [] and count >= 8
        close(model(x), before, atol=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_an_encoder_keeps_its_masks_along_the_spectrum(lam):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 8)
    convert.to_convnn(encoder)
    convert.set_interpolation(encoder, lam)
    out = encoder(x, src_key_padding_mask=padding)
    close(encoder(x[1:, :3]), out[1:, :3])
    close(encoder(x[:1]), out[:1])


def test_vit_tiny_gives_the_same_logits():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        convert.to_convnn(model)
        assert type(model.blocks[11].attn) is convert.TimmAttention and known(model) == []
        close(model(x), before, atol=1e-4)
        assert len(convert.set_interpolation(model, 0.5)) == 12  # its patches do not overlap: even
        assert (model(x) - before).abs().max() > 1e-3
        convert.set_interpolation(model, 1.0)
        close(model(x), before, atol=1e-4)


# Convolutions


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_convolution_equals_itself(data):
    axes = data.draw(st.integers(1, 3))
    side = st.tuples(*[st.integers(1, 4)] * axes)
    groups = data.draw(st.sampled_from([1, 2]))
    mode = data.draw(st.sampled_from(["zeros", "circular", "replicate"]))
    padding = data.draw(st.one_of(st.sampled_from(["same", "valid"]), st.integers(0, 1)))
    options = {
        "kernel_size": data.draw(side),
        "stride": 1 if padding == "same" else data.draw(st.integers(1, 2)),
        "dilation": data.draw(st.integers(1, 2)),
        "groups": groups,
        "bias": data.draw(st.booleans()),
        "padding": padding,
        "padding_mode": mode,
    }
    conv = CONV[axes](2 * groups, 4, **options)
    new = convert.to_convnn(conv)
    assert type(new) is CONVNN[axes] and new.weight is conv.weight and new.bias is conv.bias
    x = torch.randn(2, 2 * groups, *[9, 8, 7][:axes])
    close(new(x), conv(x))


def test_conversion_keeps_mode_dtype_hooks_and_frozen_weights():
    conv = nn.Conv2d(2, 3, 3, dtype=torch.float64).eval()
    conv.weight.requires_grad_(False)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    before = torch.random.get_rng_state()
    new = convert.to_convnn(conv)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing is drawn for exact layers
    assert not new.training and new.weight.dtype == torch.float64
    assert not new.weight.requires_grad and new.bias.requires_grad
    new(torch.zeros(1, 2, 4, 4, dtype=torch.float64))
    assert calls == [1] and new.converted_from == "Conv2d"


def test_gradients_and_optimizers_go_on():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 1, 2))
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    convert.to_convnn(model)
    x = torch.randn(3, 2, 9)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        m(x).square().mean().backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        close(ours, theirs, atol=1e-6)
    assert list(model.state_dict()) == list(twin.state_dict())


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Conv2d):
    pass


def test_a_layer_with_a_forward_of_its_own_is_another_layer():
    model = nn.Sequential(Scaled(2, 2, 3), Named(2, 2, 3), nn.ConvTranspose2d(2, 2, 3))
    convert.to_convnn(model)
    assert [type(layer) for layer in model] == [Scaled, ConvNN2d, nn.ConvTranspose2d]


def test_weights_that_are_computed_are_refused_by_name():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    assert convert.known.kind(parametrized) == "convolution"
    for layer in (parametrized, nn.LazyConv2d(2, 3)):
        model = nn.Sequential(nn.Conv2d(2, 2, 3), layer)
        with pytest.raises(
            NotApplicable, match=r"1 \(\w*Conv2d\) can't become 'exact': its weight"
        ):
            convert.to_convnn(model, "exact")
        assert type(model[0]) is nn.Conv2d  # nothing is replaced where anything fails


@pytest.mark.parametrize("rules", [None, Rule("exact", optional=True)])
def test_a_layer_without_an_exact_counterpart_is_left_and_the_report_says_why(monkeypatch, rules):
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    least = edge_layer(monkeypatch, "min")
    model = nn.ModuleDict({"plain": nn.Conv2d(2, 2, 1), "normed": normed, "least": least})
    assert convert.to_convnn(model, rules) is model
    assert type(model["plain"]) is ConvNN2d
    assert model["normed"] is normed and model["least"] is least
    found = convert.report(model)
    assert found.left.keys() == {"normed", "least"}
    assert "its weight is computed from other parameters" in found.left["normed"]
    assert "its aggr is 'min'" in found.left["least"]
    last = str(found).splitlines()[-2:]
    assert last == [f"left {name}: {why}" for name, why in found.left.items()]
    least.aggr = "max"
    convert.to_convnn(model, rules)
    assert convert.known.is_ours(model["least"]) and convert.report(model).left.keys() == {"normed"}
    convert.to_convnn(model, Rule("keep"))
    assert not convert.report(model).left  # the reasons are the last call's


def test_an_error_says_the_rule_that_leaves_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 3, padding=1))
    message = r"0 \(Conv2d\) can't become 'kvt'.*; Rule\('kvt', optional=True\) leaves such layers"
    with pytest.raises(NotApplicable, match=message):
        convert.to_convnn(model, "kvt")
    convert.to_convnn(model, Rule("kvt", optional=True))
    assert [type(layer).__name__ for layer in model] == ["Conv2d", "PixelAttention"]
    assert "changes the image's size" in convert.report(model).left["0"]
    with pytest.raises(TypeError, match="optional is True or False"):
        Rule("kvt", optional=1)


def test_an_optional_rule_leaves_tied_weights():
    model = convert.to_convnn(tied(), Rule("convnn", optional=True))
    assert type(model[0]) is nn.Conv2d and model[0].weight is model[2].weight
    assert convert.report(model).left["0"].startswith("it shares its weight with 2")


def test_a_model_that_is_itself_the_layer_shares_with_nobody():
    conv, attention = nn.Conv2d(4, 4, 3, padding=1), nn.MultiheadAttention(8, 2)
    assert type(convert.to_convnn(conv, "branching")).__name__ == "Branching"
    assert type(convert.to_convnn(attention, "kvt")) is ConvNNAttention
    assert type(convert.to_convnn(attention, Rule("convnn_attention"))) is ConvNNAttention


def test_a_recipe_is_its_name_and_a_layer_is_none():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    assert Rule(recipes.kvt) == Rule("kvt") and spec(recipes.kvt, k=3) == spec("kvt", k=3)
    assert type(convert.to_convnn(model, Rule(recipes.vig))[0].kernel).__name__ == "MaxRelative"
    with pytest.raises(ValueError, match="unknown spec 'grav_net'; expected one of: keep"):
        Rule(recipes.grav_net)
    for layer in (ConvNN2d(4, 4, k=3, metric="cosine"), nn.Identity(), ConvNN2d):
        with pytest.raises(TypeError, match=r"got (a )?\w+, which is made .*spec\('convnn', k=9\)"):
            Rule(layer)


# Attention


ATTENTION = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "other channels": {"kdim": 6, "vdim": 10},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_multihead_attention_equals_itself(options):
    layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    new = convert.to_convnn(layer)
    assert type(new) is ConvNNAttention and list(new.state_dict()) == list(layer.state_dict())
    assert {id(p) for p in new.parameters()} == {id(p) for p in layer.parameters()}
    q = torch.randn(3, 5, 8)
    k, v = torch.randn(3, 7, layer.kdim), torch.randn(3, 7, layer.vdim)
    if not layer.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    masks = {"key_padding_mask": padding, "attn_mask": torch.randn(5, 7).gt(1)}
    masks["attn_mask"][:, 0] = False
    masks["attn_mask"] = masks["attn_mask"].float() * -1e4
    masks["key_padding_mask"] = padding.float() * -1e4
    for ours, theirs in zip(new(q, k, v, **masks), layer(q, k, v, **masks), strict=True):
        close(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(training, norm_first):
    layer = nn.TransformerEncoderLayer(
        *(16, 4, 32), dropout=0.0, batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.set_grad_enabled(training):
        before = model(x, src_key_padding_mask=padding)
        convert.to_convnn(model)
        assert isinstance(model.layers[1].self_attn, ConvNNAttention)
        close(model(x, src_key_padding_mask=padding)[~padding], before[~padding])
        convert.set_interpolation(model, 0.3)
        assert (model(x) - before)[0].abs().max() > 1e-3


def test_dropout_of_attention_is_carried():
    new = convert.to_convnn(nn.MultiheadAttention(8, 2, dropout=0.4))
    assert new.dropout == new.weighting.dropout == 0.4


TIMM = {
    "plain": {"qkv_bias": True},
    "no bias": {"proj_bias": False},
    "qk norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
}


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_timm_attention_equals_itself(options):
    pytest.importorskip("timm")
    from timm.layers import Attention

    layer = Attention(8, 2, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    new = convert.to_convnn(layer)
    assert {id(p) for p in new.parameters()} == {id(p) for p in layer.parameters()}
    x = torch.randn(3, 6, 8)
    allowed = torch.rand(3, 1, 6, 6) < 0.7
    allowed[..., 0] = True
    close(new(x), layer(x))
    close(new(x, attn_mask=allowed), layer(x, attn_mask=allowed))
    close(new(x, attn_mask=torch.zeros(6, 6) + 3.0 * allowed[0, 0]), layer(x, 3.0 * allowed[0, 0]))
    close(new(x, is_causal=True), layer(x, is_causal=True))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_what_was_converted_goes_back_to_timm(options, moved):
    pytest.importorskip("timm")
    from timm.layers import Attention

    def model():
        return nn.Sequential(nn.Conv1d(6, 6, 1), Attention(8, 2, **options)).eval()

    converted, x = convert.to_convnn(model()), torch.randn(3, 6, 8)
    if moved:  # and back: the place is no parameter
        convert.set_interpolation(converted, 0.5)
    for parameter in converted.parameters():
        nn.init.normal_(parameter)
    state = convert.original_state_dict(converted)
    plain = model()
    plain.load_state_dict(state)  # no more and no less
    if moved:
        convert.set_interpolation(converted, 1.0)
    close(converted(x), plain(x))
    assert convert.original_state_dict(plain).keys() == plain.state_dict().keys()
    assert state.keys() == plain.state_dict().keys()


def test_timm_attention_becomes_others_and_refuses_what_it_has_no_place_for():
    pytest.importorskip("timm")
    from timm.layers import Attention

    x = torch.randn(2, 9, 8)
    normalised = Attention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm)
    new = spec("kvt", k=9)(normalised)  # all of nine tokens
    close(new(x), normalised(x))
    assert (spec("kvt", k=3)(normalised)(x) - normalised(x)).abs().max() > 1e-3
    taps = spec("convnn_attention", k=4, kernel="standard")(Attention(8, 2))
    assert taps.attention.taps.shape == (4, 4, 4) and taps(x).shape == x.shape
    with pytest.raises(NotApplicable, match="normalises"):
        spec("interpolated_attention")(normalised)
    with pytest.raises(NotApplicable, match="heads have 12 channels"):
        spec("exact")(Attention(8, 2, attn_head_dim=6))
    with pytest.raises(NotApplicable, match="gate"):
        spec("exact")(Attention(8, 2, gated=True))


# Graphs


def edge_layer(monkeypatch, aggr="max"):
    monkeypatch.setattr("torch_geometric.typing.WITH_KNN", True)  # it is built, and never run
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return DynamicEdgeConv(mlp, k=4, aggr=aggr)


@pytest.mark.parametrize("aggr", ["max", "mean", "add"])
def test_dynamic_edge_conv(monkeypatch, aggr):
    layer = edge_layer(monkeypatch, aggr)
    x, batch = torch.randn(12, 3), torch.tensor([0] * 7 + [1] * 3 + [2] * 2)  # 3 and 2 under k
    edges = []
    for i in range(12):
        inside = [j for j in range(12) if batch[j] == batch[i]]
        inside.sort(key=lambda j, i=i: float((x[i] - x[j]).square().sum()))
        edges += [(j, i) for j in inside[:4]]
    expected = EdgeConv(layer.nn, aggr)(x, torch.tensor(edges).T)  # it resets what it is given
    new = convert.to_convnn(nn.ModuleDict({"conv": layer}))["conv"]
    close(new(x, batch), expected)
    assert {id(p) for p in new.parameters()} == {id(p) for p in layer.parameters()}
    with pytest.raises(NotApplicable, match="how many channels"):
        spec("exact")(DynamicEdgeConv(nn.ReLU(), 3))


# Rules and specs


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)),
        nn.Conv2d(4, 6, 1),
    )


def kinds(model):
    layers = (model[0], model[2][0], model[2][1], model[3])
    return [type(layer).__name__.removesuffix("2d") for layer in layers]


def test_rules_select_by_name_type_depth_and_predicate():
    assert kinds(convert.to_convnn(chain())) == ["ConvNN"] * 4
    for condition, expected in (
        ({"name": "2.*"}, "Conv ConvNN ConvNN Conv"),
        ({"name": "?"}, "ConvNN Conv Conv ConvNN"),
        ({"type": (nn.Conv1d, nn.Conv2d)}, "ConvNN ConvNN ConvNN ConvNN"),
        ({"depth": 2}, "Conv Conv ConvNN Conv"),
        ({"depth": range(1, 3)}, "Conv ConvNN ConvNN Conv"),
        ({"where": lambda name, layer: layer.out_channels == 6}, "Conv Conv Conv ConvNN"),
        ({"name": "2.*", "depth": range(2)}, "Conv ConvNN Conv Conv"),
    ):
        assert kinds(convert.to_convnn(chain(), [Rule("exact", **condition)])) == expected.split()


def test_the_first_rule_that_matches_wins():
    rules = [Rule("keep", depth=0), Rule(spec("branching", k=3), depth=range(2)), Rule("convnn")]
    model = convert.to_convnn(chain(), rules)
    assert kinds(model) == ["Conv", "Branching", "ConvNN", "ConvNN"]
    assert model[2][1].k == 9 and model[3].k == 1
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 6, 4, 4)
    assert convert.to_convnn(model, Rule("exact"))[2][0].neighbors.k == 3  # ours stay as they are
    assert kinds(model) == ["ConvNN", "Branching", "ConvNN", "ConvNN"]


def test_a_function_may_make_the_layer_and_a_shared_layer_stays_shared():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    made = []

    def make(layer, scale):
        made.append(layer)
        return nn.Sequential(layer, nn.Upsample(scale_factor=scale))

    convert.to_convnn(model, [Rule(spec(make, scale=2), name="b.0")])
    assert model["a"] is model["b"][0] and made == [shared]
    assert model["a"](torch.zeros(1, 2, 3, 3)).shape == (1, 2, 6, 6)


def test_a_share_of_too_few_channels_is_no_counterpart():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1))
    branching = spec("branching", k=3)
    with pytest.raises(ValueError, match=r"1.*0.5 of out_channels=1"):
        convert.to_convnn(copy.deepcopy(model), [Rule(branching)])
    convert.to_convnn(model, [Rule(branching, optional=True)])
    assert type(model[0]).__name__ == "Branching" and type(model[1]) is nn.Conv2d
    assert "out_channels=1" in convert.report(model).left["1"]
    with pytest.raises(ValueError, match=r"ratio: .* in \[0, 1\], got 2"):
        convert.to_convnn(chain(), [Rule(spec("branching", k=3, ratio=2.0), optional=True)])


def test_bad_rules_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown spec 'convn'; expected one of: keep, exact"):
        Rule("convn")
    for wrong in ({"name": 3}, {"type": "Conv2d"}, {"depth": True}, {"depth": 1.0}, {"where": 1}):
        with pytest.raises(TypeError, match=f"Rule: {next(iter(wrong))}"):
            Rule("exact", **wrong)
    with pytest.raises(TypeError, match="model"):
        convert.to_convnn("resnet18")
    with pytest.raises(TypeError, match="rules"):
        convert.to_convnn(chain(), ["exact"])
    with pytest.raises(TypeError, match=r"expected an nn\.Module in return, got None"):
        convert.to_convnn(chain(), [Rule(lambda layer: None)])
    model = chain()
    with pytest.raises(
        NotApplicable, match=r"2\.1 \(Conv2d\) can't become 'branching': its stride"
    ):
        convert.to_convnn(model, [Rule("branching")])
    assert kinds(model) == ["Conv"] * 4
    with pytest.raises(ValueError, match=r"0 \(Conv2d\): .*ratio"):
        convert.to_convnn(model, [Rule(spec("branching", ratio=2.0))])
    with pytest.raises(TypeError, match=r"0 \(Conv2d\): k: expected an integer"):
        convert.to_convnn(model, [Rule(spec("convnn", k=2.5))])


def test_specs_refuse_options_that_they_do_not_take():
    with pytest.raises(ValueError, match=r"unknown option 'ratio' of spec 'kvt'; .*\bk\b"):
        spec("kvt", ratio=0.5)
    with pytest.raises(ValueError, match="unknown option 'k' of spec 'exact'; it takes none"):
        spec("exact", k=3)
    with pytest.raises(ValueError, match="'neighborhood_attention' needs kernel_size"):
        spec("neighborhood_attention")
    attention = spec("attention", num_heads=2)  # an option for convolutions alone
    assert attention(nn.Conv2d(4, 6, 3, padding=1))(torch.zeros(1, 4, 5, 3)).shape == (1, 6, 5, 3)
    with pytest.raises(ValueError, match="num_heads"):
        attention(nn.MultiheadAttention(4, 2))
    with pytest.raises(NotApplicable, match="not among the layers known"):
        spec("exact")(nn.Linear(2, 2))
    with pytest.raises(NotApplicable, match=r"Conv2d can't become 'strided_attention'; .*kvt"):
        spec("strided_attention", stride=2)(nn.Conv2d(2, 2, 1))


REQUIRED = {
    "block_attention": {"size": 3},
    "dilated_attention": {"kernel_size": 3},
    "neighborhood_attention": {"kernel_size": 3},
    "sliding_window_attention": {"kernel_size": 3},
    "strided_attention": {"stride": 2},
}


@pytest.mark.parametrize("name", convert.spec_names())
def test_every_spec_runs_on_a_layer_that_it_is_for(name, monkeypatch):
    layers = {
        1: (nn.Conv1d(4, 4, 3, padding=1), torch.randn(2, 4, 11)),
        2: (nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 5, 6)),
        3: (nn.Conv3d(4, 4, 3, padding=1), torch.randn(2, 4, 3, 4, 5)),
        "attention": (nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 12, 8)),
        "edge": (edge_layer(monkeypatch), torch.randn(12, 3)),
    }
    become, ran = spec(name, **REQUIRED.get(name, {})), 0
    for layer, x in layers.values():
        try:
            new = become(layer)
        except NotApplicable:
            continue
        inputs = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
        if new is layer:
            assert name == "keep"
            ran += 1
            continue
        out = new(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        assert out.shape == (*x.shape[:-1], 4) if x.ndim == 2 else out.shape == x.shape
        out.sum().backward()
        assert all(p.grad is not None for p in new.parameters())
        ran += 1
    assert ran


def test_names_of_specs_are_all_that_a_layer_could_become():
    names = convert.spec_names()
    assert len(set(names)) == len(names)
    assert {"keep", "exact", "conv", "convnn", "branching", "attention", "kvt"} < set(names)
    assert not {n for n in names if "pool" in n} and "dynamic_edge_conv" in names


def test_weights_are_carried_where_shapes_allow():
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
    nine = spec("convnn")(conv)
    assert torch.equal(nine.weight, conv.weight.flatten(2)) and nine.bias is conv.bias
    assert nine.stride == (2, 2) and nine.groups == 2 and nine.k == 9
    five = spec("convnn", k=5)(conv)
    assert five.weight.shape == (6, 2, 5) and five.bias is conv.bias
    x = torch.randn(1, 4, 7, 8)
    assert nine(x).shape == conv(x).shape
    plain = nn.Conv2d(4, 6, (3, 5), padding="same")
    ends = [spec("branching", ratio=ratio)(plain) for ratio in (0.0, 0.5, 1.0)]
    assert ends[0].other.weight is plain.weight
    assert ends[1].neighbors.out_channels == 3 and ends[1].pointwise is not None
    assert ends[2].neighbors.k == 9 and ends[2].neighbors.weight.shape == (6, 4, 9)
    x = torch.randn(1, 4, 7, 8)
    close(ends[0](x), plain(x))
    moved = spec("interpolated_conv2d", lam=0.7)(plain)
    assert moved.weight is plain.weight and moved.metric.lam == 0.7


def image(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("name", "heads", "k"), [("kvt", 1, 4), ("convnn_attention", 2, 3)])
def test_attention_over_the_nearest_pixels_by_a_double_loop(name, heads, k, axes):
    conv = CONV[axes](4, 6, 3, padding=1, dtype=torch.float64)
    layer, size = spec(name, num_heads=heads, k=k)(conv), (5, 4, 2)[:axes]
    attention, taps = layer.attention, torch.ones(4 // heads, k, dtype=torch.float64)
    assert attention.k == k and layer.linear.out_features == 6
    nn.init.normal_(attention.in_proj_bias)
    if name == "convnn_attention":
        assert attention.kernel == "depthwise"
        nn.init.normal_(attention.taps)
        taps = attention.taps[:, 0]
    x = image(2, 4, *size)
    projected = x.flatten(2).mT @ attention.in_proj_weight.T + attention.in_proj_bias
    expected = torch.zeros(2, math.prod(size), 4, dtype=torch.float64)
    for b, (q, keys, value) in enumerate(zip(*projected.chunk(3, -1), strict=True)):
        for head in torch.arange(4).chunk(heads):
            for i, query in enumerate(q[:, head]):
                score = keys[:, head] @ query / len(head) ** 0.5
                best = score.argsort(descending=True)[:k]
                weight = score[best].softmax(0)
                expected[b, i, head] = (weight[:, None] * value[best][:, head] * taps.T).sum(0)
    expected = layer.linear(attention.out_proj(expected)).mT.unflatten(-1, size)
    close(layer(x), expected, atol=1e-10)
    close(layer(x[1]), expected[1], atol=1e-10)  # one image by itself
    layer(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all() and p.grad.any()) for p in layer.parameters())


def test_attention_among_pixels_takes_the_options_of_attention():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    become = spec("convnn_attention", k=5, kernel="standard", taps_per_head=True, num_heads=2)
    assert become(conv).attention.taps.shape == (2, 2, 2, 5)
    chosen = spec("kvt", k=4, metric="euclidean", self_point="first", encoding="coordinates")(conv)
    assert chosen.attention.metric.kind == "euclidean" and chosen(torch.randn(2, 4, 3, 5)).any()
    assert chosen.attention.selection.self_point == "first"
    window = spec("kvt", k=None, candidates=Window(3, padding=1))(conv.double())
    x, before = image(1, 4, 5, 6), None
    for place in ((0, 0), (0, 5), (2, 3)):  # what is not in the window does not count
        before = window(x)
        other = x.clone()
        other[..., place[0], place[1]] += 1
        rows, columns = (window(other) - before).abs().sum((0, 1)).nonzero().T
        assert int((rows - place[0]).abs().max()) == int((columns - place[1]).abs().max()) == 1
    for wrong, match in (({"metric": "cosinus"}, "unknown metric"), ({"k": 0}, "k: expected")):
        with pytest.raises(ValueError, match=match):
            spec("kvt", **wrong)(conv)
    with pytest.raises(ValueError, match="unknown option 'axes' of spec 'kvt'"):
        spec("kvt", axes=2)(conv)


@pytest.mark.parametrize(
    ("become", "layer", "reason"),
    [
        ("kvt", nn.Conv2d(4, 4, 3), "changes the image's size"),
        ("convnn_attention", nn.Conv2d(4, 4, 3, 2, 1), "stride"),
        ("branching", nn.Conv2d(4, 4, 3), "changes the image's size"),
        ("branching", nn.Conv2d(4, 4, 3, padding=1, groups=2), "2 groups"),
        ("branching", nn.Conv2d(4, 4, 4, padding="same"), "even"),
        ("branching", nn.Conv1d(4, 4, 3, padding="same", dilation=2), "dilation"),
        ("convnn", nn.Conv2d(4, 4, 3), "changes the image's size"),
        ("attention", nn.Conv2d(4, 4, 3, 2, 1), "stride"),
        ("interpolated_conv2d", nn.Conv1d(4, 4, 3), "1 axes, the recipe 2"),
        ("conv3d_by_position", nn.Conv3d(4, 4, (3, 3, 2)), "even"),
        ("interpolated_conv2d", nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect"), "reflect"),
        ("depthwise_conv2d", nn.Conv2d(4, 6, 3), "from 4 to 6 channels"),
    ],
)
def test_specs_refuse_layers_that_they_do_not_fit(become, layer, reason):
    with pytest.raises(NotApplicable, match=reason):
        spec(become)(layer)


def test_layers_do_not_share_what_learns():
    metric = interpolate("spatial", "cosine", learnable=True)
    become = spec("convnn", metric=metric, weighting="softmax")
    first, second = (become(nn.Conv2d(2, 2, 3, padding=1)) for _ in range(2))
    assert first.metric.lam is not second.metric.lam


# Reports


def test_flops_against_counts_by_hand():
    model = nn.Sequential(
        nn.Conv1d(3, 8, 5, padding="same"),
        nn.Conv1d(8, 8, 3, padding=1, stride=2, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 10, 7),
    )
    x = torch.randn(2, 3, 20)
    by_hand = [2 * 2 * 20 * 8 * 3 * 5, 2 * 2 * 10 * 8 * 2 * 3]
    for was in ("", "Conv1d"):
        found = convert.report(model, x)
        assert [line.flops for line in found.lines] == by_hand
        assert found.other_flops == 2 * 2 * 80 * 7 and found.other_parameters == 80 * 7 + 7
        assert found.flops == sum(by_hand) + found.other_flops
        assert [line.was for line in found.lines] == [was, was]
        assert {line.lowering for line in found.lines} == {"convolution" if was else "torch"}
        convert.to_convnn(model)
    convert.to_convnn(model)
    convert.set_interpolation(model, 1.0)
    first = convert.report(model, x).lines[0]  # 24 sources: two zeros at each end
    assert first.flops == 2 * 2 * (20 * 24 * 3 + 20 * 5 * 3 * 8) and first.lowering == "gather"


def test_flops_of_chosen_neighbours_by_hand():
    def one(layer, *inputs):
        (line,) = convert.report(layer, *inputs).lines
        return line.flops

    x = torch.randn(2, 4, 6, 7)  # 42 pixels
    conv = nn.Conv2d(4, 6, 3, padding=1)
    taps = 2 * 2 * 42 * 9 * 4 * 6
    search = 2 * 2 * 42 * 42 * 4
    assert one(conv, x) == one(spec("exact")(conv), x) == taps
    assert one(spec("convnn")(conv), x) == search + taps
    assert one(spec("conv2d_by_position")(conv), x) == taps  # positions take no products
    half = 2 * 2 * 42 * 9 * 4 * 3
    assert one(spec("branching")(conv), x) == search + 2 * half + 2 * 2 * 42 * 6 * 6
    tokens = torch.randn(2, 10, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    project, products = 2 * 2 * 10 * 4 * 8 * 8, 2 * 2 * 2 * 10 * 10 * 4
    assert one(attention, tokens, tokens, tokens) == project + 2 * products
    exact, nearest = spec("exact")(attention), spec("kvt", k=3)(attention)
    assert one(exact, tokens, tokens, tokens) == project + 2 * products
    assert one(nearest, tokens) == project + products + 2 * 2 * 2 * 10 * 3 * 4


def test_flops_of_networks_on_edges(monkeypatch):
    new = convert.to_convnn(edge_layer(monkeypatch))
    x, batch = torch.randn(12, 3), torch.arange(12) // 6
    (line,) = convert.report(new, x, batch).lines
    assert line.now == "DynamicEdgeConvNN" and line.was == "DynamicEdgeConv"
    targets, edges = 12, 12 * 4
    first = (targets + edges) * 3 * 8  # targets once each, differences once an edge
    assert line.flops == 2 * (first + edges * 8 * 4) + 2 * 2 * 6 * 6 * 3


def test_report_of_whole_models_does_not_change_with_exact_layers():
    model = pytest.importorskip("torchvision").models.resnet18()
    x = torch.randn(1, 3, 64, 64)
    before = convert.report(model, x)
    state = copy.deepcopy(model.state_dict())
    after = convert.report(convert.to_convnn(model), x)
    assert [line.flops for line in after.lines] == [line.flops for line in before.lines]
    assert after.flops == before.flops and after.parameters == before.parameters == 11_689_512
    assert len(after.lines) == 20 and model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.conv1._forward_hooks and torch.backends.mha.get_fastpath_enabled()


def test_reports_print_a_line_a_layer():
    model = convert.to_convnn(chain(), [Rule("branching", depth=1), Rule("exact")])
    text = str(convert.report(model, torch.zeros(1, 3, 8, 8))).splitlines()
    assert text[0].split() == ["layer", "was", "is", "parameters", "FLOPs", "lowering"]
    assert [line.split()[0] for line in text[1:5]] == ["0", "2.0", "2.1", "3"]
    assert text[2].split()[1:3] == ["Conv2d", "Branching"] and text[2].endswith("convolution")
    assert "gather + convolution" in text[2] and text[-1].startswith("total")
    bare = convert.report(model)
    assert bare.flops is None and "FLOPs" not in str(bare) and bare.parameters > 0
    shared = nn.Conv2d(2, 2, 1)
    twice = convert.report(nn.Sequential(shared, shared), torch.zeros(1, 2, 3, 3))
    assert len(twice.lines) == 1 and twice.lines[0].flops == 2 * 2 * 9 * 2 * 2
    assert twice.parameters == 6
    with pytest.raises(TypeError, match="model"):
        convert.report("resnet18")


def test_metrics_that_look_at_features():
    assert looks_at_features(0.5 * Spatial() + Feature("cosine"))
    assert not looks_at_features(0.5 * Spatial() + 0 * Feature("cosine"))
    assert not looks_at_features(interpolate("spatial", "cosine", 0.0))
    assert looks_at_features(interpolate("spatial", "cosine", 0.5))
    assert not looks_at_features(convert.PatchPositions((2, 2)))


# The spectrum


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (1, {"kernel_size": 5, "padding": 2}),
        (1, {"kernel_size": 3}),
        (2, {"kernel_size": 3, "padding": 1, "stride": 2}),
        (2, {"kernel_size": (3, 5), "padding": "same", "groups": 2}),
        (2, {"kernel_size": 7, "padding": 3}),
        (3, {"kernel_size": 3, "padding": 1}),
    ],
)
def test_convolutions_move_along_the_spectrum_and_back(axes, options):
    conv = CONV[axes](4, 6, **options)
    x = torch.randn(2, 4, *[[31], [10, 9], [4, 5, 6]][axes - 1])
    layer = convert.to_convnn(copy.deepcopy(conv))
    parameters = list(layer.parameters())
    assert convert.interpolation(layer) == {"": 0.0}
    outs = {}
    for lam in (0.0, 0.6, 1.0, 0.6, 0.0):
        assert convert.set_interpolation(layer, lam) == [""]
        assert convert.interpolation(layer) == {"": lam}
        out = layer(x)
        assert out.shape == conv(x).shape
        assert torch.equal(outs.setdefault(lam, out), out)
    close(outs[0.0], conv(x))
    assert (outs[0.6] - outs[0.0]).abs().max() > 1e-2
    assert (outs[1.0] - outs[0.6]).abs().max() > 1e-2
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert list(layer.state_dict()) == list(conv.state_dict())
    convert.set_interpolation(layer, 1e-9)  # the neighbours are chosen, and they are the window
    close(layer(x), conv(x))
    assert not isinstance(layer.selection, Every)


def test_between_the_ends_it_is_the_recipe():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer, x = convert.to_convnn(nn.Sequential(conv)), torch.randn(2, 3, 8, 9)
    for lam in (0.4, 0.8, 1.0):
        peer = recipes.interpolated_conv2d(3, 5, 3, lam)
        peer.load_state_dict(conv.state_dict())
        convert.set_interpolation(layer, lam)
        assert torch.equal(layer(x), peer(x))
    assert convert.interpolation(peer) == {"": 1.0}
    convert.set_interpolation(peer, 0.0)  # a layer built by the recipe moves as well
    close(peer(x), conv(x))


def test_layers_that_choose_by_features_move_to_positions():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer, x = spec("convnn", k=6, metric="euclidean")(conv), torch.randn(1, 3, 8, 9)
    before = layer(x)
    assert convert.interpolation(layer) == {"": 1.0}
    convert.set_interpolation(layer, 0.0)
    near = ConvNN2d(3, 5, k=6, metric=Spatial("chebyshev"))
    near.load_state_dict(layer.state_dict())
    close(layer(x), near(x))
    convert.set_interpolation(layer, 1.0)
    assert torch.equal(layer(x), before)
    both = nn.ModuleList([spec("branching")(conv), spec("branching", ratio=0.0)(conv)])
    assert convert.set_interpolation(both, 0.5) == ["0.neighbors"]
    assert isinstance(both[0].neighbors.metric, Interpolation) and both[0].other.metric is not None
    assert not isinstance(both[0].other.metric, Interpolation)


def test_what_can_not_move_stays():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 4, padding="same"),
        nn.Conv2d(2, 2, 3, padding=2, dilation=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 1),
    )
    convert.to_convnn(model).append(recipes.max_pool2d(2)).append(recipes.bilateral_filter(1, 1))
    x = torch.randn(1, 2, 8, 8)
    before = model(x)
    with pytest.raises(ValueError, match="no layer that can move"):
        convert.set_interpolation(model, 0.5)
    with pytest.raises(ValueError, match="no layer that can move"):
        convert.set_interpolation(nn.Conv2d(2, 2, 3), 0.5)
    model.append(convert.to_convnn(nn.Conv2d(2, 2, 3)))
    assert convert.set_interpolation(model, 0.5) == ["6"]
    assert torch.equal(model[:-1](x), before)
    for lam in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="lam"):
            convert.set_interpolation(model, lam)
    for key in ("add_bias_kv", "add_zero_attn"):
        attention = convert.to_convnn(nn.MultiheadAttention(4, 2, **{key: True}))
        assert convert.interpolation(attention) == {}


def test_attention_moves_along_the_sequence():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layer, x = convert.to_convnn(attention), 3 * torch.randn(2, 7, 8)
    assert convert.interpolation(layer) == {"": 1.0}
    outs = []
    for lam in (0.0, 0.5, 1.0):
        assert convert.set_interpolation(layer, lam) == [""]
        outs.append(layer(x)[0])
    close(outs[2], attention(x, x, x)[0])
    place = torch.arange(7.0)
    near = (-(place[:, None] - place).square()).softmax(-1)
    value = x @ attention.in_proj_weight[16:].T
    close(outs[0], attention.out_proj(near @ value))
    assert (outs[1] - outs[0]).abs().max() > 1e-2 and (outs[1] - outs[2]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["attention", "kvt", "convnn_attention"])
def test_attention_among_pixels_moves_on_their_grid(name):
    layer, x = spec(name)(nn.Conv2d(3, 5, 3, padding=1).double()), image(2, 3, 4, 5)
    before = layer(x)
    assert convert.interpolation(layer) == {"": 1.0}
    assert convert.set_interpolation(layer, 0.0) == [""]
    place = torch.tensor([(row, column) for row in range(4) for column in range(5)]).double()
    near = -(place[:, None] - place).square().sum(-1)
    if name != "attention":  # ties go to the lowest index
        chosen = near.argsort(dim=-1, descending=True, stable=True)[:, :9]
        near = near.masked_fill(torch.ones(20, 20).scatter(1, chosen, 0).bool(), -torch.inf)
    value = x.flatten(2).mT @ layer.attention.in_proj_weight[6:].T
    moved = layer.linear(layer.attention.out_proj(near.softmax(-1) @ value))
    close(layer(x), moved.mT.unflatten(-1, (4, 5)), atol=1e-10)
    convert.set_interpolation(layer, 1.0)
    close(layer(x), before, atol=1e-10)


def small_vit(which, **options):
    if which == "timm":
        pytest.importorskip("timm")
        from timm.models.vision_transformer import VisionTransformer

        sizes = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return VisionTransformer(**sizes, **{"reg_tokens": 2, **options})
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    return vision.VisionTransformer(8, 4, 2, 2, 16, 32)


@pytest.mark.parametrize(("which", "size", "prefix"), [("timm", (2, 3), 3), ("tv", (2, 2), 1)])
def test_patches_of_vision_transformers_lie_on_their_grid(which, size, prefix):
    model = convert.to_convnn(small_vit(which).eval())
    x = torch.randn(1, 3, 4 * size[0], 4 * size[1])
    before = model(x)
    inside = model.blocks if which == "timm" else model.encoder
    assert len(convert.set_interpolation(inside, 0.25)) == 2  # the layers know the model's grid
    metrics = [m for m in model.modules() if isinstance(m, convert.PatchPositions)]
    assert [(m.size, m.prefix) for m in metrics] == [(size, prefix)] * 2
    assert model(x).shape == before.shape
    convert.set_interpolation(model, 1)
    close(model(x), before)
    recipe = small_vit(which)
    convert.to_convnn(recipe, [Rule(spec("interpolated_attention", lam=1.0), name="*att*")])
    found = [m for m in recipe.modules() if isinstance(m, convert.PatchPositions)]
    assert [(m.size, m.prefix) for m in found] == [(size, prefix)] * 2
    own = small_vit(which)
    keep = spec("interpolated_attention", spatial=Spatial("l1"))
    convert.to_convnn(own, [Rule(keep, name="*att*")])
    assert not any(isinstance(m, convert.PatchPositions) for m in own.modules())


def test_positions_of_patches_by_hand():
    metric = convert.PatchPositions((3, 4), prefix=2)
    tokens = Points.from_tokens(torch.randn(2, 14, 5))
    found = metric(tokens)
    place = [None, None] + [(i, j) for i in range(3) for j in range(4)]
    for i, p in enumerate(place):
        for j, q in enumerate(place):
            expected = 0 if p is None or q is None else (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2
            assert found[i, j] == expected
    with pytest.raises(
        ValueError, match=r"expected 14 tokens \(2 before patches of 3 x 4\), got 9"
    ):
        metric(Points.from_tokens(torch.zeros(1, 9, 5)))
    with pytest.raises(ValueError, match="size"):
        convert.PatchPositions((3, 0))


def test_lam_learns():
    model = convert.to_convnn(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3)))
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.1)
    assert convert.set_interpolation(model, 0.5, learnable=True) == ["0", "1"]
    assert [n for n, _ in model.named_parameters() if n.endswith("lam")] == [
        *("0.metric.lam", "1.metric.lam")
    ]
    lams = [layer.metric.lam for layer in model]
    optimizer.add_param_group({"params": lams})
    x = torch.randn(2, 2, 6, 6)
    model(x).square().sum().backward()
    assert all(lam.grad.abs() > 0 for lam in lams)
    optimizer.step()
    stands = convert.interpolation(model)
    assert set(stands) == {"0", "1"} and all(v != 0.5 and 0 <= v <= 1 for v in stands.values())
    convert.set_interpolation(model, 0.2, learnable=True)
    assert [layer.metric.lam for layer in model] == lams and lams[0].item() == pytest.approx(0.2)
    assert all(a is b for a, b in zip(weights[:2], model[0].parameters(), strict=False))
    convert.set_interpolation(model, 0.0)
    assert len(list(model.parameters())) == 4
    twin = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3))
    twin.load_state_dict(model.state_dict())
    close(model(x), twin(x))


def test_a_dilated_convolution_is_not_moved():
    """Nor dilated where it is none."""
    model = convert.to_convnn(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
    convert.set_interpolation(model, 0.5)
    with pytest.raises(AttributeError, match="dilation: it is that of a window"):
        model[0].dilation = 2
    assert convert.set_interpolation(model, 0.0) == ["0"]
    model[0].dilation, model[0].padding = 2, 2
    plain = nn.Conv2d(3, 4, 3, padding=2, dilation=2)
    plain.load_state_dict(model[0].state_dict())
    x = torch.randn(1, 3, 8, 9)
    close(model(x), plain(x))
    with pytest.raises(ValueError, match="no layer"):
        convert.set_interpolation(model, 0.9)


def test_a_learned_place_is_of_the_models_dtype():
    model = convert.to_convnn(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))).double()
    convert.set_interpolation(model, 0.8, learnable=True)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.randn(1, 2, 6, 6).double()).dtype == torch.float64


def test_weights_of_a_layer_that_learns_have_mean_one():
    layer = convert.to_convnn(nn.Conv2d(2, 4, 3, padding=1))
    convert.set_interpolation(layer, 0.5, learnable=True)
    op = layer.operation(torch.randn(1, 2, 6, 6))
    weight = op.weighting(op.pairs())
    close(weight.mean(-1), torch.ones(1, 36))
    attention = convert.to_convnn(nn.MultiheadAttention(8, 2, batch_first=True))
    convert.set_interpolation(attention, 0.5, learnable=True)
    attention(torch.randn(2, 5, 8))[0].square().sum().backward()
    assert attention.metric.lam.grad.abs() > 0


def test_converted_models_are_copied_and_saved(tmp_path):
    model = convert.to_convnn(chain(), [Rule("convnn", depth=1), Rule("exact")]).eval()
    x = torch.randn(1, 3, 8, 8)
    convert.set_interpolation(model, 0.6)
    close(copy.deepcopy(model)(x), model(x))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = convert.to_convnn(chain(), [Rule("convnn", depth=1), Rule("exact")]).eval()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    convert.set_interpolation(fresh, 0.6)
    assert torch.equal(fresh(x), model(x))


# Found by use


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_a_padding_mask_in_eval():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 5, 16)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
        after = convert.to_convnn(model)(x, src_key_padding_mask=mask)
    close(after[~mask], before[~mask])


def test_patches_moved_outside_their_model_find_their_place_in_it():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    convert.to_convnn(model.blocks)
    convert.set_interpolation(model.blocks, 0.3)
    convert.set_interpolation(model, 0.3)
    assert isinstance(model.blocks[0].attn.attention.metric.first, convert.PatchPositions)


def test_a_learned_place_comes_back_from_beyond_the_ends():
    model = convert.to_convnn(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1)))
    convert.set_interpolation(model, 0.5, learnable=True)
    lam = model[0].metric.lam
    for beyond in (-0.4, 1.3):
        with torch.no_grad():
            lam.fill_(beyond)
        lam.grad = None
        model(torch.randn(1, 2, 6, 6)).square().sum().backward()
        assert lam.grad.abs() > 0


def test_converting_twice_says_what_is_converted():
    model = convert.to_convnn(nn.Sequential(nn.Conv2d(2, 2, 3)))
    with pytest.raises(ValueError, match="1 more were converted before"):
        convert.to_convnn(model, convert.Rule("exact", name="0"))


def hooked(conv):
    """Handles of every kind of hook, and where they write."""
    calls = []

    def hook(name):
        return lambda *_, **__: calls.append(name)

    return calls, {
        "before": conv.register_forward_pre_hook(hook("before")),
        "after": conv.register_forward_hook(hook("after")),
        "keywords": conv.register_forward_hook(hook("keywords"), with_kwargs=True),
        "always": conv.register_forward_hook(hook("always"), always_call=True),
        "gradient before": conv.register_full_backward_pre_hook(hook("gradient before")),
        "gradient": conv.register_full_backward_hook(hook("gradient")),
    }


@pytest.mark.parametrize("become", ["exact", "branching"])
def test_handles_still_remove_the_hooks_of_a_converted_layer(become):
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    calls, handles = hooked(model[0])
    convert.to_convnn(model, Rule(become))
    expected = list(handles)
    while handles:
        calls.clear()
        model(torch.randn(1, 2, 4, 4).requires_grad_()).sum().backward()
        assert sorted(calls) == sorted(expected)
        name, handle = handles.popitem()
        handle.remove()
        expected.remove(name)
    calls.clear()
    model(torch.randn(1, 2, 4, 4).requires_grad_()).sum().backward()
    assert calls == []


def test_hooks_of_a_layer_that_is_kept_inside_run_once():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    calls, handles = hooked(model[0])
    convert.to_convnn(model, Rule(nn.Sequential))
    model(torch.zeros(1, 2, 4, 4))
    assert calls.count("after") == 1
    handles["after"].remove()
    model(torch.zeros(1, 2, 4, 4))
    assert calls.count("after") == 1


def test_hooks_of_two_layers_can_not_be_one():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    hooked(model[0])

    def make(layer):
        new = nn.Identity()
        new.register_forward_hook(lambda *_: None)
        return new

    with pytest.raises(NotApplicable, match=r"0 \(Conv2d\) can't become 'make': it has hooks"):
        convert.to_convnn(model, Rule(make))
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    "register",
    [
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_hooks_of_a_state_are_not_lost_unsaid(register):
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    handle = getattr(model[0], register)(lambda *_: None)
    with pytest.raises(NotApplicable, match=r"0 \(Conv2d\).*it has hooks of its state_dict"):
        convert.to_convnn(model, "exact")
    handle.remove()
    convert.to_convnn(model)


def tied():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    model[2].weight = model[0].weight
    return model


def test_tied_weights_stay_tied():
    model = convert.to_convnn(tied())
    assert model[0].weight is model[2].weight
    assert len(list(model.parameters())) == 3
    convert.to_convnn(tied(), [Rule("exact", name="0"), Rule("keep", name="2")])
    layer = nn.Conv2d(2, 2, 3, padding=1)  # one layer in two places shares with nobody else
    model = convert.to_convnn(nn.Sequential(layer, layer), Rule("convnn"))
    assert model[0] is model[1] and type(model[0]) is ConvNN2d
    model = convert.to_convnn(tied(), Rule(lambda layer: nn.Identity(), name="0"))
    assert type(model[0]) is nn.Identity  # which has nothing that could differ


@pytest.mark.parametrize(
    ("become", "name", "made"),
    [("convnn", "*", "ConvNN2d"), ("convnn", "0", "ConvNN2d"), ("branching", "*", "Branching")],
)
def test_tied_weights_are_not_drawn_apart(become, name, made):
    model = tied()
    message = rf"0 \(Conv2d\) shares its weight with 2, and a {made} in its place would not"
    with pytest.raises(NotApplicable, match=message):
        convert.to_convnn(model, Rule(become, name=name))
    assert type(model[0]) is type(model[2]) is nn.Conv2d and model[0].weight is model[2].weight
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())  # as the message says
    convert.to_convnn(model, Rule(become, name=name))


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"name": "layer1*"}, "name='layer1*'"),
        ({"type": nn.Conv1d}, "type=Conv1d"),
        ({"type": (nn.Linear, nn.Conv3d)}, "type=(Linear, Conv3d)"),
        ({"depth": 4}, "depth=4"),
        ({"depth": range(4, 9)}, "depth=range(4, 9)"),
        ({"where": lambda name, layer: layer.groups == 2}, "where=<lambda>"),
        ({"name": "2.*", "depth": 3}, "name='2.*', depth=3"),
    ],
)
def test_a_rule_that_fits_no_layer_is_told(conditions, said):
    model = chain()
    rules = [Rule("keep", name="3"), Rule("exact", **conditions)]
    with pytest.raises(ValueError, match="fits no layer") as raised:
        convert.to_convnn(model, rules)
    there = "0 (Conv2d), 2.0 (Conv2d), 2.1 (Conv2d), 3 (Conv2d)"
    assert f"rules[1], Rule('exact', {said}), fits no layer" in str(raised.value)
    assert "nn.MultiheadAttention, timm's Attention" in str(raised.value)
    assert str(raised.value).endswith(f"in the order of depth: {there}")
    assert kinds(model) == ["Conv"] * 4
    with pytest.raises(ValueError, match="in the order of depth: none"):
        convert.to_convnn(nn.Sequential(nn.Linear(2, 2)), Rule("exact", type=nn.Linear))


def test_rules_that_earlier_ones_leave_nothing_to():
    rules = [Rule("keep", depth=0), Rule("convnn", type=nn.Conv2d), Rule("exact")]
    one = convert.to_convnn(nn.Sequential(nn.Conv2d(2, 2, 1)), rules)  # one list for all models
    assert type(one[0]) is nn.Conv2d
    wrong = [Rule("exact"), Rule("branching", name="2.*")]
    message = r"rules\[0\], Rule\('exact'\), takes every layer, so that rules\[1\].* put it last"
    with pytest.raises(ValueError, match=message):
        convert.to_convnn(chain(), wrong)
    assert convert.to_convnn(nn.Linear(2, 2)) is not None  # where no condition can be mistyped


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 0}, 0),
        ({"class_token": False, "global_pool": "avg"}, 2),
        ({"class_token": False, "global_pool": "map", "reg_tokens": 1}, 1),
        ({"reg_tokens": 4, "no_embed_class": True}, 5),
        ({"reg_tokens": 0, "global_pool": "avg"}, 1),
    ],
)
def test_patches_come_after_the_tokens_that_a_transformer_puts_before(options, prefix):
    model = convert.to_convnn(small_vit("timm", **options).eval())
    convert.set_interpolation(model, 0.0)
    metric = model.blocks[0].attn.attention.metric.first
    assert (metric.size, metric.prefix) == ((2, 3), prefix)
    seen = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 3, 8, 12)
    model(x)
    patches = model.patch_embed(x)
    if not options.get("no_embed_class"):  # which adds to the patches alone
        patches = patches + model.pos_embed[:, model.pos_embed.shape[1] - 6 :]
    else:
        patches = patches + model.pos_embed
    close(seen[0][:, prefix:], model.blocks[0].norm1(patches))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("learnable", [False, True])
def test_new_parts_train_as_the_model_does(training, learnable):
    conv, attention = nn.Conv2d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2)
    model = nn.ModuleList([conv, attention, nn.Conv2d(8, 8, 3, padding=1)]).train(training)
    rules = [Rule("branching", depth=2), Rule("exact")]
    convert.to_convnn(model, rules)
    assert all(part.training == training for part in model.modules())
    convert.set_interpolation(model, 0.8, learnable)
    assert all(part.training == training for part in model.modules())


def test_positions_of_images_of_any_size_are_refused():
    model = small_vit("timm", dynamic_img_size=True).eval()
    tall, wide = torch.randn(1, 3, 12, 8), torch.randn(1, 3, 8, 12)
    before = model(tall), model(wide)
    convert.to_convnn(model)
    close(model(tall), before[0])  # where positions do not count, any size will do
    for part in (model, model.blocks):
        with pytest.raises(ValueError, match="can't leave lam=1: dynamic_img_size=True takes"):
            convert.set_interpolation(part, 0.5)
    close(model(tall), before[0])
    convert.set_interpolation(model, 1.0)
    close(model(wide), before[1])
    recipe = small_vit("timm", dynamic_img_size=True)
    convert.to_convnn(recipe, Rule(spec("interpolated_attention", lam=0.5), name="*attn"))
    with pytest.raises(ValueError, match="dynamic_img_size"):
        recipe(tall)


def test_positions_of_patches_without_a_grid_are_refused():
    pytest.importorskip("timm")
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    cfg = NaFlexVitCfg(patch_size=4, embed_dim=16, depth=1, num_heads=2, pos_embed_grid_size=(2, 3))
    model, x = NaFlexVit(cfg, num_classes=3).eval(), torch.randn(1, 3, 8, 12)
    before = model(x)
    close(convert.to_convnn(model)(x), before)
    with pytest.raises(ValueError, match="NaFlexVit names no grid_size"):
        convert.set_interpolation(model, 0.5)
    close(model(x), before)


def test_positions_of_patches_that_are_dropped_are_refused():
    model = convert.to_convnn(small_vit("timm", patch_drop_rate=0.5))
    x = torch.randn(1, 3, 8, 12)
    assert model(x).shape == (1, 1000)
    convert.set_interpolation(model, 0.5)
    with pytest.raises(ValueError, match=r"expected 9 tokens .*, got 6; .*patch_drop_rate=0"):
        model(x)
    assert model.eval()(x).shape == (1, 1000)  # where none is dropped


def test_other_models_with_a_class_token_are_sequences():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    model.class_token, model.patch_size = nn.Parameter(torch.zeros(8)), (4, 4)
    convert.to_convnn(model)
    convert.set_interpolation(model, 0.5)
    assert isinstance(model[0].metric.first, Spatial)


def test_hooks_on_parts_that_go_are_no_silent_loss():
    pytest.importorskip("timm")
    from timm.layers import Attention

    model = nn.Sequential(Attention(8, 2))
    calls = []
    model[0].proj.register_forward_hook(lambda *_: calls.append("proj"))  # a part that stays
    handle = model[0].qkv.register_forward_hook(lambda *_: calls.append("qkv"))
    with pytest.raises(NotApplicable, match=r"0 \(Attention\) .*: its qkv has hooks, and goes"):
        convert.to_convnn(model, "exact")
    handle.remove()
    convert.to_convnn(model)(torch.zeros(1, 5, 8))
    assert calls == ["proj"]


def test_timms_weights_load_into_a_converted_model():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
    models = [
        timm.models.VisionTransformer(**options, qk_norm=norm).eval() for norm in (False, True)
    ]
    x = torch.randn(1, 3, 32, 32)
    for model in models:
        other = convert.to_convnn(copy.deepcopy(model))
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        assert (other(x) - model(x)).abs().max() > 0.01
        other.load_state_dict(model.state_dict())
        close(other(x), model(x), atol=1e-5)
        other.load_state_dict(other.state_dict())
        convert.set_interpolation(other, 0.5)
        other.load_state_dict(model.state_dict())


def test_fx_keeps_timms_attention_whole():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 1}
    model = convert.to_convnn(timm.models.VisionTransformer(**options).eval())
    x = torch.randn(1, 3, 32, 32)
    graph = torch.fx.symbolic_trace(model)
    assert "blocks.0.attn" in [node.target for node in graph.graph.nodes]
    close(graph(x), model(x))


@pytest.mark.parametrize("name", ["branching", "kvt", "convnn", "convnn_attention"])
def test_fewer_pixels_than_k_leave_the_last_neighbours_empty(name):
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 2, 2)
    assert spec(name)(conv)(x).shape == (1, 6, 2, 2)
    assert spec(name, selection=KNearest(9, short="pad"))(conv)(x).shape == (1, 6, 2, 2)
    with pytest.raises(ValueError, match="k=9 needs 9 candidates, but there are 4"):
        spec(name, selection=KNearest(9))(conv)(x)


def test_a_name_or_a_spec_stands_for_a_rule_for_every_layer():
    for become in ("convnn", spec("convnn", k=9)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        convert.to_convnn(model, become)
        assert [layer.k for layer in model] == [9, 9]


def test_attention_that_is_not_known_is_named_by_the_error():
    class WindowAttention(nn.Module):
        pass

    model = convert.to_convnn(nn.Sequential(nn.Conv2d(3, 3, 1), WindowAttention()))
    with pytest.raises(ValueError, match=r"DynamicEdgeConv, not .*\.WindowAttention"):
        convert.set_interpolation(model, 0.5)


def test_a_report_needs_tensors():
    with pytest.raises(TypeError, match=r"got a shape; pass torch.randn\(1, 3, 4, 4\)"):
        convert.report(nn.Conv2d(3, 3, 1), (1, 3, 4, 4))


# --- what would be lost ------------------------------------------------------------------------


class WithParts(nn.Conv2d):
    """The forward is torch's; a parent uses the rest."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale, self.act = nn.Parameter(torch.ones(1)), nn.ReLU()


def doubled(conv):
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)
    return conv


def shifted(conv):
    conv._conv_forward = lambda *args: 1 + nn.Conv2d._conv_forward(conv, *args)
    return conv


class Called(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: doubled(nn.Conv2d(2, 3, 3)), "its forward was replaced, and would be lost"),
        (lambda: shifted(nn.Conv2d(2, 3, 3)), "its _conv_forward was replaced"),
        (lambda: WithParts(2, 3, 3), "it has parts of its own, which would be lost: scale, act"),
        (lambda: nn.Conv2d(2, 3, 3, dtype=torch.complex64), "its weight is of torch.complex64"),
        (lambda: Called(2, 3, 3), None),
    ],
)
def test_a_layer_that_would_lose_something_is_left(make, why):
    model = nn.Sequential(make())
    layer, x = model[0], torch.randn(1, 2, 5, 5, dtype=model[0].weight.dtype)
    before = model(x)
    assert convert.to_convnn(model)[0] is layer
    assert torch.equal(model(x), before)
    left = convert.report(model).left
    assert why in left["0"] if why else not left
    with pytest.raises(ValueError, match=why or "fits no layer"):
        convert.to_convnn(model, [convert.Rule("exact", name="0")])


def test_attention_whose_forward_was_replaced_is_left():
    timm = pytest.importorskip("timm")
    del timm
    from timm.models.vision_transformer import Attention

    layer = Attention(8, 2)
    layer.forward = lambda x, **_: x
    model = nn.Sequential(layer)
    assert convert.to_convnn(model)[0] is layer
    assert "its forward was replaced" in convert.report(model).left["0"]


def test_a_forward_that_a_hook_gave_back_is_the_layers_own():
    """As accelerate leaves it: the class's, bound, on the object."""
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    conv.forward = conv.forward
    close(convert.to_convnn(nn.Sequential(conv))(x), conv(x))
    assert type(convert.to_convnn(nn.Sequential(conv))[0]) is ConvNN2d


def test_an_edge_convolution_whose_forward_was_replaced_is_left(monkeypatch):
    monkeypatch.setattr("torch_geometric.typing.WITH_KNN", True)  # it is built, and never run
    layer = DynamicEdgeConv(nn.Linear(6, 4), k=2)
    layer.forward = lambda x, batch=None: x
    model = nn.Sequential(layer)
    assert convert.to_convnn(model)[0] is layer
    assert "its forward was replaced" in convert.report(model).left["0"]


def test_a_converted_convolution_takes_its_input_by_name():
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    close(convert.to_convnn(nn.ModuleDict({"c": conv}))["c"](input=x), conv(input=x))


class WithQuery(nn.Module):
    """A learned query, spread over a batch, goes into a layer."""

    def __init__(self):
        super().__init__()
        self.query, self.layer = nn.Parameter(torch.zeros(1, 1, 8)), nn.Linear(8, 8)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x):
        return self.layer(self.query.expand(len(x), -1, -1)) + x


def test_a_report_counts_where_parameters_are_inputs():
    model = WithQuery()
    assert convert.report(model, torch.randn(2, 5, 8)).flops == 2 * 2 * 8 * 8
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


@pytest.mark.parametrize("layer", ["exact", "kvt", "convnn"])
def test_patches_are_placed_anew_after_a_new_size(layer):
    timm = pytest.importorskip("timm")

    def model():
        torch.manual_seed(0)
        made = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, embed_dim=24, num_heads=2, depth=1, num_classes=4
        )
        return made.eval()

    rules = [convert.Rule(layer, type=timm.layers.Attention)]
    x = torch.randn(1, 3, 32, 128)  # as many patches as before, 2 x 8 and not 4 x 4
    first, then = convert.to_convnn(model(), rules), model()
    convert.set_interpolation(first, 0.5)  # on the old grid
    first.set_input_size((32, 128))
    then.set_input_size((32, 128))
    then = convert.to_convnn(then, rules)
    for one in (first, then):
        convert.set_interpolation(one, 0.3)
    then.load_state_dict(first.state_dict())
    close(first(x), then(x))
    convert.set_interpolation(first, 0.3)
    first.set_input_size((64, 128))
    convert.set_interpolation(first, 0.3)
    assert first(torch.randn(1, 3, 64, 128)).shape == (1, 4)
