"""Lowering: which rule runs, why the others refuse, and that it never changes the result."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn

from convnn_geo import kernels, lowering, metrics, recipes
from convnn_geo.candidates import All, Block, Candidates, Causal, Congruent, Random, Subset, Window
from convnn_geo.kernels import Sum
from convnn_geo.lowering import RULES, choose, explain, run
from convnn_geo.lowering.attention import Attention, MaskedAttention
from convnn_geo.lowering.convolution import Convolution, Pooling
from convnn_geo.metrics import as_metric
from convnn_geo.nn import (
    Branching,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    NeighborConv,
    PointConvNN,
)
from convnn_geo.nn.functional import knn_attention
from convnn_geo.operation import Operation
from convnn_geo.points import Grid, Points
from convnn_geo.search import registry
from convnn_geo.selection import Every, KNearest, Radius
from convnn_geo.weighting import Softmax, Weighting

IMAGE = torch.zeros(1, 4, 6, 6)
TOKENS = torch.zeros(1, 6, 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the table -----------------------------------------------------------------------------


def test_rules_are_tried_from_the_fastest_to_the_plainest():
    names = [rule.name for rule in RULES]
    native = ["convolution", "pooling", "block_attention", "attention"]
    others = ["neighbor_attention", "triton_attention", "masked_attention"]
    assert names[:8] == [*native, *others, "gather"]
    assert names[8:] == ["message_passing", "triton_taps"]  # run when asked for
    backends = [rule.backend for rule in RULES]
    assert backends[:8] == [*["native"] * 4, "compiled", "triton", "native", "gather"]
    assert backends[8:] == ["message_passing", "triton"]


@pytest.mark.parametrize(
    "backend, expected",
    [
        ("auto", "convolution"),
        ("native", "convolution"),
        ("gather", "gather"),
        ("message_passing", "message_passing"),
    ],
)
def test_choose_takes_the_first_that_can(backend, expected):
    op = ConvNN2d(4, 6, 3).operation(IMAGE)
    rule, passed = choose(op, backend)
    assert rule.name == expected
    order = [r.name for r in RULES]
    assert [r.name for r, _ in passed] == order[: order.index(expected)]
    assert all(reason == f"backend={backend!r} was asked for" for _, reason in passed)


def test_auto_ends_at_gather():
    rule, passed = choose(ConvNN2d(4, 6, k=3, metric="cosine").operation(IMAGE))
    assert rule.name == "gather" and len(passed) == 7 and all(reason for _, reason in passed)


def test_unknown_backend():
    op = ConvNN2d(4, 6, 3).operation(IMAGE)
    with pytest.raises(ValueError, match="unknown backend 'fast'; expected one of: auto, native"):
        run(op, "fast")


@pytest.mark.parametrize(
    "layer, x, reasons",
    [
        (
            ConvNN2d(4, 6, k=3, metric="cosine", backend="native"),
            IMAGE,
            ["convolution: candidates are All, not a Window", "pooling: the kernel is Taps"],
        ),
        (
            ConvNNAttention(8, 2, k=3, backend="native"),
            TOKENS,
            ["attention: KNearest keeps part of the candidates", "convolution: the kernel is Sum"],
        ),
        (
            ConvNNAttention(8, 2, metric="euclidean", backend="native"),
            TOKENS,
            ["attention: the metric is not bilinear"],
        ),
    ],
    ids=["conv", "attention", "metric"],
)
def test_native_where_it_cannot_lists_every_reason(layer, x, reasons):
    with pytest.raises(ValueError, match="backend='native' can't run this layer") as error:
        layer(x) if not isinstance(layer, ConvNNAttention) else layer(x, need_weights=False)
    text = str(error.value)
    for part in (*reasons, "convolution:", "pooling:", "attention:", "Use backend='auto'"):
        assert part in text
    assert "gather:" not in text


def test_native_with_weights_runs_by_gather():
    """Torch's own attention returns no weights either."""
    native, gather = (ConvNNAttention(8, 2, backend=b).double() for b in ("native", "gather"))
    gather.load_state_dict(native.state_dict())
    x = random(2, 6, 8)
    for a, b in zip(native(x), gather(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- every refusal -------------------------------------------------------------------------


def conv(*args: object, **options: object) -> object:
    return ConvNN2d(4, 4, *args, **options).operation(IMAGE)


def pool(*args: object, **options: object) -> object:
    return ConvNN2d(4, 4, *args, **{"kernel": "mean", **options}).operation(IMAGE)


def attend(**options: object) -> object:
    return ConvNNAttention(8, 2, **options).operation(TOKENS)


def masked(op: object) -> object:
    return dataclasses.replace(op, mask=torch.ones(36, dtype=torch.bool))


def elsewhere() -> object:
    """A window whose targets are not its own."""
    op = ConvNN2d(4, 4, 3, padding=1).operation(IMAGE)
    other = ConvNN2d(4, 4, 3, padding=1, stride=2).operation(IMAGE)
    return dataclasses.replace(op, target=other.target)


def cloud() -> object:
    op = PointConvNN(4, 4, 3).operation(IMAGE[0].flatten(1).t(), torch.zeros(36, 2))
    return dataclasses.replace(op, candidates=Window(3), selection=Every())


def four_axes() -> object:
    op = conv(3)
    points = Points(op.value, grid=Grid((6, 6, 1, 1)))
    return dataclasses.replace(op, source=points, target=points)


CONVOLUTION = {
    "kernel": (lambda: conv(3, kernel="mean"), "the kernel is Mean, not taps"),
    "candidates": (
        lambda: conv(k=3, metric="cosine"),
        "candidates are All, not a Window",
    ),
    "border": (
        lambda: conv(3, candidates=Window(3, border="shift"), padding=1),
        "windows shift at borders instead of padding",
    ),
    "selection": (
        lambda: conv(3, k=2, metric="cosine"),
        "KNearest keeps part of the window",
    ),
    "weights": (
        lambda: conv(3, metric="euclidean", weighting="softmax", padding=1),
        "weights are Softmax, not Ones",
    ),
    "mask": (lambda: masked(conv(3)), "some points are masked"),
    "cloud": (cloud, "the sources are no image"),
    "axes": (four_axes, "images of 4 axes"),
    "targets": (elsewhere, "the targets are not the window's centres"),
}
POOLING = {
    "kernel": (lambda: conv(3), "the kernel is Taps, neither Mean nor Max"),
    "candidates": (lambda: pool(k=3, metric="cosine"), "candidates are All, not a Window"),
    "one-sided": (
        lambda: pool(2, padding="same"),
        r"padding \(\(0, 1\), \(0, 1\)\) differs before and after",
    ),
    "mode": (lambda: pool(3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
    "wide": (lambda: pool(3, padding=2), r"padding \(2, 2\) is over half the window \(3, 3\)"),
    "dilated-mean": (lambda: pool(3, dilation=2), "torch has no dilated average pooling"),
}
ATTENTION = {
    "kernel": (
        lambda: attend(k=3, kernel="standard"),
        "the kernel is Taps, not Sum",
    ),
    "weights": (lambda: attend(weighting="ones"), "weights are Ones, not Softmax"),
    "selection": (lambda: attend(k=3), "KNearest keeps part of the candidates"),
    "window": (lambda: attend(candidates=Window(3, padding=1)), "candidates of Window are named"),
    "random": (lambda: attend(candidates=Random(3)), "candidates of Random are named by index"),
    "both": (
        lambda: attend(candidates=Window(3, padding=1) & Causal()),
        "candidates of Both are named by index",
    ),
    "metric": (lambda: attend(metric="euclidean"), "the metric is not bilinear"),
}
REFUSALS = [
    pytest.param(rule, *row, id=f"{rule.name}-{name}")
    for rule, rows in ((Convolution(), CONVOLUTION), (Pooling(), POOLING), (Attention(), ATTENTION))
    for name, row in rows.items()
]


@pytest.mark.parametrize("rule, make, reason", REFUSALS)
def test_every_refusal_says_why(rule, make, reason):
    assert re.match(reason, rule.refuses(make()) or "it did not refuse")


def test_the_slow_rules_never_refuse():
    for make, _ in (*CONVOLUTION.values(), *ATTENTION.values()):
        op = make()
        assert all(rule.refuses(op) is None for rule in RULES[7:9])


# --- explain -------------------------------------------------------------------------------


def test_explain_a_convolution():
    assert explain(ConvNN2d(4, 6, 3), IMAGE) == "ConvNN2d runs by: convolution"


def test_explain_pooling():
    text = explain(recipes.avg_pool2d(2), IMAGE)
    assert text.splitlines() == [
        "ConvNN2d runs by: pooling",
        "  convolution        refused: the kernel is Mean, not taps",
    ]


def test_explain_attention():
    lines = explain(ConvNNAttention(8, 2), TOKENS, need_weights=False).splitlines()
    assert lines == [
        "ConvNNAttention runs by: attention",
        "  convolution        refused: the kernel is Sum, not taps",
        "  pooling            refused: the kernel is Sum, neither Mean nor Max",
        "  block_attention    refused: candidates are All, no classes of points",
    ]


def test_explain_names_the_search_and_why_no_other():
    lines = explain(ConvNN2d(4, 6, k=3, metric="spatial"), IMAGE).splitlines()
    assert lines[0] == "ConvNN2d runs by: gather"
    assert lines[-1].split() == ["search", "grid"]
    lines = explain(ConvNN2d(4, 6, k=3, metric="cosine"), IMAGE).splitlines()
    assert (
        lines[-1]
        .strip()
        .startswith("search             dense (grid: the metric looks at more than")
    )
    lines = explain(ConvNN2d(4, 6, k=3, metric="cosine", search="dense"), IMAGE).splitlines()
    assert lines[-1].strip() == "search             dense (asked for)"


def test_explain_a_backend_that_was_asked_for():
    lines = explain(ConvNN2d(4, 6, 3, backend="message_passing"), IMAGE).splitlines()
    assert lines[0] == "ConvNN2d runs by: message_passing"
    assert lines[1:] == [
        f"  {name:<18} refused: backend='message_passing' was asked for"
        for name in (rule.name for rule in RULES[:8])
    ]


@pytest.mark.parametrize("unbatched", [False, True])
def test_explain_takes_what_the_layer_takes(unbatched):
    x = IMAGE[0] if unbatched else IMAGE
    assert explain(ConvNN2d(4, 6, k=3, metric="cosine"), x).startswith("ConvNN2d runs by: gather")
    tokens = TOKENS[0] if unbatched else TOKENS
    layer = ConvNNAttention(8, 2)
    options = {"key_padding_mask": None, "need_weights": False, "is_causal": True}
    assert "runs by: attention" in explain(layer, tokens, **options)
    with pytest.raises(ValueError, match="expected 4 channels, got 3"):
        explain(ConvNN2d(4, 6, 3), torch.zeros(1, 3, 6, 6))


def test_explain_other_layers():
    cloud_layer = PointConvNN(3, 4, k=2)
    assert "runs by: gather" in explain(cloud_layer, None, torch.randn(5, 3))
    assert explain(NeighborConv(3, 4, k=2)) == (
        "NeighborConv runs by: message_passing (torch_geometric's propagate)"
    )
    text = explain(Branching(4, 6, k=3, metric="cosine"), IMAGE)
    assert text.splitlines()[0] == "Branching runs its branches:"
    assert "  ConvNN2d runs by: gather" in text and "  ConvNN2d runs by: convolution" in text
    mixed = Branching.of(ConvNN2d(4, 6, k=3, metric="cosine"), nn.Conv2d(4, 6, 1), None)
    assert "  Conv2d: as it is" in explain(mixed, IMAGE)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
def test_explain_names_what_attention_with_weights_runs(monkeypatch, k, backend, weights):
    layer = ConvNNAttention(8, 2, k=k, backend=backend)
    ran = []
    for rule in RULES:
        monkeypatch.setattr(type(rule), "run", lambda rule, op: ran.append(rule.name) or op.value)
        if rule.weighs:
            own = type(rule).run_with_weights
            spied = lambda rule, *a, own=own: ran.append(rule.name) or own(rule, *a)  # noqa: E731
            monkeypatch.setattr(type(rule), "run_with_weights", spied)
    text = explain(layer, TOKENS, TOKENS, TOKENS, None, weights)  # in the order of forward
    layer(TOKENS, TOKENS, TOKENS, None, weights)
    assert text.splitlines()[0] == f"ConvNNAttention runs by: {ran[0]}"
    asked = "weights are asked for, too (need_weights=False asks for none)"
    assert (asked in text) == ((weights and k is not None) or weights)


@pytest.mark.parametrize(
    "layer",
    [
        ConvNN2d(3, 4, k=9, metric="euclidean"),
        ConvNN2d(3, 4, k=40, metric="cosine"),
        ConvNN2d(3, 4, k=9, metric="euclidean", self_point="first"),
        ConvNN2d(3, 4, k=9, metric="euclidean", self_point="excluded"),
        ConvNN2d(3, 4, metric="euclidean", selection=KNearest(20, dilation=2)),
        ConvNN2d(3, 3, selection=Radius(0.3, 20), metric="euclidean", kernel="sum"),
    ],
    ids=lambda layer: str(layer.selection),
)
@pytest.mark.parametrize("size", [16, 40, 72])
def test_explain_asks_what_the_layer_asks(monkeypatch, layer, size):
    image = torch.rand(1, 3, size, size + 8, generator=torch.Generator().manual_seed(size))
    asked = []
    explained, chosen = registry.explain_query, registry.fastest
    monkeypatch.setattr(
        lowering.table,
        "explain_query",
        lambda query: asked.append(("explain", said(query))) or explained(query),
    )
    monkeypatch.setattr(
        registry, "fastest", lambda query: asked.append(("run", said(query))) or chosen(query)
    )

    def said(query):
        own = None if query.excluded is None else query.excluded.tolist()
        return query.k, own, query.subset.index is None, query.source.num_points

    line = explain(layer, image).splitlines()[-1].split()
    explaining, asked[:] = [what for who, what in asked if who == "explain"], []
    layer(image)
    running = [what for who, what in asked if who == "run"]
    assert explaining == running and len(running) == 1
    assert line[:2] == ["search", chosen(layer.selection.asked(*question(layer, image)))]


def question(layer, image):
    op = layer.operation(image)
    return op.query(), op.own()


def test_explain_a_graph_that_is_given():
    layer, x = PointConvNN(3, 4, k=2), torch.rand(600, 3)
    edges = torch.stack([torch.arange(600).roll(1), torch.arange(600)])
    last = explain(layer, x, x, edge_index=edges).splitlines()[-1]
    assert last.split(None, 1) == ["search", "none: neighbours are those of edge_index"]
    last = explain(layer, x, x, torch.arange(600) // 300).splitlines()[-1]
    assert last.split(None, 1)[1] == "none: neighbours are those of search.knn, cloud by cloud"


def test_explain_needs_a_layer():
    with pytest.raises(TypeError, match=r"expected a layer of .*, got Conv2d"):
        explain(nn.Conv2d(4, 6, 3), IMAGE)


# --- that it is the same -------------------------------------------------------------------

MIXED = {
    "spatial-dot": lambda: 0.4 * metrics.Spatial(squared=True) + 0.6 * metrics.Feature("dot"),
    "interpolated": lambda: metrics.interpolate(
        metrics.Spatial(squared=True), metrics.Feature("scaled_dot"), 0.3
    ),
    "learnable": lambda: metrics.interpolate(
        metrics.Spatial(squared=True), metrics.Feature("scaled_dot"), 0.3, learnable=True
    ),
    "spatial": lambda: metrics.Spatial(squared=True),
    "lam-0": lambda: metrics.interpolate("squared_spatial", "scaled_dot", 0.0),
    "lam-1": lambda: metrics.interpolate("squared_spatial", "scaled_dot", 1.0),
    "squared": lambda: metrics.Feature("squared_euclidean"),
    "cosine": lambda: metrics.Feature("cosine"),
    "three": lambda: (
        metrics.Feature("cosine")
        + 2 * metrics.Feature("squared_euclidean")
        + 0.1 * metrics.Spatial(squared=True)
    ),
    "bilinear": lambda: metrics.Bilinear(4) + metrics.Mahalanobis(4),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_mixtures_lower_to_one_attention_call(name, masked, temperature):
    weighting = Softmax(temperature)
    torch.manual_seed(0)
    native = ConvNNAttention(8, 2, metric=MIXED[name](), weighting=weighting, backend="native")
    native = native.double()
    torch.manual_seed(0)
    gather = ConvNNAttention(8, 2, metric=MIXED[name](), weighting=weighting, backend="gather")
    gather = gather.double()
    mask = random(12, 12, seed=2).masked_fill(random(12, 12, seed=3) > 1, -torch.inf)
    options = {"attn_mask": mask} if masked else {}
    results = []
    for layer in (native, gather):
        x = random(2, 3, 4, 8).requires_grad_()
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            sdpa = torch.nn.functional.scaled_dot_product_attention
            patch.setattr(
                torch.nn.functional,
                "scaled_dot_product_attention",
                lambda *a, calls=calls, sdpa=sdpa, **k: calls.append(1) or sdpa(*a, **k),
            )
            out = layer(x, need_weights=False, **options)[0]
        assert len(calls) == (layer is native)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        a, b = (torch.zeros(()).double() if t is None else t for t in (a, b))
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["native", "gather"])
@pytest.mark.parametrize("autocast", [False, True])
def test_mixtures_keep_their_precision_in_half(backend, autocast):
    """Squared pixels reach hundreds, where bfloat16 counts in steps of two."""
    torch.manual_seed(0)
    layer = ConvNNAttention(8, 2, metric=MIXED["interpolated"](), backend=backend)
    x = torch.randn(1, 1, 40, 8).bfloat16()
    exact = layer.bfloat16().float()(x.float(), need_weights=False)[0]
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x.float(), need_weights=False)[0]
    else:
        out = layer.bfloat16()(x, need_weights=False)[0]
    assert out.dtype == torch.bfloat16
    assert bool(((out.float() - exact).abs() < 0.02).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    "pattern", [None, Causal(), Block(2), Congruent(2), Congruent(2) & Causal()], ids=str
)
def test_patterns_lower_to_masks(pattern, cross, causal):
    q = random(2, 6, 8)
    k = random(2, 5, 8, seed=1) if cross else q
    results = []
    for backend in ("native", "gather", "message_passing"):
        torch.manual_seed(0)
        layer = ConvNNAttention(8, 2, candidates=pattern, backend=backend).double()
        results.append(layer(q, k, k, need_weights=False, is_causal=causal)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results[2], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "pattern",
    [
        *(Block(3), Block(2, 1), Block((2, 5), (0, 3)), Block(9, 4), Block(9), Block(1)),
        *(Congruent(2), Congruent(3), Congruent(9)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "metric", ["scaled_dot", "cosine", metrics.interpolate("squared_spatial", "dot", 0.7)]
)
def test_classes_of_points_attend_by_themselves(pattern, metric):
    layer = ConvNNAttention(8, 2, candidates=pattern, metric=metric, axes=2).double()
    x = random(2, 6, 7, 8).requires_grad_()
    assert "runs by: block_attention" in explain(layer, x, need_weights=False)
    found = {}
    for backend in ("native", "gather"):
        layer.backend = backend
        out = layer(x, need_weights=False)[0]
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", [Block(3), Block(3, 1), Block(4, 7), Congruent(4)], ids=str)
def test_classes_of_a_sequence(pattern):
    layer = ConvNNAttention(8, 2, candidates=pattern).double()
    x = random(3, 11, 8)
    out = layer(x, need_weights=False)[0]
    layer.backend = "gather"
    torch.testing.assert_close(layer(x, need_weights=False)[0], out)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own, under vmap
def test_classes_of_points_in_float32_compiled_and_mapped():
    torch.manual_seed(0)
    layer, x = ConvNNAttention(8, 2, candidates=Block(3, 1)).eval(), torch.randn(2, 11, 8)

    def attend(x):
        return layer(x, need_weights=False)[0]

    wanted = attend(x)
    whole = torch.compile(attend, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(whole(x), wanted)
    assert whole(torch.randn(2, 14, 8)).shape == (2, 14, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (attend(x) - wanted).abs().max() < 0.05
    torch.testing.assert_close(torch.func.vmap(attend)(x[:, None])[:, 0], wanted)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"attn_mask": torch.zeros(6, 6)}, "a mask or a bias is of pairs of all classes"),
        ({"is_causal": True}, "a mask or a bias is of pairs of all classes"),
        ({"key": TOKENS[:, :4], "value": TOKENS[:, :4]}, "not the pixels of one grid"),
    ],
)
def test_what_reaches_across_classes_is_attended_at_once(options, reason):
    layer = ConvNNAttention(8, 2, candidates=Block(2))
    assert reason in explain(layer, TOKENS[:, :6], need_weights=False, **options)


class Evens(Candidates):
    """Candidates of a user's own, named by index."""

    def forward(self, target, source) -> Subset:
        return Subset(torch.arange(0, source.num_points, 2)[None])


def test_candidates_of_ones_own_are_not_taken_for_a_mask():
    layer = ConvNNAttention(8, 2, candidates=Evens()).double()
    x = random(2, 6, 8)
    assert "candidates of Evens are named by index" in explain(layer, x, need_weights=False)
    out, weights = layer(x)
    assert bool((weights[..., 1::2] == 0).all()) and bool((weights[..., ::2] > 0).all())
    torch.testing.assert_close(layer(x, need_weights=False)[0], out)


def test_attention_over_images_by_the_convolution_layer():
    """A layer over images whose every pixel looks at every other is attention, too."""
    options = {
        "selection": Every(),
        "metric": "scaled_dot",
        "weighting": "softmax",
        "kernel": "sum",
    }
    x = random(2, 4, 3, 5)
    outs = [
        ConvNN2d(4, 4, **options, backend=b)(x) for b in ("native", "gather", "message_passing")
    ]
    rows = x.flatten(2).transpose(1, 2)
    expected = ((rows @ rows.transpose(1, 2)) / 2).softmax(-1) @ rows
    for out in outs:
        torch.testing.assert_close(out.flatten(2).transpose(1, 2), expected)


POOLS = [
    (recipes.avg_pool1d, nn.AvgPool1d, (3, 2, 1), (2, 4, 9)),
    (recipes.avg_pool2d, nn.AvgPool2d, ((2, 3), 2, (1, 0)), (2, 4, 7, 6)),
    (recipes.max_pool2d, nn.MaxPool2d, (3, 2, 1, 2), (2, 4, 7, 6)),
    (recipes.max_pool1d, nn.MaxPool1d, (3, 1, 1, 2), (2, 4, 9)),
]


@pytest.mark.parametrize(
    "ours, theirs, args, shape", POOLS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("backend", ["native", "gather", "message_passing"])
def test_pooling_of_negative_values(ours, theirs, args, shape, backend):
    """Where what is padded must not win a maximum."""
    x = -random(*shape).abs() - 1
    torch.testing.assert_close(ours(*args, backend=backend)(x), theirs(*args)(x))


@pytest.mark.parametrize("options", [{"padding": 2}, {"padding": "same"}, {"dilation": 2}])
def test_pooling_that_torch_has_not_runs_by_gather(options):
    layer = ConvNN2d(None, None, 2 if "padding" in options else 3, kernel="mean", **options)
    x = random(1, 2, 6, 7)
    assert "runs by: gather" in explain(layer, x)
    other = ConvNN2d(
        None,
        None,
        2 if "padding" in options else 3,
        kernel="mean",
        backend="message_passing",
        **options,
    )
    torch.testing.assert_close(layer(x), other(x))


def test_a_convolution_computes_no_distances(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("a distance was computed")

    monkeypatch.setattr(metrics.Spatial, "distances", fail)
    for backend in ("native", "gather", "message_passing"):
        assert ConvNN2d(4, 6, 3, backend=backend)(IMAGE).shape == (1, 6, 4, 4)


@pytest.mark.parametrize("cls, size", [(ConvNN1d, (9,)), (ConvNN2d, (5, 6))])
def test_lowering_keeps_the_memory_format_and_dtype(cls, size):
    layer = cls(4, 6, 3, padding=1)
    out = layer(torch.randn(2, 4, *size))
    assert out.dtype == torch.float32
    if len(size) == 2:
        x = torch.randn(2, 4, *size).contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(4, 6, 3, padding=1)
        conv.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), conv(x))


def test_max_and_mean_of_own_kernels():
    x = random(1, 3, 5, 6)
    for kernel, pool_ in ((kernels.Max(), nn.MaxPool2d), (kernels.Mean(), nn.AvgPool2d)):
        layer = ConvNN2d(None, None, 2, 2, kernel=kernel)
        assert "pooling" in explain(layer, x).splitlines()[0]
        torch.testing.assert_close(layer(x), pool_(2)(x))


def test_public_names():
    assert set(lowering.__all__) >= {"RULES", "Rule", "choose", "explain", "run"}


def test_weights_that_count_slots_see_those_that_are_empty():
    """Only a softmax takes an empty slot for none."""

    class Share(Weighting):
        def forward(self, pairs):
            return pairs.mask / pairs.neighborhood.k

    x = torch.randn(4, 3)
    layer = PointConvNN(3, 3, k=8, kernel="sum", short="pad", weighting=Share())
    torch.testing.assert_close(layer(x, x), x.sum(0).expand(4, 3) / 8)


@pytest.mark.parametrize("metric", ["scaled_dot", "cosine", "euclidean"])
@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
@pytest.mark.parametrize("masked", [False, True])
def test_more_neighbours_than_there_are_keys_are_all_of_them(masked, backend, metric):
    """Empty slots sum to nothing, and cost nothing."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 8, requires_grad=True)
    mask = torch.rand(2, 7) < 0.3 if masked else None
    found = []
    for k in (7, 900):
        torch.manual_seed(1)
        options = {"selection": KNearest(k, short="pad"), "metric": metric, "backend": backend}
        layer = ConvNNAttention(8, 2, **options)
        out = layer(x, key_padding_mask=mask, need_weights=False)[0]
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        assert layer.operation(x).neighborhood().k == 7
    torch.testing.assert_close(*found)


class TestMaskedAttention:
    """Many neighbours among few: attention over a mask of them is what gather computes."""

    @pytest.mark.parametrize("metric", ["scaled_dot", "cosine", "squared_euclidean"])
    @pytest.mark.parametrize("given", ["nothing", "a mask", "a bias", "causal"])
    def test_values_and_gradients(self, given, metric):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 3, 270, 16, requires_grad=True) for _ in range(3))
        options = {"metric": metric}
        if given == "a mask":
            options["attn_mask"] = torch.rand(270, 270) < 0.95
            options["attn_mask"][3] = False  # who may attend to nobody
        elif given == "a bias":
            options["attn_mask"] = torch.randn(3, 270, 270).masked_fill(
                torch.rand(270, 270) < 0.05, -torch.inf
            )
        elif given == "causal":
            options["is_causal"] = True
        found, wanted = (
            (out, torch.autograd.grad(out.square().sum(), (q, k, v)))
            for out in (
                knn_attention(q, k, v, 260, backend=b, **options) for b in ("auto", "gather")
            )
        )
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
        for a, b in zip(found[1], wanted[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        "m, k, lost, reason",
        [
            (270, 260, None, None),
            (270, 256, None, "at most 256"),
            (3120, 260, None, None),
            (3121, 260, None, "a mask of 3121 sources"),
            (270, 260, "v", "finite"),
            (270, 260, "k", "finite"),
        ],
    )
    def test_it_serves_many_of_few(self, m, k, lost, reason):
        parts = {"q": torch.randn(1, 5, 16), "k": torch.randn(1, m, 16), "v": torch.randn(1, m, 8)}
        if lost is not None:
            parts[lost][0, 7, 3] = torch.inf
        op = Operation(
            *(Points(parts["q"]), Points(parts["k"]), parts["v"], as_metric("dot"), All()),
            *(KNearest(k), Softmax(), Sum()),
        )
        found = MaskedAttention().refuses(op)
        assert found is None if reason is None else reason in found

    def test_who_is_nearer_than_rounding_tells_is_found(self):
        """The last of the nearest and the next are closer to one another than a product tells."""
        torch.manual_seed(0)
        q = torch.randn(1, 60, 16)
        keys = torch.randn(1, 1, 16) * 10 + 1e-6 * torch.randn(1, 270, 16)
        value = torch.eye(270).unsqueeze(0)
        found, wanted = (
            knn_attention(q, keys, value, 260, backend=backend) != 0
            for backend in ("native", "gather")
        )
        assert torch.equal(found, wanted) and (found.sum(-1) == 260).all()

    @pytest.mark.parametrize(
        "self_point, dilation", [("first", 1), ("excluded", 1), ("natural", 2)]
    )
    def test_other_choices_of_neighbours(self, self_point, dilation):
        torch.manual_seed(0)
        points = Points(torch.randn(1, 560, 16))
        chosen = KNearest(260, dilation, self_point)
        op = Operation(
            *(points, points, torch.randn(1, 560, 8), as_metric("dot"), All(), chosen),
            *(Softmax(), Sum()),
        )
        rule, _ = choose(op)
        assert rule.name == "masked_attention"
        torch.testing.assert_close(rule.run(op), run(op, "gather"), rtol=1e-4, atol=1e-5)

    def test_ties_go_to_the_lowest_index(self):
        q, keys = torch.ones(1, 2, 16), torch.ones(1, 270, 16)
        value = torch.arange(270.0).view(1, 270, 1)
        out = knn_attention(q, keys, value, 260)
        torch.testing.assert_close(out, torch.full((1, 2, 1), 129.5))
