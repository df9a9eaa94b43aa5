"""``convnn-geo bench graph`` and ``convnn-geo bench layers``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from convnn_geo import search
from convnn_geo.bench import calibrate, graph, inputs, layers, peer, pictures, tables
from convnn_geo.bench.arguments import counts, device, duration, names_among
from convnn_geo.bench.cells import run
from convnn_geo.bench.machine import machine, other_work
from convnn_geo.bench.worker import Worker
from convnn_geo.extras import require
from convnn_geo.metrics import metric_names
from convnn_geo.search import costs

_FULL: dict[str, dict[str, Any]] = {
    "graph": {
        "metric": ["euclidean", "cosine", "mixed"],
        "input": inputs.input_names(),
        "n": [1024, 16384, 100_000],
        "dim": [2, 3, 64, 192],
        "k": [9, 16, 40],
        "batch": [1, 32],
        "limit": 20.0,
    },
    "layers": {
        "input": inputs.input_names(),
        "n": [256, 1024, 4096],
        "dim": [3, 64],
        "batch": [1, 32],
        "limit": 20.0,
    },
}
_QUICK: dict[str, dict[str, Any]] = {
    "graph": {
        "metric": ["euclidean", "cosine"],
        "input": ["random", "photograph"],
        "n": [1024, 4096],
        "dim": [3, 64],
        "k": [9],
        "batch": [1],
        "limit": 5.0,
    },
    "layers": {
        "input": ["random", "photograph"],
        "n": [256, 1024],
        "dim": [64],
        "batch": [4],
        "limit": 5.0,
    },
}
_INTERRUPTED = 130
"""What a shell calls a program that Ctrl-C ended."""
_QUICK_BUDGET, _QUICK_PREPARING = 80.0, 10.0
"""Seconds: what is not asked by then is left out, and what compiles itself for longer."""


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` and what it measures to the command line."""
    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure search engines and layers on this machine",
        description="Measure search engines or layers beside those of other packages. Prints "
        "tables, writes results.csv and results.json, and draws.",
    )
    _add_calibrate(bench, False)
    bench.set_defaults(command=partial(_calibrate_or_help, bench), device="cpu")
    kinds = bench.add_subparsers(title="what to measure", dest="bench")
    _add_graph(kinds)
    _add_layers(kinds)


def _add_graph(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "graph",
        allow_abbrev=False,
        help="search engines",
        description="Time, memory and recall of search engines. A call that takes over --limit "
        "is ended, and larger questions to the same engine are left out.",
    )
    parser.add_argument(
        "--engines",
        type=names_among("engine", ["all", "auto", peer.NAME, *search.ENGINES]),
        default=["all"],
        metavar="NAMES",
        help=f"all: those installed and {peer.NAME}, the package itself; auto: what it chooses",
    )
    known = ["mixed", *metric_names()]
    _add(
        parser,
        "metric",
        names_among("metric", known),
        "NAMES",
        "mixed: 0.3 squared position + 0.7 cosine",
    )
    _add_common(parser, "graph")
    _add(parser, "k", counts, "NUMBERS", "neighbours")
    _add_calibrate(parser, argparse.SUPPRESS)
    parser.set_defaults(command=_graph)


def _add_calibrate(parser: argparse.ArgumentParser, default: Any) -> None:
    """What ``bench`` and ``bench graph`` share; the latter's default keeps what the former saw."""
    parser.add_argument(
        "--calibrate",
        action="store_true",
        default=default,
        help="measure what backend='auto' chooses by, and keep it in the user's cache",
    )
    parser.add_argument(
        "--budget",
        type=duration,
        default=default or 480.0,
        metavar="SECONDS",
        help="of --calibrate (480)",
    )


def _add_layers(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "layers",
        allow_abbrev=False,
        help="layers, forward and backward",
        description="Time and memory of layers beside nn.Conv2d, scaled_dot_product_attention "
        "and PyG's layers.",
    )
    parser.add_argument(
        "--layers",
        type=names_among("family of layers", layers.families()),
        default=layers.families(),
        metavar="NAMES",
        help=f"among {', '.join(layers.families())}; all by default",
    )
    _add_common(parser, "layers")
    parser.set_defaults(command=_layers)


def _add_common(parser: argparse.ArgumentParser, name: str) -> None:
    known = inputs.input_names()
    _add(parser, "input", names_among("input", known), "NAMES", f"among {', '.join(known)}")
    _add(parser, "n", counts, "NUMBERS", "points")
    _add(parser, "dim", counts, "NUMBERS", "features of a point")
    _add(parser, "batch", counts, "NUMBERS", "examples")
    _add(parser, "limit", duration, "SECONDS", "of a call")
    parser.add_argument(
        "--device", type=device, default="cpu", metavar="DEVICE", help="cpu or cuda (%(default)s)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer and smaller by default; ends within two minutes",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench", name), metavar="DIR", help="%(default)s"
    )


def _add(
    parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], what: str, text: str
) -> None:
    """An option whose default depends on --quick."""
    parser.add_argument(f"--{name}", type=kind, metavar=what, help=text)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is to be measured: as given, or by default."""
    defaults = _FULL[arguments.bench]
    if arguments.quick:
        defaults = {**defaults, **_QUICK[arguments.bench]}
    given = {name: getattr(arguments, name) for name in defaults}
    return {
        name: default if given[name] is None else given[name] for name, default in defaults.items()
    }


def _calibrate_or_help(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if not arguments.calibrate:
        parser.error("expected what to measure, graph or layers, or --calibrate")
    return _calibrate(arguments)


def _graph(arguments: argparse.Namespace) -> int:
    if arguments.calibrate:
        return _calibrate(arguments)
    chosen = _settings(arguments)
    engines = [name for entry in arguments.engines for name in _engines(entry)]
    todo = graph.cells(
        list(dict.fromkeys(engines)),
        chosen["metric"],
        chosen["input"],
        chosen["n"],
        chosen["dim"],
        chosen["k"],
        chosen["batch"],
        device=arguments.device,
        seconds=0.05 if arguments.quick else 0.5,
    )
    results = _measure(arguments, graph.measure, graph.Result, todo, chosen, graph.engine_of)
    tables.print_graph(results)
    _finish(arguments, results, {"engines": engines, **chosen}, pictures.draw_graph)
    return 0 if len(results) == len(todo) else _INTERRUPTED


def _layers(arguments: argparse.Namespace) -> int:
    chosen = _settings(arguments)
    todo = layers.cells(
        arguments.layers,
        chosen["input"],
        chosen["n"],
        chosen["dim"],
        chosen["batch"],
        device=arguments.device,
        seconds=0.2 if arguments.quick else 0.5,
    )
    results = _measure(arguments, layers.measure, layers.Result, todo, chosen)
    tables.print_layers(results)
    _finish(arguments, results, {"layers": arguments.layers, **chosen}, pictures.draw_layers)
    return 0 if len(results) == len(todo) else _INTERRUPTED


def _calibrate(arguments: argparse.Namespace) -> int:
    todo = calibrate.cells(arguments.device)
    _warn()
    with _progress("calibrate", len(todo)) as tick:
        rows = calibrate.calibrate(arguments.device, arguments.budget, tick, todo)
    print(f"{len(rows)} of {len(todo)} cells measured; the table is at {costs.save(rows)}")
    return 0


def _engines(name: str) -> list[str]:
    if name != "all":
        return [name]
    if peer.installed():
        return [*search.engines(), peer.NAME]
    hint = "pip install --no-build-isolation 'convnn-geo[cluster]'"
    print(f"note: without torch_cluster there are no ratios to it: {hint}", file=sys.stderr)
    return search.engines()


def _measure(
    arguments: argparse.Namespace,
    measure: Callable[[Any], Iterator[Any]],
    failed: Callable[[Any, str], Any],
    todo: Sequence[Any],
    chosen: dict[str, Any],
    apart: Callable[[Any], object] = lambda cell: None,
) -> list[Any]:
    """All cells in turn, with a bar; the folder and what draws are looked for before.

    Ctrl-C ends it with the results so far.
    """
    require("matplotlib.figure", extra="viz")
    if not todo:
        raise SystemExit(
            "nothing to measure: no input has so many points of that dimension, or k is over n"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(machine(arguments.device))
    _warn()
    budget, preparing = math.inf, 180.0
    if arguments.quick:
        budget, preparing = _QUICK_BUDGET, _QUICK_PREPARING
    results: list[Any] = []
    with (
        Worker(measure, chosen["limit"], preparing, arguments.device, apart) as worker,
        _progress(arguments.bench, len(todo)) as tick,
    ):

        def done(result: Any) -> None:
            results.append(result)
            tick(result)

        try:
            run(todo, worker.ask, failed, done, budget)
        except KeyboardInterrupt:  # hours may be behind it
            if not results:
                raise
            print(f"interrupted after {len(results)} of {len(todo)}", file=sys.stderr)
    return results


def _warn() -> None:
    """Say so where times will not be this machine's best."""
    found = other_work()
    if found is not None:
        print(f"note: {found}", file=sys.stderr)


def _finish(
    arguments: argparse.Namespace,
    results: Sequence[Any],
    settings: dict[str, Any],
    draw: Callable[[Sequence[Any], Path, float], list[Path]],
) -> None:
    tables.save(arguments.out, results, settings, arguments.device)
    drawn = draw(results, arguments.out, settings["limit"])
    print(f"{arguments.out} has results.csv, results.json and {len(drawn)} pictures")


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[Any], None]]:
    """A bar that moves by one with each result and names the cell."""
    progress = require("rich.progress", extra="viz")
    columns = (
        progress.TextColumn(name),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns) as bar:
        shown = bar.add_task("", total=total)

        def tick(result: Any) -> None:
            cell = result.cell
            what = getattr(cell, "engine", None) or cell.layer
            bar.update(shown, advance=1, description=f"{what}, {cell.input}, n = {cell.n}")

        yield tick
