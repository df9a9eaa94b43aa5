"""ConvNN1d, 2d and 3d: drop-ins for nn.Conv*d, and each of their options."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo import encodings, kernels, metrics, recipes, weighting
from convnn_geo.candidates import All, Random, Strided, Window
from convnn_geo.nn import ConvNN1d, ConvNN2d, ConvNN3d, ConvNNAttention
from convnn_geo.points import Grid, Points
from convnn_geo.search import knn
from convnn_geo.selection import KNearest, Radius

PAIRS = [(ConvNN1d, nn.Conv1d, 1), (ConvNN2d, nn.Conv2d, 2), (ConvNN3d, nn.Conv3d, 3)]
SIZES = {1: (9,), 2: (7, 9), 3: (5, 6, 7)}
each_pair = pytest.mark.parametrize("ours, theirs, axes", PAIRS, ids=["1d", "2d", "3d"])


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- drop-in -------------------------------------------------------------------------------


@each_pair
def test_positional_arguments_and_initialisation_are_torchs(ours, theirs, axes):
    arguments = (4, 6, 3, 2, 1, 2, 2, False, "reflect", "cpu", torch.float64)
    torch.manual_seed(0)
    layer = ours(*arguments)
    torch.manual_seed(0)
    conv = theirs(*arguments)
    assert torch.equal(layer.weight, conv.weight) and layer.bias is None
    x = image(2, 4, *(s + 2 for s in SIZES[axes]))
    assert torch.equal(layer(x), conv(x))
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(conv, name), name


@each_pair
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_goes_both_ways(ours, theirs, axes, bias):
    layer, conv = ours(4, 6, 2, bias=bias), theirs(4, 6, 2, bias=bias)
    x = torch.randn(1, 4, *SIZES[axes])
    layer.load_state_dict(conv.state_dict(), strict=True)
    assert torch.equal(layer(x), conv(x))
    other = ours(4, 6, 2, bias=bias)
    conv.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(other(x), conv(x))


@each_pair
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "padding": 1, "stride": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "valid", "stride": 3},
    ],
    ids=["3", "2-stride", "4-same", "3-same-dilated", "2-valid"],
)
@pytest.mark.parametrize("backend", ["native", "gather"])
def test_every_padding(ours, theirs, axes, mode, options, backend):
    torch.manual_seed(0)
    layer = ours(2, 3, padding_mode=mode, backend=backend, dtype=torch.float64, **options)
    conv = theirs(2, 3, padding_mode=mode, dtype=torch.float64, **options)
    conv.load_state_dict(layer.state_dict())
    x = image(2, 2, *SIZES[axes])
    equal(layer(x), conv(x))


@pytest.mark.parametrize("backend", ["native", "gather", "message_passing"])
def test_unequal_axes(backend):
    options = {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3), "groups": 2}
    layer = ConvNN2d(4, 6, (3, 2), **options, backend=backend).double()
    conv = nn.Conv2d(4, 6, (3, 2), **options).double()
    conv.load_state_dict(layer.state_dict())
    x = image(2, 4, 8, 5)
    equal(layer(x), conv(x))


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((4, 6, 3), {"groups": 3}),
        ((4, 6, 3), {"groups": 0}),
        ((4, 6, 3), {"padding": "same", "stride": 2}),
        ((4, 6, 3), {"padding": "whole"}),
        ((4, 6, 3), {"padding_mode": "mirror"}),
    ],
    ids=["groups", "no-groups", "same-stride", "padding", "mode"],
)
def test_torch_refuses_at_construction_and_so_do_we(arguments, options):
    with pytest.raises(ValueError):
        nn.Conv2d(*arguments, **options)
    with pytest.raises(ValueError, match=r"groups|stride|padding"):
        ConvNN2d(*arguments, **options)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 2, 2), (4, 8), (1, 1, 4, 8, 8)])
def test_torch_refuses_at_call_and_so_do_we(shape):
    x = torch.zeros(shape)
    with pytest.raises(RuntimeError):
        nn.Conv2d(4, 6, 3)(x)
    with pytest.raises(ValueError, match=r"expected|does not fit"):
        ConvNN2d(4, 6, 3)(x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", (2, 1)),
        ("padding", (1, 0)),
        ("padding", "same"),
        ("dilation", (2, 2)),
        ("padding_mode", "circular"),
    ],
)
def test_attributes_that_are_set_later_count(name, value):
    """As those of a segmentation model's encoder are."""
    ours, theirs = ConvNN2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    near, made = (
        ConvNN2d(3, 4, 3, k=4, metric="cosine", **{"padding": 1, **options})
        for options in ({}, {name: value})
    )
    x = torch.randn(2, 3, 9, 8)
    for layer, other in ((ours, theirs), (near, made)):
        layer.load_state_dict(other.state_dict())
        setattr(layer, name, value)
        if isinstance(other, nn.Conv2d):
            setattr(other, name, value)
            if name.startswith("padding"):  # which torch computes when it is made
                other = nn.Conv2d(3, 4, 3, **{"padding": 1, name: value})
                other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), other(x))
        assert repr(layer) == repr(copy.deepcopy(layer))


def test_attributes_that_parameters_depend_on_are_settled():
    for name, value in (("kernel_size", (5, 5)), ("k", 5)):
        with pytest.raises(AttributeError, match=f"{name}: the layer .*make a new one"):
            setattr(ConvNN2d(3, 4, 3, k=4, metric="cosine"), name, value)
    with pytest.raises(AttributeError, match="k: the layer chooses by no k"):
        ConvNN2d(3, 3, 3, kernel="mean").k = 5
    layer = ConvNN2d(3, 3, k=4, metric="cosine", kernel="max")
    layer.k, layer.dilation = 3, 2
    x, same = (
        torch.randn(1, 3, 5, 6),
        ConvNN2d(3, 3, k=3, metric="cosine", kernel="max", dilation=2),
    )
    assert torch.equal(layer(x), same(x)) and repr(layer) == repr(same)


def test_attributes_as_numbers_and_of_copies():
    layer, x = ConvNN2d(3, 4, 3, padding=1), torch.randn(1, 3, 6, 7)
    before = layer(x)
    twin = copy.copy(layer)  # which shares its modules
    twin.padding, twin.stride = 2, 2
    assert twin.padding == twin.stride == (2, 2) and "padding=(2, 2)" in repr(twin)
    assert torch.equal(twin(x), F.conv2d(x, layer.weight, layer.bias, 2, 2))
    assert torch.equal(layer(x), before)
    layer.kernel_size = 3  # what it is
    old = ConvNN2d.__new__(ConvNN2d)
    old.__setstate__({k: v for k, v in layer.__dict__.items() if k != "built"})
    old.stride = 2
    assert old(x).shape == (1, 4, 3, 4)
    near = ConvNN2d(3, 4, k=5, metric="cosine")
    near.padding = 1
    assert near(x).shape == (1, 4, 6, 7) and "padding=(1, 1)" in repr(near)


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        (ConvNN2d(3, 4, 3), "stride", -1),
        (ConvNN2d(3, 4, 3), "padding_mode", "foo"),
        (ConvNN2d(3, 4, 3, padding="same"), "stride", 2),
        (ConvNN2d(3, 4, k=5, metric="cosine"), "dilation", (2, 2)),
        (ConvNN2d(3, 4, k=5, metric="cosine"), "padding", "same"),
        (ConvNN2d(3, 4, selection=Radius(0.5, 3), metric="cosine"), "dilation", 2),
        (recipes.interpolated_conv2d(3, 4, 3), "dilation", 2),
    ],
)
def test_attributes_that_do_not_fit_leave_the_layer_as_it_was(layer, name, value):
    before, x = repr(layer), torch.randn(1, 3, 6, 7)
    out, kept = layer(x), getattr(layer, name)
    with pytest.raises((ValueError, TypeError, AttributeError), match=name):
        setattr(layer, name, value)
    assert repr(layer) == before and getattr(layer, name) == kept
    assert torch.equal(layer(x), out)


def test_subclasses_may_name_their_parts_as_they_like():
    class Block(ConvNN2d):
        def __init__(self, channels, k):
            super().__init__(channels, channels, k=k, metric="cosine")
            self.k = k
            self.stride_of = nn.Linear(2, 2)

    class Attend(ConvNNAttention):
        def __init__(self):
            super().__init__(8, 2)
            self.dropout, self.k = nn.Dropout(0.1), nn.Linear(8, 8)

    assert Block(4, 3).k == 3
    block = Attend()
    assert block.k(block.dropout(block(torch.randn(1, 5, 8))[0])).shape == (1, 5, 8)


def test_in_place_of_a_convolution_in_a_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    ours = nn.Sequential(ConvNN2d(3, 4, 3, padding=1), nn.ReLU(), ConvNN2d(4, 2, 3))
    ours.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), model(x))


# --- k nearest neighbours ------------------------------------------------------------------


def naive(layer: ConvNN2d, x: Tensor, index: Tensor, value: Tensor | None = None) -> Tensor:
    """Taps over given neighbours ``(b, n, k)``, one target at a time: ``(b, n, d)``."""
    rows = (x if value is None else value).flatten(2).transpose(1, 2)
    weight = layer.weight.flatten(2)
    out = torch.zeros(*index.shape[:2], weight.shape[0], dtype=x.dtype)
    for b in range(index.shape[0]):
        for i in range(index.shape[1]):
            out[b, i] = layer.bias
            for j in range(index.shape[2]):
                out[b, i] += weight[:, :, j] @ rows[b, index[b, i, j]]
    return out


def chosen(x: Tensor, k: int, metric: str) -> Tensor:
    points = Points.from_image(x)
    return knn(points, None, k, metric=metric).index


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot"])
@pytest.mark.parametrize("order", ["rank", "raster"])
def test_taps_follow_rank_or_raster_order(metric, order):
    layer = ConvNN2d(3, 5, k=4, metric=metric, order=order).double()
    x = image(2, 3, 4, 5)
    index = chosen(x, 4, metric)
    if order == "raster":
        index = index.sort(-1).values
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index))


def test_the_two_orders_differ():
    x = image(1, 3, 4, 5)
    torch.manual_seed(0)
    ranked = ConvNN2d(3, 5, k=4, metric="cosine").double()
    raster = ConvNN2d(3, 5, k=4, metric="cosine", order="raster").double()
    raster.load_state_dict(ranked.state_dict())
    assert not torch.allclose(ranked(x), raster(x))


def test_weight_has_one_matrix_a_neighbour():
    layer = ConvNN2d(4, 8, k=9, metric="cosine", groups=2)
    assert layer.weight.shape == (8, 2, 9) and layer.bias.shape == (8,)


@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_stride_without_a_window_skips_targets(stride):
    whole = ConvNN2d(3, 5, k=4, metric="euclidean").double()
    layer = ConvNN2d(3, 5, k=4, metric="euclidean", stride=stride).double()
    layer.load_state_dict(whole.state_dict())
    x = image(2, 3, 5, 7)
    rows, cols = (stride, stride) if isinstance(stride, int) else stride
    equal(layer(x), whole(x)[:, :, ::rows, ::cols])


def test_padding_without_a_window_adds_candidates_not_targets():
    x = image(2, 3, 4, 5)
    layer = ConvNN2d(3, 5, k=4, metric="euclidean", padding=(1, 2)).double()
    padded = F.pad(x, (2, 2, 1, 1))
    points = Points.from_image(padded)
    index = knn(points, None, 4, metric="euclidean").index.unflatten(1, (6, 9))
    index = index[:, 1:-1, 2:-2].flatten(1, 2)
    expected = naive(layer, padded, index)
    assert layer(x).shape == (2, 5, 4, 5)
    equal(layer(x).flatten(2).transpose(1, 2), expected)
    assert bool((padded.flatten(2).transpose(1, 2)[0][index[0]] == 0).all(-1).any())  # used


def test_nearest_positions_with_padding_are_the_convolution():
    x = image(2, 3, 5, 8)
    layer = ConvNN2d(3, 5, k=9, metric="chebyshev", padding=1, order="raster").double()
    equal(layer(x), F.conv2d(x, layer.weight.unflatten(2, (3, 3)), layer.bias, padding=1))


def test_dilation_without_a_window_keeps_every_second_rank():
    layer = ConvNN2d(3, 5, k=3, metric="euclidean", dilation=2).double()
    x = image(2, 3, 4, 5)
    index = chosen(x, 6, "euclidean")[..., ::2]
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index))


def test_k_in_a_window_looks_at_the_window_alone():
    x = image(1, 3, 5, 6)
    layer = ConvNN2d(3, 5, 3, padding=1, k=2, metric="euclidean", order="rank").double()
    rows = x[0].flatten(1).t()
    expected = torch.zeros(30, 2, dtype=torch.long)
    for row in range(5):
        for col in range(6):
            inside = [
                r * 6 + c
                for r in range(max(row - 1, 0), min(row + 2, 5))
                for c in range(max(col - 1, 0), min(col + 2, 6))
            ]
            distance = (rows[inside] - rows[row * 6 + col]).norm(dim=-1)
            best = distance.argsort(stable=True)[:2]
            expected[row * 6 + col] = torch.tensor(inside)[best]
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, expected[None]))


def test_whole_window_by_k_is_the_window():
    """All nine of a 3 x 3 window in raster order, wherever none is cut off: the convolution."""
    x = image(2, 3, 6, 7)
    layer = ConvNN2d(3, 5, 3, k=9, metric="cosine").double()
    assert layer.weight.shape == (5, 3, 3, 3) and layer.order == "raster"
    equal(layer(x), F.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("backend", ["native", "gather", "message_passing"])
def test_whole_window_by_k_is_the_window_at_borders_too(mode, backend):
    x = image(2, 3, 5, 4)
    options = {"padding": 2, "dilation": (2, 1), "stride": (1, 2), "padding_mode": mode}
    layer = ConvNN2d(3, 5, 3, **options, k=9, metric="cosine", backend=backend).double()
    conv = nn.Conv2d(3, 5, 3, **options).double()
    conv.load_state_dict(layer.state_dict())
    equal(layer(x), conv(x))


def test_raster_order_in_a_window_is_that_of_offsets():
    """Past the seam of a circular sequence the point before the first is the last."""
    layer = ConvNN1d(1, 1, 3, padding=1, k=2, metric="euclidean", padding_mode="circular")
    x = torch.tensor([[[0.0, 9.0, 9.0, 9.0, 0.0]]])
    index = layer.operation(x).neighborhood().index
    assert index.tolist() == [[[4, 0], [1, 2], [1, 2], [2, 3], [4, 0]]]


def test_radius_has_a_tap_for_each_of_max_k():
    layer = ConvNN2d(3, 5, selection=Radius(1.0, 5), metric="spatial").double()
    assert layer.weight.shape == (5, 3, 5)
    x = image(1, 3, 4, 5)
    index = torch.tensor([[6, 1, 5, 7, 11]])  # pixel (1, 1): itself, then up, left, right, down
    out = layer(x).flatten(2).transpose(1, 2)
    equal(out[:, 6:7], naive(layer, x, index[None]))
    corner = torch.tensor([[[0, 1, 5]]])
    small = ConvNN2d(3, 5, k=3, metric="spatial").double()
    small.load_state_dict({"weight": layer.weight[..., :3], "bias": layer.bias})
    equal(out[:, :1], naive(small, x, corner))  # two empty slots give nothing


# --- candidates ----------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [Random(6, seed=3), Strided(3)], ids=["random", "strided"])
@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_samples_with_the_point_itself_as_first_tap(candidates, backend):
    layer = ConvNN2d(
        3, 5, k=4, metric="euclidean", candidates=candidates, self_point="first", backend=backend
    )
    layer = layer.double().eval()
    x = image(2, 3, 5, 6)
    points = Points.from_image(x)
    sample = candidates(points, points).index.flatten().tolist()
    rows = points.x
    index = torch.zeros(2, 30, 4, dtype=torch.long)
    for b in range(2):
        for i in range(30):
            others = [j for j in sample if j != i]  # never taken twice
            distance = (rows[b, others] - rows[b, i]).norm(dim=-1)
            order = distance.argsort(stable=True)[:3]
            index[b, i] = torch.tensor([i, *torch.tensor(others)[order].tolist()])
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index))


def test_the_point_itself_excluded():
    layer = ConvNN2d(3, 5, k=3, metric="euclidean", self_point="excluded").double()
    x = image(1, 3, 4, 5)
    index = chosen(x, 4, "euclidean")[..., 1:]
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index))


def test_one_neighbour_that_is_the_point_itself_is_a_pointwise_convolution():
    layer = ConvNN2d(3, 5, k=1, metric="cosine", candidates=Random(4), self_point="first").double()
    x = image(2, 3, 4, 5)
    equal(layer(x), F.conv2d(x, layer.weight.unsqueeze(-1), layer.bias))


def test_samples_without_the_point_itself_are_the_sample():
    candidates = Strided(2)
    layer = ConvNN2d(3, 5, k=4, metric="euclidean", candidates=candidates, order="raster")
    layer = layer.double()
    x = image(1, 3, 4, 5)
    index = torch.tensor([0, 4, 15, 19]).expand(1, 20, 4)  # k = r * r: all of them
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index))


# --- shuffle -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
@pytest.mark.parametrize(
    "options",
    [{"k": 4, "metric": "cosine"}, {"kernel_size": 3, "padding": 1}],
    ids=["k", "window"],
)
def test_shuffle_is_unshuffle_layer_shuffle(options, backend):
    layer = ConvNN2d(3, 5, **options, shuffle=2, backend=backend).double()
    inner = ConvNN2d(12, 20, **options).double()
    inner.load_state_dict(layer.state_dict())
    x = image(2, 3, 6, 8)
    equal(layer(x), F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2)), 2))


def test_shuffle_in_one_and_three_axes():
    line = ConvNN1d(3, 5, k=2, metric="cosine", shuffle=2).double()
    inner = ConvNN1d(6, 10, k=2, metric="cosine").double()
    inner.load_state_dict(line.state_dict())
    x = image(1, 3, 8)
    folded = x.unflatten(2, (4, 2)).permute(0, 1, 3, 2).flatten(1, 2)
    unfolded = inner(folded).unflatten(1, (5, 2)).permute(0, 1, 3, 2).flatten(2)
    equal(line(x), unfolded)
    volume = ConvNN3d(1, 2, k=2, metric="cosine", shuffle=2).double()
    assert volume(image(1, 1, 4, 2, 6)).shape == (1, 2, 4, 2, 6)


# --- encodings -----------------------------------------------------------------------------


def test_coordinates_are_channels_of_the_value_alone():
    layer = ConvNN2d(3, 5, k=4, metric="euclidean", encoding="coordinates").double()
    assert layer.weight.shape == (5, 5, 4)
    x = image(2, 3, 4, 6)
    down = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None].expand(4, 6)
    across = torch.linspace(-1, 1, 6, dtype=torch.float64)[None, :].expand(4, 6)
    value = torch.cat([x, torch.stack([across, down]).expand(2, 2, 4, 6)], 1)  # x, then y
    index = chosen(x, 4, "euclidean")  # by the features without coordinates
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index, value))


def test_fourier_features_are_seen_by_the_metric():
    encoding = encodings.Fourier(2)
    layer = ConvNN2d(3, 5, k=4, metric="euclidean", encoding=encoding).double()
    assert layer.weight.shape == (5, 3 + 2 * 2 * 2, 4)
    x = image(2, 3, 4, 6)
    value = encoding(Points.from_image(x)).to_image()
    index = chosen(value, 4, "euclidean")
    assert not torch.equal(index, chosen(x, 4, "euclidean"))
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index, value))


def test_learned_encoding_is_resampled_to_other_sizes():
    table = encodings.LearnedAbsolute(3, (4, 6))
    layer = ConvNN2d(3, 5, k=4, metric="euclidean", encoding=table).double()
    assert "encoding.table" in layer.state_dict()
    plain = ConvNN2d(3, 5, k=4, metric="euclidean").double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if "table" not in n})
    x = image(2, 3, 4, 6)
    equal(layer(x), plain(x + table.table))
    y = image(2, 3, 5, 3)
    resampled = F.interpolate(table.table[None], (5, 3), mode="bilinear")
    equal(layer(y), plain(y + resampled))
    layer(x).sum().backward()
    assert bool((table.table.grad != 0).any())


def test_rotary_encoding_is_in_the_metric_alone():
    layer = ConvNN2d(4, 5, k=4, metric="dot", encoding="rotary").double()
    x = image(2, 4, 4, 6)
    points = Points.from_image(x)
    turned = encodings.Rotary()(points)
    index = knn(turned, None, 4, metric="dot").index
    assert not torch.equal(index, chosen(x, 4, "dot"))
    equal(layer(x).flatten(2).transpose(1, 2), naive(layer, x, index))  # plain values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conditional_encoding_is_a_depthwise_convolution_before(dtype):
    layer = ConvNN2d(3, 5, k=4, metric="euclidean", encoding="conditional", dtype=dtype)
    plain = ConvNN2d(3, 5, k=4, metric="euclidean", dtype=dtype)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = image(2, 3, 4, 6).to(dtype)
    torch.testing.assert_close(layer(x), plain(x + layer.encoding.conv(x)))


@pytest.mark.parametrize("name", ["coordinates", "fourier", "conditional"])
@pytest.mark.parametrize("layer, axes", [(ConvNN1d, 1), (ConvNN2d, 2), (ConvNN3d, 3)])
def test_encodings_by_name_in_every_dimension(name, layer, axes):
    x = torch.randn(1, 3, *SIZES[axes])
    out = layer(3, 2, k=2, metric="euclidean", encoding=name)(x)
    assert out.shape == (1, 2, *SIZES[axes]) and bool(out.isfinite().all())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_autocast_does_not_lower_an_encoding_that_the_metric_sees(half):
    torch.manual_seed(0)
    layer = ConvNN2d(8, 5, k=4, metric="euclidean", encoding="conditional")
    x = torch.randn(2, 8, 6, 7)
    x = x.bfloat16() if half else x
    exact = layer.encoding(Points.from_image(x.float())).features.to(x.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        op = layer.operation(x)
        assert op.source.features.dtype == x.dtype
        torch.testing.assert_close(op.source.features, exact)
        assert layer(x).dtype == torch.bfloat16


def test_encoding_with_a_convolution():
    """A CoordConv: the window's taps see the coordinates as channels."""
    layer = ConvNN2d(3, 5, 3, padding=1, encoding="coordinates").double()
    assert layer.weight.shape == (5, 5, 3, 3)
    x = image(1, 3, 4, 6)
    value = encodings.Coordinates()(Points.from_image(x)).to_image()
    equal(layer(x), F.conv2d(value, layer.weight, layer.bias, padding=1))


# --- weighting -----------------------------------------------------------------------------

WEIGHTINGS = {
    "softmax": lambda d: (-d).softmax(-1),
    "gaussian": lambda d: (-d.square() / 2).exp(),
    "similarity": lambda d: -d,
    "inverse_distance": lambda d: (1 / (d + 1e-8)) / (1 / (d + 1e-8)).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_weightings(name, backend):
    layer = ConvNN2d(
        3,
        5,
        k=3,
        metric="euclidean",
        weighting=name,
        backend=backend,
        self_point="excluded",
        bias=False,
    ).double()
    x = image(1, 3, 4, 5)
    rows = x[0].flatten(1).t()
    distance = (rows[:, None] - rows[None]).norm(dim=-1)
    distance.fill_diagonal_(torch.inf)
    near = distance.sort(dim=-1, stable=True)
    rho = WEIGHTINGS[name](near.values[:, :3])
    expected = torch.einsum("nkc,nk,dck->nd", rows[near.indices[:, :3]], rho, layer.weight)
    equal(layer(x)[0].flatten(1).t(), expected)


def test_every_weighting_is_known():
    assert {*WEIGHTINGS, "ones"} == set(weighting.weighting_names())


def test_weights_from_relative_positions():
    mlp = nn.Linear(2, 3).double()
    layer = ConvNN2d(
        3, 3, k=4, metric="spatial", weighting=weighting.PositionMLP(mlp), kernel="sum"
    )
    x = image(1, 3, 4, 5)
    grid = Grid((4, 5)).positions(dtype=torch.float64)
    index = knn(Points.from_image(x), None, 4, metric="spatial").index  # of every example
    rows = x[0].flatten(1).t()
    expected = (mlp(grid[index] - grid[:, None]) * rows[index]).sum(1)
    equal(layer(x)[0].flatten(1).t(), expected)


# --- kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_kernels_by_name(backend):
    x = image(2, 4, 4, 5)
    index = chosen(x, 3, "cosine")
    rows = x.flatten(2).transpose(1, 2)
    near = torch.stack([rows[b][index[b]] for b in range(2)])

    def layer(kernel, d=4):
        torch.manual_seed(0)
        made = ConvNN2d(4, d, k=3, metric="cosine", kernel=kernel, backend=backend)
        return made.double()

    def out(module):
        return module(x).flatten(2).transpose(1, 2)

    equal(out(layer("sum")), near.sum(2))
    equal(out(layer("mean")), near.mean(2))
    equal(out(layer("max")), near.max(2).values)
    assert not list(layer("max").parameters())
    depthwise = layer("depthwise", 8)  # a channel multiplier of 2
    assert depthwise.weight.shape == (8, 1, 3)
    taps = depthwise.weight.view(4, 2, 3)
    expected = torch.einsum("bnkc,cek->bnce", near, taps).flatten(2) + depthwise.bias
    equal(out(depthwise), expected)
    separable = layer("separable", 6)
    inner = torch.einsum("bnkc,ck->bnc", near, separable.weight.squeeze(1))
    equal(out(separable), inner @ separable.pointwise.t() + separable.bias)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [True, False], ids=["window", "k"])
def test_a_kernel_of_ones_own_that_looks_at_targets(stride, window):
    mlp = nn.Linear(6, 5).double()
    where = {"kernel_size": 3, "padding": 1} if window else {"k": 9, "metric": "chebyshev"}
    kernel = kernels.EdgeMLP(mlp)
    layer = ConvNN2d(3, 5, stride=stride, kernel=kernel, **where)
    assert {n for n, _ in layer.named_parameters()} == {"kernel.mlp.weight", "kernel.mlp.bias"}
    x = image(1, 3, 5, 7)
    out = layer(x)
    center = x[0, :, 2, 2]
    around = x[0, :, 1:4, 1:4].flatten(1).t()
    expected = mlp(torch.cat([center.expand(9, 3), around - center], 1)).max(0).values
    equal(out[0, :, 2 // stride, 2 // stride], expected)


def test_own_kernel_without_channels():
    layer = ConvNN2d(None, None, 3, padding=1, kernel=kernels.Max())
    for channels in (1, 4):
        x = torch.rand(1, channels, 5, 6)
        assert torch.equal(layer(x), F.max_pool2d(x, 3, 1, 1))


# --- gradients of the metric ---------------------------------------------------------------


def build(cls: type, **options: object) -> nn.Module:
    return cls(4, 4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"metric": metrics.Mahalanobis(4), "k": 3},
        {"metric": metrics.interpolate("spatial", "cosine", 0.5, learnable=True), "k": 3},
        {"metric": metrics.Feature("dot", query=nn.Linear(4, 2), key=nn.Linear(4, 2)), "k": 3},
        {"metric": metrics.Mahalanobis(4), "kernel_size": 3, "k": 4},
    ],
    ids=["mahalanobis", "lam", "projected", "window"],
)
def test_a_metric_that_cannot_learn_is_named_once_at_construction(options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = ConvNN2d(4, 4, **options)
        layer(torch.randn(1, 4, 4, 4))
        layer(torch.randn(1, 4, 4, 4))
    assert len(caught) == 1 and caught[0].category is UserWarning
    assert "will not learn" in str(caught[0].message)
    assert caught[0].filename == __file__  # at the line that asked for it


def test_no_warning_where_the_metric_learns_or_has_nothing_to_learn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConvNN2d(4, 4, k=3, metric=metrics.Mahalanobis(4), weighting="softmax")
        ConvNN2d(4, 4, k=3, metric="cosine")
        frozen = metrics.Mahalanobis(4).requires_grad_(False)
        ConvNN2d(4, 4, k=3, metric=frozen)


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("kernel", ["standard", "sum"])
def test_lam_learns_through_the_weights(backend, kernel):
    metric = metrics.interpolate("spatial", "euclidean", 0.4, learnable=True)
    layer = ConvNN2d(
        3, 3, k=4, metric=metric, weighting="softmax", kernel=kernel, backend=backend
    ).double()
    x = image(1, 3, 4, 5)
    layer(x).square().sum().backward()
    assert metric.lam.grad is not None and abs(metric.lam.grad.item()) > 1e-6

    def loss(lam: float) -> Tensor:
        with torch.no_grad():
            metric.lam.fill_(lam)
            return layer(x).square().sum()

    slope = (loss(0.4 + 1e-6) - loss(0.4 - 1e-6)) / 2e-6
    torch.testing.assert_close(metric.lam.grad, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_lam_at_an_end_is_that_end(lam):
    x = image(1, 3, 4, 5)
    mixed = metrics.interpolate("spatial", "euclidean", lam, learnable=True)
    layer = ConvNN2d(3, 5, k=4, metric=mixed, weighting="softmax").double()
    end = ConvNN2d(3, 5, k=4, metric="euclidean" if lam else "spatial", weighting="softmax")
    end.double().load_state_dict({"weight": layer.weight, "bias": layer.bias})
    equal(layer(x), end(x))


def test_a_metric_by_name_takes_the_layers_dtype_and_device(monkeypatch):
    monkeypatch.setitem(metrics.base._RESOLVER, "mine", lambda: metrics.Mahalanobis(3))
    options = {"k": 3, "weighting": "softmax", "dtype": torch.float64}
    layer = ConvNN2d(3, 5, metric="mine", **options)
    assert layer.metric.factor.dtype == torch.float64
    layer(image(1, 3, 4, 5))
    attention = ConvNNAttention(6, 2, metric="mine", k=3, device="meta")
    assert attention.metric.factor.is_meta
    own = metrics.Mahalanobis(3)
    assert ConvNN2d(3, 5, metric=own, **options).metric.factor.dtype == torch.float32


# --- odds ----------------------------------------------------------------------------------


def test_selection_in_place_of_k():
    x = image(1, 3, 4, 5)
    torch.manual_seed(0)
    a = ConvNN2d(3, 5, selection=KNearest(3, self_point="excluded"), metric="cosine").double()
    torch.manual_seed(0)
    b = ConvNN2d(3, 5, k=3, self_point="excluded", metric="cosine").double()
    assert torch.equal(a(x), b(x)) and a.k == 3


@pytest.mark.parametrize("search", ["dense", "auto"])
def test_search_engine_by_name(search):
    x = image(1, 3, 4, 5)
    torch.manual_seed(0)
    layer = ConvNN2d(3, 5, k=3, metric="euclidean", search=search).double()
    torch.manual_seed(0)
    equal(layer(x), ConvNN2d(3, 5, k=3, metric="euclidean").double()(x))


@pytest.mark.parametrize("engine", ["grid", "torch_cluster", "dense"])
def test_every_engine_finds_the_same_pixels(engine):
    if engine == "torch_cluster":
        pytest.importorskip("torch_cluster")
    x = image(2, 3, 6, 7)
    torch.manual_seed(0)
    layer = ConvNN2d(3, 5, k=5, metric="spatial", search=engine).double()
    torch.manual_seed(0)
    equal(layer(x), ConvNN2d(3, 5, k=5, metric="spatial", search="dense").double()(x))


def test_windows_given_as_candidates():
    """``candidates=Window(...)`` without kernel_size: k nearest of that window, taps by rank."""
    x = image(1, 3, 5, 6)
    window = ConvNN2d(3, 5, 3, padding=1, k=2, metric="euclidean", order="rank").double()
    same = ConvNN2d(
        3, 5, k=2, metric="euclidean", candidates=Window(3, padding=1), order="rank"
    ).double()
    same.load_state_dict({"weight": window.weight, "bias": window.bias})
    equal(same(x), window(x))


def test_all_candidates_with_a_kernel_size_are_the_nearest_of_the_padded_image():
    x = image(1, 3, 4, 5)
    layer = ConvNN2d(3, 5, 3, padding=1, metric="euclidean", candidates=All()).double()
    same = ConvNN2d(3, 5, k=9, padding=1, metric="euclidean", order="raster").double()
    same.load_state_dict({"weight": layer.weight.flatten(2), "bias": layer.bias})
    equal(layer(x), same(x))


def test_repr_says_what_runs():
    text = repr(ConvNN2d(3, 8, k=9, metric="cosine", groups=1, shuffle=2, kernel="separable"))
    for part in ("ConvNN2d(", "3, 8", "k=9", "Feature('cosine')", "'separable'", "shuffle=2"):
        assert part in text
    assert "kernel_size=(3, 3)" in repr(ConvNN2d(3, 8, 3))


def test_torch_func_differentiates_a_layer():
    torch.manual_seed(0)
    layer = ConvNN2d(2, 3, k=4, metric="cosine").double()
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    exact = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for gradient, name in zip(exact, parameters, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_features_of_a_window_without_a_middle():
    layer = ConvNN2d(3, 8, kernel_size=4, k=5, metric="cosine")
    with pytest.raises(ValueError, match=r"kernel_size=\(4, 4\), .*middle of a window"):
        layer(torch.randn(1, 3, 8, 8))
    spatial = ConvNN2d(3, 8, kernel_size=4, k=5, metric="spatial")
    assert spatial(torch.randn(1, 3, 8, 8)).shape == (1, 8, 5, 5)
