"""PointConvNN: a graph built in each forward, or one that is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convnn_geo import kernels, metrics
from convnn_geo.candidates import Random
from convnn_geo.encodings import Coordinates
from convnn_geo.kernels import EdgeMLP
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.nn import PointConvNN
from convnn_geo.points import Points
from convnn_geo.search import knn, radius
from convnn_geo.selection import Given, KNearest, Radius
from convnn_geo.weighting import Weighting

C, D, K = 4, 5, 3
BACKENDS = ("gather", "message_passing")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def taps(layer: PointConvNN, x: Tensor, index: Tensor) -> Tensor:
    return torch.einsum("nkc,dck->nd", x[index], layer.weight) + layer.bias


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_static_by_position_dynamic_by_feature(backend):
    x, pos = random(12, C), random(12, 3, seed=1)
    by_position, by_feature = torch.cdist(pos, pos).argsort(-1), torch.cdist(x, x).argsort(-1)
    static = PointConvNN(C, D, K, backend=backend).double()
    equal(static(x, pos), taps(static, x, by_position[:, :K]))
    dynamic = PointConvNN(C, D, K, "euclidean", backend=backend).double()
    equal(dynamic(x, pos), taps(dynamic, x, by_feature[:, :K]))
    equal(dynamic(x), dynamic(x, pos))
    assert not torch.equal(by_position[:, :K], by_feature[:, :K])
    mixed = PointConvNN(
        C, D, K, 0.5 * metrics.Spatial() + 2 * metrics.Feature("euclidean"), backend=backend
    ).double()
    order = (0.5 * torch.cdist(pos, pos) + 2 * torch.cdist(x, x)).argsort(-1)
    equal(mixed(x, pos), taps(mixed, x, order[:, :K]))


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("metric", ["spatial", "euclidean"])
@pytest.mark.parametrize("weighting", ["ones", "softmax"])
def test_a_ragged_batch_is_its_clouds_one_by_one(backend, metric, weighting):
    layer = PointConvNN(C, D, K, metric, weighting=weighting, backend=backend).double()
    sizes = [5, 3, 8]
    x, pos = random(16, C).requires_grad_(), random(16, 3, seed=1).requires_grad_()
    batch = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    together = layer(x, pos, batch)
    parts = zip(x.split(sizes), pos.split(sizes), strict=True)
    apart = torch.cat([layer(a, p) for a, p in parts])
    equal(together, apart)
    wanted = [x, layer.weight] + ([pos if metric == "spatial" else x] * (weighting == "softmax"))
    for a, b in zip(
        torch.autograd.grad(together.square().sum(), wanted),
        torch.autograd.grad(apart.square().sum(), wanted),
        strict=True,
    ):
        equal(a, b)


MIXTURE = 0.5 * metrics.Spatial() + 0.5 * metrics.Feature("cosine")
CHOSEN = {
    "mixture": {"k": K, "metric": MIXTURE},
    "custom": {"k": K, "metric": metrics.Custom(lambda i, j: (i.pos - j.pos).abs().amax(-1))},
    "dilated": {"selection": KNearest(K, dilation=2, short="pad")},
    "dilated excluded": {"selection": KNearest(2, dilation=2, self_point="excluded")},
    "radius": {"selection": Radius(0.4, 6)},
    "radius mean": {"selection": Radius(0.4, 6), "kernel": "mean"},
    "radius softmax": {"selection": Radius(0.9, 50), "kernel": "sum", "weighting": "softmax"},
    "radius max": {"selection": Radius(0.3, 300), "kernel": "max", "metric": "squared_spatial"},
}


@pytest.mark.parametrize("options", CHOSEN.values(), ids=CHOSEN)
def test_uneven_clouds_are_searched_by_themselves(monkeypatch, options):
    """A cloud far larger than the rest: nothing is filled up to its size."""
    out = C if options.get("kernel") in ("sum", "mean", "max") else D
    layer = PointConvNN(C, out, **options).double()
    sizes = [5, 600, *[6] * 10, 7]
    x, pos = random(672, C).requires_grad_(), random(672, 3, seed=1).requires_grad_()
    batch = torch.arange(13).repeat_interleave(torch.tensor(sizes))
    apart = [layer(a, b) for a, b in zip(x.split(sizes), pos.split(sizes), strict=True)]
    monkeypatch.setattr(Points, "from_batch", None)
    together = layer(x, pos, batch)
    equal(together, torch.cat(apart))
    grads = [
        torch.autograd.grad(loss.square().sum(), (x, pos), allow_unused=True)
        for loss in (together, torch.cat(apart))
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        equal(a if a is not None else x[:0], b if b is not None else x[:0])


class Half(Radius):
    """A selection of the user's own, that is also one of ours."""

    def forward(self, query, own, search="auto"):
        return super().forward(query, own, search).within(self.r / 2)


def test_a_selection_of_ones_own_is_asked_in_batches_too():
    layer = PointConvNN(C, C, selection=Half(0.8, 8), kernel="sum").double()
    x, pos = random(30, C), random(30, 3, seed=1)
    apart = [layer(a, b) for a, b in zip(x.split(15), pos.split(15), strict=True)]
    equal(layer(x, pos, torch.arange(30) // 15), torch.cat(apart))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", ["max", "sum", "mean", EdgeMLP(nn.Linear(C, C), ("source",))])
@pytest.mark.parametrize("weighting", ["ones", "softmax"])
def test_balls_that_are_empty_for_all(backend, kernel, weighting):
    options = {"kernel": kernel, "weighting": weighting, "backend": backend}
    layer = PointConvNN(C, C, selection=Radius(0.1, 8), **options)
    x, pos, far = torch.randn(6, C), torch.rand(6, 3), torch.rand(2, 3) + 9
    batch = torch.zeros(6, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    for given in (None, batch):
        assert not layer((x, None), (pos, far), given).any()


def test_balls_where_there_are_no_values_to_look_at():
    layer = PointConvNN(C, C, selection=Radius(0.9, 40), kernel="sum")
    x, pos = torch.randn(50, C), torch.randn(3, 50, 3)
    mapped = torch.func.vmap(lambda p: layer(x, p))(pos)
    torch.testing.assert_close(mapped, torch.stack([layer(x, p) for p in pos]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(9, C), torch.randn(9, 3)).shape == (9, C)
    found = radius(torch.randn(9, 3, device="meta"), None, 0.5, max_num_neighbors=8)
    assert found.index.shape == (9, 8)


def test_a_source_that_is_no_number_shows_in_balls_with_room_for_it():
    layer = PointConvNN(C, C, selection=Radius(0.2, 60), kernel="sum")
    x, pos = torch.randn(60, C), torch.rand(60, 3)
    pos[7] = torch.nan
    x[7] = torch.nan
    assert layer(x, pos).isnan().all()


def test_slots_that_are_empty_for_all_are_none():
    x, pos = random(30, C), random(30, 3, seed=1)
    layer = PointConvNN(C, D, selection=Radius(1.0, 25), kernel=EdgeMLP(nn.Linear(2 * C, D)))
    layer.double()
    found = layer.operation(x, pos).neighborhood()
    assert found.k == (torch.cdist(pos, pos) <= 1.0).sum(1).max() < 25
    wide = PointConvNN(C, D, selection=Radius(1.0, 25)).double()  # each tap has its slot
    assert wide.operation(x, pos).neighborhood().k == 25


@pytest.mark.parametrize("encoding", [None, "coordinates"])
@pytest.mark.parametrize("batched", [False, True])
def test_targets_have_features_of_another_width_or_none(encoding, batched):
    layer = PointConvNN(C, D, K, encoding=encoding).double()
    x, pos, at = random(40, C), random(40, 3, seed=1), random(10, 3, seed=2)
    batch = (torch.arange(40) // 20, torch.arange(10) // 5) if batched else None
    other = None if encoding else random(10, C + 3, seed=3)  # as on the way up in a U-Net
    alike = random(10, C, seed=4)
    equal(layer((x, other), (pos, at), batch), layer((x, alike), (pos, at), batch))


def test_gaps_in_the_batch_vector_are_empty_clouds():
    layer = PointConvNN(C, D, K).double()
    x, pos = random(8, C), random(8, 3, seed=1)
    dense, gaps = torch.tensor([0] * 4 + [1] * 4), torch.tensor([1] * 4 + [4] * 4)
    equal(layer(x, pos, gaps), layer(x, pos, dense))


def test_a_given_graph_is_the_built_one():
    x, pos = random(12, C), random(12, 3, seed=1)
    layer = PointConvNN(C, D, K).double()
    edge_index, _ = knn(pos, pos, K).to_edge_index()
    equal(layer(x, pos, edge_index=edge_index), layer(x, pos))
    backwards = PointConvNN(C, D, K, backend="message_passing").double()
    backwards.load_state_dict(layer.state_dict())
    equal(backwards(x, pos, edge_index=edge_index), layer(x, pos))
    # The order of its edges is their rank.
    reversed_ = edge_index.view(2, 12, K).flip(-1).flatten(1)
    index = torch.cdist(pos, pos).argsort(-1)[:, :K].flip(-1)
    equal(layer(x, pos, edge_index=reversed_), taps(layer, x, index))


@pytest.mark.parametrize("weighting", ["softmax", "gaussian"])
@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_a_given_graph_is_weighed_by_the_metric(weighting, backend):
    x, pos = random(12, C), random(12, 3, seed=1).requires_grad_()
    layer = PointConvNN(C, D, K, weighting=weighting, backend=backend).double()
    edge_index, _ = knn(pos, pos, K).to_edge_index()
    given, built = layer(x, pos, edge_index=edge_index), layer(x, pos)
    equal(given, built)
    for a, b in zip(
        torch.autograd.grad(given.square().sum(), pos),
        torch.autograd.grad(built.square().sum(), pos),
        strict=True,
    ):
        equal(a, b)


def test_a_kernel_of_ones_own_must_give_the_channels_that_the_layer_says():
    mlp = EdgeMLP(nn.Linear(2 * C, 4))
    assert PointConvNN(C, 4, K, kernel=mlp)(torch.rand(9, C), torch.rand(9, 3)).shape == (9, 4)
    with pytest.raises(ValueError, match="EdgeMLP gives 4 channels, but the layer was made for 99"):
        PointConvNN(C, 99, K, kernel=mlp)(torch.rand(9, C), torch.rand(9, 3))


def test_a_kernel_with_parameters_must_be_a_module():
    class Projected(kernels.Kernel):
        def __init__(self):
            if isinstance(self, nn.Module):
                nn.Module.__init__(self)
            self.linear = nn.Linear(C, C)

        def message(self, pairs):
            return self.linear(pairs.x_j)

        def reduce(self, messages, mask):
            return messages.amax(-2)

    class Module(Projected, nn.Module):
        pass

    with pytest.raises(TypeError, match=r"class Projected\(nn.Module, Kernel\)"):
        PointConvNN(C, C, K, kernel=Projected())
    layer = PointConvNN(C, C, K, kernel=Module())
    assert [name for name, _ in layer.named_parameters()] == [
        "kernel.linear.weight",
        "kernel.linear.bias",
    ]
    with pytest.raises(TypeError, match=r"expected a Kernel or one of standard, .*got <class"):
        PointConvNN(C, C, K, kernel=kernels.Max)


def test_features_beside_a_pair_of_positions_are_those_of_the_sources():
    """As in PyG's layers of point clouds."""
    x, pos = random(12, C), random(12, 3, seed=1)
    batch, chosen = torch.tensor([0] * 6 + [1] * 6), torch.tensor([0, 3, 5, 6, 11])
    layer = PointConvNN(C, D, K).double()
    pairs = (pos, pos[chosen]), (batch, batch[chosen])
    equal(layer(x, *pairs), layer((x, None), *pairs))
    equal(layer(x, *pairs), layer(x, pos, batch)[chosen])
    with pytest.raises(ValueError, match=r"Feature looks at features of targets.*x_target"):
        PointConvNN(C, D, K, "euclidean").double()(x, *pairs)


def test_kernels_that_look_at_targets_need_their_features():
    layer = PointConvNN(C, 4, K, kernel=EdgeMLP(nn.Linear(2 * C, 4)))
    x, pos = torch.rand(9, C), torch.rand(9, 3)
    assert layer((x, x[:5]), (pos, pos[:5])).shape == (5, 4)
    with pytest.raises(ValueError, match=r"EdgeMLP looks at features of targets.*x_target"):
        layer((x, None), (pos, pos[:5]))


def test_repr_names_what_is_not_as_by_default():
    def first(**options):
        return repr(PointConvNN(4, 4, k=3, **options)).splitlines()[1].strip()

    assert first() == "4, 4, k=3"
    assert first(kernel="max") == "4, 4, k=3, kernel='max'"
    assert first(groups=2, bias=False, order="raster") == (
        "4, 4, k=3, groups=2, bias=False, order='raster'"
    )


def test_a_given_graph_with_fewer_edges_than_taps():
    x, pos = random(4, C), random(4, 3, seed=1)
    layer = PointConvNN(C, D, K).double()
    edge_index = torch.tensor([[0, 1, 2], [0, 0, 1]])
    out = layer(x, pos, edge_index=edge_index)
    w = layer.weight
    equal(out[0], w[..., 0] @ x[0] + w[..., 1] @ x[1] + layer.bias)
    equal(out[1], w[..., 0] @ x[2] + layer.bias)
    equal(out[2], layer.bias)


def test_a_given_graph_of_a_batch():
    layer = PointConvNN(C, D, K).double()
    x, pos = random(9, C), random(9, 3, seed=1)
    batch = torch.tensor([0] * 4 + [1] * 5)
    edge_index, _ = knn(pos, pos, K, batch, batch).to_edge_index()
    equal(layer(x, pos, batch, edge_index), layer(x, pos, batch))


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_bipartite_clouds(backend):
    layer = PointConvNN(C, D, K, backend=backend).double()
    x, pos, centre = random(11, C), random(11, 3, seed=1), random(5, 3, seed=2)
    batch = torch.tensor([0] * 6 + [1] * 5), torch.tensor([0] * 2 + [1] * 3)
    out = layer((x, None), (pos, centre), batch)
    distance = torch.cdist(centre, pos)
    distance[batch[1][:, None] != batch[0]] = torch.inf
    equal(out, taps(layer, x, distance.argsort(-1)[:, :K]))
    alone = layer((x, None), (pos, centre))
    equal(alone, taps(layer, x, torch.cdist(centre, pos).argsort(-1)[:, :K]))


def test_bipartite_by_feature():
    layer = PointConvNN(C, D, K, "euclidean").double()
    x, y = random(11, C), random(5, C, seed=1)
    equal(layer((x, y)), taps(layer, x, torch.cdist(y, x).argsort(-1)[:, :K]))


def test_positions_are_the_features_where_there_are_none():
    pos = random(8, 3)
    layer = PointConvNN(3, D, K).double()
    equal(layer(None, pos), layer(pos, pos))
    ragged = torch.tensor([0] * 3 + [1] * 5)
    equal(layer(None, pos, ragged), layer(pos, pos, ragged))


def test_short_clouds_are_padded_where_asked():
    layer = PointConvNN(C, D, K, short="pad").double()
    x, pos = random(6, C), random(6, 3, seed=1)
    batch = torch.tensor([0, 0, 1, 1, 1, 1])
    out = layer(x, pos, batch)
    strict = PointConvNN(C, D, K).double()
    strict.load_state_dict(layer.state_dict())
    equal(out[2:], strict(x[2:], pos[2:]))
    w = layer.weight
    equal(out[0], w[..., 0] @ x[0] + w[..., 1] @ x[1] + layer.bias)
    alone = layer(x[:1], pos[:1])
    equal(alone[0], w[..., 0] @ x[0] + layer.bias)


@pytest.mark.parametrize(
    "options, sizes, available",
    [
        ({"k": 3}, (2, 5), 2),
        ({"k": 3, "self_point": "excluded"}, (3, 5), 2),
        ({"selection": KNearest(2, dilation=2)}, (3, 5), 3),
        ({"k": 9}, (5,), 5),
    ],
)
def test_small_clouds_are_an_error(options, sizes, available):
    layer = PointConvNN(C, D, **options)
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    n = sum(sizes)
    with pytest.raises(ValueError, match=rf"smallest cloud's {available} candidates"):
        layer(torch.randn(n, C), torch.randn(n, 3), batch)


def test_radius_counts_only_what_is_near():
    layer = PointConvNN(C, D, selection=Radius(1.0, 3), kernel="standard").double()
    assert layer.weight.shape == (D, C, 3)
    pos = torch.tensor([[0.0], [0.5], [0.9], [5.0]]).double()
    x = random(4, C)
    out = layer(x, pos)
    w = layer.weight
    equal(out[0], w[..., 0] @ x[0] + w[..., 1] @ x[1] + w[..., 2] @ x[2] + layer.bias)
    equal(out[3], w[..., 0] @ x[3] + layer.bias)


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("name", ["depthwise", "separable", "mean", "max", "sum"])
def test_kernels(name, backend):
    d = C if name in ("mean", "max", "sum") else 8
    layer = PointConvNN(C, d, K, kernel=name, backend=backend).double()
    x, pos = random(9, C), random(9, 3, seed=1)
    near = x[torch.cdist(pos, pos).argsort(-1)[:, :K]]
    expected = {
        "mean": lambda: near.mean(1),
        "max": lambda: near.max(1).values,
        "sum": lambda: near.sum(1),
        "depthwise": lambda: (
            torch.einsum("nkc,cek->nce", near, layer.weight.view(C, 2, K)).flatten(1) + layer.bias
        ),
        "separable": lambda: (
            torch.einsum("nkc,ck->nc", near, layer.weight[:, 0]) @ layer.pointwise.t() + layer.bias
        ),
    }[name]()
    equal(layer(x, pos), expected)


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
def test_own_kernels_see_targets_and_offsets(backend):
    mlp = nn.Linear(C + 3, D).double()
    kernel = kernels.EdgeMLP(mlp, inputs=("source", "offset"), reduce="mean")
    layer = PointConvNN(C, D, K, kernel=kernel, backend=backend)
    x, pos = random(9, C), random(9, 3, seed=1)
    index = torch.cdist(pos, pos).argsort(-1)[:, :K]
    inputs = torch.cat([x[index], pos[index] - pos[:, None]], -1)
    equal(layer(x, pos), mlp(inputs).mean(1))
    batch = torch.tensor([0] * 4 + [1] * 5)
    apart = torch.cat([layer(x[:4], pos[:4]), layer(x[4:], pos[4:])])
    equal(layer(x, pos, batch), apart)


def test_edge_networks_work_on_pygs_own_mlp():
    """It normalises over rows of edges, and has seen no row that is only filling."""
    from torch_geometric.nn import MLP

    x, pos = random(9, C), random(9, 3, seed=1)
    batch = torch.tensor([0] * 3 + [1] * 6)
    graph, _ = knn(x, x, K, batch, batch).to_edge_index()
    results, statistics = [], []
    for backend, edge_index in (("message_passing", graph), *((b, None) for b in BACKENDS)):
        torch.manual_seed(0)
        kernel = kernels.EdgeMLP(MLP([2 * C, 8, D]))
        layer = PointConvNN(C, D, K, "euclidean", kernel, backend=backend).double()
        results.append(layer(x, pos, batch, edge_index))
        statistics.append(layer.kernel.mlp.norms[0].module.running_mean)
    source, target = graph
    rows = kernel.mlp.lins[0](torch.cat([x[target], x[source] - x[target]], 1))
    equal(statistics[0], 0.1 * rows.mean(0).detach())
    for result, seen in zip(results[1:], statistics[1:], strict=True):
        equal(result, results[0])
        equal(seen, statistics[0])


@pytest.mark.parametrize("order", ["rank", "raster"])
def test_orders(order):
    layer = PointConvNN(C, D, K, order=order).double()
    x, pos = random(9, C), random(9, 3, seed=1)
    index = torch.cdist(pos, pos).argsort(-1)[:, :K]
    equal(layer(x, pos), taps(layer, x, index if order == "rank" else index.sort(-1).values))


@pytest.mark.parametrize("self_point", ["first", "excluded"])
def test_the_point_itself(self_point):
    layer = PointConvNN(C, D, K, "dot", self_point=self_point).double()
    x = random(9, C)
    score = -(x @ x.t()).fill_diagonal_(-torch.inf)
    others = score.argsort(dim=-1, stable=True)
    own = torch.arange(9)[:, None]
    index = {"first": torch.cat([own, others[:, : K - 1]], 1), "excluded": others[:, :K]}
    equal(layer(x), taps(layer, x, index[self_point]))


def test_random_candidates_follow_the_seed_in_training():
    layer = PointConvNN(C, D, K, candidates=Random(5)).double()
    x, pos = random(30, C), random(30, 3, seed=1)
    torch.manual_seed(0)
    first = layer(x, pos)
    assert not torch.equal(layer(x, pos), first)
    torch.manual_seed(0)
    assert torch.equal(layer(x, pos), first)
    layer.eval()
    assert torch.equal(layer(x, pos), layer(x, pos))


def test_coordinates_as_channels():
    layer = PointConvNN(C, D, K, encoding=Coordinates()).double()
    assert layer.weight.shape == (D, C + 3, K)
    x, pos = random(9, C), random(9, 3, seed=1)
    low, high = pos.amin(0), pos.amax(0)
    unit = (2 * (pos - low) / (high - low) - 1).flip(-1)
    index = torch.cdist(pos, pos).argsort(-1)[:, :K]
    equal(layer(x, pos), taps(layer, torch.cat([x, unit], -1), index))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("name", ["coordinates", "fourier"])
def test_encodings_of_other_than_three_axes(name, axes):
    layer = PointConvNN(4, 5, k=3, encoding=name, axes=axes).double()
    rows = random(9, 4), random(9, axes)
    added = layer.encoding.extra_channels(axes)
    assert layer.weight.shape == (5, 4 + added, 3) and layer(*rows).shape == (9, 5)


def test_coordinates_do_not_depend_on_the_batch():
    """What fills a batch up takes no part in the scale."""
    layer = PointConvNN(C, D, K, encoding=Coordinates()).double()
    x, pos = random(9, C), random(9, 3, seed=1) + 5
    batch = torch.tensor([0] * 4 + [1] * 5)
    apart = torch.cat([layer(x[:4], pos[:4]), layer(x[4:], pos[4:])])
    equal(layer(x, pos, batch), apart)


def test_permuted_points_permute_the_output():
    layer = PointConvNN(C, D, K).double()
    x, pos = random(12, C), random(12, 3, seed=1)
    perm = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    equal(layer(x[perm], pos[perm]), layer(x, pos)[perm])


@pytest.mark.parametrize("engine", ["dense", "torch_cluster"])
def test_engines(engine):
    if engine == "torch_cluster":
        pytest.importorskip("torch_cluster")
    layer = PointConvNN(C, D, K, search=engine).double()
    x, pos = random(40, C), random(40, 3, seed=1)
    index = torch.cdist(pos, pos).argsort(-1)[:, :K]
    equal(layer(x, pos), taps(layer, x, index))


def test_no_points():
    layer = PointConvNN(C, D, K)
    none = torch.zeros(0, C, requires_grad=True)
    out = layer(none, torch.zeros(0, 3))
    assert out.shape == (0, D)
    out.sum().backward()
    assert none.grad.shape == (0, C)
    assert layer(none, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0, D)
    assert layer((torch.zeros(4, C), None), (torch.zeros(4, 3), torch.zeros(0, 3))).shape == (0, D)


def test_the_graph_of_the_layer_can_be_had():
    layer = PointConvNN(C, D, K).double()
    x, pos = random(7, C), random(7, 3, seed=1)
    hood = layer.operation(x, pos).neighborhood()
    assert isinstance(hood, Neighborhood)
    assert torch.equal(hood.index[0], torch.cdist(pos, pos).argsort(-1)[:, :K])


@pytest.mark.parametrize("options", [{}, {"self_point": "excluded"}, {"metric": "euclidean"}])
@pytest.mark.parametrize("sizes", [(300, 300), (700, 20, 400)])
def test_large_clouds_are_searched_each_by_itself(monkeypatch, options, sizes):
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x, pos = torch.randn(len(batch), 5), torch.randn(len(batch), 3)
    layer = PointConvNN(5, 8, k=6, **options)
    assert isinstance(layer.operation(x, pos, batch).selection, Given)
    found = layer(x, pos, batch)
    monkeypatch.setattr(PointConvNN, "_by_cloud", lambda *args: False)
    torch.testing.assert_close(found, layer(x, pos, batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="smallest cloud"):
        PointConvNN(5, 8, k=301)(x, pos, batch)


def test_a_graph_in_the_place_of_positions_is_refused_by_name():
    x, edge_index = torch.randn(5, C), torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(TypeError, match="pass it as edge_index="):
        PointConvNN(C, D, K)(x, edge_index)


def test_nan_stays_in_its_cloud():
    x = torch.randn(16, 3)
    x[0] = torch.nan
    x.requires_grad_()
    batch = torch.tensor([0] * 9 + [2] * 4 + [3] * 3)
    selection = KNearest(4, self_point="excluded", short="pad")
    options = {"kernel": "mean", "weighting": "softmax", "selection": selection}
    layer = PointConvNN(3, 3, metric="cosine", **options)
    out = layer(x, batch=batch)
    assert bool(out[9:].isfinite().all())
    out.nan_to_num(0.0).sum().backward()
    assert bool(x.grad[9:].isfinite().all())


def test_a_cloud_alone_is_as_in_a_batch_where_slots_are_empty():
    """A weighting of one's own may look at empty slots: they name the same source."""

    class Careless(Weighting):
        def forward(self, pairs):
            return 1 - pairs.distance / pairs.distance.mean(-1, keepdim=True)

    x, batch = torch.rand(103, 3), torch.tensor([0] * 100 + [1] * 3)
    layer = PointConvNN(3, 3, k=9, short="pad", weighting=Careless(), kernel="sum")
    torch.testing.assert_close(layer(x, x, batch)[100:], layer(x[100:], x[100:]))


def test_weights_of_the_wrong_shape_are_refused():
    class Mean(Weighting):
        def forward(self, pairs):
            return pairs.distance.mean(-1)

    for kernel in ("standard", "sum"):
        with pytest.raises(ValueError, match=r"Mean: expected weights of shape \(..., 9, 5\)"):
            PointConvNN(3, 3, k=5, weighting=Mean(), kernel=kernel)(
                torch.rand(9, 3), torch.rand(9, 3)
            )
