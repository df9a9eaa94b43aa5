"""Claim: on a GPU neighbours cost little beside what attention and convolution move anyway.

Builds the kernels, times them beside torch's own and torch_cluster's, with floors, and checks them
(the whole grid of the tests, compiled, and a small case under compute-sanitizer). In one run:

    python benchmarks/on_a_gpu.py
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from feature_convnn_without_topk import with_copies
from knn_attention_costs_no_more_than_attention import with_copies as attention_with_copies
from torch import Tensor, nn

from convnn_geo import recipes
from convnn_geo.bench import compare, machine
from convnn_geo.bench.measure import count_syncs, host_time
from convnn_geo.extras import importable, require
from convnn_geo.nn import ConvNN2d
from convnn_geo.nn.functional import knn_attention
from convnn_geo.search import knn

ROOT = Path(__file__).parents[1]
#: (batch, heads, n, channels), k, and what attention's time may be multiplied by.
ATTENTION = (
    ((256, 3, 197, 64), 9, 1.5),
    ((256, 3, 197, 64), 16, 1.5),
    ((32, 12, 1024, 64), 32, 1.0),
    ((8, 12, 4096, 64), 32, 0.8),
)
BACKWARD = 0.6  #: of attention's backward, where k is at most n / 16
IMAGE = (256, 64, 32, 32)
#: examples, points, dimension, and how many times as fast as torch_cluster knn is to be.
CLOUDS = ((32, 1024, 3, 5.0), (1, 16384, 3, 15.0), (1, 100_000, 3, 50.0), (1, 16384, 64, 50.0))
AWAITS = "Awaits a GPU: there is none here."
SETS = 3  #: of inputs in turn, so that no cache holds them


@dataclass(frozen=True)
class Case:
    """Functions side by side, the first of which ratios are taken to.

    Args:
        title: of the table.
        functions: by name.
        operations: that any way of computing it needs.
        moved: bytes, each input read once and each output written once.
        claim: what is to be reached.
    """

    title: str
    functions: dict[str, Callable[[], object]]
    operations: float
    moved: float
    claim: str


def in_turn(
    function: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]]
) -> Callable[[], Tensor]:
    """Forward on one set of inputs after the other."""
    turn = itertools.cycle(inputs)

    def call() -> Tensor:
        with torch.no_grad():
            return function(*next(turn))

    return call


def furthest(found: Tensor, parts: Sequence[Tensor], k: int) -> float:
    """Largest error of the last head, of queries whose choice is not within rounding."""
    q, key, value = (t[-1, -1].double() for t in parts)
    best = (q @ key.T).topk(k + 1, dim=-1).values
    clear = best[..., -2] - best[..., -1] > 1e-4
    error = (found[-1, -1] - attention_with_copies(q, key, value, k)).abs().amax(-1)
    return float(error[clear].max())


def memory_ratio(parts: Sequence[Tensor], k: int) -> float:
    """What a forward pass that learns adds beside its result, over indices and weights.

    These are int32 and float32, one of each a pair.
    """
    leaves = [t.detach().requires_grad_() for t in parts]
    knn_attention(*leaves, k, backend="triton")  # compiles, and makes what is made once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = knn_attention(*leaves, k, backend="triton")
    added = torch.cuda.max_memory_allocated() - before - out.nbytes
    return added / (8 * out.shape[:-1].numel() * k)


def backward(
    function: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]]
) -> Callable[[], object]:
    """Backward alone, on one set of inputs after the other."""
    ready = []
    for parts in inputs:
        leaves = [t.detach().requires_grad_() for t in parts]
        out = function(*leaves)
        ready.append((out, leaves, torch.randn_like(out)))
    turn = itertools.cycle(ready)

    def call() -> object:
        out, leaves, grad = next(turn)
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return call


def both(layer: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Forward and backward of a layer."""
    turn = itertools.cycle(inputs)
    return lambda: layer(next(turn).detach().requires_grad_()).sum().backward()


def attention(device: str, dtype: torch.dtype) -> list[Case]:
    """K-nearest attention beside all of it."""
    cases = []
    for (b, h, n, c), k, wanted in ATTENTION:
        inputs = [
            torch.randn(3, b, h, n, c, device=device, dtype=dtype).unbind() for _ in range(SETS)
        ]
        functions = {
            "scaled_dot_product_attention": F.scaled_dot_product_attention,
            "knn_attention": lambda q, key, v, k=k: knn_attention(q, key, v, k, backend="triton"),
        }
        error = furthest(knn_attention(*inputs[0], k, backend="triton"), inputs[0], k)
        memory = memory_ratio(inputs[0], k)
        title = f"attention, {b} x {h} x {n} x {c}, k = {k}, {dtype}"
        size, pairs = b * h * n * c, b * h * n * k
        for what, make, claim, times in (
            ("forward", in_turn, wanted, 1.0),
            ("backward", backward, BACKWARD if 16 * k <= n else None, 2.0),
        ):
            cases.append(
                Case(
                    f"{title}, {what}",
                    {name: make(f, inputs) for name, f in functions.items()},
                    2 * b * h * n * n * c if what == "forward" else 8 * pairs * c,
                    times * (4 * size * inputs[0][0].element_size()) + 8 * pairs,
                    ("" if claim is None else f"ratio at most {claim:g}; ")
                    + f"largest error {error:.1e}; forward that learns adds {memory:.2f} of at "
                    "most 1.2 times index and weights beside its result; "
                    f"int32 index and float32 weights are {8 * pairs / 2**20:.0f} MiB, the result "
                    f"{size * inputs[0][0].element_size() / 2**20:.0f}",
                )
            )
    return cases


def convolution(device: str, dtype: torch.dtype) -> list[Case]:
    """Convolution mode beside the convolution, and the nearest by feature beside all scores."""
    b, c, h, w = IMAGE
    made = torch.randn(SETS, *IMAGE, device=device, dtype=dtype)
    images = [image.contiguous(memory_format=torch.channels_last) for image in made]
    options = {"device": device, "dtype": dtype}
    plain = nn.Conv2d(c, c, 3, padding=1, **options).to(memory_format=torch.channels_last)
    window = ConvNN2d(c, c, 3, padding=1, **options).to(memory_format=torch.channels_last)
    near = ConvNN2d(c, c, k=9, metric="cosine", backend="triton", **options)
    near.search = "triton"
    taps, moved = 2 * 9 * b * h * w * c * c, 2 * b * c * h * w * made.element_size()
    scores = 2 * b * (h * w) ** 2 * c
    inputs = [(image,) for image in images]
    size = " x ".join(map(str, IMAGE))
    return [
        Case(
            f"convolution mode, {size}, channels last, {dtype}, forward and backward",
            {"nn.Conv2d": both(plain, images), "ConvNN2d": both(window, images)},
            3 * taps,
            3 * moved,
            "ratio at most 1.05",
        ),
        Case(
            f"ConvNN2d of the 9 nearest by cosine, {size}, {dtype}, forward",
            {
                "scores, topk, gathered copies": in_turn(
                    lambda x: with_copies(x, near.weight), inputs
                ),
                "ConvNN2d": in_turn(near, inputs),
                "nn.Conv2d": in_turn(plain, inputs),
            },
            taps + scores,
            moved + 4 * 9 * b * h * w,
            f"ratio at most 1 / 25 = {1 / 25:g}",
        ),
    ]


def interpolated(device: str) -> list[Case]:
    """Between convolution and features, in float32: a few pixels around each, or all pairs."""
    cases = []
    for (b, c, h, w), size, stride in (((2, 3, 224, 224), 7, 2), ((16, 64, 56, 56), 3, 1)):
        smooth = torch.randn(SETS, b * c, h // 8, w // 8, device=device)
        images = F.interpolate(smooth, (h, w), mode="bilinear").view(SETS, b, c, h, w)
        inputs = [(image + 0.05 * torch.randn_like(image),) for image in images]
        window = {"kernel_size": size, "stride": stride, "padding": size // 2}
        near, every = (
            recipes.interpolated_conv2d(c, 64, **window, lam=0.8).to(device) for _ in range(2)
        )
        every.load_state_dict(near.state_dict())
        every.search = "dense"
        pixels, targets = b * h * w, b * h * w // stride**2
        with torch.no_grad():
            same = torch.isclose(near(inputs[0][0]), every(inputs[0][0]), atol=1e-4)
        cases.append(
            Case(
                f"interpolated_conv2d, lam = 0.8, {b} x {c} x {h} x {w}, window {size}, stride "
                f"{stride}, forward",
                {
                    "nn.Conv2d": in_turn(nn.Conv2d(c, 64, **window).to(device), inputs),
                    "interpolated_conv2d": in_turn(near, inputs),
                    "interpolated_conv2d, all distances": in_turn(every, inputs),
                },
                2 * size**2 * targets * c * 64,
                4 * (pixels * c + targets * (64 + 3 * size**2)),
                "the second row at most half the third; the same output for "
                f"{100 * float(same.double().mean()):.2f} %",
            )
        )
    return cases


def search(device: str) -> list[Case]:
    """Graphs of clouds beside torch_cluster's, in float32, k = 9."""
    if not importable("torch_cluster"):
        return []
    torch_cluster, cases = require("torch_cluster", extra="cluster"), []
    for examples, n, dimension, wanted in CLOUDS:
        batch = torch.arange(examples, device=device).repeat_interleave(n)
        x = [(torch.rand(examples * n, dimension, device=device),) for _ in range(SETS)]
        dense = [(one[0].view(examples, n, dimension),) for one in x]
        functions: dict[str, Callable[[], object]] = {
            "torch_cluster.knn": in_turn(lambda x, b=batch: torch_cluster.knn(x, x, 9, b, b), x)
        }
        for engine in ("auto", "triton", "cells", "dense"):
            if dimension <= 3 if engine == "cells" else engine != "dense" or n < 2**15:
                functions[f"knn, {engine}"] = in_turn(
                    lambda x, engine=engine: knn(x, k=9, backend=engine, check=False).index, dense
                )
        peers = torch_cluster.knn(x[0][0], x[0][0], 9, batch, batch)[1].view(examples, n, 9)
        start = torch.arange(examples, device=device)[:, None, None] * n
        found = knn(dense[0][0], k=9, backend="triton").index + start
        same = (found.sort(-1).values == peers.sort(-1).values).all(-1).double().mean()
        cases.append(
            Case(
                f"{examples} x {n} points, {dimension} dimensions, k = 9",
                functions,
                2 * examples * n * n * dimension if dimension > 3 else 0,
                examples * n * (4 * dimension + 12 * 9),
                f"ratio at most 1 / {wanted:g} = {1 / wanted:.3f}; the same neighbours for "
                f"{100 * float(same):.2f} % of points",
            )
        )
    return cases


def unequal_clouds(device: str) -> list[Case]:
    """The same of clouds of unequal size, named by a batch vector, in one launch."""
    if not importable("torch_cluster"):
        return []
    torch_cluster, cases = require("torch_cluster", extra="cluster"), []
    sizes = torch.randint(512, 1537, (32,), generator=torch.Generator().manual_seed(0))
    batch = torch.arange(32, device=device).repeat_interleave(sizes.to(device))
    for dimension in (3, 64):
        x = [(torch.rand(len(batch), dimension, device=device),) for _ in range(SETS)]
        pairs, squares = len(batch) * 9, float((sizes.double() ** 2).sum())
        cases.append(
            Case(
                f"32 clouds of 512 to 1536 points, {dimension} dimensions, k = 9",
                {
                    "torch_cluster.knn": in_turn(
                        lambda x: torch_cluster.knn(x, x, 9, batch, batch), x
                    ),
                    "knn, auto": in_turn(
                        lambda x: knn(x, k=9, batch_x=batch, check=False).index, x
                    ),
                },
                2 * squares * dimension if dimension > 3 else 0,
                len(batch) * 4 * dimension + 12 * pairs,
                "none asked; a batch vector is looked at by the host",
            )
        )
    return cases


def ceilings(device: str) -> tuple[float, float]:
    """Bytes a second of a copy, and operations a second of a product in bfloat16."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    a = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    copy, product = compare(
        {"copy": lambda: target.copy_(source), "product": lambda: a[0] @ a[1]}, 5, 0.1, device
    )
    return 2 * source.numel() * 4 / copy.median, 2 * 8192**3 / product.median


def show(case: Case, device: str, most: tuple[float, float]) -> None:
    """A table in Markdown with ratios, floor, what is achieved of it, memory and the host."""
    floor = max(case.moved / most[0], case.operations / most[1])
    print(f"\n### {case.title}\n")
    print("| | median ms | p10 | p90 | ratio | floor ms | GB/s | added MiB | host µs | syncs |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for timing in compare(case.functions, rounds=9, seconds=0.02, device=device):
        function = case.functions[timing.name]
        host, syncs = ("-", "-")
        if device == "cuda":
            host, syncs = f"{1e6 * host_time(function, 20):.0f}", str(count_syncs(function))
        print(
            f"| {timing.name} | {1e3 * timing.median:.3f} | {1e3 * timing.p10:.3f} | "
            f"{1e3 * timing.p90:.3f} | {timing.ratio:.3g} | {1e3 * floor:.3f} | "
            f"{case.moved / timing.median / 1e9:.0f} | {timing.memory:.0f} | {host} | {syncs} |",
            flush=True,
        )
    print(f"\nClaim: {case.claim}. Host time at most 40 µs, no syncs.")


def check() -> bool:
    """The tests of the kernels, compiled; then a few under compute-sanitizer, where that is.

    Whether all passed.
    """
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests"]
    tests += ["-m", "triton"]
    beside = ["-p", "no:benchmark", "-n", "auto"] if importable("xdist") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    runs = {"the kernels' tests, compiled": [*tests, *beside]}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        few = "ties_go_to or fixed_order or causal or outside or all_choose or lists_cannot_hold"
        few += " or offsets_are"
        runs["a few of them under compute-sanitizer"] = [
            *(sanitizer, "--error-exitcode=1", "--target-processes=all", *tests, "-k", few)
        ]
    passed = True
    for name, command in runs.items():
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        said = "; ".join([*failed, lines[-1] if lines else "no output"])
        print(f"\n{name}: {'passed' if done.returncode == 0 else 'FAILED'}: {said}", flush=True)
        passed = passed and done.returncode == 0
    return passed


def main() -> int:
    """What the shell is told: 0 unless a test failed."""
    if not torch.cuda.is_available():
        print(f"{machine()}\n\n{AWAITS}")
        return 0
    torch.manual_seed(0)
    most = ceilings("cuda")
    print(
        f"{machine()}\n\nGPU: {machine('cuda')}. Ceilings: {most[0] / 1e12:.2f} TB/s copied, "
        f"{most[1] / 1e12:.0f} TFLOP/s in bfloat16."
    )
    for make in (
        lambda: attention("cuda", torch.bfloat16),
        lambda: convolution("cuda", torch.bfloat16),
        lambda: search("cuda"),
        lambda: unequal_clouds("cuda"),
        lambda: interpolated("cuda"),
    ):
        for case in make():
            show(case, "cuda", most)
    return 0 if check() else 1


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())
