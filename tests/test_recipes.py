"""Every recipe equals its peer: outputs and gradients, on every backend, in both precisions."""

from __future__ import annotations

import inspect

import pytest

from convnn_geo import recipes, verify
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
