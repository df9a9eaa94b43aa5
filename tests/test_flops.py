"""FLOPs of a report against counts by hand, the same on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from convnn_geo import convert, recipes
from convnn_geo.candidates import All
from convnn_geo.convert.flops import counted, looks_at_features
from convnn_geo.encodings import Conditional
from convnn_geo.kernels import EdgeMLP, Kernel
from convnn_geo.metrics import (
    Bilinear,
    Encoded,
    Feature,
    Mahalanobis,
    PaperMix,
    PositionBias,
    Spatial,
    interpolate,
)
from convnn_geo.nn import ConvNN2d, ConvNNAttention, PointConvNN
from convnn_geo.search import knn
from convnn_geo.selection import Every, Given, KNearest, Radius
from convnn_geo.typing import BACKENDS
from convnn_geo.weighting import PositionMLP

PIXELS, CHANNELS, OUT, K = 6 * 7, 4, 6, 9
TAPS = 2 * PIXELS * K * CHANNELS * OUT  # 18144
SEARCH = 2 * PIXELS * PIXELS * CHANNELS
WEIGHTED = PIXELS * K * CHANNELS  # products of weights and values, before taps
TOKENS, EMBED, HEADS = 10, 8, 2
PROJECTIONS = 4 * 2 * TOKENS * EMBED * EMBED
SCORES = 2 * TOKENS * TOKENS * EMBED  # of all heads


def image():
    return torch.randn(1, CHANNELS, 6, 7)


def tokens():
    return torch.randn(1, TOKENS, EMBED)


def flops(layer, *inputs, **options):
    (line,) = convert.report(layer, *inputs, **options).lines
    return line.flops


def on_every_backend(layer, *inputs, **options):
    """What each backend that can run the layer counts, and the backends."""
    found = {}
    for name in BACKENDS:
        layer.backend = name
        try:
            found[name] = flops(layer, *inputs, **options)
        except ValueError as error:
            if "can't run this layer" not in str(error):
                raise
    return set(found.values()), set(found)


def conv(*args, **options):
    return ConvNN2d(CHANNELS, OUT, *args, **options)


def plain(**options):
    return ConvNN2d(CHANNELS, CHANNELS, weighting="softmax", **options)


def network():
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))


IMAGES = {
    "network of the weighting": (
        lambda: conv(k=K, metric="spatial", weighting=PositionMLP(network())),
        TAPS + WEIGHTED + 2 * PIXELS * K * (2 * 16 + 16 * 1),
    ),
    "depthwise convolution of the encoding": (
        lambda: conv(3, padding=1, encoding="conditional"),
        TAPS + 2 * PIXELS * CHANNELS * 9,
    ),
    "encoding that the metric sees, too": (
        lambda: conv(k=K, metric="cosine", encoding="conditional"),
        SEARCH + TAPS + 2 * PIXELS * CHANNELS * 9,
    ),
    "encoding inside the metric": (
        lambda: conv(k=K, metric=Encoded("cosine", Conditional(CHANNELS)), weighting="softmax"),
        SEARCH + TAPS + WEIGHTED + 2 * PIXELS * CHANNELS * 9,
    ),
    "factor of Mahalanobis, on targets that are the sources": (
        lambda: conv(k=K, metric=Mahalanobis(CHANNELS), weighting="softmax"),
        SEARCH + TAPS + WEIGHTED + 2 * PIXELS * CHANNELS * CHANNELS,
    ),
    "rank of Mahalanobis": (
        lambda: conv(k=K, metric=Mahalanobis(CHANNELS, 3), weighting="softmax"),
        2 * PIXELS * PIXELS * 3 + TAPS + WEIGHTED + 2 * PIXELS * CHANNELS * 3,
    ),
    "matrix of Bilinear, on targets": (
        lambda: conv(k=K, metric=Bilinear(CHANNELS), weighting="softmax"),
        SEARCH + TAPS + WEIGHTED + 2 * PIXELS * CHANNELS * CHANNELS,
    ),
    "two metrics over features": (
        lambda: conv(k=K, metric=interpolate("cosine", "manhattan", 0.5)),
        2 * SEARCH + TAPS,
    ),
    "positions beside features": (
        lambda: conv(k=K, metric=interpolate("spatial", "cosine", 0.5)),
        SEARCH + TAPS,
    ),
    "table of positions": (
        lambda: conv(k=K, metric=PositionBias((6, 7)), weighting="softmax"),
        TAPS + WEIGHTED,
    ),
    "groups": (lambda: conv(3, padding=1, groups=2), 2 * PIXELS * 9 * (CHANNELS // 2) * OUT),
    "kernel that is separable": (
        lambda: conv(3, padding=1, kernel="separable"),
        2 * PIXELS * CHANNELS * (9 + OUT),
    ),
    "sum of weighted values": (
        lambda: plain(k=K, metric="cosine", kernel="sum"),
        SEARCH + 2 * PIXELS * K * CHANNELS,
    ),
    "maximum of weighted values": (
        lambda: plain(k=K, metric="cosine", kernel="max"),
        SEARCH + PIXELS * K * CHANNELS,
    ),
    "sum over all pixels": (
        lambda: plain(selection=Every(), metric="dot", kernel="sum"),
        SEARCH + 2 * PIXELS * PIXELS * CHANNELS,
    ),
    "network of the kernel, weighted": (
        lambda: conv(k=K, metric="cosine", weighting="softmax", kernel=EdgeMLP(nn.Linear(8, OUT))),
        SEARCH + 2 * PIXELS * (1 + K) * CHANNELS * OUT + PIXELS * K * OUT,  # targets once each
    ),
}
NATIVE = {
    "depthwise convolution of the encoding",
    "groups",
    "kernel that is separable",
    "sum over all pixels",
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    make, by_hand = IMAGES[name]
    found, backends = on_every_backend(make(), image())
    assert found == {by_hand} and {"auto", "gather", "message_passing"} <= backends
    assert ("native" in backends) == (name in NATIVE)


def test_numbers_that_were_counted_by_hand_before():
    assert TAPS == 18_144 and IMAGES["groups"][1] == 9_072
    assert 2 * PIXELS * K * (2 * 16 + 16 * 1) == 36_288
    assert 2 * 2 * PIXELS * CHANNELS * CHANNELS == 2_688
    assert flops(nn.Conv2d(CHANNELS, OUT, 3, padding=1, groups=2), image()) == 9_072


def test_two_examples_are_twice_one():
    layer = conv(k=K, metric=Mahalanobis(CHANNELS), weighting="softmax", encoding="conditional")
    assert flops(layer, image().expand(2, -1, -1, -1)) == 2 * flops(layer, image())


def test_a_network_on_positions_runs_once_for_all_examples():
    layer = conv(k=K, metric="spatial", weighting=PositionMLP(nn.Linear(2, 1)))
    x = image().expand(5, -1, -1, -1)
    assert flops(layer, x) == 5 * (TAPS + WEIGHTED) + 2 * PIXELS * K * 2


def test_no_points_take_no_operations():
    layer = conv(k=K, metric="spatial", weighting=PositionMLP(network()))
    assert flops(layer, image()[:0]) == 0
    assert flops(recipes.edge_conv(CHANNELS, OUT, k=3), torch.zeros(0, CHANNELS)) == 0


TAP = 2 * TOKENS * 3 * EMBED  # 3 neighbours, one number a channel
ATTENTIONS = {
    "sum": (lambda: recipes.kvt(EMBED, HEADS, k=3), PROJECTIONS + SCORES + TAP),
    "depthwise": (
        lambda: ConvNNAttention(EMBED, HEADS, k=3, kernel="depthwise"),
        PROJECTIONS + SCORES + TAP + TOKENS * 3 * EMBED,
    ),
    "taps per head": (
        lambda: ConvNNAttention(EMBED, HEADS, k=3, kernel="standard", taps_per_head=True),
        PROJECTIONS + SCORES + TAP * EMBED // HEADS + TOKENS * 3 * EMBED,
    ),
    "all keys": (lambda: ConvNNAttention(EMBED, HEADS), PROJECTIONS + 2 * SCORES),
    "Mahalanobis in each head": (
        lambda: ConvNNAttention(EMBED, HEADS, k=3, metric=Mahalanobis(EMBED // HEADS)),
        PROJECTIONS + SCORES + TAP + 2 * 2 * TOKENS * EMBED * (EMBED // HEADS),
    ),
    "convolution before the projections": (
        lambda: ConvNNAttention(EMBED, HEADS, k=3, encoding="conditional"),
        PROJECTIONS + SCORES + TAP + 2 * TOKENS * EMBED * 3,
    ),
    "rotary": (
        lambda: ConvNNAttention(EMBED, HEADS, k=3, encoding="rotary"),
        PROJECTIONS + SCORES + TAP,
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    make, by_hand = ATTENTIONS[name]
    found, backends = on_every_backend(make(), tokens(), need_weights=False)
    assert found == {by_hand} and {"auto", "gather", "message_passing"} <= backends
    assert flops(make(), tokens(), need_weights=True) == by_hand
    assert ("native" in backends) == (name == "all keys")


def test_kvt_of_ten_tokens():
    assert ATTENTIONS["sum"][1] == 7_200


def test_encodings_of_other_keys_and_values_count_each():
    layer = ConvNNAttention(EMBED, HEADS, k=3, encoding="conditional")
    once = flops(layer, tokens())
    assert flops(layer, tokens(), tokens(), tokens()) == once + 2 * 2 * TOKENS * EMBED * 3


def test_point_transformer():
    pairs, to = 12 * 3, CHANNELS * OUT
    positions, query, key_value = 2 * pairs * 3 * OUT, 2 * 12 * to, 2 * 2 * 12 * to
    assert positions + query == 1_872 and key_value == 1_152
    layer = recipes.point_transformer(CHANNELS, OUT, k=3)
    found, _ = on_every_backend(layer, torch.randn(12, CHANNELS), torch.rand(12, 3))
    assert found == {positions + query + key_value + 2 * pairs * OUT}


def test_grav_net():
    layer = recipes.grav_net(CHANNELS, OUT, space_dimensions=2, propagate_dimensions=5, k=3)
    space = 2 * 12 * CHANNELS * 2 + 2 * 12 * 12 * 2  # of points, then pairs
    networks = 2 * 12 * (CHANNELS * 5 + CHANNELS * OUT + 2 * 5 * OUT)
    found, _ = on_every_backend(layer, torch.randn(12, CHANNELS))
    assert found == {space + networks + 12 * 3 * 5}


def test_point_conv_sums_weighted_values():
    layer = recipes.point_conv(CHANNELS, k=3)  # one weight a channel
    network = 2 * 12 * 3 * (3 * CHANNELS + CHANNELS * CHANNELS)
    found, _ = on_every_backend(layer, torch.randn(12, CHANNELS), torch.rand(12, 3))
    assert found == {network + 2 * 12 * 3 * CHANNELS}


class Everywhere(All):
    """Candidates of the user's own, which may look at a cloud as a whole."""


@pytest.mark.parametrize("as_rows", [True, False])  # or filled up to one size
@pytest.mark.parametrize("sizes", [(5, 7), (250, 300)])
def test_clouds_of_a_batch(sizes, as_rows):
    x, batch = torch.randn(sum(sizes), CHANNELS), torch.repeat_interleave(torch.tensor(sizes))
    pairs, chosen = sum(size * size for size in sizes), 3 * sum(sizes)
    options = {} if as_rows else {"candidates": Everywhere()}
    layer = PointConvNN(CHANNELS, OUT, 3, "euclidean", weighting="softmax", **options)
    by_hand = 2 * pairs * CHANNELS + chosen * CHANNELS * (1 + 2 * OUT)
    assert isinstance(layer.operation(x, None, batch).selection, Given) == as_rows
    assert flops(layer, x, None, batch) == by_hand
    of_two = flops(layer, (x, x[: sizes[0]]), None, (batch, batch[: sizes[0]]))
    pairs, chosen = sizes[0] ** 2, 3 * sizes[0]
    assert of_two == 2 * pairs * CHANNELS + chosen * CHANNELS * (1 + 2 * OUT)


def test_graphs_that_are_given_are_not_searched():
    x = torch.randn(12, CHANNELS)
    edges = torch.stack([torch.arange(36) % 12, torch.arange(36) // 3])
    taps = 2 * 36 * CHANNELS * OUT
    assert flops(PointConvNN(CHANNELS, OUT, k=3, metric="dot"), x, None, None, edges) == taps
    weighted = PointConvNN(CHANNELS, CHANNELS, 3, "dot", "sum", "softmax")
    both = 2 * 36 * CHANNELS + 2 * 36 * CHANNELS  # distances of the edges, then the sum
    assert flops(weighted, x, None, None, edges) == both


@pytest.mark.parametrize("selection", [Radius(2.0, 3), KNearest(3, dilation=2)])
def test_slots_of_a_selection(selection):
    layer = PointConvNN(
        CHANNELS, CHANNELS, None, "euclidean", "sum", "softmax", selection=selection
    )
    by_hand = 2 * 12 * 12 * CHANNELS + 2 * 12 * 3 * CHANNELS
    assert flops(layer, torch.randn(12, CHANNELS)) == by_hand


class Mixed(Kernel):
    """A kernel of the user's own with a matrix for sources and one for sums."""

    def project(self, value):
        return value @ torch.ones(CHANNELS, 5)

    def reduce(self, messages, mask):
        return messages.sum(-2) @ torch.ones(5, OUT)


def test_kernels_of_the_users_own():
    layer = conv(k=K, metric="spatial", kernel=Mixed())
    found, _ = on_every_backend(layer, image())
    assert found == {2 * PIXELS * (CHANNELS * 5 + 5 * OUT)}


def test_metrics_that_look_at_positions_alone():
    assert looks_at_features(PaperMix(0.5)) and not looks_at_features(PaperMix(0.0))
    assert not looks_at_features(Spatial() + PositionBias((2, 2)))
    gray = ConvNN2d(1, OUT, k=K, metric=PaperMix(0.5))  # fewer channels than axes
    mixed = ConvNN2d(1, OUT, k=K, metric=Spatial() + Feature())
    by_hand = 2 * PIXELS * PIXELS + 2 * PIXELS * K * OUT
    assert flops(gray, image()[:, :1]) == flops(mixed, image()[:, :1]) == by_hand


def test_resnet18_at_its_own_size():
    model = pytest.importorskip("torchvision").models.resnet18()
    x = torch.randn(1, 3, 224, 224)
    assert convert.report(model, x).flops == 3_628_146_688
    assert convert.report(convert.to_convnn(model), x).flops == 3_628_146_688


def test_vit_tiny():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    n, d = 14 * 14 + 1, 192
    block = 4 * 2 * n * d * d + 2 * 2 * n * n * d + 2 * 2 * n * d * (4 * d)
    by_hand = 2 * (n - 1) * (3 * 16 * 16) * d + 12 * block + 2 * d * 1000
    x = torch.randn(1, 3, 224, 224)
    assert convert.report(model, x).flops == by_hand == 2_507_366_400
    assert convert.report(convert.to_convnn(model), x).flops == by_hand


LIKE_TORCH = {
    "feature": (ConvNN2d(6, 8, k=5, metric="cosine"), (2, 6, 7, 9)),
    "depthwise": (ConvNN2d(6, 6, k=5, metric="dot", kernel="depthwise"), (2, 6, 7, 9)),
    "interpolated": (recipes.interpolated_conv2d(6, 8, 3, lam=0.8), (2, 6, 7, 9)),
    "attention": (ConvNNAttention(8, 2, k=3), (2, 9, 8)),
}


@pytest.mark.parametrize("name", LIKE_TORCH)
def test_torchs_counter_sees_what_operators_do(name):
    layer, shape = LIKE_TORCH[name]
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        layer(x, **({"need_weights": False} if name == "attention" else {}))
    assert counter.get_total_flops() == counted(layer, x)[1]


def test_torchs_counter_sees_backward_and_clouds():
    layer, x = ConvNNAttention(8, 2, k=3), torch.randn(2, 9, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x, need_weights=False)[0].sum().backward()
    (back,) = [
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if "neighbor_attention_backward" in str(operator)
    ]
    assert back == 2 * 2 * (2 * 2 * 9) * 3 * (4 + 4)  # pairs of 2 examples, 2 heads; 2 products
    points, batch = torch.randn(30, 5), torch.arange(3).repeat_interleave(torch.tensor([5, 10, 15]))
    with FlopCounterMode(display=False) as counter:
        knn(points, k=4, batch_x=batch)
    assert counter.get_total_flops() == 2 * 5 * (5 * 5 + 10 * 10 + 15 * 15)
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        given = [mode.from_tensor(t) for t in (points, batch)]
        torch.ops.convnn_geo.nearest_in_clouds(
            *("points", given[0], given[0], None, None, 1.0, False, False, 4),
            *(given[1], given[1], False, False, 2**20, "dense"),
        )
    assert counter.get_total_flops() == 2 * 5 * 30 * 30  # sizes of clouds are values
