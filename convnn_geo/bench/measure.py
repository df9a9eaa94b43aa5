"""What every benchmark shares: warm calls, samples and their percentiles, memory, ratios."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

_PAGE = 4096 / 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, median and tenth percentiles; what else was measured beside them.

    Args:
        name: of the function.
        median: of the seconds of a call.
        p10: their tenth percentile.
        p90: their ninetieth.
        ratio: to the first function's, each round by itself, then the median of rounds: what slows
            a whole round down, a machine's clock say, drops out.
        memory: that a call added, in MiB.
    """

    name: str
    median: float
    p10: float
    p90: float
    ratio: float
    memory: float


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, tenth and ninetieth percentile; of a single sample thrice that.

    Example:
        >>> percentiles([3.0])
        (3.0, 3.0, 3.0)
    """
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), tenths[0], tenths[-1]


def sample(function: Callable[[], object], seconds: float) -> list[float]:
    """Seconds a call, several times over: about ``seconds`` in all, or one call if that is slower.

    Args:
        function: what to time; called before, so that it is warm.
        seconds: to spend; short calls are repeated within each sample.

    Example:
        >>> all(time > 0 for time in sample(lambda: sum(range(1000)), seconds=0.01))
        True
    """
    return list(_timer(function).blocked_autorange(min_run_time=seconds).times)


def compare(
    functions: dict[str, Callable[[], object]],
    rounds: int = 15,
    seconds: float = 0.05,
    device: str = "cpu",
) -> list[Timing]:
    """Time functions in turns, so that what disturbs one disturbs all.

    Args:
        functions: by name; the first is what ratios are taken to.
        rounds: of measuring each function once.
        seconds: that one measurement takes at least.
        device: where they run.

    Example:
        >>> [t.name for t in compare({"sum": lambda: sum(range(99))}, rounds=2, seconds=0.001)]
        ['sum']
    """
    timers = {name: _timer(f) for name, f in functions.items()}
    memory = {name: added_memory(f, device) for name, f in functions.items()}
    loops = {}
    for name, timer in timers.items():
        timer.timeit(2)  # warm-up
        once = timer.timeit(1).median
        loops[name] = max(1, int(seconds / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(loops[name]).median)
    base = samples[next(iter(functions))]
    return [
        Timing(
            name,
            *percentiles(times),
            statistics.median(a / b for a, b in zip(times, base, strict=True)),
            memory[name],
        )
        for name, times in samples.items()
    ]


def _timer(function: Callable[[], object]) -> Timer:
    return Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())


@dataclass
class Memory:
    """MiB by which the peak rose; known once the block of :func:`watch_memory` is left."""

    added: float = float("nan")


@contextmanager
def watch_memory(device: str = "cpu") -> Iterator[Memory]:
    """Measure how far what happens inside raises memory: of the device, or of the process.

    The process's is sampled from ``/proc`` every half millisecond; NaN where there is none.
    """
    memory = Memory()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated()
        yield memory
        torch.cuda.synchronize()
        memory.added = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    status = Path("/proc/self/statm")
    if not status.exists():
        yield memory
        return
    gc.collect()
    _give_back()

    def resident() -> float:
        return int(status.read_text().split()[1]) * _PAGE

    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
    memory.added = max(peak, resident()) - before


def _give_back() -> None:
    """Hand freed memory back to the system, so that a call that needs it again is seen to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def added_memory(function: Callable[[], object], device: str = "cpu") -> float:
    """MiB by which one call raises the peak of the device, or of the process; the call is warm."""
    function()
    with watch_memory(device) as memory:
        function()
    return memory.added


def host_time(function: Callable[[], object], rounds: int = 5) -> float:
    """Seconds until a call returns, whether or not the GPU has finished; the median."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def count_syncs(function: Callable[[], object]) -> int:
    """How often a call waits for the GPU, as torch's debug mode sees it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def report(title: str, timings: list[Timing], bound: str) -> None:
    """Print a table in Markdown with ratios to the first row."""
    print(f"\n### {title}\n")
    print("| | median ms | p10 | p90 | ratio | added MiB |")
    print("|---|---|---|---|---|---|")
    for t in timings:
        print(
            f"| {t.name} | {t.median * 1e3:.3f} | {t.p10 * 1e3:.3f} | {t.p90 * 1e3:.3f} | "
            f"{t.ratio:.3g} | {t.memory:.0f} |"
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
