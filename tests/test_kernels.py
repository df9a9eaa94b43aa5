"""Kernels against loops over neighbours, on arrays and on edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from convnn_geo.kernels import (
    EdgeMLP,
    GravNet,
    HeadTaps,
    Join,
    Max,
    MaxRelative,
    Mean,
    Separable,
    Sum,
    Taps,
    VectorAttention,
)
from convnn_geo.metrics import Feature
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.pairs import EdgePairs, Pairs
from convnn_geo.points import Points

B, N, M, K, C = 2, 4, 5, 3, 4


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mlp(*sizes):
    """A network of its own random numbers, the same at each call."""
    torch.manual_seed(sum(sizes))
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())]).double()


# -- what the kernels compute, for one target ---------------------------------------------------
# A slot is (rank, value, weight, offset); empty slots are left out.


def taps(weight, bias, groups, d):
    def loop(slots, x_i):
        out = torch.zeros(d, dtype=torch.float64)
        for rank, value, rho, _ in slots:
            for o in range(d):
                group = o // (d // groups)
                width = C // groups
                for c in range(width):
                    out[o] += weight.flatten(2)[o, c, rank] * rho * value[group * width + c]
        return out if bias is None else out + bias

    return loop


def summed(slots, x_i):
    return sum((rho * value for _, value, rho, _ in slots), torch.zeros(C).double())


def mean(slots, x_i):
    return summed(slots, x_i) / max(len(slots), 1)


def mean_of_all(slots, x_i):
    return summed(slots, x_i) / K


def largest(slots, x_i):
    return torch.stack([rho * v for _, v, rho, _ in slots]).amax(0) if slots else torch.zeros(C)


def edge_mlp(net, inputs, reduce):
    def loop(slots, x_i):
        messages = []
        for _, value, rho, offset in slots:
            seen = {"target": x_i, "source": value, "difference": value - x_i, "offset": offset}
            messages.append(rho * net(torch.cat([seen[name] for name in inputs])))
        if not messages:
            return torch.zeros(3).double()
        messages = torch.stack(messages)
        return {"max": messages.amax(0), "mean": messages.mean(0), "sum": messages.sum(0)}[reduce]

    return loop


def max_relative(update):
    def loop(slots, x_i):
        best = torch.zeros(C).double()
        if slots:
            best = torch.stack([rho * (value - x_i) for _, value, rho, _ in slots]).amax(0)
        return update(torch.cat([x_i, best]))

    return loop


def vector_attention(query, key, value, position, attention):
    def loop(slots, x_i):
        if not slots:
            return torch.zeros(3).double()
        scores, values = [], []
        for _, v, _, offset in slots:
            delta = position(-offset)
            scores.append(attention(query(x_i) - key(v) + delta))
            values.append(value(v) + delta)
        return (torch.stack(scores).softmax(0) * torch.stack(values)).sum(0)

    return loop


def gravnet(value, own, update):
    def loop(slots, x_i):
        sent = [rho * value(v) for _, v, rho, _ in slots]
        if not sent:
            reduced = torch.zeros(6).double()
        else:
            sent = torch.stack(sent)
            reduced = torch.cat([sent.mean(0), sent.amax(0)])
        return own(x_i) + update(reduced)

    return loop


def make_taps(d, groups, bias=True, shape=(K,)):
    weight = randn(d, C // groups, *shape)
    b = randn(d, seed=1) if bias else None
    return Taps(weight, b, groups), taps(weight, b, groups, d)


def make_separable():
    depthwise, pointwise, bias = randn(C, 1, K), randn(6, C, 1), randn(6, seed=2)
    first = taps(depthwise, None, C, C)
    kernel = Separable(depthwise, pointwise, bias)
    return kernel, lambda slots, x_i: pointwise.flatten(1) @ first(slots, x_i) + bias


def make_edge_mlp(inputs, reduce):
    widths = {"target": C, "source": C, "difference": C, "offset": 2}
    net = mlp(sum(widths[name] for name in inputs), 3)
    return EdgeMLP(net, inputs, reduce), edge_mlp(net, inputs, reduce)


def make_max_relative():
    update = mlp(2 * C, 5)
    return MaxRelative(update), max_relative(update)


def make_vector_attention():
    parts = mlp(C, 3), mlp(C, 3), mlp(C, 2, 3), mlp(2, 3), mlp(3, 3)
    return VectorAttention(*parts), vector_attention(*parts)


def make_plain_vector_attention():
    parts = mlp(C, 3), mlp(C, 3), mlp(C, 2, 3), mlp(2, 3)
    return VectorAttention(*parts), vector_attention(*parts, nn.Identity())


def make_gravnet():
    parts = mlp(C, 3), mlp(C, 5), mlp(6, 5)
    return GravNet(*parts), gravnet(*parts)


KERNELS = {
    "sum": lambda: (Sum(), summed),
    "mean": lambda: (Mean(), mean),
    "mean of all slots": lambda: (Mean(count_empty=True), mean_of_all),
    "max": lambda: (Max(), largest),
    "join": lambda: (
        Join(Mean(), Max(), Sum()),
        lambda slots, x_i: torch.cat([f(slots, x_i) for f in (mean, largest, summed)]),
    ),
    "taps": lambda: make_taps(6, 1),
    "taps without bias": lambda: make_taps(6, 1, bias=False),
    "taps of three axes": lambda: make_taps(6, 1, shape=(1, 3, 1)),
    "grouped taps": lambda: make_taps(6, 2),
    "depthwise taps": lambda: make_taps(C, C),
    "depthwise taps with multiplier": lambda: make_taps(3 * C, C),
    "separable": make_separable,
    "edge mlp": lambda: make_edge_mlp(("target", "difference"), "max"),
    "edge mlp of sources": lambda: make_edge_mlp(("source", "offset"), "mean"),
    "edge mlp of everything": lambda: make_edge_mlp(
        ("offset", "difference", "source", "target"), "sum"
    ),
    "max relative": make_max_relative,
    "vector attention": make_vector_attention,
    "vector attention without gamma": make_plain_vector_attention,
    "gravnet": make_gravnet,
}
MASKS = ["none", "some", "shared"]
WEIGHTS = ["none", "pair", "channel"]
LEADS = {"batch": (B,), "heads": (B, 2), "alone": ()}


def make_mask(kind, lead=(B,)):
    if kind == "none":
        return None
    mask = randn(*lead, N, K, seed=3) > 0
    mask[..., 1, :], mask[..., 2, :] = False, True
    return mask if kind == "some" else mask.reshape(-1, N, K)[0]


def make_pairs(kernel, x_i, x_j, mask=None, shared=False):
    lead = x_j.shape[:-2]
    index = torch.randint(M, (N, K) if shared else (*lead, N, K))
    hood = Neighborhood(index, M, mask=mask)
    target = Points(x_i, randn(*lead, N, 2, seed=4))
    source = Points(x_j, randn(*lead, M, 2, seed=5))
    value = kernel.project(x_j)
    return Pairs(target, source, value, lambda: Feature().bind(target, source), hood)


def by_edges(kernel, pairs, weight):
    """The kernel on edges: messages one by one, then into slots."""
    lead = torch.broadcast_shapes(
        pairs.value.shape[:-2],
        pairs.neighborhood.index.shape[:-2],
        () if pairs.mask is None else pairs.mask.shape[:-2],
    )

    def rows(t):
        return t.expand(*lead, *t.shape[-2:]).reshape(-1, t.shape[-1])

    hood = pairs.neighborhood.expand(*lead)
    edge_index, rank, slot = hood.edges()
    source, target = edge_index
    offset = rows(pairs.source.position)[source] - rows(pairs.target.position)[target]
    x_i = rows(pairs.target.x)
    edges = EdgePairs(x_i[target], rows(pairs.value)[source], offset)
    messages = kernel.message(edges)
    if weight is not None:
        if weight.ndim == pairs.value.ndim + 1:
            weight = weight.expand(*lead, *weight.shape[-3:]).flatten(0, -2)[slot]
        else:
            weight = weight.expand(*lead, N, K).flatten()[slot].unsqueeze(-1)
        messages = messages * weight
    out = kernel.scatter(messages, target, rank, (*lead, N), K)
    return kernel.finish(out, pairs.target.x)


def make_weight(kind, channels, mask, lead=(B,)):
    if kind == "none":
        return None
    shape = (*lead, N, K) if kind == "pair" else (*lead, N, K, channels)
    weight = randn(*shape, seed=6)
    if mask is not None:
        weight = weight * (mask if kind == "pair" else mask.unsqueeze(-1))
    return weight


def message_channels(kernel, pairs):
    return kernel.message(pairs).shape[-1]


def naive(loop, pairs, weight, x_j):
    """The loop over examples and targets, with the sources' own features as values."""
    out = []
    lead = x_j.shape[:-2]

    def flat(t, own):
        return t.expand(*lead, *t.shape[-own:]).reshape(math.prod(lead), *t.shape[-own:])

    index = flat(pairs.neighborhood.index, 2)
    mask = flat(torch.ones(N, K).bool() if pairs.mask is None else pairs.mask, 2)
    x_i, values = flat(pairs.target.x, 2), flat(x_j, 2)
    pos_i, pos_j = flat(pairs.target.pos, 2), flat(pairs.source.pos, 2)
    if weight is not None:
        weight = flat(weight, 3 if weight.ndim == x_j.ndim + 1 else 2)
    for b in range(len(values)):
        for i in range(N):
            slots = []
            for rank in range(K):
                if mask[b, i, rank]:
                    j = index[b, i, rank]
                    rho = 1.0 if weight is None else weight[b, i, rank]
                    slots.append((rank, values[b, j], rho, pos_j[b, j] - pos_i[b, i]))
            out.append(loop(slots, x_i[b, i]).double())
    return torch.stack(out).view(*x_j.shape[:-2], N, -1)


def inputs(lead=(B,)):
    return randn(*lead, N, C, seed=7), randn(*lead, M, C, seed=8)


# Scores of vector attention are no values to be weighed.
WEIGHABLE = [name for name in KERNELS if "attention" not in name]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_their_loops(name, kind):
    kernel, loop = KERNELS[name]()
    x_i, x_j = inputs()
    pairs = make_pairs(kernel, x_i, x_j, make_mask(kind))
    expected = naive(loop, pairs, None, x_j)
    torch.testing.assert_close(kernel.gather(pairs, None), expected)
    torch.testing.assert_close(by_edges(kernel, pairs, None), expected)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", WEIGHABLE)
def test_weighted_kernels_are_their_loops(name, kind):
    kernel, loop = KERNELS[name]()
    x_i, x_j = inputs()
    mask = make_mask(kind)
    pairs = make_pairs(kernel, x_i, x_j, mask)
    for what in ("pair", "channel"):
        weight = make_weight(what, message_channels(kernel, pairs), mask)
        if what == "channel" and ("taps" in name or "separable" in name):
            weighed = lambda slots, x: loop([(r, v * w, 1.0, o) for r, v, w, o in slots], x)  # noqa: E731
            expected = naive(weighed, pairs, weight, x_j)
        else:
            expected = naive(loop, pairs, weight, x_j)
        torch.testing.assert_close(kernel.gather(pairs, weight), expected)
        torch.testing.assert_close(by_edges(kernel, pairs, weight), expected)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_leading_axes(name, shared, lead):
    lead = LEADS[lead]
    kernel, loop = KERNELS[name]()
    x_i, x_j = inputs(lead)
    pairs = make_pairs(kernel, x_i, x_j, make_mask("shared", (1,)), shared)
    weight = None if name not in WEIGHABLE else make_weight("pair", 0, pairs.mask, lead)
    expected = naive(loop, pairs, weight, x_j)
    torch.testing.assert_close(kernel.gather(pairs, weight), expected)
    torch.testing.assert_close(by_edges(kernel, pairs, weight), expected)


@pytest.mark.parametrize("kind", ["none", "some"])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients(name, kind):
    x_i, x_j = (t.requires_grad_() for t in inputs())
    mask = make_mask(kind)
    kernel, _ = KERNELS[name]()
    state = torch.random.get_rng_state()
    leaves = [x_i, x_j]
    if name in WEIGHABLE:
        leaves.append(make_weight("pair", 0, mask).requires_grad_())
    if isinstance(kernel, (Taps, Separable)):
        tensors = [t for t in vars(kernel).values() if isinstance(t, torch.Tensor)]
        leaves += [t.requires_grad_() for t in tensors]
    elif isinstance(kernel, nn.Module):
        leaves += list(kernel.parameters())

    def out(way):
        def call(x_i, x_j, *rest):
            torch.random.set_rng_state(state)  # the same neighbours each time
            pairs = make_pairs(kernel, x_i, x_j, mask)
            weight = rest[0] if name in WEIGHABLE else None
            return way(pairs, weight)

        return call

    assert torch.autograd.gradcheck(out(kernel.gather), leaves, fast_mode=True)
    cotangent = randn(*out(kernel.gather)(*leaves).shape, seed=9)
    gathered = torch.autograd.grad(
        out(kernel.gather)(*leaves), leaves, cotangent, allow_unused=True
    )
    scattered = torch.autograd.grad(
        out(lambda p, w: by_edges(kernel, p, w))(*leaves), leaves, cotangent, allow_unused=True
    )
    for a, b in zip(gathered, scattered, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", KERNELS)
def test_targets_without_neighbours_are_finite_with_finite_gradients(name):
    kernel, loop = KERNELS[name]()
    x_i, x_j = (t.requires_grad_() for t in inputs())
    mask = torch.zeros(B, N, K, dtype=torch.bool)
    mask[0, 0, 1] = True
    pairs = make_pairs(kernel, x_i, x_j, mask)
    for out in (kernel.gather(pairs, None), by_edges(kernel, pairs, None)):
        torch.testing.assert_close(out, naive(loop, pairs, None, x_j))
        (grad,) = torch.autograd.grad(out.sum(), x_j, retain_graph=True)
        assert grad.isfinite().all()
        others = torch.ones(B, M).bool()
        others[0, pairs.neighborhood.index[0, 0, 1]] = False
        assert not grad[others].any()


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("name", ["sum", "mean", "mean of all slots", "max", "join", "edge mlp"])
def test_no_slots_and_one_slot(name, k):
    kernel, _ = KERNELS[name]()
    x_i, x_j = inputs()
    hood = Neighborhood(torch.zeros(B, N, k, dtype=torch.long), M)
    target, source = Points(x_i), Points(x_j)
    pairs = Pairs(target, source, x_j, lambda: Feature().bind(target, source), hood)
    out = kernel.gather(pairs, None)
    assert out.isfinite().all()
    if not k and name != "edge mlp":
        assert not out.any()
    if k and name == "sum":
        assert torch.equal(out, x_j[:, :1].expand(B, N, C))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_what_an_empty_slot_points_at_does_not_matter(name, weighted, bad):
    if weighted and name not in WEIGHABLE:
        return
    kernel, _ = KERNELS[name]()
    x_i, x_j = inputs()
    torch.manual_seed(1)
    index = make_pairs(kernel, x_i, x_j).neighborhood.index
    mask = index != 0
    assert not mask.all()
    weight = make_weight("pair", 0, mask) if weighted else None

    def both(x_j):
        torch.manual_seed(1)
        pairs = make_pairs(kernel, x_i, x_j, mask)
        return kernel.gather(pairs, weight), by_edges(kernel, pairs, weight)

    expected = both(x_j)
    x_j[:, 0] = bad
    for a, b in zip(both(x_j), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", KERNELS)
def test_reductions_ignore_what_is_masked(name):
    kernel, _ = KERNELS[name]()
    mask = make_mask("some")
    pairs = make_pairs(kernel, *inputs(), mask)
    messages = kernel.message(pairs)
    noise = torch.where(mask.unsqueeze(-1), messages, 100.0)
    torch.testing.assert_close(kernel.reduce(noise, mask), kernel.reduce(messages, mask))


def test_every_source_as_neighbour_is_one_product():
    x = randn(B, M, C)
    points = Points(x)
    hood = Neighborhood(torch.arange(M).expand(M, M), M, complete=True)
    pairs = Pairs(points, points, x, lambda: Feature().bind(points, points), hood)
    weight = randn(B, M, M)
    torch.testing.assert_close(Sum().gather(pairs, weight), weight @ x)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("kind", ["none", "some"])
def test_taps_of_heads(depthwise, kind):
    heads, d = 3, C if depthwise else 2
    weight = randn(heads, C, 1, K) if depthwise else randn(heads, d, C, K)
    kernel = HeadTaps(weight)
    lead = (B, heads)
    x_i, x_j = inputs(lead)
    mask = make_mask(kind, lead)
    pairs = make_pairs(kernel, x_i, x_j, mask)
    rho = make_weight("pair", 0, mask, lead)
    expected = torch.zeros(B, heads, N, d, dtype=torch.float64)
    for b in range(B):
        for h in range(heads):
            for i in range(N):
                for rank in range(K):
                    if mask is not None and not mask[b, h, i, rank]:
                        continue
                    value = rho[b, h, i, rank] * x_j[b, h, pairs.neighborhood.index[b, h, i, rank]]
                    if depthwise:
                        expected[b, h, i] += weight[h, :, 0, rank] * value
                    else:
                        expected[b, h, i] += weight[h, :, :, rank] @ value
    torch.testing.assert_close(kernel.gather(pairs, rho), expected)
    torch.testing.assert_close(by_edges(kernel, pairs, rho), expected)


@pytest.mark.parametrize("name", ["taps", "grouped taps", "depthwise taps with multiplier"])
def test_taps_keep_nothing_of_the_size_of_all_gathered_values(name):
    kernel, _ = KERNELS[name]()
    x_j = randn(B, 50, C).requires_grad_()
    x_i = x_j.detach()
    hood = Neighborhood(torch.randint(50, (B, 50, K)), 50)
    points = Points(x_i)
    pairs = Pairs(points, Points(x_j), x_j, lambda: None, hood)
    saved = []
    weight = randn(B, 50, K).requires_grad_()

    def pack(t):
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kernel.gather(pairs, weight).sum()
    assert max(saved) < B * 50 * K * C


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: Taps(randn(2, C, 4)).gather(p, None), "4 taps, but targets have 3"),
        (lambda p: Taps(randn(2, C, 4)).reduce(p.x_j, None), "4 taps, but targets have 3"),
        (lambda p: Separable(randn(C, 1, 2), randn(3, C)).gather(p, None), "2 taps"),
        (lambda p: EdgeMLP(nn.Identity(), ("middle",)), "target, source, difference, offset"),
        (lambda p: EdgeMLP(nn.Identity(), reduce="min"), "max, mean, sum"),
        (
            lambda p: MaxRelative(nn.Identity()).message(EdgePairs(None, p.x_j, None)),
            "x_src, x_dst",
        ),
    ],
)
def test_bad_kernels_are_refused(call, match):
    pairs = make_pairs(Sum(), *inputs())
    with pytest.raises(ValueError, match=match):
        call(pairs)
