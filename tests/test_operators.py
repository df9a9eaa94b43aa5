"""Operators: called directly where nobody looks on, and seen by everybody who does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from convnn_geo import operators
from convnn_geo.nn.functional import knn_attention
from convnn_geo.operators import operator

calls: list[str] = []


@operator("test_scaled")
def scaled(x: Tensor, factor: float) -> Tensor:
    calls.append("function")
    return (x * factor).transpose(-1, -2)


@scaled.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    calls.append("fake")
    return torch.empty_like(x).transpose(-1, -2)


def _setup(ctx, inputs, output):
    ctx.factor = inputs[1]


def _backward(ctx, grad):
    return grad.transpose(-1, -2) * ctx.factor, None


scaled.register_autograd(_backward, setup_context=_setup)


class Seen(TorchDispatchMode):
    """The names of operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A tensor of another class."""


def test_the_same_directly_and_by_torch():
    torch.library.opcheck(torch.ops.convnn_geo.test_scaled.default, (torch.randn(2, 3), 2.0))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    found, other = scaled(x, 2.0), torch.ops.convnn_geo.test_scaled(x, 2.0)
    assert torch.equal(found, other)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, other))
    assert torch.equal(ours, theirs)
    assert torch.autograd.gradcheck(lambda x: scaled(x, 2.0), x)
    assert not scaled(x.detach(), 2.0).requires_grad
    with torch.no_grad():
        assert not scaled(x, 2.0).requires_grad


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_results_may_be_written_into(learns, grad):
    """A view made inside of a function might not."""
    x = torch.randn(2, 3, requires_grad=learns)
    with torch.set_grad_enabled(grad):
        out = scaled(x, 2.0)
    out.add_(torch.ones(3, 2, requires_grad=True))
    out.sum().backward()
    assert (x.grad is not None) == (learns and grad)


def test_modes_see_it():
    x = torch.randn(2, 3)
    with Seen() as seen:
        scaled(x, 2.0)
    assert seen.names == ["convnn_geo::test_scaled"]
    q = torch.randn(1, 8, 4)
    with FlopCounterMode(display=False), Seen() as seen:
        knn_attention(q, q, q, 2)
    assert "convnn_geo::neighbor_attention" in seen.names


def test_who_looks_on_has_the_fake():
    calls.clear()
    assert scaled(torch.empty(2, 3, device="meta"), 2.0).shape == (3, 2)
    with torch._subclasses.FakeTensorMode() as mode:
        scaled(mode.from_tensor(torch.randn(2, 3)), 2.0)
    scaled(mode.from_tensor(torch.randn(2, 3)), 2.0)  # the mode is over, the tensor is still fake
    assert calls == ["fake"] * 3


def test_a_compiled_program_holds_it():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 3)
    assert torch.equal(torch.compile(lambda x: scaled(x, 2.0), backend=keep)(x), scaled(x, 2.0))
    assert "convnn_geo.test_scaled" in str(graphs[0].graph)


def test_a_traced_program_holds_it():
    x = torch.randn(2, 3)
    traced = torch.jit.trace(lambda x: scaled(x, 2.0), (x,))
    assert "convnn_geo::test_scaled" in str(traced.graph)


def test_other_classes_of_tensors_stay():
    x = torch.randn(2, 3).as_subclass(Tagged)
    assert torch.equal(scaled(x, 2.0).as_subclass(Tensor), scaled(x.as_subclass(Tensor), 2.0))


def test_forward_mode_is_no_silent_mistake():
    x = torch.randn(2, 3, requires_grad=True)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        scaled(forward_ad.make_dual(x, torch.ones_like(x)), 2.0)


def test_checkpointed():
    x = torch.randn(2, 3, requires_grad=True)
    calls.clear()
    checkpoint(lambda x: scaled(x, 2.0).square(), x, use_reentrant=False).sum().backward()
    assert calls == ["function"] * 2
    torch.testing.assert_close(x.grad, 8 * x.detach())


@pytest.mark.skipif(operators._UNSAFE is None, reason="this torch knows no such tag")
def test_what_may_wait_for_a_gpu_is_left_out_of_cuda_graphs():
    """By ``torch.compile(mode="reduce-overhead")``."""
    import convnn_geo.search  # noqa: F401, which registers them

    for name, waits in (("nearest", True), ("nearest_in_clouds", True), ("k_smallest", False)):
        tags = getattr(torch.ops.convnn_geo, name).default.tags
        assert (torch.Tag.cudagraph_unsafe in tags) == waits
