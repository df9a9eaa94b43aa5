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

from convnn_geo import gpu  # noqa: E402
from convnn_geo.metrics import interpolate  # noqa: E402
from convnn_geo.search.problem import Problem  # noqa: E402

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
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
SHARED = {90: 227 * 1024, 80: 163 * 1024, 89: 99 * 1024}  # bytes that a block can have, by GPU
SPILLED = 512  # bytes of a thread's stack from which on a kernel waits for memory

SEARCHES = {"_nearest_survivors", "_nearest"}  # the second for rows that the first can't do
CENTERS = {"_mean", "_center"}


def compiled(kernel, arguments, generation=90):
    """A launch as machine code, specialised as Triton would do it for these arguments."""
    arguments = dict(arguments)
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
    target = triton.backends.compiler.GPUTarget("cuda", generation, 32)
    return compiler.compile(source, target=target, options=options)


@pytest.fixture
def launches(monkeypatch):
    """What is launched while the test runs: kernels and their arguments."""
    found = []

    def record(kernel, *args, grid=None, warmup=None, **kwargs):
        names = kernel.arg_names
        found.append((kernel, {**dict(zip(names, args, strict=False)), **kwargs}))
        assert all(size < 2**16 for size in grid[1:]), "only the first axis of a grid is long"

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    return found


def check(launches, folder, kernels):
    assert {kernel.__name__ for kernel, _ in launches} == kernels
    for kernel, arguments in launches:
        code = compiled(kernel, arguments)
        assert code.metadata.shared <= SHARED[90]
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
    check(launches, tmp_path, SEARCHES if k <= 32 else {"_nearest"})


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "kind, exact", [("points", True), ("angles", True), ("angles", False), ("products", True)]
)
@pytest.mark.parametrize(
    ("d", "k"), [(3, 9), (64, 9), pytest.param(192, 40, marks=pytest.mark.slow)]
)
def test_search_engine(launches, tmp_path, d, k, kind, exact, own):
    from convnn_geo.search.launches import launch

    points = torch.randn(2, 1024, d)
    places = torch.arange(1024).repeat(2) if own else None
    launch(Problem(kind, points, points, None, 1.0, torch.float32, None, exact), k, places)
    searches = SEARCHES if k <= 32 else {"_nearest"}
    centers = set() if d <= 8 or kind == "products" else CENTERS
    check(launches, tmp_path, searches | centers)


@pytest.mark.parametrize("kind", ["points", "products"])
def test_search_in_doubles(launches, tmp_path, kind):
    from convnn_geo.search.launches import launch

    points, bias = torch.randn(2, 1024, 48).double(), torch.randn(2, 1024).double()
    bias = bias if kind == "products" else None
    launch(Problem(kind, points, points, bias, 0.3, torch.float32), 9)
    check(launches, tmp_path, SEARCHES | (CENTERS if kind == "points" else set()))


def test_clouds_about_their_centers(launches, tmp_path):
    from convnn_geo.search.launches import Clouds, launch

    q, keys, starts = torch.randn(90, 64), torch.randn(400, 64), torch.tensor([0, 40, 90])
    batch = torch.arange(2).repeat_interleave(45), torch.arange(2).repeat_interleave(200)
    problem = Problem("points", q, keys, None, 1.0, torch.float32)
    launch(problem, 9, None, Clouds(50, (starts, starts), batch))
    check(launches, tmp_path, SEARCHES | CENTERS)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("d", "k"), [(3, 9), (2, 20), (1, 1), pytest.param(3, 64, marks=pytest.mark.slow)]
)
def test_cells(launches, tmp_path, d, k, own):
    from convnn_geo.gpu.cells import nearest

    points = torch.randn(2, 1000, d)
    nearest(points, points, k, torch.arange(1000).repeat(2) if own else None)
    check(launches, tmp_path, {"_lay_out", "_count", "_fill", "_search"})


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("kind", "k"),
    [("angles", 9), ("roots", 25), pytest.param("squares", 64, marks=pytest.mark.slow)],
)
def test_rings(launches, tmp_path, kind, k, own):
    from convnn_geo.gpu.rings import nearest

    x, zeros = torch.randn(2, 900, 3), torch.zeros(2, 900, dtype=torch.bool)
    offset, far, weights = torch.zeros(3, 3481, dtype=torch.int32), torch.zeros(3481), torch.ones(2)
    at = torch.arange(900)
    nearest(
        *(x, x, kind, (zeros, zeros), (30, 30), at, offset, far.double(), weights.double(), k),
        at if own else None,
    )
    check(launches, tmp_path, {"_look_around"})


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
    from convnn_geo.gpu import attention
    from convnn_geo.gpu.attention import attend, attend_backward

    q = torch.randn(1, 3, n, 64, dtype=dtype)
    keep = None if dtype == torch.float32 else torch.ones(1, 3, n, k)
    _, weight, place = attend(q, q, q, None, None, keep, k, 0.125, 1.0)
    torch.use_deterministic_algorithms(deterministic)
    try:
        attend_backward(q, q, q, keep, 0.125, 1.0, q, weight, place.zero_())
    finally:
        torch.use_deterministic_algorithms(False)
    backward = {"_count", "of_targets", "of_sources"}
    if deterministic:
        backward |= {"_list", "_settle"}
    forward = {"_attend_rows"}
    if n > attention.SHORT:
        forward = {"_nearest_survivors", "_nearest", "_combine"}
    check(launches, tmp_path, forward | backward)


@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [
        (197, 9, torch.bfloat16),
        (1024, 32, torch.bfloat16),
        pytest.param(197, 9, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_attention_by_scores_that_are_added(launches, tmp_path, n, k, dtype):
    from convnn_geo.gpu import attention

    q, less = torch.randn(1, 3, n, 64, dtype=dtype), torch.randn(3, n, n)
    attention.attend(q, q, q, None, None, None, k, 0.125, 1.0, True, less)
    searched = {"_nearest_survivors", "_nearest", "_combine"}
    check(launches, tmp_path, searched if n > attention.SHORT else {"_attend_rows"})


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
    names = {"_forward", "_backward_of_rows", "_backward_of_taps"}
    if groups == channels:
        names = {"_forward_depthwise", "_backward_depthwise_rows", "_backward_depthwise_taps"}
    check(launches, tmp_path, names)


def called(name, *shape, dtype=torch.bfloat16, **options):
    """Attention by a layer's own rule, as a GPU would run it."""
    from convnn_geo.nn import ConvNNAttention

    layer = ConvNNAttention(128, 2, k=9, backend="triton", dtype=dtype, **LAYERS[name])
    layer(torch.randn(*shape, 128, dtype=dtype), need_weights=False, **options)


LAYERS = {
    "plain": {},
    "dropped": {"dropout": 0.1},
    "mixed": {"metric": interpolate("squared_spatial", "scaled_dot", 0.5)},
}


@pytest.mark.parametrize("mode", ["inferred", pytest.param("trained", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(launches, tmp_path, monkeypatch, name, mode):
    monkeypatch.setattr(gpu, "refuses", lambda device: None)
    with torch.set_grad_enabled(mode == "trained"):
        called(name, 2, 197, is_causal=name != "mixed")
    ((_, arguments),) = launches
    half = name != "mixed"  # its products are of positions, too, which halves can't hold
    assert arguments["q_ptr"].dtype == (torch.bfloat16 if half else torch.float32)
    assert arguments["HAS_MASK"] == half and arguments["HAS_KEEP"] == (name == "dropped")
    stored = mode == "trained" or not half  # float32 gathers what it has stored
    assert (arguments["weight_ptr"] is not None) == stored
    check(launches, tmp_path, {"_attend_rows"})


@pytest.mark.parametrize(
    ("m", "d", "dtype"),
    [
        (197, 64, torch.bfloat16),
        (512, 256, torch.bfloat16),
        (1024, 128, torch.float16),
        (300, 64, torch.float32),
    ],
)
def test_tiles_fit_into_shared_memory(launches, m, d, dtype, monkeypatch):
    from convnn_geo.gpu import attention

    q = torch.randn(1, 1, m, d, dtype=dtype)
    for generation in (80, 89):
        monkeypatch.setattr(gpu, "shared_memory", lambda device, g=generation: SHARED[g])
        attention.attend(q, q, q, None, None, None, 9, 0.125, 1.0, False)
        kernel, arguments = launches[-1]
        if kernel.__name__ == "_attend_rows" and generation == 89:
            code = compiled(kernel, arguments, generation)
            assert code.metadata.shared <= SHARED[generation]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (4, 2, 3)])
def test_results_lie_as_who_joins_heads_wants_them(lead):
    from convnn_geo.gpu.calls import Shapes
    from convnn_geo.gpu.layout import empty_result

    value = torch.zeros(*lead, 7, 8, dtype=torch.bfloat16)
    out = Shapes(torch.Size(lead), 5, 7, 2, 8, 8, (), (), ()).result(value)
    expected = empty_result(value, value.shape[:-2], 5)
    assert (out.shape, out.stride()) == (expected.shape, expected.stride())
    assert (out.dtype, out.device) == (value.dtype, value.device)


def test_where_nothing_fits_rows_are_searched():
    from convnn_geo.gpu.rows import tile

    def fitting(m, d, shared, n=500, dtype=torch.bfloat16, stores=False, masked=False):
        return tile(n, m, d, d, dtype, shared, stores, masked)

    assert fitting(1024, 64, SHARED[90]).columns == 1024
    assert fitting(1025, 64, SHARED[90]) is None
    assert fitting(1024, 64, 48 * 1024) is None
    wide, narrow = (fitting(512, 256, SHARED[g]) for g in (90, 89))
    assert wide.axes == wide.channels == 64 and narrow.axes <= 64
    assert fitting(197, 64, SHARED[90]).rows == 128 and fitting(49, 64, SHARED[90], 49).rows == 64
    assert fitting(197, 64, SHARED[90], stores=True).rows == 32
    assert fitting(197, 64, SHARED[90], stores=True, masked=True).rows == 16


def test_lists_are_small_beside_what_is_found():
    """On a GPU of 132 multiprocessors, of 32 x 12 heads of 1024 queries with 32 keys each."""
    from convnn_geo.gpu.plans import plan

    found = 32 * 12 * 1024 * 32 * 8
    for dtype in (torch.bfloat16, torch.float32):
        chosen = plan(1024, 32, 64, dtype, False)
        assert 132 * chosen.programs * chosen.scratch * 4 < 0.19 * found


def test_many_examples(launches):
    from convnn_geo.gpu.attention import attend, attend_backward

    q = torch.zeros(70000, 1, 1, 16)
    _, weight, place = attend(q, q, q, None, None, None, 1, 1.0, 1.0)
    attend_backward(q, q, q, None, 1.0, 1.0, q, weight, place)
    assert len(launches) == 4  # whose grids have one long axis


def test_offsets_are_counted_in_64_bits(launches):
    from convnn_geo.gpu.attention import attend
    from convnn_geo.gpu.search import nearest
    from convnn_geo.gpu.taps import gather_taps

    q = torch.randn(2, 3, 32, 16, dtype=torch.bfloat16)
    mask = torch.ones(2, 3, 32, 32, dtype=torch.bool)
    nearest(q, q, 9, None, 32, mask=mask)
    attend(q, q, q, None, mask, None, 9, 1.0, 1.0, False)
    gather_taps(q[0, 0], torch.zeros(9, 32, dtype=torch.int32), None, q[0, :, :9].mT, None, 1)
    for kernel, arguments in launches:
        text = compiled(kernel, {**arguments, "n": 33}).asm["ttir"]
        large = "mask_example|mask_head|mask_row" if "mask_row" in arguments else "n"
        assert not re.search(rf"muli [^:]*%({large})\b[^:]*: (tensor<[^>]*xi32>|i32)", text)


@pytest.mark.parametrize(
    ("d", "k", "dtype"),
    [
        (256, 9, torch.bfloat16),
        (128, 32, torch.float16),
        pytest.param(64, 256, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(256, 9, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_backward_of_wide_heads_and_many_neighbors(launches, tmp_path, d, k, dtype):
    from convnn_geo.gpu.attention import attend_backward

    q, weight = torch.randn(1, 2, 300, d, dtype=dtype), torch.ones(1, 2, 300, k)
    attend_backward(q, q, q, None, 1.0, 1.0, q, weight, torch.zeros_like(weight).int())
    check(launches, tmp_path, {"_count", "of_targets", "of_sources"})


def test_what_one_warp_stores_others_wait_for(launches):
    from convnn_geo.gpu.attention import attend_backward

    q, weight = torch.randn(1, 1, 32, 16), torch.ones(1, 1, 32, 1)
    attend_backward(q, q, q, None, 1.0, 1.0, q, weight, weight.int())
    ((kernel, arguments),) = (found for found in launches if "targets" in found[0].__name__)
    text = compiled(kernel, arguments).asm["ttir"]
    steps = [line for line in text.splitlines() if "tt.store" in line or "barrier" in line]
    assert ["barrier" in line for line in steps[-2:]] == [True, False]  # the lists come last
