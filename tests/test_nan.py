"""NaN is never hidden: a point's own reaches its own output, and no other's more than it must.

Nor does forward look at values, so nothing waits for the device.
"""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES
from torch import Tensor
from torch._subclasses import FakeTensorMode

from convnn_geo import checking, metrics
from convnn_geo.candidates import Random, Strided, Window
from convnn_geo.nn import (
    Branching,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    ConvNNAttention,
    NeighborConv,
    PointConvNN,
)
from convnn_geo.selection import Radius

NAN = float("nan")
PIXEL = (1, 2)  # of a 4 x 5 image, and on no lattice or sample below


def make(**options: object) -> ConvNN2d:
    torch.manual_seed(0)
    return ConvNN2d(3, 5, **options).eval()


def sample_without_pixel() -> Random:
    """A sample that does not hold the pixel: ``1 * 5 + 2``."""
    image = torch.zeros(1, 3, 4, 5)
    for seed in range(100):
        candidates = Random(6, seed=seed).eval()
        layer = ConvNN2d(3, 5, k=2, metric="cosine", candidates=candidates).eval()
        if 7 not in layer.operation(image).query().subset.index.flatten().tolist():
            return candidates
    raise AssertionError("every sample held the pixel")


CONV = {
    "window": {"kernel_size": 3, "padding": 1},
    "window-circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "window-k": {"kernel_size": 3, "padding": 1, "k": 2, "metric": "cosine"},
    "window-k-spatial": {"kernel_size": 3, "padding": 1, "k": 2, "metric": "spatial"},
    "feature": {"k": 3, "metric": "cosine"},
    "euclidean": {"k": 3, "metric": "euclidean"},
    "dot": {"k": 3, "metric": "dot"},
    "manhattan": {"k": 3, "metric": "manhattan"},
    "paper": {"k": 3, "metric": "paper_mix"},
    "spatial": {"k": 3, "metric": "spatial"},
    "spatial-excluded": {"k": 3, "metric": "spatial", "self_point": "excluded"},
    "feature-excluded": {"k": 3, "metric": "cosine", "self_point": "excluded"},
    "first": {"k": 3, "metric": "cosine", "self_point": "first"},
    "padded": {"k": 3, "metric": "euclidean", "padding": 1},
    "mixed": {"k": 3, "metric": 0.5 * metrics.Spatial() + metrics.Feature("euclidean")},
    "mostly-spatial": {"k": 3, "metric": metrics.Spatial() + 0.0 * metrics.Feature("cosine")},
    "strided": {"k": 3, "metric": "cosine", "candidates": Strided(2)},
    "strided-spatial": {"k": 3, "metric": "spatial", "candidates": Strided(2)},
    "random": {"k": 3, "metric": "cosine", "candidates": sample_without_pixel()},
    "random-spatial": {"k": 3, "metric": "spatial", "candidates": sample_without_pixel()},
    "random-max": {
        "k": 3,
        "metric": "spatial",
        "candidates": sample_without_pixel(),
        "kernel": "max",
    },
    "softmax": {"k": 3, "metric": "euclidean", "weighting": "softmax"},
    "softmax-spatial": {
        "k": 3,
        "metric": "spatial",
        "weighting": "softmax",
        "candidates": sample_without_pixel(),
    },
    "radius": {"selection": Radius(0.5, 3), "metric": "cosine"},
    "dilated": {"k": 2, "dilation": 2, "metric": "cosine"},
    "coordinates": {"k": 3, "metric": "cosine", "encoding": "coordinates"},
    "depthwise": {"k": 3, "metric": "cosine", "kernel": "depthwise"},
    "separable": {"k": 3, "metric": "cosine", "kernel": "separable"},
    "max": {"k": 3, "metric": "cosine", "kernel": "max"},
    "mean-window": {"kernel_size": 3, "padding": 1, "kernel": "mean"},
    "max-window": {"kernel_size": 3, "padding": 1, "kernel": "max"},
}
KEEPS = ("depthwise", "max")
"""Kernels that mix no channels: a NaN stays in its own."""


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
@pytest.mark.parametrize("whole", [True, False], ids=["all-channels", "one-channel"])
def test_own_nan_of_a_pixel(name, backend, whole):
    options = dict(CONV[name])
    d = 3 if options.get("kernel") in ("depthwise", "max", "mean") else 5
    torch.manual_seed(0)
    layer = ConvNN2d(3, d, **options, backend=backend).eval()
    x = torch.randn(2, 3, 4, 5)
    row, col = PIXEL
    x[0, slice(None) if whole else 1, row, col] = NAN
    out = layer(x)
    own = out[0, :, row, col]
    window = "kernel_size" in options and "k" not in options
    if whole or not window or options.get("kernel") not in ("max", "mean"):
        assert bool(own.isnan().all())
    else:
        assert bool(own[1].isnan()) and not bool(own[[0, 2]].isnan().any())
    assert bool(out[1].isfinite().all())  # another example sees nothing of it
    if name.startswith(("feature", "euclidean", "dot", "manhattan", "strided", "random", "mixed")):
        others = out[0].flatten(1)[:, torch.arange(20) != row * 5 + col]
        assert bool(others.isfinite().all())  # it is nobody's near neighbour


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "squared_euclidean", "dot"])
@pytest.mark.parametrize("channels", [3, 16])
def test_one_nan_does_not_change_who_is_near_to_others(metric, channels):
    torch.manual_seed(0)
    x = torch.randn(1, channels, 6, 6)
    layer = ConvNN2d(channels, 4, k=3, metric=metric)
    hood = layer.operation(x).neighborhood().index[0]
    x[0, :, 2, 3] = NAN
    lost = layer.operation(x).neighborhood().index[0]
    unrelated = ~(hood == 15).any(-1)
    unrelated[15] = False
    assert int(unrelated.sum()) > 5
    assert torch.equal(lost[unrelated], hood[unrelated])


ATTENTION = {
    "plain": {},
    "k": {"k": 3},
    "cosine": {"metric": "cosine"},
    "squared": {"metric": "squared_euclidean"},
    "cosine-k": {"metric": "cosine", "k": 3},
    "spatial-k": {"metric": "spatial", "k": 3},
    "spatial-excluded": {"metric": "spatial", "k": 2, "self_point": "excluded"},
    "ones": {"k": 3, "weighting": "ones"},
    "taps": {"k": 3, "kernel": "standard"},
    "excluded": {"k": 3, "self_point": "excluded"},
    "window": {"candidates": Window(3, border="shift")},
    "random": {"k": 2, "candidates": Random(4)},
    "random-all": {"candidates": Random(4)},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "padding", "row"])
def test_own_nan_of_a_token(name, backend, mask):
    torch.manual_seed(0)
    layer = ConvNNAttention(8, 2, **ATTENTION[name], backend=backend).eval()
    x = torch.randn(2, 8, 8)
    x[0, 3] = NAN
    options = {}
    if mask in ("bool", "float", "row"):
        hidden = torch.rand(8, 8) < 0.3
        hidden[:, 0] = False
        hidden[3, 3] = True  # it may not even look at itself
        if mask == "row":
            hidden[3] = True  # nor at anything
        options["attn_mask"] = hidden
        if mask == "float":
            options["attn_mask"] = torch.zeros(8, 8).masked_fill(hidden, -torch.inf)
    if mask == "padding":
        options["key_padding_mask"] = torch.zeros(2, 8, dtype=torch.bool)
        options["key_padding_mask"][:, 3] = True
    for need_weights in (False, True):
        out = layer(x, **options, need_weights=need_weights)[0]
        assert bool(out[0, 3].isnan().all())
        assert bool(out[1].isfinite().all())


@pytest.mark.parametrize("options", [{"k": 3}, {"k": 3, "metric": "euclidean"}], ids=["pos", "x"])
@pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("where", ["x", "pos"])
@pytest.mark.parametrize("batch", ["one", "ragged", "padded"])
def test_own_nan_of_a_point(options, self_point, backend, where, batch):
    torch.manual_seed(0)
    short = "pad" if batch == "padded" else "error"
    layer = PointConvNN(4, 5, **options, self_point=self_point, backend=backend, short=short)
    x, pos = torch.randn(12, 4), torch.randn(12, 3)
    (x if where == "x" else pos)[7] = NAN
    vector = {
        "one": None,
        "ragged": torch.tensor([0] * 5 + [1] * 7),
        "padded": torch.tensor([0] * 5 + [1] * 5 + [2] * 2),
    }[batch]
    out = layer(x, pos, vector)
    assert bool(out[7].isnan().all())
    if vector is not None:
        assert bool(out[:5].isfinite().all())


def test_own_nan_with_a_compiled_search():
    pytest.importorskip("torch_cluster")
    torch.manual_seed(0)
    layer = PointConvNN(3, 5, k=4, search="torch_cluster")
    pos = torch.rand(2000, 3)
    expected = layer(None, pos)
    pos[9] = NAN
    out = layer(None, pos)
    assert bool(out[9].isnan().all()) and int(out.isnan().any(-1).sum()) == 1
    assert float((out - expected).abs().nan_to_num().amax(-1).gt(1e-5).float().mean()) < 0.02


@pytest.mark.parametrize("aggr", ["taps", "mean", "max"])
def test_nan_of_a_neighbour_on_a_graph(aggr):
    """A graph layer sees what its edges say: PyG's layers without self loops do likewise."""
    layer = NeighborConv(4, 5, k=2, aggr=aggr)
    x = torch.randn(4, 4)
    x[1] = NAN
    out = layer(x, torch.tensor([[1, 2, 1], [1, 0, 3]]))
    assert out.isnan().any(-1).tolist() == [False, True, False, True]
    assert bool(out[1].isnan().all())


def test_gradients_of_others_stay_finite():
    torch.manual_seed(0)
    layer = ConvNN2d(3, 5, k=3, metric="cosine", self_point="excluded")
    x = torch.randn(1, 3, 4, 5)
    x[0, :, 1, 2] = NAN
    x.requires_grad_()
    out = layer(x)
    out[0, :, 3, 3].sum().backward()
    others = torch.ones(4, 5, dtype=torch.bool)
    others[1, 2] = False
    assert bool(x.grad[0][:, others].isfinite().all())


def test_infinity_is_not_taken_for_nan():
    layer = ConvNN2d(3, 5, k=1, metric="spatial", bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.zeros(1, 3, 4, 5)
    x[0, 0, 1, 2] = torch.inf
    out = layer(x)
    assert bool(torch.isinf(out[0, :, 1, 2]).all()) and int((~out.isfinite()).sum()) == 5


# --- the switch ----------------------------------------------------------------------------

IMAGE, TOKENS = torch.zeros(1, 3, 4, 5), torch.zeros(1, 6, 8)
LAYERS = {
    "1d": (ConvNN1d(3, 5, 3), lambda: [torch.zeros(1, 3, 6)]),
    "2d": (ConvNN2d(3, 5, 3), lambda: [IMAGE.clone()]),
    "2d-k": (ConvNN2d(3, 5, k=2, metric="cosine"), lambda: [IMAGE.clone()]),
    "3d": (ConvNN3d(3, 5, 1), lambda: [torch.zeros(1, 3, 2, 2, 2)]),
    "attention": (ConvNNAttention(8, 2), lambda: [TOKENS.clone()]),
    "attention-key": (
        ConvNNAttention(8, 2, k=2),
        lambda: [TOKENS.clone(), TOKENS.clone(), TOKENS.clone()],
    ),
    "point": (PointConvNN(3, 5, 2), lambda: [torch.zeros(6, 3), torch.zeros(6, 3)]),
    "neighbor": (
        NeighborConv(3, 5, 2),
        lambda: [torch.zeros(6, 3), torch.zeros(2, 0, dtype=torch.long)],
    ),
    "branching": (Branching(3, 5, k=2, metric="cosine"), lambda: [IMAGE.clone()]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bad", [NAN, torch.inf, -torch.inf])
def test_checking_refuses_what_is_not_finite(name, bad):
    layer, inputs = LAYERS[name]
    with checking():
        layer(*inputs())
    for position, tensor in enumerate(inputs()):
        if not tensor.is_floating_point():
            continue
        spoilt = inputs()
        spoilt[position].view(-1)[-1] = bad
        with checking(), pytest.raises(ValueError, match="expected finite values, got 1 that are"):
            layer(*spoilt)
        with checking(False):
            layer(*spoilt)
        layer(*spoilt)  # the switch is off again


def test_checking_is_undone_after_an_error_and_nests():
    layer, x = ConvNN2d(3, 5, 3), torch.full((1, 3, 4, 5), NAN)
    with pytest.raises(RuntimeError), checking():
        raise RuntimeError
    layer(x)
    with checking():
        with checking(False):
            layer(x)
        with pytest.raises(ValueError, match="finite"):
            layer(x)


# --- no look at values ---------------------------------------------------------------------

BLIND = [c for c in CASES if not c.name.startswith("point")]


@pytest.mark.parametrize(
    "case", [c for c in BLIND if "neighbor" not in c.name], ids=lambda c: c.name
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_forward_runs_on_tensors_without_values(case, train):
    """On the meta device ``.item()``, ``bool(tensor)`` and ``nonzero`` are errors."""
    layer = case.layer(dtype=torch.float32).to("meta").train(train)
    inputs = tuple(t.float().to("meta") for t in case.sample())
    out = case.call(layer, *inputs)
    real = case.call(case.layer(dtype=torch.float32), *(t.float() for t in case.sample()))
    assert out.device.type == "meta" and out.shape == real.shape


@pytest.mark.parametrize("name", ["conv2d-window", "conv2d-even", "attention-plain"])
def test_fake_tensors_leave_nothing_behind(name):
    """What is computed once from sizes is not kept from a run on fakes, nor given to one."""
    case = next(c for c in CASES if c.name == name)
    for backend in ("native", "gather"):  # edges are as many as there are, so they need values
        layer, real = case.layer(backend, dtype=torch.float32), case.sample()
        for _ in range(2):
            with FakeTensorMode():
                fake = case.make(backend=backend)
                case.call(fake, *(torch.empty(t.shape) for t in real))
            out = case.call(layer, *(t.float() for t in real))
            assert type(out) is Tensor and bool(out.isfinite().all())
