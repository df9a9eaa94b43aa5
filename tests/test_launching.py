"""Kernels are launched in the form that Triton would choose, which it is asked for once."""

import pytest
import torch

from convnn_geo.gpu import launching
from convnn_geo.gpu.launching import launch


class Kernel:
    """What Triton makes of a function: launched with a grid, it returns the form that it took."""

    arg_names = ("x_ptr", "y_ptr", "n", "scale", "BLOCK", "HAS_Y")

    def __init__(self, interpreted=False):
        self.asked, self.launched, self.interpreted = [], [], interpreted

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.asked.append((grid, args, constants))
            return None if self.interpreted else Form(self.launched)

        return run


class Form:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    monkeypatch.setattr(launching, "_launches", {})
    return launching._launches


X = torch.zeros(64)


def go(kernel, x=X, y=None, n=16, scale=1.0, grid=(4,), block=32, **options):
    launch(kernel, grid, (x, y), (n,), (scale,), BLOCK=block, HAS_Y=y is not None, **options)


def test_the_second_launch_takes_the_form_of_the_first():
    kernel = Kernel()
    go(kernel, num_warps=2)
    go(kernel, scale=0.5, grid=(2, 3), num_warps=2)
    assert kernel.asked == [
        ((4,), (X, None, 16, 1.0), {"BLOCK": 32, "HAS_Y": False, "num_warps": 2})
    ]
    assert kernel.launched == [((2, 3, 1), (X, None, 16, 0.5, 32, False))]


@pytest.mark.parametrize(
    "other",
    [
        {"x": X[1:]},  # which lies elsewhere
        {"x": X.half()},
        {"x": X.to("meta")},
        {"y": X},
        {"n": 17},
        {"block": 64},
        {"num_warps": 4},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_triton_looks_at_has_a_form_of_its_own(other):
    kernel = Kernel()
    for options in ({}, other, {}, other):
        go(kernel, **options)
    assert (len(kernel.asked), len(kernel.launched)) == (2, 2)


def test_kernels_have_forms_of_their_own():
    one, two = Kernel(), Kernel()
    go(one)
    go(two)
    assert len(one.asked) == len(two.asked) == 1


def test_what_is_interpreted_has_no_form():
    kernel = Kernel(interpreted=True)
    go(kernel)
    go(kernel)
    assert (len(kernel.asked), kernel.launched) == (2, [])


def test_what_is_kept_is_bounded(launches, monkeypatch):
    monkeypatch.setattr(launching, "_MOST", 3)
    kernel = Kernel()
    for n in range(8):
        go(kernel, n=n)
        assert len(launches) <= 3
    go(kernel, n=7)
    assert len(kernel.launched) == 1
    for start in range(8):
        go(kernel, x=X[start:])
    (last,) = (known for key, known in launches.items() if key[2] == (16,))
    assert 1 <= len(last._forms) <= 3
