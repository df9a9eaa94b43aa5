"""Models by name: their definitions, the layers put into them, sizes, points, bad input."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convnn_geo import convert
from convnn_geo.candidates import Random
from convnn_geo.convert import PatchConv, TimmAttention, TimmTokens
from convnn_geo.extras import MissingExtraError, require
from convnn_geo.kernels import EdgeMLP, VectorAttention
from convnn_geo.models import (
    create_model,
    is_model,
    list_layers,
    list_models,
    register_model,
    registry,
)
from convnn_geo.models.layers import Layer, replace_convolutions
from convnn_geo.nn import Branching, ConvNN1d, ConvNN2d, ConvNNAttention, PointConvNN
from convnn_geo.nn.branching import PixelAttention
from convnn_geo.selection import KNearest

VGG = ["vgg11", "vgg13", "vgg16", "vgg19"]
RESNET = ["resnet18", "resnet34", "resnet50"]
CLASSIFIERS = [*VGG, *RESNET, "densenet121", "all_conv_net"]
DENOISERS = ["unet", "dncnn"]
CONVOLUTIONAL = [*CLASSIFIERS, *DENOISERS]
VIT = ["vit_tiny", "vit_small", "vit_base"]
POINTS = ["point_classifier", "point_segmenter"]

#: What a layer's name puts in place of a convolution, and the options it is given here.
CONVOLUTIONS = {
    "conv": (ConvNN2d, {}),
    "convnn": (ConvNN2d, {"k": 5}),
    "branching": (Branching, {"ratio": 0.5, "k": 5, "metric": "euclidean"}),
    "attention": (PixelAttention, {}),
    "kvt": (PixelAttention, {"k": 5}),
    "convnn_attention": (PixelAttention, {"k": 4}),
    "interpolated_conv2d": (ConvNN2d, {"lam": 0.3}),
    "feature_conv2d": (ConvNN2d, {"k": 4}),
}
ATTENTIONS = {
    "attention": {},
    "kvt": {"k": 5},
    "convnn_attention": {"k": 4},
    "interpolated_attention": {"k": 5, "lam": 0.5},
    "block_attention": {"size": 5},
    "dilated_attention": {"kernel_size": 3},
    "neighborhood_attention": {"kernel_size": 3},
    "sliding_window_attention": {"kernel_size": 3},
    "strided_attention": {"stride": 2},
}
TOKENS = {
    "conv": (PatchConv, {"kernel_size": 5}),
    "convnn": (ConvNN1d, {"k": 5, "metric": "euclidean"}),
    "branching": (Branching, {"ratio": 0.25, "k": 4}),
}
POINT_LAYERS = {
    "conv": {"k": 4},
    "attention": {"num_heads": 2},
    "convnn": {"k": 4, "lam": 0.25},
    "convnn_attention": {"k": 4, "kernel": "standard"},
    "kvt": {"k": 4},
    "branching": {"k": 4, "ratio": 0.25},
    "dynamic_edge_conv": {"k": 4},
    "edge_conv": {"k": 4},
    "grav_net": {"k": 4, "propagate_dimensions": 5},
    "point_conv": {"k": 4},
    "point_transformer": {"k": 4},
    "set_abstraction": {"max_k": 4, "r": 0.9},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of tensors this small, a second thread makes waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vision(package):
    """torchvision or timm; the test is skipped without."""
    try:
        return require(package, extra="vision")
    except MissingExtraError as error:
        pytest.skip(str(error))


def make(name, layer=None, seed=0, **options):
    """A narrow, shallow model, whose residual branches count from the start."""
    if name in (*VGG, *RESNET, "densenet121", *VIT):
        vision("torchvision")
    if name in (*RESNET, *VIT):
        vision("timm")
    torch.manual_seed(seed)
    shallow = {"depth": 2} if name in VIT else {"depth": 4} if name == "dncnn" else {}
    model = create_model(name, layer, **{"width": 0.125, **shallow, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts the last of each branch at 0
    return model


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clouds(*sizes, axes=3, seed=0):
    pos = torch.rand(sum(sizes), axes, generator=torch.Generator().manual_seed(seed))
    return pos, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def inputs(name):
    return clouds(6, 9) if name in POINTS else (image(2, 3, 8, 8),)


def output_shape(name):
    if name in DENOISERS:
        return (2, 3, 8, 8)
    return (15, 10) if name == "point_segmenter" else (2, 10)


def grid():
    """Every model with each of its layers."""
    for name in list_models():
        yield name, None
        yield from ((name, layer) for layer in list_layers(name))


def options_of(name, layer):
    if name in POINTS:
        return POINT_LAYERS.get(layer, {})
    if name in VIT:
        return TOKENS[layer][1] if layer in TOKENS else ATTENTIONS.get(layer, {})
    return CONVOLUTIONS[layer][1] if layer in CONVOLUTIONS else {}


def plain(module):
    """Whether the layer may take its place."""
    return (
        isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1)
    )


def test_models_are_listed():
    assert list_models() == sorted([*CONVOLUTIONAL, *VIT, *POINTS])
    assert list_models("vgg*") == VGG
    assert list_models("nothing") == []
    assert list_models(["vit*", "vgg*", "vgg11"]) == sorted([*VGG, *VIT])
    assert list_models(()) == list_models("") == list_models()
    for wrong in (3, ["vgg*", 3], None):
        with pytest.raises(TypeError, match="filter: expected a pattern such as 'vgg"):
            list_models(wrong)
    assert all(map(is_model, list_models()))
    assert not any(map(is_model, ["vgg*", "VGG11", "", None, []]))


def test_a_model_of_ones_own_is_made_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

    @register_model("plain", channels=5)
    def build(layer, *, channels, num_classes, in_channels, bias=True):
        parts = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias), nn.Flatten()]
        return replace_convolutions(nn.Sequential(*parts, nn.LazyLinear(num_classes)), layer)

    assert is_model("plain") and "plain" in list_models("pl*")
    model = create_model("plain", "convnn", num_classes=7, k=4, bias=False)
    assert type(model[0]) is ConvNN2d and model[0].bias is None and model[0].out_channels == 5
    assert model(image(2, 3, 4, 4)).shape == (2, 7)


@pytest.mark.parametrize("name", ["vgg11", "point_classifier"])
def test_the_name_of_a_model_is_not_taken_twice(name):
    before = registry._MODELS[name]
    with pytest.raises(ValueError, match=f"new name of a model, got '{name}'; .*unet"):
        register_model(name)(lambda layer: nn.Identity())
    assert registry._MODELS[name] is before


PROMISED = {"conv", "attention", "convnn", "convnn_attention", "kvt", "branching"}


@pytest.mark.parametrize("name", list_models())
def test_every_model_takes_the_layers_that_are_promised_and_names_its_own(name):
    own = list_layers(name)
    assert set(own) > PROMISED and len(own) == len(set(own))
    with pytest.raises(ValueError, match=f"unknown layer of {name} 'nonsense'") as error:
        make(name, "nonsense")
    assert str(error.value).endswith(f"expected one of: {', '.join(own)}")
    others = {layer for other in list_models() for layer in list_layers(other)} - set(own)
    for layer in {*others, "causal_attention", "conv1d", "depthwise_conv2d", "max_pool2d"}:
        with pytest.raises(ValueError, match=f"unknown layer of {name} '{layer}'"):
            make(name, layer)


@pytest.mark.parametrize("name, layer", list(grid()))
def test_every_model_with_every_layer_learns(name, layer):
    model = make(name, layer, image_size=8, **options_of(name, layer))
    out = model(*inputs(name))
    assert out.shape == output_shape(name)
    target = image(*out.shape, seed=1)  # not all rows alike: BatchNorm would take that away
    (out - target).square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert not [key for key, grad in gradients.items() if grad is None]
    assert not [key for key, grad in gradients.items() if not grad.isfinite().all()]
    still = [key for key, grad in gradients.items() if not grad.any()]
    norms = {
        f"{key}.bias"
        for key, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    # Where BatchNorm comes next, a bias counts for nothing: its gradient is rounding, or 0.
    idle = [key for key in still if norms and key.endswith("bias") and "head" not in key]
    assert not {*still} - ({*idle} - norms)


@pytest.mark.parametrize("layer", CONVOLUTIONS)
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_plain_convolution_becomes_the_layer(name, layer):
    kind, options = CONVOLUTIONS[layer]
    native = dict(make(name).named_modules())
    model = make(name, layer, **options)
    wanted = [key for key, module in native.items() if plain(module)]
    assert wanted
    for key in wanted:
        new = model.get_submodule(key)
        assert type(new) is kind
        if layer == "branching":
            assert new.neighbors.selection.k == 5
            assert new.neighbors.metric.kind == "euclidean"
            assert new.neighbors.out_channels == round(0.5 * native[key].out_channels)
        elif "k" in options:
            inner = new.attention if kind is PixelAttention else new
            assert inner.selection.k == options["k"]
            assert inner.kernel == ("depthwise" if layer == "convnn_attention" else inner.kernel)
        elif layer == "interpolated_conv2d":
            assert new.metric.lam == 0.3
    others = [key for key, m in native.items() if isinstance(m, nn.Conv2d) and key not in wanted]
    assert all(type(model.get_submodule(key)) is nn.Conv2d for key in others)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_few_layers_of_a_classifier_stay_convolutions(name):
    """By number: one a convolution of VGG, two a basic block, one a bottleneck, ..."""
    first, stride_2 = 1, 3
    expected = {
        **{"vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16},
        **{"resnet18": first + 16 - stride_2, "resnet34": first + 32 - stride_2},
        **{"resnet50": first + 16 - stride_2, "densenet121": first + 58, "all_conv_net": 5},
    }[name]
    model = make(name, "convnn")
    assert sum(type(m) is ConvNN2d for m in model.modules()) == expected


@pytest.mark.parametrize("layer", ATTENTIONS)
@pytest.mark.parametrize("name", VIT)
def test_every_attention_becomes_the_layer(name, layer):
    model = make(name, layer, **ATTENTIONS[layer])
    assert [type(block.attn) for block in model.blocks] == [TimmAttention] * 2
    for block in model.blocks:
        inner = block.attn.attention
        assert type(inner) is ConvNNAttention
        assert inner.num_heads == {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}[name]
        assert inner.k == ATTENTIONS[layer].get("k")
        assert inner.kernel == ("depthwise" if layer == "convnn_attention" else "sum")


@pytest.mark.parametrize("layer", TOKENS)
@pytest.mark.parametrize("name", VIT)
def test_every_attention_becomes_a_layer_of_tokens(name, layer):
    kind, options = TOKENS[layer]
    model = make(name, layer, **options)
    for block in model.blocks:
        assert type(block.attn) is TimmTokens and type(block.attn.layer) is kind
        inner = block.attn.layer
        if layer == "branching":
            assert inner.neighbors.out_channels == round(0.25 * model.embed_dim)
            assert inner.neighbors.k == 4
            assert inner.other.attention.num_heads == model.embed_dim // 8
        else:
            inner = inner.convolution if layer == "conv" else inner
            assert inner.out_channels == model.embed_dim
            assert inner.k == (25 if layer == "conv" else 5)
            assert inner.kernel_size == ((5, 5) if layer == "conv" else None)


@pytest.mark.parametrize("sides", [3, (3, 3)], ids=str)
@pytest.mark.parametrize(
    "layer", ["conv", "neighborhood_attention", "sliding_window_attention", "dilated_attention"]
)
def test_classes_depend_on_every_patch(layer, sides):
    assert_every_patch_counts(layer, kernel_size=sides)


@pytest.mark.parametrize(
    "layer, options",
    [
        ("block_attention", {"size": 2}),
        ("block_attention", {"size": (2, 4), "shift": 1}),
        ("strided_attention", {"stride": 2}),
        ("strided_attention", {"stride": 3, "is_causal": True}),
        ("neighborhood_attention", {"kernel_size": 3, "is_causal": True}),
        ("sliding_window_attention", {"kernel_size": (3, 5), "is_causal": True}),
        ("branching", {"other": "convolution", "k": 2}),
    ],
)
def test_classes_depend_on_every_patch_of_blocks_and_strides(layer, options):
    assert_every_patch_counts(layer, **options)


def assert_every_patch_counts(layer, **options):
    """The class token alone is classified; it must have seen the whole image."""
    torch.manual_seed(0)
    model = create_model("vit_tiny", layer, image_size=32, patch_size=4, width=0.25, **options)
    model = nn.Sequential(model).double().eval()
    nn.init.normal_(model[0].head.weight)
    x = image(1, 3, 32, 32).double().requires_grad_()
    model(x).square().sum().backward()
    seen = x.grad.abs().amax(1).unflatten(-1, (8, 4)).unflatten(-3, (8, 4)).amax((-1, -3))
    assert seen.shape == (1, 8, 8) and int((seen > 0).sum()) >= 60


@pytest.mark.parametrize("layer", ["kvt", "convnn_attention", "convnn", "branching"])
def test_images_of_fewer_patches_than_k(layer):
    for size in (1, 2):  # two and five tokens
        model = make("vit_tiny", layer, image_size=size, width=0.125).eval()
        with torch.no_grad():
            assert bool(model(image(1, 3, size, size)).isfinite().all())
    chosen = KNearest(3, short="error")
    model = make("vit_tiny", layer, selection=chosen)
    found = [m for m in model.modules() if isinstance(m, KNearest)]
    assert [repr(m) for m in found] == [repr(chosen)] * 2


@pytest.mark.parametrize(
    "name, layer", [(n, "conv") for n in CONVOLUTIONAL] + [(n, "attention") for n in VIT]
)
def test_the_exact_layer_computes_what_the_native_one_does(name, layer):
    x = image(2, 3, 32, 32)
    with torch.no_grad():
        expected = make(name).eval()(x)
        torch.testing.assert_close(make(name, layer).eval()(x), expected, rtol=1e-4, atol=1e-5)


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", [*RESNET, "densenet121"])
def test_parameters_are_those_of_torchvision(name):
    torchvision = vision("torchvision")
    with torch.device("meta"):
        peer = getattr(torchvision.models, name)(weights=None)
        model = make(name, width=1.0, num_classes=1000, image_size=224)
    assert shapes(model) == shapes(peer)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("name", VGG)
def test_features_of_vgg_are_those_of_torchvision(name, batch_norm):
    torchvision = vision("torchvision")
    with torch.device("meta"):
        peer = getattr(torchvision.models, name + "_bn" * batch_norm)(weights=None)
        model = make(name, width=1.0, image_size=224, batch_norm=batch_norm)
    assert shapes(model.features) == shapes(peer.features)
    assert repr(model.features) == repr(peer.features)  # the pools, too


@pytest.mark.parametrize("name", VIT)
def test_parameters_are_those_of_timm(name):
    timm = vision("timm")
    with torch.device("meta"):
        peer = timm.create_model(f"{name}_patch16_224")
        model = make(name, width=1.0, depth=12, num_classes=1000, image_size=224)
    assert shapes(model) == shapes(peer)


def test_weights_of_torchvision_load_and_count():
    torchvision = vision("torchvision")
    torch.manual_seed(1)
    peer = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    native = make("resnet18", width=1.0, num_classes=7, small_stem=False)
    native.load_state_dict(peer.state_dict())
    exact = make("resnet18", "conv", width=1.0, num_classes=7, small_stem=False)
    exact.load_state_dict(peer.state_dict())
    x = image(1, 3, 64, 48)
    with torch.no_grad():
        expected = peer(x)
        torch.testing.assert_close(native.eval()(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(exact.eval()(x), expected, rtol=1e-4, atol=1e-4)


SOME = [
    ("vgg11", "branching", {}),
    ("vgg11", "convnn", {"candidates": Random(4)}),
    ("resnet18", "kvt", {}),
    ("vit_tiny", "branching", {"dropout": 0.2}),
    ("resnet18", None, {"drop_path": 0.3}),
    ("vit_tiny", "kvt", {"k": 5, "drop_path": 0.3, "dropout": 0.2}),
    ("unet", "convnn_attention", {"k": 4}),
    ("point_classifier", "convnn", {"dropout": 0.5}),
]


@pytest.mark.parametrize("layer", ["kvt", "convnn_attention"])
def test_attention_among_pixels_is_reported_and_moves(layer):
    model, x = make("vgg11", layer).eval(), image(1, 3, 32, 32)
    lines = [line for line in convert.report(model, x).lines if line.was == "Conv2d"]
    assert len(lines) == 8 and all(line.now == "PixelAttention" for line in lines)
    assert all(line.flops and line.lowering != "torch" for line in lines)
    with torch.no_grad():
        before, first = model(x), model.features[0](x)
        assert len(convert.set_interpolation(model, 0.0)) == 8
        assert (model.features[0](x) - first).abs().max() > 1e-2
        convert.set_interpolation(model, 1.0)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("name, layer, options", SOME)
def test_a_seed_decides_all_weights(name, layer, options):
    first, same, other = (make(name, layer, seed=seed, **options) for seed in (0, 0, 1))
    pairs = zip(first.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name, layer, options", SOME)
def test_evaluation_is_deterministic_and_reloads(name, layer, options):
    model = make(name, layer, **options).eval()
    given_inputs = clouds(12, 9) if name in POINTS else (image(2, 3, 32, 32),)
    with torch.no_grad():
        first, again = model(*given_inputs), model(*given_inputs)
        assert torch.equal(first, again)
        other = make(name, layer, seed=1, **options).eval()
        assert not torch.equal(other(*given_inputs), first)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(*given_inputs), first)


@pytest.mark.parametrize("name", list_models())
def test_one_example_is_as_in_a_batch(name):
    layer = "kvt" if name in VIT else "convnn"
    model = make(name, layer, k=3, image_size=32).eval()
    with torch.no_grad():
        if name in POINTS:
            pos, batch = clouds(7, 5)
            whole, one = model(pos, batch), model(pos[:7])  # no batch: one cloud
            rows = 7 if name == "point_segmenter" else 1
        else:
            x = image(2, 3, 32, 32)
            whole, one, rows = model(x), model(x[:1]), 1
    torch.testing.assert_close(one, whole[:rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [None, "branching"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_images_need_not_be_square(name, layer):
    model = make(name, layer, in_channels=1, image_size=16).eval()
    with torch.no_grad():
        out = model(image(1, 1, 16, 23))
    assert out.shape == ((1, 1, 16, 23) if name in DENOISERS else (1, 10))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 16, 28])
@pytest.mark.parametrize("name", ["vgg19", "resnet18", "densenet121", "all_conv_net", *DENOISERS])
def test_small_images(name, size):
    with torch.no_grad():
        for layer in (None, "convnn", "kvt", "convnn_attention"):
            model = make(name, layer, image_size=size).eval()
            assert bool(model(image(1, 3, size, size)).isfinite().all())


@pytest.mark.parametrize("size", [1, 4, 5, 9, 33])
def test_small_images_at_the_large_stem(size):
    for name in ("resnet18", "densenet121"):
        model = make(name, image_size=size, small_stem=False).eval()
        with torch.no_grad():
            assert model(image(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize("size, pools", [(1, 0), (2, 1), (7, 2), (16, 4), (32, 5), (224, 5)])
def test_pools_of_vgg_that_would_see_one_pixel_are_left_out(size, pools):
    model = make("vgg11", image_size=size)
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == pools


def test_stems():
    small, large = make("resnet18"), make("resnet18", image_size=65)
    assert small.conv1.kernel_size == (3, 3) and isinstance(small.maxpool, nn.Identity)
    assert large.conv1.kernel_size == (7, 7) and isinstance(large.maxpool, nn.MaxPool2d)
    assert make("resnet18", image_size=65, small_stem=True).conv1.stride == (1, 1)
    features = make("densenet121", in_channels=1, small_stem=False).features
    assert (features.conv0.in_channels, features.conv0.stride) == (1, (2, 2))
    assert isinstance(make("densenet121").features.pool0, nn.Identity)


@pytest.mark.parametrize("size, patch, tokens", [(224, 16, 196), (32, 4, 64), (8, 1, 64)])
def test_patches_of_vision_transformers(size, patch, tokens):
    model = make("vit_tiny", image_size=size)
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.patch_embed.num_patches == tokens


def test_options_reach_the_model():
    model = make("vit_tiny", patch_size=8, depth=3, drop_path=0.2, dropout=0.1, width=0.5)
    assert model.patch_embed.num_patches == 16 and len(model.blocks) == 3
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.blocks[0].mlp.drop1.p == 0.1 and model.embed_dim == 3 * 32
    model = make("resnet34", drop_path=0.2)
    assert model.layer4[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.layer4[-1].conv1.out_channels == 64
    assert make("vgg11", dropout=0.3).dropout.p == 0.3
    assert sum(isinstance(m, nn.Conv2d) for m in make("dncnn", depth=6).modules()) == 6
    assert len(make("point_classifier", depth=2).features.layers) == 2


def test_small_maps_leave_the_last_taps_empty():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    model = replace_convolutions(nn.Sequential(conv), Layer("convnn", {"k": 9}))
    x = image(1, 3, 2, 2)
    before = model(x)
    with torch.no_grad():
        model[0].weight[..., 4:] += 1
        assert torch.equal(model(x), before)
        model[0].weight[..., 3] += 1
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize(
    "name, layer, size",
    [
        *(("vgg11", "vig", (32, 32)), ("vgg11", "vig", (28, 28)), ("vgg11", "vig", (32, 45))),
        *(("resnet18", "vig", (16, 16)), ("unet", "vig", (8, 11)), ("densenet121", "vig", (8, 8))),
    ],
)
def test_layers_of_k_neighbours_see_fewer_pixels(name, layer, size):
    model = make(name, layer, image_size=min(size))
    model(image(2, 3, *size)).square().mean().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_a_selection_is_left_as_it_is():
    chosen = KNearest(4, dilation=2, self_point="first")
    for layer in ("convnn", "branching"):
        model = make("vgg11", layer, selection=chosen)
        found = [m.selection for m in model.modules() if isinstance(m, ConvNN2d)]
        assert [repr(s) for s in found if isinstance(s, KNearest)] == [repr(chosen)] * 8
    model = make("vgg11", "convnn", self_point="first", dilation=2)
    assert repr(model.features[0].selection) == repr(KNearest(9, 2, "first", "pad"))
    model = make("vgg11", "kvt", selection=chosen)
    assert repr(model.features[0].attention.selection) == repr(chosen)
    with pytest.raises(ValueError, match="expected k or a selection, and not both"):
        make("vgg11", "convnn", k=4, selection=chosen)


def test_unet_and_dncnn_compute_what_they_say():
    model = make("dncnn").eval()
    x = image(1, 3, 9, 14)
    nn.init.zeros_(model.noise[-1].weight)
    nn.init.constant_(model.noise[-1].bias, 0.25)
    torch.testing.assert_close(model(x), x - 0.25)
    model = make("unet").eval()
    assert [block[0].in_channels for block in model.up] == [96, 48, 24]
    with torch.no_grad():
        before = model(x)
        model.down[-1][-2].weight.zero_()  # BatchNorm of the coarsest, far part of the network
        model.down[-1][-2].bias.fill_(1)
        assert not torch.equal(model(x), before)


@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 21), w=st.integers(1, 21), channels=st.sampled_from([1, 3]))
def test_denoisers_keep_any_size(h, w, channels):
    for name in DENOISERS:
        with torch.no_grad():
            out = make(name, in_channels=channels, num_classes=None).eval()(
                image(1, channels, h, w)
            )
        assert out.shape == (1, channels, h, w)


# Features in place of classes

#: The layer that gives the classes.
HEADS = {
    **dict.fromkeys([*VGG, *VIT], "head"),
    **dict.fromkeys(RESNET, "fc"),
    **{"densenet121": "classifier", "all_conv_net": "head.0"},
    **dict.fromkeys(POINTS, "head.1"),
}


@pytest.mark.parametrize("name", [*CLASSIFIERS, *VIT, *POINTS])
def test_no_classes_give_what_the_head_would_see(name):
    whole, features = make(name), make(name, num_classes=0)
    head = whole.get_submodule(HEADS[name])
    nn.init.normal_(head.weight)
    assert type(features.get_submodule(HEADS[name])) is nn.Identity
    keys = features.load_state_dict(whole.state_dict(), strict=False)
    assert keys.missing_keys == []
    assert keys.unexpected_keys == [f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"]
    given = clouds(6, 9) if name in POINTS else (image(2, 3, 32, 32),)
    with torch.no_grad():
        found = features.eval()(*given)
        assert found.ndim == 2
        expected = nn.functional.linear(found, head.weight.flatten(1), head.bias)
        torch.testing.assert_close(whole.eval()(*given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["branching", "kvt"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny", "point_segmenter"])
def test_features_of_other_layers_learn(name, layer):
    model = make(name, layer, num_classes=0)
    given = clouds(6, 9) if name in POINTS else (image(2, 3, 32, 32),)
    out = model(*given)
    (out * image(*out.shape, seed=1)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_have_no_classes_to_leave_out(name):
    with pytest.raises(ValueError, match=f"num_classes: 0 is for features.*{name} has none"):
        make(name, num_classes=0)


@pytest.mark.parametrize("name", ["unet", "vgg11", "vit_tiny", "point_classifier"])
def test_pretrained_false_is_what_models_are(name):
    with_it, without = make(name, pretrained=False), make(name)
    pairs = zip(with_it.state_dict().values(), without.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "channels, ratio, end",
    [(1, 0.5, "other"), (1, 0.75, "neighbors"), (3, 0.125, "other"), (3, 0.9, "neighbors")],
)
def test_the_end_of_dncnn_has_one_branch_where_its_channels_are_too_few(channels, ratio, end):
    model = make("dncnn", "branching", in_channels=channels, ratio=ratio, k=5)
    *inner, last = [m for m in model.modules() if isinstance(m, Branching)]
    assert len(inner) == 3 and all(len(layer.branches) == 2 for layer in inner)
    assert last.branches == [getattr(last, end)] and model.noise[-1] is last
    assert model(image(1, channels, 6, 7)).shape == (1, channels, 6, 7)
    both = make("dncnn", "branching", in_channels=3, ratio=0.5).noise[-1]
    assert both.neighbors.out_channels == 2 and both.other.out_channels == 1


# Points


@pytest.mark.parametrize("layer, kernel", [("edge_conv", EdgeMLP), ("dynamic_edge_conv", EdgeMLP)])
def test_point_layers_are_those_asked_for(layer, kernel):
    model = make("point_classifier", layer, k=3)
    for found in model.features.layers:
        assert type(found) is PointConvNN and found.k == 3 and isinstance(found.kernel, kernel)
        assert type(found.metric).__name__ == ("Spatial" if layer == "edge_conv" else "Feature")
    model = make("point_classifier", "point_transformer", in_channels=2)
    assert all(isinstance(found.kernel, VectorAttention) for found in model.features.layers)
    assert model(*clouds(5, 6, axes=2)).shape == (2, 10)
    model = make("point_classifier", lam=0.125, metric="euclidean")
    for found in model.features.layers:
        assert found.metric.lam == 0.125 and found.metric.second.kind == "euclidean"


@pytest.mark.parametrize("layer", POINT_LAYERS)
@pytest.mark.parametrize("name", POINTS)
def test_point_models_see_sets(name, layer):
    """The order of points, their unit and their origin do not matter; each cloud is by itself."""
    model = make(name, layer, **POINT_LAYERS[layer]).double().eval()
    pos, batch = clouds(8, 11)
    pos = pos.double()
    order = torch.cat([torch.randperm(8), 8 + torch.randperm(11)])
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        out = model(pos, batch)
        close(model(pos[order], batch), out[order] if name == "point_segmenter" else out)
        close(model(1000 * pos + 7, batch), out)
        second = out[8:] if name == "point_segmenter" else out[1:]
        close(model(pos[8:], batch[8:] - 1), second)


def test_lam_goes_from_positions_to_features():
    outs = []
    for lam in (0.0, 0.5, 1.0):
        model = make("point_classifier", "convnn", k=4, lam=lam).eval()
        with torch.no_grad():
            outs.append(model(*clouds(30, 40)))
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


def test_a_learned_lam_gets_its_gradient_through_weights():
    model = make("point_classifier", learnable=True, weighting="softmax", k=4)
    model(*clouds(9, 12)).square().sum().backward()
    grads = [layer.metric.lam.grad for layer in model.features.layers]
    assert all(g is not None and bool(g != 0) for g in grads)


def test_features_of_points_take_part():
    model = make("point_segmenter", feature_channels=2).eval()
    pos, batch = clouds(12, 10)
    x = image(22, 2)
    with torch.no_grad():
        assert not torch.allclose(model(pos, batch, x), model(pos, batch, x + 1))


@pytest.mark.parametrize("layer", POINT_LAYERS)
def test_clouds_of_fewer_points_than_k(layer):
    model = make("point_classifier", layer, seed=1).eval()  # the layer's own k
    pos, batch = clouds(1, 3, 70)
    pos.requires_grad_()
    out = model(pos, batch)
    assert bool(out.isfinite().all())
    out.sum().backward()
    assert bool(pos.grad.isfinite().all())


# What can't be


@pytest.mark.parametrize(
    "name, layer, options, match",
    [
        ("vgg12", None, {}, r"unknown model 'vgg12'; did you mean vgg1"),
        ("transformer", None, {}, "unknown model 'transformer'; "),
        ("unet", "convn", {}, "unknown layer of unet 'convn'; expected one of: .*branching"),
        ("resnet18", None, {"in_chans": 1}, "did you mean in_channels"),
        ("resnet18", None, {"pretrained": True}, "got True; no weights are published.*load_model"),
        ("unet", "kvt", {"pretrained": "coco"}, "expected False, got 'coco'; no weights"),
        ("unet", "branching", {"ratoi": 1}, "'ratoi' of unet; did you mean ratio?.*takes width"),
        ("unet", None, {"ratio": 1}, "'ratio' of unet; .*options of a layer need layer="),
        ("unet", None, {"num_heads": 1, "k": 1}, "unknown options 'num_heads', 'k' of unet"),
        ("unet", "convnn", {"ratio": 1}, "'ratio' of unet; .*its layer 'convnn' takes k"),
        ("point_classifier", "vig", {}, "unknown layer of point_classifier 'vig'; .*: conv, "),
        ("point_classifier", "attention", {"k": 9}, "unknown option 'k' .*takes num_heads"),
        ("point_classifier", "edge_conv", {"encoding": "fourier"}, "unknown option 'encoding'"),
        ("point_classifier", "branching", {"ratio": 1.5}, r"ratio: expected a number in \[0, 1\]"),
        ("point_classifier", "branching", {"ratio": 0.001}, "of out_channels=64, which is 0"),
        ("dncnn", "branching", {"ratio": 0.001}, r"noise\.0 .* of out_channels=64, which is 0"),
        ("dncnn", "branching", {"ratio": 1.1}, r"ratio: expected a number in \[0, 1\]"),
        ("point_classifier", "kvt", {"num_heads": 3}, "num_heads=3 must divide embed_dim=64"),
        ("point_classifier", None, {"axes": 2}, "'axes' of point_classifier"),
        ("unet", None, {"width": 0}, "width: expected a finite number greater than 0"),
        ("unet", None, {"in_channels": 0}, "in_channels: expected an integer of at least 1"),
        ("dncnn", None, {"depth": 1}, "depth: expected an integer of at least 2"),
        ("all_conv_net", None, {"num_classes": -1}, "num_classes: expected .* of at least 0"),
        ("point_classifier", None, {"lam": 2.0}, r"lam: expected a number in \[0, 1\]"),
        ("unet", "convnn", {"metric": "cosinus"}, "unknown metric 'cosinus'"),
    ],
)
def test_bad_input_is_refused_by_name(name, layer, options, match):
    with pytest.raises(ValueError, match=match):
        create_model(name, layer, **options)


def test_bad_input_to_vision_transformers():
    with pytest.raises(ValueError, match="a multiple of patch_size=5, got 32"):
        make("vit_tiny", patch_size=5)
    with pytest.raises(ValueError, match="'strided_attention' needs stride; pass stride="):
        make("vit_tiny", "strided_attention")
    with pytest.raises(ValueError, match="unknown option 'num_heads' of vit_tiny"):
        make("vit_tiny", "kvt", num_heads=2)  # an option of pixels and points alone


def test_classifiers_need_classes_and_images_a_size():
    with pytest.raises(TypeError, match="num_classes: expected an integer, got None"):
        create_model("all_conv_net", num_classes=None)
    with pytest.raises(TypeError, match="image_size: expected an integer, got None"):
        create_model("vgg11", image_size=None)


def test_points_of_the_wrong_width():
    model = make("point_classifier")
    with pytest.raises(ValueError, match="expected 3 axes and features a point, got 2"):
        model(*clouds(9, 9, axes=2))
    pos, batch = clouds(9, 9)
    with pytest.raises(ValueError, match="expected 3 axes and features a point, got 4"):
        model(pos, batch, pos[:, :1])


@pytest.mark.parametrize("name, package", [("vgg11", "torchvision"), ("vit_tiny", "timm")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    vision(package)
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"pip install 'convnn-geo\[vision\]'"):
        create_model(name)


class Without:
    """An import system's finder, for which one package is not there."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)
