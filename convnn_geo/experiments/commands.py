"""``convnn-geo experiment``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from functools import partial
from pathlib import Path

from convnn_geo.checks import check_int, check_name
from convnn_geo.console import print_table
from convnn_geo.train import ConfigError, DivergedError


def add_experiment(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``experiment`` to the command line."""
    parser = commands.add_parser(
        "experiment",
        help="one of the paper's questions, asked of small models",
        description="Train a grid of small models on data that ship with packages, and write a "
        "table, a picture beside the published curve and what was seen: OUT/NAME.md, .csv and "
        ".png. Runs are kept in OUT/runs: a second call goes on where the first was stopped.",
        epilog="example: convnn-geo experiment branching_ratio --quick",
    )
    parser.add_argument("experiment", nargs="?", metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, an epoch or so, few settings"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="VGG-11 and ViT-Tiny whole, on MNIST and patches of 32 x 32 pixels: for a GPU",
    )
    parser.add_argument(
        "--data-root", default="data", metavar="DIR", help="of --full: has MNIST (%(default)s)"
    )
    parser.add_argument("--download", action="store_true", help="of --full: MNIST, if not there")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/experiment, with --quick runs/quick"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of a setting (3; 1 if quick)")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="processes, a thread each; the numbers do not depend on it (%(default)s)",
    )
    parser.set_defaults(command=_experiment)


def _experiment(arguments: argparse.Namespace) -> int:
    from convnn_geo.experiments import EXPERIMENTS

    if arguments.list:
        listed = [[each.name, each.question] for each in EXPERIMENTS.values()]
        print_table("Experiments", ["name", "asks"], listed)
        return 0
    try:
        _run(arguments)
    except (ConfigError, DivergedError, FileNotFoundError) as error:
        print(f"convnn-geo experiment: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DivergedError) else 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    import torch

    from convnn_geo.experiments import EXPERIMENTS, report, run
    from convnn_geo.experiments.full_size import at_full_size
    from convnn_geo.experiments.summary import Row, paragraphs

    quick, name = arguments.quick, arguments.experiment
    try:
        if name is None:
            raise ValueError(f"expected the NAME of one: {', '.join(EXPERIMENTS)}")
        experiment = EXPERIMENTS[check_name("experiment", name, EXPERIMENTS)]
        if arguments.full:
            experiment = at_full_size(experiment, arguments.data_root, quick, arguments.download)
            if not torch.cuda.is_available():
                print(
                    "convnn-geo experiment: warning: --full is sized for a GPU and this machine "
                    "has none: expect it to be very slow",
                    file=sys.stderr,
                )
        seeds = (1 if quick else 3) if arguments.seeds is None else arguments.seeds
        check_int("--seeds", seeds)
        workers = check_int("--workers", arguments.workers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    out = arguments.out or Path("runs", "quick" if quick else "experiment")
    began = time.perf_counter()
    print(experiment.question, flush=True)
    tell = partial(print, flush=True)
    found = run(experiment, out / "runs" / experiment.name, seeds, quick, workers, tell)
    rows = [Row(*each) for each in found]
    command = f"convnn-geo experiment {name} --seeds {seeds}" + " --quick" * quick
    command += f" --full --data-root {arguments.data_root}" * arguments.full
    path = report.write_report(experiment, rows, out, command)
    print_table(experiment.title, report.head(experiment, rows), [report.cells(r) for r in rows])
    for paragraph in paragraphs(experiment, rows):
        print(paragraph)
    print(f"{path}, with a picture and every run, after {time.perf_counter() - began:.0f} s")
