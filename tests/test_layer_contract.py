"""What every layer promises, in every mode: one contract, run over all of them."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from layer_cases import CASES, NAMES, RANDOM_CASES, Case
from torch import Tensor, nn

import convnn_geo.nn.attention
import convnn_geo.nn.conv
import convnn_geo.nn.point_conv
from convnn_geo import recipes
from convnn_geo.kernels import EdgeMLP
from convnn_geo.metrics import Mahalanobis, interpolate
from convnn_geo.nn import ConvNN2d, ConvNNAttention, PointConvNN
from convnn_geo.weighting import PositionMLP

each = pytest.mark.parametrize("case", CASES, ids=NAMES)
each_random = pytest.mark.parametrize("case", RANDOM_CASES, ids=[c.name for c in RANDOM_CASES])
each_backend = pytest.mark.parametrize(
    "case, backend",
    [pytest.param(case, b, id=f"{case.name}-{b}") for case in CASES for b in case.backends],
)


def output_and_gradients(
    case: Case, layer: nn.Module, inputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    layer.zero_grad()
    out = case.call(layer, *inputs)
    torch.manual_seed(7)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    result = {"output": out.detach()}
    result |= {f"input {i}": t.grad for i, t in enumerate(inputs) if t.grad is not None}
    result |= {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return result


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_backend
def test_backends_agree(case: Case, backend: str):
    expected = output_and_gradients(case, case.layer("auto"), case.sample())
    found = output_and_gradients(case, case.layer(backend), case.sample())
    assert len(expected) >= 3  # output, input and at least one parameter
    assert_same(found, expected)


@each
def test_gradcheck(case: Case):
    layer, inputs = case.layer(), case.sample(1, 1)
    names = [name for name, _ in layer.named_parameters()]

    def function(*tensors: Tensor) -> Tensor:
        count = len(inputs)
        module = Caller(case, layer)
        parameters = {f"layer.{n}": t for n, t in zip(names, tensors[count:], strict=True)}
        return torch.func.functional_call(module, parameters, tensors[:count])

    leaves = [t.requires_grad_() for t in inputs]
    leaves += [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("conv2d-feature", "conv2d-softmax", "attention-taps")],
    ids=lambda c: c.name,
)
def test_second_derivatives(case: Case):
    layer, inputs = case.layer(), case.sample(1, 1)
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradgradcheck(
        lambda *t: case.call(layer, *t), leaves, eps=1e-7, atol=1e-4, fast_mode=True
    )


class Caller(nn.Module):
    def __init__(self, case: Case, layer: nn.Module) -> None:
        super().__init__()
        self.case, self.layer = case, layer

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.case.call(self.layer, *tensors)


@each
def test_examples_of_a_batch_do_not_see_each_other(case: Case):
    layer, inputs = case.layer(), case.sample(3)
    together = case.call(layer, *inputs)
    apart = [case.call(layer, *(t[i : i + 1] for t in inputs)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)


@each
def test_empty_batch(case: Case):
    layer = case.layer()
    one, none = case.sample(1), tuple(t[:0].requires_grad_() for t in case.sample(1))
    out = case.call(layer, *none)
    assert out.shape == (0, *case.call(layer, *one).shape[1:])
    out.sum().backward()
    assert none[0].grad is not None


@each
def test_deepcopy_and_state_dict(case: Case):
    layer, inputs = case.layer(), case.sample()
    expected = case.call(layer, *inputs)
    twin = copy.deepcopy(layer)
    assert torch.equal(case.call(twin, *inputs), expected)
    own = {id(p) for p in layer.parameters()}
    assert own.isdisjoint(id(p) for p in twin.parameters())

    other = case.layer(seed=5)
    assert not torch.equal(case.call(other, *inputs), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(case.call(other, *inputs), expected)


@each
def test_reset_parameters_draws_anew_and_repeats(case: Case):
    layer = case.layer()
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(3.0)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(bool((p != 3.0).any()) for p in layer.parameters())
    assert before.keys() == layer.state_dict().keys()
    assert all(
        t.shape == before[name].shape and bool(t.isfinite().all())
        for name, t in layer.state_dict().items()
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNN2d(4, 4, k=3, metric=Mahalanobis(4), weighting="softmax"),
        lambda: ConvNN2d(4, 4, k=3, metric="cosine", encoding="conditional"),
        lambda: PointConvNN(4, 4, k=3, weighting=PositionMLP(nn.Linear(3, 1))),
        lambda: ConvNNAttention(4, 2, k=3, metric=Mahalanobis(2)),
        lambda: ConvNNAttention(
            4, 2, k=3, metric=interpolate("squared_spatial", "scaled_dot", 0.25, learnable=True)
        ),
        lambda: recipes.vig(4, k=3),
        lambda: recipes.edge_conv(4, 4, k=3),
    ],
)
def test_reset_parameters_reaches_every_part(make):
    """What a layer is made of stays as it is at first, and is drawn anew when asked for."""
    torch.manual_seed(0)
    layer = make()
    for p in layer.parameters():
        nn.init.constant_(p, 3.0)
    layer.reset_parameters()
    untouched = [name for name, p in layer.named_parameters() if bool((p == 3.0).all())]
    assert untouched == []


def test_parts_come_into_a_layer_as_they_are():
    part = nn.Linear(8, 4)
    before = part.weight.clone()
    PointConvNN(4, 4, k=3, kernel=EdgeMLP(part))
    assert torch.equal(part.weight, before)


@each
def test_repr_names_the_layer_and_its_channels(case: Case):
    layer = case.layer()
    text = repr(layer)
    assert text.startswith(type(layer).__name__)
    assert ("8, 2" if "attention" in case.name else "4, ") in text


@pytest.mark.parametrize(
    "case",  # graphs carry their batch in a vector
    [c for c in CASES if not c.name.startswith(("point", "neighbor"))],
    ids=lambda c: c.name,
)
def test_unbatched_input(case: Case):
    layer, (x,) = case.layer(), case.sample(1)
    found = case.call(layer, x[0])
    torch.testing.assert_close(found, case.call(layer, x)[0], rtol=1e-12, atol=1e-12)


def snapshot(layer: nn.Module) -> list[tuple[str, str, object]]:
    found: list[tuple[str, str, object]] = []
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                value = sorted((k, id(v)) for k, v in value.items())
            found.append((name, key, value if isinstance(value, (list, tuple)) else repr(value)))
    return found


@each
def test_forward_stores_nothing(case: Case):
    layer = case.layer()
    state = copy.deepcopy(layer.state_dict())
    before = snapshot(layer)
    first = case.call(layer, *case.sample(2, 0))
    case.call(layer, *case.sample(3, 1))  # another size and batch
    assert snapshot(layer) == before
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())
    assert torch.equal(case.call(layer, *case.sample(2, 0)), first)


@each
def test_inputs_are_left_as_they_are(case: Case):
    inputs = case.sample()
    case.call(case.layer(), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, case.sample(), strict=True))


@each
def test_memory_layout_does_not_matter(case: Case):
    layer, inputs = case.layer(), case.sample()
    expected = case.call(layer, *inputs)
    strided = tuple(t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs)
    assert any(not t.is_contiguous() for t in strided)
    torch.testing.assert_close(case.call(layer, *strided), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.vary], ids=lambda c: c.name)
@pytest.mark.parametrize("which", ["one", "all"])
def test_smallest_and_largest_k(case: Case, which: str):
    layer = case.vary(1 if which == "one" else case.points)
    inputs = case.sample()
    out = case.call(layer, *inputs)
    assert bool(out.isfinite().all())
    layer.backend = "message_passing"
    torch.testing.assert_close(case.call(layer, *inputs), out, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=rf"k={case.points + 1}.* {case.points}"):
        case.call(case.vary(case.points + 1), *inputs)


@each
def test_dtype_half(case: Case):
    """In bfloat16 every layer runs, gives bfloat16, and is right to its precision."""
    layer = case.layer(dtype=torch.bfloat16)
    inputs = tuple(t.bfloat16() for t in case.sample())
    out = case.call(layer, *inputs)
    assert out.dtype == torch.bfloat16
    exact = case.call(copy.deepcopy(layer).double(), *(t.double() for t in inputs))
    error = (out.double() - exact).abs()
    # A rounding flip changes a neighbour, so some outputs may differ; most must not.
    close = error <= 0.05 * exact.abs().amax() + 0.02
    assert float(close.double().mean()) > 0.9


@each
def test_autocast_chooses_neighbours_in_full_precision(case: Case):
    layer, inputs = case.layer(dtype=torch.float32), tuple(t.float() for t in case.sample())
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call(layer, *inputs)
        assert out.dtype in (torch.bfloat16, torch.float32)
        out.float().sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
        if not hasattr(layer, "operation"):
            return
        operation = capture(case, layer, inputs)
        chosen = operation.neighborhood()
    points = {id(operation.source): operation.source, id(operation.target): operation.target}
    exact = {key: p.with_x(None if p.x is None else p.x.float()) for key, p in points.items()}
    again = dataclasses.replace(
        operation, source=exact[id(operation.source)], target=exact[id(operation.target)]
    ).neighborhood()
    assert torch.equal(chosen.index, again.index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_autocast_gives_half_precision_on_every_backend(case: Case, dtype: torch.dtype):
    """As nn.Conv2d and nn.Linear do."""
    inputs = tuple(t.to(dtype) for t in case.sample())
    found = []
    for backend in case.backends or ("auto",):
        layer = case.layer(backend, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(case.call(layer, *inputs))
            assert found[-1].dtype == torch.bfloat16, backend
        exact = case.call(layer, *(t.float() for t in inputs))
        error = (found[-1].float() - exact).abs()
        assert float((error <= 0.02 * exact.abs().amax() + 0.01).float().mean()) > 0.9
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("backend", ["gather", "message_passing"])
@pytest.mark.parametrize("kernel", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighting", ["ones", "softmax"])
def test_autocast_leaves_pooling_alone(kernel: str, weighting: str, backend: str):
    """As nn.AvgPool2d does: nothing is multiplied by a matrix."""
    options = {"metric": "cosine", "kernel": kernel, "weighting": weighting, "backend": backend}
    layer, x = ConvNN2d(3, 3, k=4, **options), torch.randn(1, 3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.float32 and torch.equal(found, layer(x))


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot"])
def test_autocast_does_not_round_distances(metric: str):
    """In the product of bfloat16 numbers half the pixels would find other neighbours."""
    layer, x = ConvNN2d(32, 4, k=4, metric=metric), torch.randn(1, 32, 9, 8) + 2
    exact = layer.operation(x).neighborhood().index
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.operation(x).neighborhood().index, exact)
    rows = x[0].flatten(1).t()
    rounded = -(rows.bfloat16() @ rows.bfloat16().t()).float()
    assert not torch.equal(rounded.argsort(dim=-1, stable=True)[:, :4], exact[0])


def capture(case: Case, layer: nn.Module, inputs: tuple[Tensor, ...]):
    """The operation that the case's call runs."""
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "backend", "gather")  # a convolution by torch's own makes none
        for module in (convnn_geo.nn.attention, convnn_geo.nn.conv, convnn_geo.nn.point_conv):
            run = module.run
            patch.setattr(
                module, "run", lambda op, backend, run=run: caught.append(op) or run(op, backend)
            )
        case.call(layer, *inputs)
    return caught[0]


@each_random
def test_eval_is_deterministic(case: Case):
    layer, inputs = case.layer().eval(), case.sample()
    first = case.call(layer, *inputs)
    torch.manual_seed(123)
    assert torch.equal(case.call(layer, *inputs), first)
    state = torch.random.get_rng_state()
    case.call(layer, *inputs)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn


@each_random
def test_training_follows_the_seed(case: Case):
    layer, inputs = case.layer().train(), case.sample()
    torch.manual_seed(3)
    first, second = case.call(layer, *inputs), case.call(layer, *inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(case.call(layer, *inputs), first)
    assert torch.equal(case.call(layer, *inputs), second)


@each_random
def test_backends_draw_alike(case: Case):
    inputs = case.sample()
    results = []
    for backend in case.backends:
        layer = case.layer(backend).train()
        torch.manual_seed(3)
        results.append(case.call(layer, *inputs))
    if "dropout" in case.name or case.name == "attention-random":
        results = results[-2:]  # sdpa draws its own dropout
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-10)
