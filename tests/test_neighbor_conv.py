"""NeighborConv keeps PyG's conventions, and means what its formula says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_geometric
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import SumAggregation, to_hetero
from torch_geometric.utils import softmax

from convnn_geo import checking
from convnn_geo.neighborhood import edge_rank
from convnn_geo.nn import NeighborConv, PointConvNN
from convnn_geo.search import knn
from convnn_geo.weighting import PositionMLP, Weighting

N, M, C, D, K = 6, 9, 4, 5, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def edges() -> Tensor:
    """Sources 0..8, targets 0..5; target 4 hears nothing, target 5 one source."""
    return torch.tensor([[3, 0, 8, 1, 2, 7, 5, 6, 4, 0], [0, 0, 0, 1, 1, 2, 2, 3, 3, 5]])


def naive(
    layer: NeighborConv,
    x: Tensor,
    edge_index: Tensor,
    rank: Tensor,
    n: int = N,
    weight: Tensor | None = None,
) -> Tensor:
    """Edge by edge; ``weight (E, c)``."""
    bias = layer.bias if layer.bias is not None else torch.zeros(layer.out_channels).to(x)
    out = [bias for _ in range(n)]
    per = layer.out_channels // layer.groups
    for e, (source, target) in enumerate(edge_index.t().tolist()):
        message = x[source] if weight is None else x[source] * weight[e]
        parts = message.view(layer.groups, -1)
        tap = layer.weight[:, :, rank[e]].view(layer.groups, per, -1)
        out[target] = out[target] + torch.einsum("gdc,gc->gd", tap, parts).flatten()
    return torch.stack(out)


RANK = torch.tensor([0, 1, 2, 0, 1, 0, 1, 0, 1, 0])


# --- what it computes ----------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_a_matrix_for_each_rank(groups):
    layer = NeighborConv(C, 6, K, groups=groups).double()
    x = random(M, C)
    out = layer((x, random(N, 7)), edges())
    equal(out, naive(layer, x, edges(), RANK))
    equal(out[4], layer.bias)  # it hears nothing


def test_the_order_of_edges_does_not_matter_once_ranks_are_given():
    layer, x = NeighborConv(C, D, K).double(), random(M, C)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = layer((x, None), edges()[:, order], rank=RANK[order], size=(M, N))
    equal(shuffled, naive(layer, x, edges(), RANK))


def test_attributes_of_edges_are_columns():
    """As PyG's transforms write them."""
    x = torch.randn(9, 4)
    hood = knn(x, k=3)
    edge_index, rank = hood.to_edge_index()
    distance = hood.distance.flatten()
    layer = NeighborConv(4, 6, k=3, weighting="softmax")
    wanted = layer(x, edge_index, rank=rank, distance=distance)
    assert torch.equal(layer(x, edge_index, rank=rank[:, None], distance=distance[:, None]), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edge_weights_of_less_precision_are_taken(dtype):
    x, weight = torch.randn(6, 4), torch.rand(6, dtype=dtype)
    edges = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    layer = NeighborConv(4, 6, k=1)
    assert torch.equal(layer(x, edges, weight), layer(x, edges, weight.float()))


def test_ranks_follow_distance_and_then_source():
    layer, x = NeighborConv(C, D, K).double(), random(M, C)
    distance = torch.tensor([0.3, 0.1, 0.2, 0.5, 0.5, 0.9, 0.1, 0.0, 0.0, 0.7]).double()
    rank = torch.tensor([2, 0, 1, 0, 1, 1, 0, 1, 0, 0])  # target 3: sources 6 and 4 tie
    out = layer((x, None), edges(), distance=distance, size=(M, N))
    equal(out, naive(layer, x, edges(), rank))


@pytest.mark.parametrize("shape", [(10,), (10, 2), (10, C)], ids=["edge", "head", "channel"])
def test_edge_weights(shape):
    layer, x = NeighborConv(C, D, K, heads=2).double(), random(M, C)
    weight = random(*shape, seed=1)
    wide = weight[:, None] if weight.ndim == 1 else weight
    wide = wide.repeat_interleave(C // wide.shape[1], 1)
    out = layer((x, None), edges(), weight, size=(M, N))
    equal(out, naive(layer, x, edges(), RANK, weight=wide))


def test_weighting_of_distances():
    layer = NeighborConv(C, D, K, weighting="softmax").double()
    x, distance = random(M, C), random(10, seed=2).abs().requires_grad_()
    rho = softmax(-distance, edges()[1], num_nodes=N)
    rank = edge_rank(edges(), distance.detach())
    out = layer((x, None), edges(), distance=distance, size=(M, N))
    expected = naive(layer, x, edges(), rank, weight=rho[:, None].expand(10, C))
    equal(out, expected)
    grads = [torch.autograd.grad(o.square().sum(), distance)[0] for o in (out, expected)]
    equal(*grads)
    given = random(10, seed=3)  # both: their product
    out = layer((x, None), edges(), given, distance=distance, size=(M, N))
    weight = (rho * given)[:, None].expand(10, C)
    equal(out, naive(layer, x, edges(), rank, weight=weight))


@pytest.mark.parametrize("name", ["gaussian", "inverse_distance", "similarity"])
def test_other_weightings_of_distances(name):
    layer = NeighborConv(C, D, K, weighting=name).double()
    x, distance = random(M, C), random(10, seed=2).abs()
    rho = {
        "gaussian": (-distance / 2).exp(),
        "inverse_distance": 1 / (distance + 1e-8),
        "similarity": -distance,
    }[name]
    if name == "inverse_distance":
        rho = rho / torch.zeros(N).double().index_add(0, edges()[1], rho)[edges()[1]]
    expected = naive(
        layer, x, edges(), edge_rank(edges(), distance), weight=rho[:, None].expand(10, C)
    )
    equal(layer((x, None), edges(), distance=distance, size=(M, N)), expected)


def test_weightings_need_what_they_weigh():
    x, edge = random(M, C), edges()
    with pytest.raises(ValueError, match="Softmax depend on distances; pass distance="):
        NeighborConv(C, D, K, weighting="softmax").double()((x, None), edge, size=(M, N))
    with pytest.raises(ValueError, match=r"PositionMLP depend on positions.* edge_weight="):
        NeighborConv(C, D, K, weighting=PositionMLP(nn.Linear(3, 1)))


def test_repr_names_what_is_not_as_by_default():
    assert repr(NeighborConv(C, D, K)) == f"NeighborConv({C}, {D}, k={K})"
    found = repr(NeighborConv(C, 6, K, bias=False, aggr="mean", weighting="softmax", groups=2))
    assert found == (
        f"NeighborConv({C}, 6, k={K}, groups=2, bias=False, aggr='mean', "
        "weighting=Softmax(temperature=1, dropout=0))"
    )


def test_the_same_as_the_dense_layer_on_its_graph():
    x = random(12, C)
    hood = knn(x, x, K)
    edge_index, rank = hood.to_edge_index()
    layer = NeighborConv(C, D, K).double()
    dense = PointConvNN(C, D, K, "euclidean").double()
    dense.load_state_dict(layer.state_dict())
    equal(layer(x, edge_index, rank=rank), dense(x))


def test_target_to_source():
    x = random(M, C)
    layer = NeighborConv(C, D, K).double()
    other = NeighborConv(C, D, K, flow="target_to_source").double()
    other.load_state_dict(layer.state_dict())
    equal(other((x, random(N, C)), edges().flip(0)), layer((x, random(N, C)), edges()))
    ring = torch.tensor([[1, 2, 0], [0, 1, 2]])
    equal(other(x[:3], ring.flip(0)), layer(x[:3], ring))


def test_bipartite_sizes():
    x = random(M, C)
    layer = NeighborConv(C, D, K).double()
    expected = naive(layer, x, edges(), RANK)
    equal(layer((x, random(N, 2)), edges()), expected)
    equal(layer((x, None), edges(), size=(M, N)), expected)
    assert layer((x, None), edges()).shape == (M, D)  # as many targets as sources


def test_edges_of_no_edges():
    layer = NeighborConv(C, D, K).double()
    none = torch.zeros(2, 0, dtype=torch.long)
    equal(layer(random(3, C), none), layer.bias.expand(3, D))
    assert layer(random(0, C), none).shape == (0, D)


@pytest.mark.parametrize("rank", [[0, 1, 2, 3], [0, 0, 0, 3], [-1, 0, 1, 2]])
def test_ranks_over_k_are_an_error(rank):
    star = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]])
    layer = NeighborConv(C, D, K)
    with pytest.raises(ValueError, match="k=3 taps"):
        layer(torch.zeros(4, C), star, rank=torch.tensor(rank))
    with pytest.raises(ValueError, match="ranks run from 0 to 3"):
        layer(torch.zeros(4, C), star)  # four edges into target 0


def test_two_edges_in_one_tap_are_refused_where_values_are_checked():
    layer = NeighborConv(C, D, K).double()
    x, edges = random(N, C), torch.tensor([[0, 1, 2], [3, 3, 4]])
    rank = torch.tensor([1, 1, 1])
    layer(x, edges, rank=rank)  # looking costs, so only where it is asked for
    with checking():
        with pytest.raises(ValueError, match="rank: 2 edges of target 3 have rank 1; give each"):
            layer(x, edges, rank=rank)
        equal(layer(x, edges, rank=torch.tensor([0, 1, 0])), layer(x, edges))
        NeighborConv(C, D, K, aggr="mean").double()(x, edges, rank=rank)  # has one tap


def test_torch_scatter_sums_the_same_messages():
    scatter = pytest.importorskip("torch_scatter").scatter
    layer, x = NeighborConv(C, D, K).double(), random(M, C).requires_grad_()
    weight = random(10, seed=4)
    messages = torch.einsum(
        "edc,ec->ed", layer.weight[:, :, RANK].permute(2, 0, 1), x[edges()[0]] * weight[:, None]
    )
    expected = scatter(messages, edges()[1], 0, dim_size=N, reduce="sum") + layer.bias
    out = layer((x, None), edges(), weight, size=(M, N))
    equal(out, expected)
    wanted = (x, *layer.parameters())
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        equal(a, b)


# --- PyG's conventions ---------------------------------------------------------------------


def test_channels_as_int_tuple_or_lazy():
    x = random(M, C)
    torch.manual_seed(0)
    plain = NeighborConv(C, D, K).double()
    torch.manual_seed(0)
    pair = NeighborConv((C, 7), D, K).double()
    assert plain.weight.shape == pair.weight.shape == (D, C, K)
    torch.manual_seed(0)
    lazy = NeighborConv(-1, D, K)
    assert torch.nn.parameter.is_lazy(lazy.weight)
    assert "-1" in repr(lazy)
    out = lazy(x.float(), edges()[:, :3])
    assert lazy.weight.shape == (D, C, K) and out.shape == (M, D)
    lazy_pair = NeighborConv((-1, -1), D, K)
    assert lazy_pair((x.float(), x[:N].float()), edges()).shape == (N, D)
    doubled = NeighborConv(-1, D, K)
    assert doubled(x, edges()[:, :3]).dtype == torch.float64  # it takes its input's dtype


def test_loading_into_and_from_a_lazy_layer():
    whole, lazy = NeighborConv(C, D, K), NeighborConv(-1, D, K)
    lazy.load_state_dict(whole.state_dict(), strict=True)
    x = random(M, C).float()
    assert torch.equal(lazy(x, edges()), whole(x, edges()))
    empty = NeighborConv(-1, D, K)
    twin = copy.deepcopy(empty)
    assert torch.nn.parameter.is_lazy(twin.weight)
    twin(x, edges())
    assert torch.nn.parameter.is_lazy(empty.weight)
    still = NeighborConv(-1, D, K)
    still.load_state_dict(empty.state_dict())  # lazy into lazy
    assert torch.nn.parameter.is_lazy(still.weight)


def test_reset_parameters_and_repr():
    layer = NeighborConv((C, 7), D, K)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    bound = 1 / (C * K) ** 0.5
    assert all(bool((p.abs() <= bound).all()) for p in layer.parameters())
    assert repr(layer) == f"NeighborConv(({C}, 7), {D}, k={K})"
    assert NeighborConv(C, D, K, bias=False).bias is None


@pytest.mark.parametrize(
    "aggr, width",
    [
        ("mean", 1),
        ("max", 1),
        ("sum", 1),
        ("std", 1),
        ("softmax", 1),
        (["sum", "std"], 2),
        (SumAggregation(), 1),
        ([SumAggregation(), "max", "mean"], 3),
    ],
    ids=str,
)
def test_aggregations_through_resolvers(aggr, width):
    layer = NeighborConv(C, D, K, aggr=aggr).double()
    assert layer.weight.shape == (D, width * C, 1)
    x = random(M, C)
    reduced = layer.aggr_module(x[edges()[0]], edges()[1], dim_size=N)
    expected = reduced @ layer.weight.squeeze(-1).t() + layer.bias
    equal(layer((x, None), edges(), size=(M, N)), expected)
    lazy = NeighborConv(-1, D, K, aggr=copy.deepcopy(aggr))
    assert lazy((x, None), edges(), size=(M, N)).shape == (N, D)


def test_inside_sequential():
    layers = [
        (NeighborConv(C, 8, K), "x, edge_index, weight -> x"),
        nn.ReLU(),
        (NeighborConv(8, D, K), "x, edge_index -> x"),
    ]
    model = torch_geometric.nn.Sequential("x, edge_index, weight", layers)
    x, weight = random(M, C).float(), random(10).float()
    out = model(x, edges(), weight)
    expected = layers[2][0](layers[0][0](x, edges(), weight).relu(), edges())
    assert torch.equal(out, expected)


class Net(nn.Module):
    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.first = NeighborConv((-1, -1), 8, K)
        self.second = NeighborConv((-1, -1), D, K)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


def hetero() -> HeteroData:
    data = HeteroData()
    data["paper"].x, data["author"].x = random(M, C).float(), random(N, 7).float()
    data["paper", "by", "author"].edge_index = edges()
    back = edges()[:, [0, 3, 5, 7, 9]].flip(0)
    data["author", "wrote", "paper"].edge_index = back
    data["paper", "cites", "paper"].edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
    return data


def test_to_hetero():
    data = hetero()
    model = to_hetero(Net(), data.metadata(), aggr="sum")
    out = model(data.x_dict, data.edge_index_dict)
    assert out["paper"].shape == (M, D) and out["author"].shape == (N, D)
    first = model.first
    by, wrote = (first[name] for name in ("paper__by__author", "author__wrote__paper"))
    assert by.weight.shape == (8, C, K) and wrote.weight.shape == (8, 7, K)
    out["author"].sum().backward()  # author <- paper <- author
    assert wrote.weight.grad is not None and by.weight.grad is None


@pytest.mark.parametrize("order", ["col", "row", None])
def test_edge_index_class(order):
    layer, x = NeighborConv(C, D, K).double(), random(M, C)
    square = torch.cat([edges(), torch.tensor([[1, 2], [4, 8]])], 1)
    index = EdgeIndex(square, sparse_size=(M, M))
    if order is not None:
        index = index.sort_by(order).values
    plain = index.as_tensor()
    equal(layer(x, index), layer(x, plain))
    weight = random(index.shape[1], seed=5)
    equal(layer(x, index, weight), layer(x, plain, weight))
    aggregated = NeighborConv(C, D, K, aggr="mean").double()
    equal(aggregated(x, index), aggregated(x, plain))


def test_explainer():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = NeighborConv(C, 8, K)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.out(self.conv(x, edge_index).relu())

    torch.manual_seed(0)
    model = Model()
    explainer = Explainer(
        model,
        GNNExplainer(epochs=5),
        explanation_type="model",
        node_mask_type="attributes",
        edge_mask_type="object",
        model_config={
            "mode": "multiclass_classification",
            "task_level": "node",
            "return_type": "raw",
        },
    )
    x = random(M, C).float()
    before = model(x, edges())
    explanation = explainer(x, edges(), index=0)
    assert explanation.edge_mask.shape == (10,)
    heard = edges()[1] == 0
    assert bool((explanation.edge_mask[heard] > 0).any())
    assert bool((explanation.edge_mask[~heard] == 0).all())  # edges of other targets say nothing
    assert torch.equal(model(x, edges()), before)  # and leaves no trace


def test_an_edge_mask_of_zero_silences_an_edge():
    from torch_geometric.explain.algorithm.utils import clear_masks, set_masks

    layer, x = NeighborConv(C, D, K).double(), random(M, C)
    mask = torch.ones(10).double()
    mask[1] = 0
    set_masks(layer, mask, edges(), apply_sigmoid=False)
    masked = layer((x, None), edges(), size=(M, N))
    clear_masks(layer)
    weight = mask[:, None].expand(10, C)
    equal(masked, naive(layer, x, edges(), RANK, weight=weight))


def test_data_and_knn_graph_of_a_batch():
    from torch_geometric.data import Batch

    clouds = [Data(x=random(n, C, seed=n).float()) for n in (4, 7)]
    batch = Batch.from_data_list(clouds)
    hood = knn(batch.x, batch.x, K, batch.batch, batch.batch)
    edge_index, rank = hood.to_edge_index()
    layer = NeighborConv(C, D, K)
    out = layer(batch.x, edge_index, rank=rank)
    for cloud, part in zip(clouds, out.split([4, 7]), strict=True):
        own, own_rank = knn(cloud.x, cloud.x, K).to_edge_index()
        torch.testing.assert_close(part, layer(cloud.x, own, rank=own_rank))


def test_permuted_nodes_permute_the_output():
    layer, x = NeighborConv(C, D, K).double(), random(M, C)
    square = edges()
    perm = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    back = perm.argsort()
    out = layer(x, square, rank=RANK)
    equal(layer(x[perm], back[square], rank=RANK), out[perm])


def test_gradcheck_with_weights_and_distances():
    layer = NeighborConv(C, D, K, weighting="softmax").double()
    inputs = (random(M, C), random(10, seed=1), random(10, seed=2).abs())

    def function(x: Tensor, weight: Tensor, distance: Tensor) -> Tensor:
        return layer((x, None), edges(), weight, distance=distance, size=(M, N))

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs], fast_mode=True)


def test_a_weighting_comes_into_the_layer_as_it_is():
    class Scaled(Weighting):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, pairs):
            return self.linear(pairs.distance[..., None]).squeeze(-1)

    weighting = Scaled()
    before = weighting.linear.weight.clone()
    layer = NeighborConv(-1, D, K, weighting=weighting)
    x, distance = random(M, C).float(), random(10, seed=2).abs().float()
    layer((x, None), edges(), distance=distance, size=(M, N))  # which makes the layer's own
    assert torch.equal(weighting.linear.weight, before)
    layer.reset_parameters()
    assert not torch.equal(weighting.linear.weight, before)
