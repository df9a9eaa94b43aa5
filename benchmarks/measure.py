"""What every benchmark here shares: side by side in one run, warmed up, medians, ratios, memory."""

from __future__ import annotations

import itertools
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch_geometric
from torch import Tensor
from torch.utils.benchmark import Timer

import convnn_geo


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, median and tenth percentiles, and the memory it added, in MiB."""

    name: str
    median: float
    p10: float
    p90: float
    memory: float


def machine() -> str:
    """The machine and the versions that the numbers belong to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return (
        f"{device}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torch_geometric {torch_geometric.__version__}, "
        f"convnn_geo {convnn_geo.__version__}"
    )


def compare(
    functions: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.05
) -> list[Timing]:
    """Time functions in turns, so that what disturbs one disturbs all.

    Args:
        functions: by name; the first is what ratios are taken to.
        rounds: of measuring each function once.
        seconds: that one measurement takes at least.
    """
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
        for name, f in functions.items()
    }
    memory = {name: added_memory(f) for name, f in functions.items()}
    loops = {}
    for name, timer in timers.items():
        timer.timeit(2)  # warm-up
        once = timer.timeit(1).median
        loops[name] = max(1, int(seconds / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(loops[name]).median)
    result = []
    for name, times in samples.items():
        tenths = statistics.quantiles(times, n=10)
        result.append(Timing(name, statistics.median(times), tenths[0], tenths[-1], memory[name]))
    return result


def added_memory(function: Callable[[], object]) -> float:
    """MiB by which one call raises the peak: of the device, or of the process, sampled."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/statm")
    if not status.exists():
        return float("nan")
    page = 4096 / 2**20
    function()
    before = int(status.read_text().split()[1]) * page
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, int(status.read_text().split()[1]) * page)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return peak - before


def report(title: str, timings: list[Timing], bound: str) -> None:
    """Print a table with ratios to the first row."""
    base = timings[0].median
    print(f"\n### {title}\n")
    print("| | median ms | p10 | p90 | ratio | added MiB |")
    print("|---|---|---|---|---|---|")
    for t in timings:
        print(
            f"| {t.name} | {t.median * 1e3:.3f} | {t.p10 * 1e3:.3f} | {t.p90 * 1e3:.3f} | "
            f"{t.median / base:.2f} | {t.memory:.0f} |"
        )
    print(f"\n{bound}")


def forward_and_backward(
    title: str,
    functions: dict[str, Callable[[Tensor], Tensor]],
    inputs: list[Tensor],
    claim: str,
    rounds: int = 15,
) -> None:
    """Compare functions of one tensor on inputs in turn: forward alone, then with backward."""
    turn = itertools.cycle(inputs)

    def forward(function: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            function(next(turn))

    def both(function: Callable[[Tensor], Tensor]) -> None:
        function(next(turn).requires_grad_()).sum().backward()

    for name, run in (("forward", forward), ("forward and backward", both)):
        timings = compare({n: partial(run, f) for n, f in functions.items()}, rounds)
        report(f"{title}, {name}", timings, claim)
