"""Cells on a GPU, or under TRITON_INTERPRET=1, find what a search of all pairs finds."""

import math

import pytest
import torch
from triton_cases import DEVICE, TRITON

from convnn_geo import gpu
from convnn_geo.search import knn
from convnn_geo.search.cells import LARGEST_K

pytestmark = TRITON
CLOUDS = {
    "uniform": lambda n, d: torch.rand(n, d),
    "lattice": lambda n, d: torch.randint(4, (n, d)).float(),
    "coincident": lambda n, d: torch.ones(n, d),
    "doubled": lambda n, d: torch.randn(n // 2, d).repeat(2, 1),
    "flat": lambda n, d: torch.randn(n, d) * (torch.arange(d) == d // 2),
    "long": lambda n, d: torch.rand(n, d) * torch.tensor([1.0, 1e-2, 1e2])[:d],
    "far away": lambda n, d: 1e6 + torch.randint(50, (n, d)).float(),
    "last bits": lambda n, d: 1e6 + torch.randn(n, d),
    "clusters": lambda n, d: torch.randint(3, (n, d)) * 1e2 + torch.randn(n, d) * 1e-3,
    "outliers": lambda n, d: torch.rand(n, d).where(torch.arange(n)[:, None] > 2, 1e4),
    "squares underflow": lambda n, d: torch.randn(n, d) * 1e-22,
    "denormal": lambda n, d: torch.randn(n, d) * 1e-41,
}


def check(x, y=None, k=9, self_point="natural"):
    """By index and bit for bit."""
    x, y = (t if t is None else t.to(DEVICE) for t in (x, y))
    found, wanted = (
        knn(x, y, k, backend=name, self_point=self_point, check=False)
        for name in ("cells", "dense")
    )
    assert torch.equal(found.index, wanted.index)
    same = found.distance == wanted.distance
    assert (same | (found.distance.isnan() & wanted.distance.isnan())).all()


@pytest.fixture(autouse=True, params=[128])
def lanes(request, monkeypatch):
    """More targets a program, for whose number an interpreter takes its time."""
    from convnn_geo.gpu import cells

    if gpu.interpreted():
        monkeypatch.setattr(cells, "LANES", request.param)


@pytest.fixture
def launches(monkeypatch):
    """Arguments of searches in cells while a test runs."""
    from convnn_geo.gpu import cells

    seen, nearest = [], cells.nearest

    def watched(*args):
        seen.append(args)
        return nearest(*args)

    monkeypatch.setattr(cells, "nearest", watched)
    return seen


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_clouds(launches, cloud, d):
    x = CLOUDS[cloud](80, d)
    check(x)
    check(x, self_point="excluded", k=4)
    check(x, CLOUDS[cloud](20, d) + 1, k=17)  # from 16 on in smaller cells
    assert [args[-1] for args in launches] == [True, True, False]


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("reach", [3.0, 1e5, 1e12, math.inf])
def test_targets_outside(d, reach):
    check(torch.rand(100, d), torch.cat([torch.randn(20, d) * reach, torch.rand(5, d)]))


def test_squares_over_the_range_of_floats():
    x = (torch.randn(80, 3) * 1e19).to(DEVICE)
    found, wanted = (knn(x, k=30, backend=name) for name in ("cells", "triton"))
    assert torch.equal(found.index, wanted.index) and found.distance.isinf().any()
    assert torch.equal(found.distance, wanted.distance)


@pytest.mark.parametrize("k", [1, 2, 33, 64])
def test_few_and_all_neighbors(k):
    check(torch.rand(64, 3), torch.rand(10, 3), k=k)
    check(torch.rand(k, 2), torch.rand(10, 2), k=k)
    check(torch.rand(k + 1, 2), k=k, self_point="excluded")


def test_more_neighbors_than_a_thread_keeps(launches):
    check(torch.rand(80, 3), k=LARGEST_K + 1)
    assert not launches


@pytest.mark.parametrize("lanes", [32], indirect=True)
def test_examples_in_one_launch(launches):
    x = torch.stack([torch.rand(50, 3), torch.rand(50, 3) * 1e-3, torch.ones(50, 3)])
    x[1, :3] = torch.eye(3) * 1e3
    for options in ({}, {"self_point": "excluded"}, {"y": torch.rand(3, 20, 3)}):
        check(x, **options)
    assert len(launches) == 3


@pytest.mark.parametrize("k", [9, 60])
@pytest.mark.parametrize("axis", [0, slice(None)])
def test_nan_comes_after_infinity(axis, k):
    x = torch.rand(60, 3)
    x[::17, axis], x[::13, axis], x[5, axis] = math.nan, math.inf, -math.inf
    check(x, k=k)
    check(x, torch.rand(10, 3), k=k)
    check(x * math.nan, k=k)


def test_half_precision_and_parts_of_larger_tensors():
    x = torch.rand(2, 100, 6)
    check(x[..., ::2], k=5)
    check(x[:, ::2, 3:].half(), k=5)


def test_nobody_waits_for_the_device(monkeypatch):
    x = torch.rand(2, 50, 3, device=DEVICE)
    x[0, :30] = 0.5
    wanted = knn(x, k=5, backend="dense", self_point="excluded").index

    def waited(*_):
        raise AssertionError("the host waited for the device")

    with monkeypatch.context() as patch:
        for name in ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "nonzero"):
            patch.setattr(torch.Tensor, name, waited)
        found = knn(x, k=5, backend="cells", self_point="excluded", check=False).index
    assert torch.equal(found, wanted)


def test_places_do_not_depend_on_how_cells_are_laid_out(monkeypatch):
    from convnn_geo.gpu import cells

    x = torch.randint(8, (150, 3)).float()
    for crowd, wide in ((-2.0, 16), (0.0, 4), (20.0, 16)):
        monkeypatch.setattr(cells, "CROWD", crowd)
        monkeypatch.setattr(cells, "WIDE", wide)
        check(x, k=7)
