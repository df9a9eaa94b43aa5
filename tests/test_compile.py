"""torch.compile(fullgraph=True) and torch.export pass, and change nothing."""

from __future__ import annotations

import io

import pytest
import torch
from layer_cases import CASES, RANDOM_CASES, Case
from torch import Tensor, nn

from convnn_geo import metrics, recipes, search
from convnn_geo.candidates import Causal, Random, Window
from convnn_geo.metrics.packed import pack
from convnn_geo.nn import Branching, ConvNN2d, ConvNNAttention, NeighborConv, PointConvNN
from convnn_geo.search import knn
from convnn_geo.search.rows import Hidden, smallest_in_rows

# Dynamo says so itself, of any autograd.Function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

DAILY = {
    "conv2d-window-native",
    "conv2d-softmax-gather",
    "attention-k-gather",
    "attention-taps-message_passing",
    "neighbor-rank-auto",
}


def daily(*values: object, name: str, names: set[str] = DAILY) -> object:
    """A case that runs every day where it is named, and by night otherwise."""
    return pytest.param(*values, id=name, marks=() if name in names else pytest.mark.slow)


TRACED = [
    daily(case, backend, name=f"{case.name}-{backend}")
    for case in CASES
    if not case.name.startswith("point")  # their batch vector has values; see below
    for backend in case.backends or ("auto",)
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("case, backend", TRACED)
def test_one_graph_without_breaks(case: Case, backend: str):
    layer, inputs = case.layer(backend), case.sample()
    compiled = torch.compile(lambda *t: case.call(layer, *t), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), case.call(layer, *inputs))


@pytest.mark.parametrize(
    "name, backend",
    [
        ("conv2d-window", "native"),
        pytest.param("conv2d-window", "gather", marks=pytest.mark.slow),
        ("conv2d-softmax", "gather"),
        ("attention-plain", "native"),
        pytest.param("attention-k", "gather", marks=pytest.mark.slow),
        pytest.param("attention-taps", "message_passing", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_a_compiled_layer(name: str, backend: str):
    case = next(c for c in CASES if c.name == name)
    layer = case.layer(backend)
    compiled = torch.compile(lambda *t: case.call(layer, *t), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda *t: case.call(layer, *t)):
        inputs = tuple(t.requires_grad_() for t in case.sample())
        out = function(*inputs)
        wanted = (*inputs, *layer.parameters())
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "case", [daily(c, name=c.name, names={"conv2d-random"}) for c in RANDOM_CASES]
)
def test_draws_of_eval_are_compiled(case: Case):
    layer, inputs = case.layer().eval(), case.sample()
    compiled = torch.compile(lambda *t: case.call(layer, *t), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), case.call(layer, *inputs))


@pytest.mark.parametrize(
    "layer",
    [
        daily(ConvNN2d(3, 4, 3, padding=1), name="window", names={"window"}),
        daily(ConvNN2d(3, 4, 3, stride=2, k=3, metric="cosine"), name="window-k"),
        daily(ConvNN2d(3, 4, k=3, metric="euclidean"), name="k"),
    ],
)
def test_sizes_may_change(layer: nn.Module):
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for b, h, w in ((2, 6, 7), (2, 5, 9), (3, 8, 8), (1, 6, 7)):
        x = torch.randn(b, 3, h, w)
        torch.testing.assert_close(compiled(x), layer(x))


OTHERS = {
    "spatial": (ConvNN2d(3, 4, k=3, metric="spatial"), (torch.randn(1, 3, 12, 13),)),
    "cloud": (PointConvNN(3, 4, 2), (None, torch.randn(9, 3))),
    "cloud-feature": (PointConvNN(3, 4, 2, "euclidean"), (torch.randn(9, 3),)),
    "pool": (recipes.max_pool2d(2), (torch.randn(1, 3, 4, 6),)),
    "vig": (recipes.vig(3, k=3), (torch.randn(1, 3, 4, 5),)),
    "bilateral": (recipes.bilateral_filter(1.0, 1.0, 3), (torch.randn(1, 3, 4, 5),)),
    "causal": (
        ConvNNAttention(8, 2, metric="squared_euclidean", candidates=Causal()),
        (torch.randn(1, 5, 8),),
    ),
}


@pytest.mark.parametrize(
    "layer, inputs",
    [daily(*row, name=name, names={"spatial", "cloud", "causal"}) for name, row in OTHERS.items()],
)
def test_others(layer: nn.Module, inputs: tuple[Tensor, ...]):
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    found, expected = compiled(*inputs), layer(*inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weighting", ["ones", "softmax"])
def test_one_program_serves_graphs_of_any_size(weighting: str):
    layer = NeighborConv(3, 4, k=2, weighting=weighting)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for n in (9, 12, 20):
        edges, distance = search.knn_graph(torch.randn(n, 3), 2, return_distance=True)
        x, edges, rank = torch.randn(n, 3), edges.as_tensor(), torch.arange(2).repeat(n)
        for given in ({"distance": distance}, {"distance": distance, "rank": rank}):
            torch.testing.assert_close(compiled(x, edges, **given), layer(x, edges, **given))
        if weighting == "ones":
            torch.testing.assert_close(compiled(x, edges, rank=rank), layer(x, edges, rank=rank))


def test_clouds_of_many_points_keep_the_tree():
    """Its search is one operator, so that a compiled layer calls the tree, too."""
    pos = torch.rand(1500, 3)
    layer = PointConvNN(3, 4, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(None, pos), layer(None, pos))


EXPORTED_DAILY = {
    "window",
    "k",
    "euclidean",
    "random",
    "attention",
    "attention-k",
    "cloud",
    "graph",
}
EXPORTED = {
    "window": (ConvNN2d(3, 4, 3, padding=1), (torch.randn(2, 3, 5, 6),)),
    "window-k": (ConvNN2d(3, 4, 3, padding=1, k=2, metric="cosine"), (torch.randn(2, 3, 5, 6),)),
    "k": (ConvNN2d(3, 4, k=3, metric="cosine"), (torch.randn(2, 3, 5, 6),)),
    "euclidean": (ConvNN2d(3, 4, k=3, metric="euclidean"), (torch.randn(2, 3, 5, 6),)),
    "mixed": (
        ConvNN2d(3, 4, k=3, metric=metrics.Spatial() + metrics.Feature("euclidean")),
        (torch.randn(2, 3, 5, 6),),
    ),
    "random": (
        ConvNN2d(3, 4, k=3, metric="cosine", candidates=Random(6)).eval(),
        (torch.randn(2, 3, 5, 6),),
    ),
    "attention": (ConvNNAttention(8, 2), (torch.randn(2, 6, 8),)),
    "attention-k": (ConvNNAttention(8, 2, k=3), (torch.randn(2, 6, 8),)),
    "attention-window": (
        ConvNNAttention(8, 2, candidates=Window(3, border="shift")),
        (torch.randn(2, 6, 8),),
    ),
    "cloud": (PointConvNN(3, 4, 2), (None, torch.randn(9, 3))),
    "graph": (
        NeighborConv(3, 4, 2),
        (torch.randn(5, 3), torch.tensor([[0, 1, 2, 3], [1, 1, 0, 4]])),
    ),
}


@pytest.mark.parametrize(
    "name, strict",
    [
        daily(name, strict, name=f"{name}-strict" if strict else name, names=EXPORTED_DAILY)
        for strict in (False, True)
        for name in EXPORTED
    ],
)
def test_export(name: str, strict: bool):
    layer, inputs = EXPORTED[name]
    program = torch.export.export(layer, inputs, strict=strict)
    module = program.module()
    for _ in range(2):  # what draws must draw the same again
        torch.testing.assert_close(module(*inputs), layer(*inputs))
    assert layer(*inputs) is not None  # and exporting left no trace of itself in the caches
    torch.testing.assert_close(loaded(program)(*inputs), layer(*inputs))


def loaded(program: torch.export.ExportedProgram) -> nn.Module:
    """The same, saved and loaded."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


IMAGE_SIZES = {
    "window": (ConvNN2d(3, 4, 3, padding=1), True),
    "window-stride": (ConvNN2d(3, 4, 3, padding=1, stride=2), True),
    "window-k": (ConvNN2d(3, 4, 3, padding=1, k=2, metric="cosine"), True),
    "window-softmax": (
        ConvNN2d(3, 4, 3, padding=1, metric="cosine", weighting="softmax"),
        True,
    ),
    "reflect": (ConvNN2d(3, 4, 3, padding=1, padding_mode="reflect"), True),
    "k": (ConvNN2d(3, 4, k=3, metric="cosine"), True),
    "k-stride": (ConvNN2d(3, 4, k=3, stride=2, metric="cosine"), False),
    "k-padding": (ConvNN2d(3, 4, k=3, padding=1, metric="cosine"), True),
    "mixed": (EXPORTED["mixed"][0], True),
    "random": (EXPORTED["random"][0], False),
    "spatial": (ConvNN2d(3, 4, k=3, metric="spatial"), True),
    "coordinates": (ConvNN2d(3, 4, k=3, metric="cosine", encoding="coordinates"), False),
    "separable": (ConvNN2d(3, 4, k=3, metric="cosine", kernel="separable"), True),
    "branching": (Branching(3, 4, 3, padding=1, k=4, metric="cosine"), True),
    "pool": (recipes.max_pool2d(2), True),
    "mixture": (ConvNN2d(3, 4, k=5, metric=metrics.interpolate("spatial", "cosine", 0.7)), True),
    "interpolated": (recipes.interpolated_conv2d(3, 4, 3, padding=1, stride=2, lam=0.7), False),
}
"""Layers, and whether height and width may stay open, too."""
OPEN = {"window-stride", "k", "mixture"}


@pytest.mark.parametrize(
    "name, strict",
    [
        daily(
            name,
            strict,
            name=f"{name}-strict" if strict else name,
            names={"window-stride", "k", "mixture"},
        )
        for strict in (False, True)
        for name in IMAGE_SIZES
    ],
)
def test_exports_leave_batch_and_size_open(name: str, strict: bool):
    layer, also_size = IMAGE_SIZES[name]
    open_sizes = {0: torch.export.Dim("b", min=2, max=16)}
    if also_size:
        open_sizes |= {2: torch.export.Dim("h", min=6, max=64)}
        open_sizes |= {3: torch.export.Dim("w", min=6, max=64)}
    x = torch.randn(2, 3, 10, 9)
    program = torch.export.export(layer, (x,), dynamic_shapes=(open_sizes,), strict=strict)
    others = torch.randn(5, 3, *((7, 12) if also_size else (10, 9)))
    for sample in (x, others):
        torch.testing.assert_close(program.module()(sample), layer(sample))


MANY_SLABS = {
    "mixture": ConvNN2d(
        3, 4, k=9, metric=0.3 * metrics.Spatial() + 0.7 * metrics.Feature("cosine")
    ),
    "window": ConvNN2d(3, 4, 7, padding=3, k=9, metric="cosine"),
    "interpolated": recipes.interpolated_conv2d(3, 4, 3, lam=0.7),
    "manhattan": ConvNN2d(3, 4, k=9, metric="manhattan", self_point="first"),
}
"""Layers whose distances, of an image of this size, are computed slab by slab."""


@pytest.mark.parametrize(
    "name, strict",
    [
        daily(name, strict, name=f"{name}-strict" if strict else name, names={"mixture", "window"})
        for strict in (False, True)
        for name in MANY_SLABS
    ],
)
def test_slabs_are_no_part_of_a_program(name: str, strict: bool):
    """So that a program does not grow with the image, and the batch stays open."""
    layer, sizes = MANY_SLABS[name], ({0: torch.export.Dim("b")},)
    programs = []
    for size in (12, 64):
        x = torch.randn(2, 3, size, size)
        program = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=strict)
        programs.append([node.op for node in program.graph.nodes])
        x = torch.randn(3, 3, size, size)
        torch.testing.assert_close(program.module()(x), layer(x))
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    "name", [daily(name, name=name, names={"mixture", "window"}) for name in MANY_SLABS]
)
def test_one_program_serves_all_batches(name: str):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(MANY_SLABS[name], fullgraph=True, backend=count)
    for batch in (2, 3, 4, 5, 7, 11):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(compiled(x), MANY_SLABS[name](x))
    assert len(graphs) <= 2  # the first batch alone, then any


def test_a_metric_by_a_function_is_traced_at_once():
    layer = ConvNN2d(3, 4, k=4, metric=metrics.Custom(lambda i, j: (i.x - j.x).abs().sum(-1)))
    x = torch.randn(2, 3, 9, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    x = torch.randn(5, 3, 9, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_searches_by_rows_are_well_made_operators(dtype: torch.dtype, masked: bool):
    q, keys = torch.randn(2, 30, 3, dtype=dtype), torch.randn(2, 40, 3, dtype=dtype)
    parts = [(0.3, metrics.Differences(q, keys)), (0.7, metrics.Differences(q, keys, 1.0))]
    bound = metrics.Biased(metrics.Combination(parts), torch.randn(30, 40, dtype=dtype))
    numbers, tensors = pack(bound)
    mask = torch.rand(2, 1, 40) < 0.7 if masked else None
    own = torch.arange(30) if masked else None
    double, slab = dtype == torch.float64, 4096
    rows = torch.ops.convnn_geo.smallest_in_rows.default
    torch.library.opcheck(rows, (numbers, tensors, 5, mask, own, slab, double))
    found = rows(numbers, tensors, 5, mask, own, slab, double)
    wanted = smallest_in_rows(bound, 5, Hidden(mask, own), 2**30, dtype)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    pairs, index = torch.ops.convnn_geo.distances_of_pairs.default, found[1]
    torch.library.opcheck(pairs, (numbers, tensors, index, slab, double))
    assert torch.equal(pairs(numbers, tensors, index, slab, double), bound.at(index))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["attention", "attention-k"])
def test_exported_attention_takes_any_number_of_tokens(name: str, strict: bool):
    layer = Plain(EXPORTED[name][0])
    sizes = {0: torch.export.Dim("b", min=2, max=16), 1: torch.export.Dim("n", min=4, max=64)}
    x = torch.randn(2, 12, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=strict)
    for sample in (x, torch.randn(3, 17, 8)):
        torch.testing.assert_close(program.module()(sample), layer(sample))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "k", "branching"])
def test_sizes_may_change_under_inductor(name: str):
    """Of a layer that comes last, too: there inductor can't take an image put together again."""
    layer, _ = IMAGE_SIZES[name]
    compiled = torch.compile(layer, fullgraph=True)
    for b, h, w in ((2, 6, 7), (2, 5, 9), (3, 8, 8)):
        x = torch.randn(b, 3, h, w)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_exported_attention_is_one_call():
    layer, (x,) = EXPORTED["attention"]
    program = torch.export.export(Plain(layer), (x,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("scaled_dot_product" in call for call in calls) == 1
    assert not any("gather" in call or "softmax" in call for call in calls)


class Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, need_weights=False)[0]


@pytest.mark.parametrize("shape, k", [((4, 9), 3), ((2, 3, 600), 5), ((3, 4), 4), ((2, 5), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_is_a_well_made_operator(shape: tuple[int, ...], k: int, dtype: torch.dtype):
    values = torch.randn(shape).to(dtype)
    torch.library.opcheck(torch.ops.convnn_geo.k_smallest.default, (values, k))


def test_search_by_itself_is_one_graph():
    x = torch.randn(2, 30, 5)

    def find(x: Tensor) -> Tensor:
        return search.knn(x, None, 4, metric="cosine", check=False).index

    compiled = torch.compile(find, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), find(x))


class Search(torch.nn.Module):
    """A search as a model."""

    def forward(self, x):
        return knn(x, k=4, check=False).index


@pytest.mark.parametrize("strict", [False, True])
def test_search_exports_with_any_number_of_points(strict):
    size = torch.export.Dim("n", min=8, max=1000)
    x = torch.randn(50, 3)
    program = torch.export.export(Search(), (x,), dynamic_shapes=({0: size},), strict=strict)
    for n in (8, 50, 77):
        x = torch.randn(n, 3)
        assert torch.equal(program.module()(x), Search()(x))
        assert torch.equal(loaded(program)(x), Search()(x))


def test_search_is_compiled_once_for_all_numbers_of_points():
    compiled = torch.compile(Search(), fullgraph=True, dynamic=True, backend="eager")
    for n in range(40, 70, 2):  # more sizes than torch recompiles for
        x = torch.randn(n, 3)
        assert torch.equal(compiled(x), Search()(x))
