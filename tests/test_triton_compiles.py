"""Every Triton kernel compiles for a Hopper GPU, without one: launches are recorded and compiled.

What the interpreter runs may still not compile, and what compiles may keep its values in memory
instead of registers: both show here, on any machine.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels aren't compiled"
    ),
    pytest.mark.skipif(not TOOL.exists(), reason="needs Triton's tools for NVIDIA GPUs"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
SHARED = 227 * 1024  # bytes that a block can have on Hopper
SPILLED = 512  # bytes of a thread's stack from which on a kernel waits for memory


def compiled(kernel, arguments):
    """A launch as machine code, specialised as Triton would do it for these arguments."""
    signature, constants, divisible = {}, {}, {}
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = {int: "i32", float: "fp32"}[type(value)]
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(kernel, signature, constants, divisible)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return compiler.compile(source, target=target, options=options)


@pytest.fixture
def launches(monkeypatch):
    """What is launched while the test runs: kernels and their arguments."""
    found = []

    def record(kernel, *args, grid=None, warmup=None, **kwargs):
        names = kernel.arg_names
        found.append((kernel, {**dict(zip(names, args, strict=False)), **kwargs}))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    return found


def check(launches, folder, kernels):
    assert {kernel.__name__ for kernel, _ in launches} == kernels
    for kernel, arguments in launches:
        code = compiled(kernel, arguments)
        assert code.metadata.shared <= SHARED
        file = folder / "code.cubin"
        file.write_bytes(code.asm["cubin"])
        usage = subprocess.run(
            [TOOL, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
        stack = int(re.search(r"STACK:(\d+)", usage).group(1))
        assert stack <= SPILLED, f"{kernel.__name__} spills {stack} bytes a thread"


@pytest.mark.parametrize(
    ("d", "k", "dtype"),
    [
        (3, 9, torch.float32),
        (64, 32, torch.bfloat16),
        pytest.param(64, 9, torch.float32, marks=pytest.mark.slow),
        pytest.param(256, 256, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_search(launches, tmp_path, d, k, dtype):
    from convnn_geo.gpu.search import nearest

    points, direct = torch.randn(1024, d, dtype=dtype), d <= 8
    starts = torch.tensor([0, 1024])
    bias = None if direct else torch.randn(1024)
    nearest(points, points, k, (starts, starts), 1024, bias, direct=direct)
    check(launches, tmp_path, {"_nearest"})


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("angles", [False, True])
@pytest.mark.parametrize(
    ("d", "k"), [(3, 9), (64, 9), pytest.param(192, 40, marks=pytest.mark.slow)]
)
def test_search_engine(launches, tmp_path, d, k, angles, own):
    from convnn_geo.search.triton import launch

    points = torch.randn(2, 1024, d)
    places = torch.arange(1024).repeat(2) if own else None
    launch(points, points, k, places, angles)
    check(launches, tmp_path, {"_nearest"})


@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [
        (197, 9, torch.bfloat16),
        (1024, 32, torch.bfloat16),
        pytest.param(197, 9, torch.float32, marks=pytest.mark.slow),
        pytest.param(512, 16, torch.float32, marks=pytest.mark.slow),
        pytest.param(512, 16, torch.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_attention(launches, tmp_path, n, k, dtype, deterministic):
    from convnn_geo.gpu.attention import attend, attend_backward

    q = torch.randn(1, 3, n, 64, dtype=dtype)
    keep = None if dtype == torch.float32 else torch.ones(1, 3, n, k)
    _, weight, place = attend(q, q, q, None, None, keep, k, 0.125, 1.0)
    torch.use_deterministic_algorithms(deterministic)
    try:
        attend_backward(q, q, q, keep, 0.125, 1.0, q, weight, place.zero_())
    finally:
        torch.use_deterministic_algorithms(False)
    forward = {"_attend_rows"} if n <= 512 else {"_nearest", "_combine"}
    backward = {"_backward", "_backward_of_sources"} if deterministic else {"_backward"}
    check(launches, tmp_path, forward | backward)


@pytest.mark.parametrize(
    ("channels", "groups", "dtype"),
    [
        (64, 1, torch.bfloat16),
        (64, 64, torch.float32),
        pytest.param(256, 1, torch.float32, marks=pytest.mark.slow),
        pytest.param(256, 4, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_taps(launches, tmp_path, channels, groups, dtype):
    from convnn_geo.gpu.taps import gather_taps, gather_taps_backward

    rows = torch.randn(1024, channels, dtype=dtype)
    index, rho = torch.zeros(9, 1024, dtype=torch.int32), torch.ones(9, 1024)
    taps = torch.randn(9, channels, channels // groups, dtype=dtype)
    gather_taps(rows, index, rho, taps, torch.zeros(channels, dtype=dtype), groups)
    gather_taps_backward(rows, index, rho, taps, rows, groups, (True, True))
    check(launches, tmp_path, {"_forward", "_backward_of_rows", "_backward_of_taps"})
