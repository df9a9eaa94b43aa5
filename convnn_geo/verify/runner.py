"""Running the cases: outputs and all gradients, on every backend, in float64 and float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convnn_geo.checks import check_name
from convnn_geo.verify import attention, convolution, graph  # noqa: F401  (they enter their cases)
from convnn_geo.verify.case import BOUNDS, CASES, Case


@dataclass(frozen=True)
class Row:
    """The worst errors of one case on one backend, in one dtype."""

    recipe: str
    case: str
    peer: str
    backend: str
    dtype: str
    error_output: float
    error_gradient: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within the bound (NaN is not)."""
        return max(self.error_output, self.error_gradient) <= self.bound and not (
            self.error_output != self.error_output or self.error_gradient != self.error_gradient
        )


BACKENDS = ("native", "compiled", "gather", "message_passing")


def run(
    names: Iterable[str] | None = None, progress: Callable[[str, int, int], None] | None = None
) -> list[Row]:
    """Check recipes against their peers.

    Args:
        names: of recipes; all by default.
        progress: called with the recipe's name, the cases done and the cases in all.

    Returns:
        One row a case, backend and dtype.

    Example:
        >>> from convnn_geo import verify
        >>> all(row.passed for row in verify.run(["max_pool2d"]))
        True
    """
    known = sorted({case.recipe for case in CASES})
    wanted = known if names is None else [check_name("recipe", n, known) for n in names]
    cases = [case for case in CASES if case.recipe in wanted]
    rows: list[Row] = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress(case.recipe, done, len(cases))
        rows += check(case)
    if progress is not None:
        progress("", len(cases), len(cases))
    return rows


def check(case: Case) -> list[Row]:
    """One case on every backend that can run it, in float64 and float32."""
    with warnings.catch_warnings():  # torch's own convolution says that it copies
        warnings.filterwarnings("ignore", message="Using padding='same'")
        return [row for dtype in BOUNDS for row in _check(case, dtype)]


def _check(case: Case, dtype: torch.dtype) -> list[Row]:
    rows = []
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in case.shapes]
    inputs = [x.to(dtype) for x in inputs]
    seeded = _seeded(case)
    exact = _reference(case, seeded, [x.double() for x in inputs])
    for backend in BACKENDS:
        layer = _seeded(case, backend)
        layer.load_state_dict(seeded.state_dict())
        try:
            found = _measure(case, layer.to(dtype), inputs)
        except ValueError as error:
            if backend in ("native", "compiled") and "can't run this layer" in str(error):
                continue
            raise
        errors = [_error(a, b) for a, b in zip(found, exact, strict=True)]
        rows.append(
            Row(
                case.recipe,
                case.name,
                case.peer,
                backend,
                str(dtype).removeprefix("torch."),
                errors[0],
                max(errors[1:], default=0.0),
                BOUNDS[dtype],
            )
        )
    return rows


def _seeded(case: Case, backend: str = "auto") -> nn.Module:
    """The layer with weights of a fixed seed that float32 holds exactly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        layer = case.build(backend=backend)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return layer


def _reference(case: Case, layer: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        return _gradients(layer.double(), inputs, lambda *x: case.reference(layer, *x))


def _measure(case: Case, layer: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return _gradients(layer, inputs, lambda *x: case.forward(layer, *x))


def _gradients(
    layer: nn.Module, inputs: list[Tensor], function: Callable[..., Tensor]
) -> list[Tensor]:
    """The output and its gradients to inputs and parameters, for one random cotangent."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(13)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    wanted = leaves + [p for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)),
    ]


def _error(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        return float("nan")
    return float((found.double() - exact.double()).abs().max()) if exact.numel() else 0.0
