"""Converted models under torch.compile, torch.export, torch.fx, torch.func and torch.jit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from convnn_geo import convert
from convnn_geo.convert import Rule, spec
from convnn_geo.nn import ConvNN2d

# Dynamo says so itself, of any autograd.Function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return x + attended


def network() -> nn.Module:
    """Convolutions and an attention, of torch."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.Flatten(2),
        nn.Unflatten(2, (1, -1)),
        nn.Conv2d(8, 8, 1, padding_mode="circular"),
        nn.Flatten(1, 2),
        nn.Linear(12, 8),
        Attending(),
    ).eval()


def image(b: int = 2) -> Tensor:
    return torch.randn(b, 3, 6, 8)


def converted(*rules: Rule) -> nn.Module:
    return convert.to_convnn(network(), rules or None)


OTHERS = {
    "exact": (),
    "convnn": (Rule("convnn", type=nn.Conv2d), Rule(spec("kvt", k=3), type=nn.MultiheadAttention)),
    "branching": (Rule("branching", name="0"), Rule("attention", name="6"), Rule("exact")),
}


@pytest.mark.parametrize("strict", [False, True])
def test_exact_models_are_exported_for_any_batch(strict):
    theirs = network()
    ours = convert.to_convnn(copy.deepcopy(theirs))
    assert convert.known.places(ours, lambda layer: convert.known.kind(layer) is not None) == []
    sizes = ({0: torch.export.Dim("b")},)
    program = torch.export.export(ours, (image(),), dynamic_shapes=sizes, strict=strict)
    for b in (2, 5):
        x = image(b)
        close(program.module()(x), theirs(x))


def test_exact_models_are_compiled_to_one_graph():
    torch.compiler.reset()
    theirs = network()
    ours = convert.to_convnn(copy.deepcopy(theirs))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for b in (2, 5):
        x = image(b)
        close(compiled(x), theirs(x))
    x = image()
    found, expected = (torch.autograd.grad(m(x).sum(), m.parameters()) for m in (compiled, theirs))
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("rules", OTHERS.values(), ids=OTHERS)
def test_fx_keeps_layers_of_ours_whole(rules):
    model = converted(*rules)
    graph = torch.fx.symbolic_trace(model)
    for b in (2, 5):
        x = image(b)
        assert torch.equal(graph(x), model(x))
    names = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert {"0", "2", "6", "9.attention"} < set(names)
    with pytest.raises(RuntimeError, match=r"ConvNN2d: torch\.fx has no graph of a layer alone"):
        torch.fx.symbolic_trace(ConvNN2d(3, 4, 3))


def test_fx_keeps_layers_of_timm_and_of_graphs_whole(monkeypatch):
    pytest.importorskip("timm")
    from timm.layers import Attention
    from torch_geometric.nn import DynamicEdgeConv

    monkeypatch.setattr("torch_geometric.typing.WITH_KNN", True)  # it is built, and never run
    edge = DynamicEdgeConv(nn.Linear(16, 8), k=3)
    model = convert.to_convnn(nn.ModuleList([Attention(8, 2), edge]))
    for layer, x in zip(model, (torch.randn(2, 5, 8), torch.randn(9, 8)), strict=True):
        whole = nn.Sequential(layer)
        assert torch.equal(torch.fx.symbolic_trace(whole)(x), whole(x))


@pytest.mark.parametrize("rules", OTHERS.values(), ids=OTHERS)
def test_jit_is_told_what_to_use(rules):
    model = converted(*rules)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would fix .* torch\.export\.export"):
        torch.jit.trace(model, image())


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_converted_attention_may_be_quantized():
    Attention = pytest.importorskip("timm.layers").Attention
    model = nn.Sequential(convert.to_convnn(nn.ModuleList([Attention(8, 2)]))[0])
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(quantized(x), model(x), atol=0.1, rtol=0.1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own attention
def test_gradients_of_each_example_by_vmap():
    model = converted()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x[None],)).square().sum()

    x = image(3)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i, example in enumerate(x):
        expected = torch.func.grad(loss)(weights, example)
        for name, value in expected.items():
            close(found[name][i], value)
