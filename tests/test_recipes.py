"""Every recipe equals its peer: outputs and gradients, on every backend, in both precisions."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from torch import nn

from convnn_geo import recipes, verify, weighting
from convnn_geo.convert import NotApplicable, spec
from convnn_geo.convert.specs import spec_names, spec_options
from convnn_geo.verify.case import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.recipe}-{case.name}")
def test_recipe_equals_its_peer(case: Case) -> None:
    rows = verify.check(case)
    backends = {row.backend for row in rows}
    assert {"gather", "message_passing"} <= backends
    assert {row.dtype for row in rows} == {"float64", "float32"}
    for row in rows:
        assert row.passed, row


def test_every_recipe_has_cases_and_takes_a_backend() -> None:
    assert {case.recipe for case in CASES} == set(recipes.names())
    for name in recipes.names():
        parameters = inspect.signature(getattr(recipes, name)).parameters
        assert any(p.kind is p.VAR_KEYWORD for p in parameters.values()), name


REQUIRED = ("size", "stride", "kernel_size")


@pytest.mark.parametrize("name", sorted(set(spec_names()) & set(recipes.names())))
def test_what_replaces_a_layer_is_where_it_was_and_as_precise(name: str) -> None:
    options = {option: 3 for option in REQUIRED if option in spec_options(name)}
    for layer in (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        lambda channels, _, kernel_size, **factory: nn.MultiheadAttention(channels, 2, **factory),
    ):
        old = layer(4, 4, 3, device="meta", dtype=torch.float64)
        with contextlib.suppress(NotApplicable):
            new = spec(name, **options)(old)
            assert {p.dtype for p in new.parameters()} <= {torch.float64}
            assert {p.device.type for p in new.parameters()} <= {"meta"}


@pytest.mark.parametrize(
    "name", ["conv2d", "avg_pool2d", "max_pool3d", "multihead_attention", "causal_attention"]
)
def test_what_torch_has_is_lowered_to_it(name: str) -> None:
    assert any(row.backend == "native" for row in verify.run([name]))


def test_a_wrong_layer_fails() -> None:
    case = next(c for c in CASES if c.recipe == "conv2d")
    broken = Case(
        case.recipe,
        case.name,
        case.peer,
        case.build,
        case.shapes,
        lambda layer, x: case.reference(layer, x) + 1e-3,
    )
    assert not any(row.passed for row in verify.check(broken))


def test_unknown_recipe_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'conv9d'.*conv2d"):
        verify.run(["conv9d"])


def test_a_learnable_place_on_the_spectrum_learns():
    layer = recipes.interpolated_conv2d(4, 6, 3, lam=0.7, learnable=True)
    layer(torch.randn(1, 4, 8, 8)).square().sum().backward()
    assert layer.metric.lam.grad.abs() > 0
    told = recipes.interpolated_conv2d(4, 6, 3, lam=0.7, learnable=True, weighting="softmax")
    assert isinstance(told.weighting, weighting.Softmax)


def test_pools_take_by_place_what_torchs_take_alike():
    for pool in (recipes.avg_pool1d, recipes.avg_pool2d, recipes.avg_pool3d):
        with pytest.raises(TypeError, match="positional"):
            pool(3, 2, 1, True)  # ceil_mode of torch's
