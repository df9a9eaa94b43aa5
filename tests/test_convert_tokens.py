"""Convolution, ConvNN and branching among the tokens of timm's vision transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convnn_geo import convert, lowering
from convnn_geo.candidates import Random, Window
from convnn_geo.convert import NotApplicable, PatchPositions, TimmTokens, spec
from convnn_geo.nn import ConvNN1d

NAMES = ["conv", "convnn", "branching"]
TIMM = {
    "plain": {"qkv_bias": True},
    "no bias": {"proj_bias": False},
    "qk norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
}


def attention(**options):
    pytest.importorskip("timm")
    from timm.layers import Attention

    layer = Attention(8, 2, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_convnn_among_tokens_by_a_double_loop():
    new, x = spec("convnn", k=3)(attention()), random(2, 7, 8)
    assert type(new) is TimmTokens and type(new.layer) is ConvNN1d
    expected = torch.zeros(2, 7, 8, dtype=torch.float64)
    for b, tokens in enumerate(x):
        for i, token in enumerate(tokens):
            likeness = nn.functional.cosine_similarity(tokens, token[None])
            for rank, j in enumerate(likeness.argsort(descending=True)[:3]):
                expected[b, i] += new.layer.weight[:, :, rank] @ tokens[j]
    equal(new(x), expected + new.layer.bias)
    assert spec("convnn")(attention()).layer.k == 9


@pytest.mark.parametrize("side", [3, 5])
def test_conv_is_a_convolution_along_the_sequence(side):
    options = {} if side == 3 else {"kernel_size": side}
    new, x = spec("conv", **options)(attention()), random(2, 7, 8)
    peer = nn.Conv1d(8, 8, side, padding=side // 2).double()
    peer.load_state_dict(new.layer.state_dict())
    equal(new(x), peer(x.mT).mT)


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_branching_without_convnn_is_the_attention_and_a_linear_layer(options):
    layer = attention(**options)
    new, x = spec("branching", ratio=0)(layer), random(2, 9, 8)
    assert new.layer.neighbors is None
    equal(new(x), new.layer.other.linear(layer(x)))
    kept = {id(p) for p in layer.parameters()} - {id(p) for p in new.parameters()}
    assert not kept  # the same parameters, so that optimizers go on


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_branching_mixes_convnn_and_attention(options):
    layer = attention(**options)
    new, x = spec("branching", ratio=0.25, k=4, metric="euclidean")(layer), random(2, 9, 8)
    near = ConvNN1d(8, 2, k=4, metric="euclidean", bias=layer.proj.bias is not None).double()
    near.load_state_dict(new.layer.neighbors.state_dict())
    both = torch.cat([near(x.mT), new.layer.other.linear(layer(x)).mT], 1)
    equal(new(x), new.layer.pointwise(both).mT)
    assert spec("branching", ratio=1.0)(layer).layer.other is None
    beside = spec("branching", other="convolution")(layer)
    assert beside.layer.other.kernel_size == (3,) and beside(x).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    new, x = spec(name)(attention(qkv_bias=True)), random(2, 12, 8).requires_grad_()
    new(x).square().sum().backward()
    for gradient in (x.grad, *(p.grad for p in new.parameters())):
        assert bool(gradient.isfinite().all() and gradient.any())


def test_options_reach_the_layer():
    layer = attention(proj_bias=False)
    new = spec("convnn", k=4, kernel="depthwise", self_point="first", backend="gather")(layer).layer
    assert new.kernel == "depthwise" and new.backend == "gather" and new.bias is None
    assert new.selection.self_point == "first" and new.weight.dtype == torch.float64
    near = spec("branching", kernel="separable", order="raster")(layer).layer.neighbors
    assert near.kernel == "separable" and near.order == "raster"
    for name, options, match in (
        ("convnn", {"kernel_size": 3}, "unknown option 'kernel_size'"),
        ("conv", {"k": 3}, "unknown option 'k'"),
        ("convnn", {"metric": "cosinus"}, "unknown metric 'cosinus'"),
        ("branching", {"ratio": 2.0}, r"ratio: expected a number in \[0, 1\]"),
        ("branching", {"other": "nothing"}, "unknown other branch 'nothing'"),
    ):
        with pytest.raises(ValueError, match=match):
            spec(name, **options)(layer)


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_refused(name):
    new, x = spec(name)(attention()), random(1, 12, 8)
    with pytest.raises(ValueError, match=r"expected no mask, got an attn_mask; .*'kvt'"):
        new(x, attn_mask=torch.ones(12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected no mask, got is_causal=True"):
        new(x, is_causal=True)
    with pytest.raises(ValueError, match="tokens: expected 3 dimensions"):
        new(x[0])


def test_layers_of_other_forms_are_refused():
    with pytest.raises(NotApplicable, match=r"queries, keys and values.*timm's Attention"):
        spec("convnn")(nn.MultiheadAttention(8, 2))
    with pytest.raises(NotApplicable, match="queries, keys and values"):
        convert.to_convnn(nn.TransformerEncoderLayer(8, 2), convert.Rule("branching"))
    with pytest.raises(NotApplicable, match="gate"):
        spec("branching")(attention(gated=True))
    with pytest.raises(NotApplicable, match="from 8 to 6 channels"):
        spec("branching")(attention(dim_out=6))
    assert spec("convnn")(attention(dim_out=6, gated=True))(random(1, 9, 8)).shape == (1, 9, 6)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_the_projection_is_kept(name):
    layer, x = attention(proj_drop=0.5), random(2, 12, 8)
    new = spec(name)(layer.train())
    assert new.proj_drop is layer.proj_drop and new.training
    dropped = new(x)
    assert 0.2 < dropped.eq(0).double().mean() < 0.8
    new.eval()
    kept = dropped != 0
    equal(dropped[kept], 2 * new(x)[kept])


def test_dropout_of_the_attention_is_kept():
    new = spec("branching")(attention(attn_drop=0.25))
    assert new.layer.other.attention.dropout == 0.25


@pytest.mark.parametrize("name", ["conv", "convnn"])
def test_what_runs_is_explained(name):
    new, x = spec(name)(attention()), random(1, 12, 8)
    told = lowering.explain(new, x)
    assert told.startswith(f"TimmTokens runs by: {'convolution' if name == 'conv' else 'gather'}")
    both = spec("branching")(attention())
    with pytest.raises(TypeError, match=r"lowering.explain\(tokens.layer, x.transpose\(1, 2\)\)"):
        both.operation(x)
    assert "PixelAttention runs by" in lowering.explain(both.layer, x.mT)


def vit():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer((8, 12), 4, embed_dim=16, depth=2, num_heads=2, reg_tokens=2)
    return model.eval()


def converted(name):
    return convert.to_convnn(vit(), convert.Rule(spec(name), name="blocks.*.attn"))


@pytest.mark.parametrize("name", NAMES)
def test_models_are_copied_saved_and_reported(name):
    model, x = converted(name), torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(copy.deepcopy(model)(x), before)
        other = converted(name)
        assert not torch.equal(other(x), before)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), before)
        traced = torch.fx.symbolic_trace(nn.Sequential(model.blocks[0].attn))
        tokens = torch.randn(2, 9, 16)
        assert torch.equal(traced(tokens), model.blocks[0].attn(tokens))
    line = next(each for each in convert.report(model, x).lines if each.name == "blocks.1.attn")
    assert (line.was, line.now) == ("Attention", "TimmTokens")
    attn = model.blocks[1].attn
    assert line.parameters == sum(p.numel() for p in attn.parameters())
    parts = {"branching": "neighbors", "conv": "convolution", "convnn": ""}
    taps, tokens = attn.layer.get_submodule(parts[name]), 6 if name == "conv" else 9
    assert line.flops >= 2 * 2 * tokens * taps.weight.numel()
    expected = {"conv": "convolution", "convnn": "gather", "branching": "gather + attention"}
    assert line.lowering == expected[name]


@pytest.mark.parametrize("name", ["convnn", "branching"])
def test_convnn_moves_to_patches_on_their_grid(name):
    model, x = converted(name), torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        before = model(x)
        names = convert.set_interpolation(model, 0.0)
        near = ".neighbors" if name == "branching" else ""
        assert names == [f"blocks.{block}.attn.layer{near}" for block in range(2)]
        layer = model.get_submodule(names[0])
        assert isinstance(layer.metric.first, PatchPositions)
        tokens = torch.randn(1, 9, 16)
        place = PatchPositions((2, 3), prefix=3)
        peer = ConvNN1d(16, layer.out_channels, k=9, metric=place).eval()
        peer.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(tokens.mT), peer(tokens.mT))
        assert not torch.allclose(model(x), before)
        convert.set_interpolation(model, 1.0)
        assert torch.equal(model(x), before)
    convert.set_interpolation(model, 0.5, learnable=True)
    model(x).square().sum().backward()
    assert model.get_submodule(names[0]).metric.lam.grad.any()


def test_a_convolution_of_tokens_moves_from_its_window():
    model, x = converted("conv"), torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        before = model(x)
        convert.set_interpolation(model, 0.5)
        assert not torch.allclose(model(x), before)
        convert.set_interpolation(model, 0.0)
        torch.testing.assert_close(model(x), before)


def rectangle(**options):
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return VisionTransformer(**sizes, **options).double().eval()


def placed(become, **options):
    """The layer in the place of a vision transformer's only attention."""
    rule = convert.Rule(become, name="blocks.*")
    return convert.to_convnn(rectangle(**options), rule).blocks[0].attn


def offsets():
    """Of the patches of 3 x 4 from each other, ``(12, 12, 2)``."""
    place = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1)
    place = place.flatten(0, 1)
    return place[None] - place[:, None]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(
    ("become", "near"),
    [
        (spec("sliding_window_attention", kernel_size=3), lambda d: d.abs().amax(-1) <= 1),
        (
            spec("sliding_window_attention", kernel_size=(1, 5)),
            lambda d: (d[..., 0] == 0) & (d[..., 1].abs() <= 2),
        ),
        (
            spec("dilated_attention", kernel_size=(3, 3)),
            lambda d: ((d % 2 == 0) & (d.abs() <= 2)).all(-1),
        ),
        (spec("strided_attention", stride=2), lambda d: (d % 2 == 0).all(-1)),
    ],
)
def test_windows_of_patches_are_on_their_grid_and_tokens_before_see_all(become, near, prefix):
    tokens = {"class_token": prefix > 0, "global_pool": "avg", "reg_tokens": max(prefix - 1, 0)}
    new, x = placed(become, **tokens), random(2, prefix + 12, 8)
    mask = torch.ones(prefix + 12, prefix + 12, dtype=torch.bool)
    mask[prefix:, prefix:] = near(offsets())
    plain = placed("attention", **tokens)
    plain.load_state_dict(new.state_dict())
    equal(new(x), plain(x, attn_mask=mask))
    with pytest.raises(ValueError, match=rf"expected {prefix + 12} tokens .*, got {prefix + 11}"):
        new(x[:, 1:])


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_conv_of_patches_is_a_convolution_beside_tokens_that_see_all(prefix):
    tokens = {"class_token": prefix > 0, "global_pool": "avg", "reg_tokens": max(prefix - 1, 0)}
    new, x = placed(spec("conv", kernel_size=(3, 1)), **tokens), random(2, prefix + 12, 8)
    layer = new.layer
    peer = nn.Conv2d(8, 8, (3, 1), padding=(1, 0)).double()
    peer.load_state_dict(layer.convolution.state_dict())
    patches = peer(x[:, prefix:].mT.unflatten(-1, (3, 4))).flatten(2).mT
    if prefix:
        before = x[:, :prefix].flatten(1)
        patches = patches + layer.seen(before)[:, None]
        own = layer.summary(torch.cat([before, patches.mean(1)], 1)).unflatten(1, (prefix, 8))
        patches = torch.cat([own, patches], 1)
    equal(new(x), patches)
    assert lowering.explain(new, x).startswith("TimmTokens runs by: convolution")


def test_the_nearest_in_a_window_are_patches_around_and_the_class_token():
    new = placed(spec("convnn", k=4, candidates=Window(3, padding=1)))
    found = new.operation(random(1, 13, 8)).neighborhood().index[0, 1:] - 1
    away = offsets().abs().amax(-1)
    assert all(bool(((j < 0) | (away[i][j.clamp_min(0)] <= 1)).all()) for i, j in enumerate(found))
    everywhere = placed(spec("convnn", k=4, candidates=Random(5)))
    assert type(everywhere.layer.candidates) is Random  # which knows no grid


def test_windows_refuse_a_grid_that_is_unknown():
    with pytest.raises(ValueError, match=r"grid is unknown to windows; .*images of one size"):
        placed("conv", dynamic_img_size=True)(random(1, 13, 8))
    alone = spec("conv", kernel_size=(3, 3))(attention())
    with pytest.raises(ValueError, match="the layer is in no vision transformer that is known"):
        alone(random(1, 13, 8))
    with pytest.raises(ValueError, match=r"a window around the query has odd sides, got \(3, 4\)"):
        placed(spec("dilated_attention", kernel_size=(3, 4)))
