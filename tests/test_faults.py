"""Faults that readers of the code found, each with the input that showed it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_geometric.nn import MLP

from convnn_geo import compiled, recipes
from convnn_geo.candidates import Block, Causal, Congruent, Window
from convnn_geo.compiled import problem
from convnn_geo.encodings import Encoding, Fourier, Rotary
from convnn_geo.kernels import EdgeMLP, Join, Max, Mean, Sum
from convnn_geo.lowering import explain
from convnn_geo.metrics import Encoded, Feature, Spatial
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.nn import (
    Branching,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    ConvNNAttention,
    NeighborConv,
    PointConvNN,
)
from convnn_geo.nn.branching import PixelAttention
from convnn_geo.points import Grid, Points
from convnn_geo.search import Query, cells, explain_search, find, knn, radius_graph
from convnn_geo.search.fused import serves
from convnn_geo.selection import KNearest, Radius
from convnn_geo.selection import base as selection
from convnn_geo.weighting import Ones, PositionMLP, Softmax

# --- windows that are wider than what they look at ------------------------------------------


@pytest.mark.parametrize("kernel, wanted", [("sum", 15.0), ("max", 5.0), ("mean", 3.0)])
@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
def test_a_window_over_all_sees_all(kernel, wanted, backend):
    layer = ConvNN1d(None, None, 9, padding=4, kernel=kernel, backend=backend)
    out = layer(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]))
    assert torch.equal(out, torch.full((1, 1, 5), wanted))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_attention_in_a_window_over_all_is_attention(kernel_size):
    layer = recipes.neighborhood_attention(
        8, 2, kernel_size=kernel_size, is_causal=True, bias=False
    )
    x = torch.randn(2, 4, 8)
    out = layer(x, need_weights=False)[0]
    assert bool((out.abs().amax(-1) > 0).all())
    if kernel_size == 7:
        whole = recipes.multihead_attention(8, 2, bias=False)
        whole.load_state_dict(layer.state_dict())
        torch.testing.assert_close(out, whole(x, is_causal=True, need_weights=False)[0])


# --- parts of one's own that inherit from ours ------------------------------------------------


class Squares(Sum):
    def message(self, pairs):
        return pairs.x_j**2


class Negated(Max):
    def reduce(self, messages, mask):
        return -messages.amax(-2)


class Half(Ones):
    def forward(self, pairs):
        return torch.full(pairs.neighborhood.index.shape, 0.5)


class Nothing(Softmax):
    def forward(self, pairs):
        return torch.zeros_like(super().forward(pairs))


class First(KNearest):
    def forward(self, query, own, search="auto"):
        return super().forward(query, own, search).apply(lambda t: t[..., :1])


IMAGE = torch.rand(1, 2, 5, 6) + 1


@pytest.mark.parametrize("backend", ["auto", "gather", "message_passing"])
def test_what_a_subclass_computes_is_its_own(backend):
    def of(kernel, x=IMAGE, **options):
        return ConvNN2d(None, None, 3, 3, kernel=kernel, backend=backend, **options)(x)

    plain = {"kernel": "sum", "x": IMAGE.square()}
    torch.testing.assert_close(of(Squares()), of(**plain))
    weighted = {"weighting": "softmax", "metric": "spatial"}
    torch.testing.assert_close(of(Squares(), **weighted), of(**plain, **weighted))
    torch.testing.assert_close(of(Negated()), -of("max"))
    torch.testing.assert_close(of("sum", weighting=Half()), of("sum") / 2)
    attention = ConvNNAttention(8, 2, weighting=Nothing(), bias=False, backend=backend)
    assert not attention(torch.randn(1, 5, 8), need_weights=False)[0].any()
    attention = ConvNNAttention(8, 2, k=3, weighting=Nothing(), bias=False, backend=backend)
    assert not attention(torch.randn(1, 5, 8), need_weights=False)[0].any()


def test_a_selection_that_inherits_from_ours_selects():
    chosen = {"selection": First(5), "metric": "scaled_dot"}
    layer, one = ConvNNAttention(8, 2, **chosen), ConvNNAttention(8, 2, k=1)
    one.load_state_dict(layer.state_dict())
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer(x)[0], one(x)[0])


def test_reductions_side_by_side_take_no_networks():
    with pytest.raises(ValueError, match="EdgeMLP has a message of its own"):
        Join(EdgeMLP(nn.Linear(4, 4)), Mean())


# --- clouds ----------------------------------------------------------------------------------


class LessTheMean(Encoding):
    on = "metric"

    def forward(self, points):
        return points.with_x(points.x - points.x.mean(-2, keepdim=True))


@pytest.mark.parametrize("encoding", [Fourier(), LessTheMean(), Rotary()])
def test_a_cloud_knows_nothing_of_the_others(encoding):
    torch.manual_seed(0)
    layer = PointConvNN(12, 8, 3, Encoded(Feature(), encoding))
    x, pos, batch = torch.randn(30, 12), torch.rand(30, 3), torch.arange(30) // 15
    pos[15:] *= 7
    x[15:] += 2
    alone = torch.cat([layer(x[part], pos[part]) for part in (slice(15), slice(15, 30))])
    torch.testing.assert_close(layer(x, pos, batch), alone)
    assert Encoded("euclidean", lambda points: points).by_set  # of which nothing is known
    assert not Encoded("euclidean", Rotary()).by_set


@pytest.mark.parametrize("batch", [None, torch.arange(20) // 10])
def test_weights_from_positions_are_normalised_over_pairs(batch):
    torch.manual_seed(0)
    layer = recipes.point_conv(4, k=9, mlp=MLP([3, 16, 4]))
    norms = [m for m in layer.modules() if isinstance(m, nn.BatchNorm1d)]
    seen = []
    norms[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    x, pos = torch.randn(20, 4), torch.rand(20, 3)
    assert layer(x, pos, batch).shape == (20, 4)
    assert seen == [(20 * 9, 16)]


def test_edges_over_k_do_not_reach_the_next_target():
    layer, x = PointConvNN(1, 1, k=3, kernel="sum"), torch.tensor([[1.0], [10.0], [100.0], [1e3]])
    edges = torch.tensor([[3, 0, 1, 2, 3], [1, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="raise k or drop edges"):
        layer(x, x, edge_index=edges)

    def run(x, edges):
        return layer(x, x, edge_index=edges)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, edges[:, :4]), run(x, edges[:, :4]))
    with pytest.raises(RuntimeError):
        compiled(x, edges)


def test_repeated_edges_count_as_often_as_they_stand_there():
    layer, x = PointConvNN(1, 1, k=9, kernel="sum"), torch.tensor([[1.0], [10.0], [100.0]])
    edges = torch.tensor([[0, 1, 2, 2], [0, 0, 0, 0]])
    assert layer(x, x, edge_index=edges)[0].item() == 211
    conv = NeighborConv(1, 1, k=2, bias=False)
    rank, distance = torch.zeros(4, dtype=torch.long), torch.rand(4)
    torch.testing.assert_close(
        conv(x, edges, rank=rank, distance=distance), conv(x, edges, rank=rank)
    )


def test_no_targets_hang_on_all_that_learns():
    layer = PointConvNN(3, 4, k=2)
    x, pos = torch.randn(5, 3), torch.rand(5, 3)
    layer((x, None), (pos, pos[:0])).sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


# --- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"padding": 2, "stride": 3}])
def test_the_past_is_that_of_the_targets_own_place(options):
    layer = ConvNN1d(1, 1, k=1, metric="spatial", candidates=Causal(), bias=False, **options)
    nn.init.ones_(layer.weight)
    x = torch.arange(1.0, 7.0).view(1, 1, 6)
    out = layer(x).flatten()
    padded = torch.nn.functional.pad(x, (options.get("padding", 0),) * 2).flatten()
    assert set(out.tolist()) <= set(padded.tolist())
    if options == {"padding": 1}:
        assert out.tolist() == [1, 2, 3, 4, 5, 6]
    if options == {"stride": 2}:
        assert out.tolist() == [1, 3, 5]


# --- attention -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"candidates": Block(280)}])
@pytest.mark.parametrize("need_weights", [False, True])
def test_more_keys_than_there_are_is_an_error_with_weights_or_without(options, need_weights):
    layer = ConvNNAttention(8, 2, k=300, **options)
    with pytest.raises(ValueError, match="k=300"):
        layer(torch.randn(1, 290 if options else 200, 8), need_weights=need_weights)


@pytest.mark.parametrize("k", [None, 3])
def test_weights_have_the_dtype_of_the_layer(k):
    layer = ConvNNAttention(8, 2, k=k).bfloat16()
    assert layer(torch.randn(1, 5, 8, dtype=torch.bfloat16))[1].dtype == torch.bfloat16


def test_a_layer_without_a_bias_at_its_end_can_be_reset():
    layer = ConvNNAttention(8, 2)
    layer.out_proj = nn.Linear(8, 8, bias=False)
    layer.reset_parameters()


def test_explain_looks_into_what_wraps_a_layer():
    layer, x = PixelAttention(4, 4, 2, k=3, backend="gather"), torch.randn(1, 4, 3, 3)
    assert "runs by: gather" in explain(layer, x)


# --- devices, dtypes, copies, tracing -----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {
            "kernel_size": 3,
            "kernel": "sum",
            "weighting": PositionMLP(nn.Linear(2, 1, device="meta")),
        },
        {"kernel_size": 2, "kernel": "sum", "weighting": "gaussian", "metric": "spatial"},
    ],
)
def test_targets_that_are_a_grid_are_where_the_image_is(options):
    layer = ConvNN2d(None, None, device="meta", **options)
    assert layer(torch.randn(1, 3, 8, 8, device="meta")).device.type == "meta"


def test_a_lazy_layer_keeps_its_dtype_under_autocast():
    layer, x = NeighborConv(-1, 8, k=2), torch.randn(4, 3)
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        layer(nn.Linear(3, 3)(x), edges)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32


def test_setting_k_leaves_other_layers_alone():
    shared = KNearest(5)
    one, other = (ConvNNAttention(8, 2, selection=shared, metric="scaled_dot") for _ in range(2))
    other.k = 2
    assert (one.k, one.selection.k, other.selection.k) == (5, 5, 2)


def test_pairs_of_points_are_one_node_of_a_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = PointConvNN(3, 4, k=2)

        def forward(self, x, pos, fine):
            return self.conv((x, None), (pos, fine))

    model, x = Model(), torch.randn(5, 3)
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes].count("call_module") == 1
    torch.testing.assert_close(traced(x, x, x[:2]), model(x, x, x[:2]))


def test_every_branch_is_reset():
    other = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    layer = Branching.of(ConvNN2d(4, 4, k=3, metric="cosine"), other, None)
    before = other[0].weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, other[0].weight)


def test_a_stride_of_nothing_is_refused():
    with pytest.raises(ValueError, match="stride"):
        recipes.max_pool2d(3, stride=0)


# --- search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_products_of_few_channels_go_to_no_tree_and_no_cells(dimension):
    x = torch.randn(20_000, dimension)
    assert explain_search(x, k=9, metric="dot")[-1][0] in ("dense", "faiss")


@pytest.mark.parametrize("dimension", [3, 16])
@pytest.mark.parametrize("self_point", ["natural", "excluded"])
def test_what_is_hidden_hides_no_nan(dimension, self_point):
    x = torch.randn(40, dimension)
    x[5] = torch.nan
    found = knn(x, k=3, self_point=self_point, check=False)
    assert bool(found.distance[5].isnan().all()) and found.distance.isnan().any(-1).sum() == 1
    assert int((radius_graph(x, 0.5, loop=False, check=False)[1] == 5).sum()) > 0


@pytest.mark.parametrize("scale", [(0.3, 2.1), (0.6, 4.2), (1.1, 7.7)])
def test_what_is_as_far_along_both_axes_of_a_grid(scale):
    points = Points(torch.zeros(1024, 1), grid=Grid((32, 32)))
    found = [knn(points, k=14, metric=Spatial(scale=scale), backend=b) for b in ("grid", "dense")]
    assert torch.equal(found[0].index, found[1].index)
    for step in (-2.0, 0.5):
        source = Points(grid=Grid((9, 7), (3.0, 1.0), (step, 1.5)))
        target = Points(grid=Grid((5, 4), (1.0, 0.5), (1.0, 0.25)))
        query = Query(target, source, Spatial(scale=scale), 8)
        one, other = (find(query, backend) for backend in ("grid", "dense"))
        assert torch.equal(one.index, other.index)


def test_a_mixture_in_float64_is_not_taken_for_one_that_c_serves():
    x, pos = torch.randn(60, 4), torch.rand(60, 3)
    metric = 0.5 * Spatial(squared=True) + 0.5 * Feature("squared_euclidean")
    query = Query(Points(x, pos), Points(x, pos), metric, 5)
    assert query.problem.q.dtype == torch.float64 and not serves(query.problem, 5, query.slab)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_many_equal_keys_are_measured_once(metric):
    torch.manual_seed(0)
    x = torch.randn(300, 20)
    x[::2] = 0
    x[1::4] = x[1]
    found, wanted = (knn(t, k=40, metric=metric, backend="dense") for t in (x, x.double()))
    assert torch.equal(found.index, wanted.index)


def test_clouds_whose_rows_are_many_in_all_are_searched_together(monkeypatch):
    monkeypatch.setattr(problem, "LONGEST_ROW", 64)
    x = torch.randn(200, 12)
    starts = torch.arange(0, 201, 50)
    runs = compiled.Runs(starts, starts[:-1], starts[1:])
    assert compiled.products_nearest("points", x, x, 3, runs=runs) is not None
    assert compiled.products_nearest("points", x, x, 3) is None  # a row of 200


def test_cells_by_torch_on_clusters_and_on_large_coordinates(monkeypatch):
    monkeypatch.setattr(cells, "_AT_ONCE", 2**12)
    torch.manual_seed(0)
    for x in (torch.cat([torch.rand(400, 3), torch.full((1, 3), 1e6)]), torch.randn(50, 3) * 1e20):
        found = cells._around(x, x, 4)
        value = (x[:, None].double() - x[found].double()).square().sum(-1)
        wanted = (x[:, None].double() - x.double()).square().sum(-1).sort(-1).values[:, :4]
        if x.abs().max() < 1e9:
            torch.testing.assert_close(value.sort(-1).values, wanted)
        assert bool((found.sort(-1).values.diff(dim=-1) > 0).all())


def test_scaled_positions_of_a_cloud_are_searched_by_a_tree():
    pytest.importorskip("pykdtree")
    points = Points(pos=torch.rand(500, 3))
    found = [knn(points, k=5, metric=Spatial(scale=2.0), backend=b) for b in ("cells", "dense")]
    assert torch.equal(found[0].index, found[1].index)


def test_without_the_point_itself_nothing_is_masked():
    for backend in ("dense", "cells"):
        assert knn(torch.rand(50, 3), k=3, self_point="excluded", backend=backend).mask is None


def test_a_ball_that_holds_all_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        selection, "find", lambda query, search: asked.append(1) or find(query, search)
    )
    points = Points.from_image(torch.randn(1, 2, 6, 6))
    subset = Window(3, padding=1)(points, points)
    Radius(100.0, 1000)(Query(points, points, Spatial(), 1, subset), None)
    assert len(asked) == 1


def test_ranks_count_from_nought():
    edges, rank = torch.tensor([[0, 1], [0, 1]]), torch.tensor([0, -1])
    with pytest.raises(ValueError, match="ranks count from 0"):
        Neighborhood.from_edge_index(edges, 2, 2, rank=rank)


# --- networks on pairs -----------------------------------------------------------------------


def test_a_whole_window_over_few_pixels():
    x = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    layer = ConvNN2d(None, None, 3, padding=1, k=9, metric="euclidean", kernel="sum")
    assert layer(x).flatten().tolist() == [15.0] * 4
    line = {"padding": 1, "k": 3, "metric": "spatial", "kernel": "mean"}
    for backend in ("auto", "gather", "message_passing"):
        out = ConvNN1d(None, None, 3, backend=backend, **line)(torch.tensor([[[1.0, 2.0]]]))
        assert out.flatten().tolist() == [1.5, 1.5]
    torch.manual_seed(0)
    volume = torch.randn(1, 1, 5, 3, 2)
    found = [
        ConvNN3d(None, None, (3, 5, 3), padding=1, kernel="mean", backend=b)(volume)
        for b in ("auto", "message_passing")
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("where", [None, 0])
def test_a_forward_of_ones_own_is_run(where):
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    part = network if where is None else network[where]
    plain = part.forward
    part.forward = lambda rows: plain(rows) + 1000
    layer = PointConvNN(4, 8, 3, kernel=EdgeMLP(network))
    assert layer(torch.randn(9, 4), torch.rand(9, 3)).min() > 900


def test_rows_of_empty_slots_are_no_rows_of_a_forward_of_ones_own():
    torch.manual_seed(0)
    network, seen = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), []
    network[2].register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    x, pos = torch.randn(12, 4), torch.rand(12, 3)
    layer = PointConvNN(4, 8, selection=Radius(0.3, 5), kernel=EdgeMLP(network))
    layer(x, pos)
    assert seen == [
        int(layer._operation(*layer._clouds(x, pos), None, None).neighborhood().mask.sum())
    ]


@pytest.mark.parametrize("inputs", [("source", "offset"), ("target", "difference")])
def test_what_touches_no_pair_has_no_part_in_gradients(inputs):
    torch.manual_seed(0)
    width = 7 if "offset" in inputs else 8
    network = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8))
    layer = PointConvNN(4, 8, selection=Radius(0.5, 5), kernel=EdgeMLP(network, inputs=inputs))
    x, own = torch.randn(30, 4), torch.randn(5, 4)
    pos, there = torch.rand(30, 3), torch.rand(5, 3)
    x[7], pos[7] = torch.nan, 100.0  # a source that nobody chooses
    own[2], there[2] = torch.nan, -100.0  # a target that chooses nobody
    out = layer((x, own), (pos, there))
    out[[0, 1, 3, 4]].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


def test_targets_with_features_of_another_width():
    kernel = EdgeMLP(nn.Linear(10, 8), inputs=("source", "target"))
    layer = PointConvNN(4, 8, 3, kernel=kernel)
    x, pos = (torch.randn(20, 4), torch.randn(5, 6)), (torch.rand(20, 3), torch.rand(5, 3))
    found = layer(x, pos)
    layer.backend = "message_passing"
    torch.testing.assert_close(layer(x, pos), found)


@pytest.mark.parametrize("pattern", [Block(3), Congruent(2)])
def test_blocks_of_images_of_any_size_are_exported(pattern):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ConvNNAttention(8, 2, candidates=pattern)

        def forward(self, x):
            return self.attention(x, need_weights=False)[0]

    model, size = Model().eval(), torch.export.Dim("size", min=2, max=64)
    whole = torch.export.export(model, (torch.randn(2, 8, 6, 8),), dynamic_shapes=({1: size},))
    x = torch.randn(2, 11, 6, 8)
    torch.testing.assert_close(whole.module()(x), model(x))


def test_an_exported_maximum_can_be_trained():
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    layer = PointConvNN(4, 8, 4, kernel=EdgeMLP(network))
    x, pos = torch.randn(20, 4), torch.rand(20, 3)
    with torch.no_grad():
        whole = torch.export.export(layer, (x, pos)).module()
    whole(x, pos).sum().backward()
    layer(x, pos).sum().backward()
    grads = dict(whole.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad)


def test_no_targets_of_a_layer_that_waits_for_its_channels():
    network = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    layer = PointConvNN(4, 8, 3, kernel=EdgeMLP(network))
    x, pos = torch.randn(9, 4), torch.rand(9, 3)
    assert layer((x, x[:0]), (pos, pos[:0])).shape == (0, 8)
    assert layer(x, pos).shape == (9, 8)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot"])
def test_gradients_to_be_differentiated_are_the_same_gradients(metric):
    torch.manual_seed(0)
    layer = ConvNN2d(16, 4, k=5, metric=metric, weighting="softmax")
    x = torch.randn(1, 16, 6, 6, requires_grad=True)
    out = layer(x).square().sum()
    (once,) = torch.autograd.grad(out, x, retain_graph=True)
    (again,) = torch.autograd.grad(out, x, create_graph=True)
    torch.testing.assert_close(again, once)
    double = copy.deepcopy(layer).double()
    z = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(double(z).square().sum(), z, create_graph=True)
    second = [torch.autograd.grad(g.square().sum(), t)[0] for g, t in ((again, x), (exact, z))]
    torch.testing.assert_close(second[0].double(), second[1], rtol=1e-3, atol=1e-2)
