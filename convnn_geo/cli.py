"""The command line: verify, demo, show, train, experiment, bench."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from convnn_geo import __version__
from convnn_geo.extras import MissingExtraError

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_EXAMPLES = """\
examples:
  python -m convnn_geo verify                     every recipe against its peer
  python -m convnn_geo verify --recipe kvt --recipe conv2d --json errors.json
  python -m convnn_geo demo                       pictures, training and a report in runs/demo
  python -m convnn_geo show --out spectrum.png    neighbours of three pixels of a photograph
  python -m convnn_geo show --image photo.png --pixel 40,60 --spectrum 5 --out spectrum.png
  python -m convnn_geo train --model vgg11 --layer branching --data digits --epochs 2
  python -m convnn_geo experiment branching_ratio --quick
  python -m convnn_geo bench graph --quick        search engines, side by side, in runs/bench/graph
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        0 where all is well, 1 where a check failed, 2 for input that can't be used.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    asked = next((word for word in given if not word.startswith("-")), "")
    try:
        return _run(_parsed(asked, given))
    except (InputError, MissingExtraError, OSError) as error:
        print(f"convnn-geo {asked}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class InputError(ValueError):
    """What the user gave can't be used; the message says why."""


def _parsed(asked: str, given: Sequence[str]) -> argparse.Namespace:
    """The arguments; for those that are unknown the usage of the command, and what is like them."""
    parser, commands = _parsers(asked)
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        command = commands.choices[arguments.name]
        flags = re.findall(r"--[\w-]+", command.format_usage())
        names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        close = [flag for name in names for flag in difflib.get_close_matches(name, flags, 1)]
        hint = f"; did you mean {' and '.join(close)}?" if close else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    for name, value in vars(arguments).items():
        if isinstance(value, Path):  # the shell leaves --out=~/x as it is
            setattr(arguments, name, Path(os.path.expanduser(value)))
    return int(arguments.command(arguments))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())


def _parsers(asked: str) -> tuple[argparse.ArgumentParser, _Commands]:
    """The command line and its commands.

    Of commands in modules of their own, the one asked for is complete. The others are names with a
    line of help, so that none needs, or waits for, what another imports.
    """
    parser = argparse.ArgumentParser(
        prog="convnn-geo",
        description="Convolution, attention and what lies between, as one operator.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"convnn-geo {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="name", metavar="COMMAND", required=True
    )
    _add_verify(commands)
    _add_demo(commands)
    _add_show(commands)
    for name, (add, text) in _GROUPS.items():
        if name == asked:
            add(commands)
        else:
            commands.add_parser(name, help=text)
    return parser, commands


def _add_train(commands: _Commands) -> None:
    from convnn_geo.train.commands import add_train

    add_train(commands)


def _add_experiment(commands: _Commands) -> None:
    from convnn_geo.experiments.commands import add_experiment

    add_experiment(commands)


def _add_bench(commands: _Commands) -> None:
    from convnn_geo.bench.commands import add_bench

    add_bench(commands)


_GROUPS: dict[str, tuple[Callable[[_Commands], None], str]] = {
    "train": (_add_train, "train a model, and score it over seeds"),
    "experiment": (_add_experiment, "one of the paper's questions, asked of small models"),
    "bench": (_add_bench, "measure search engines and layers on this machine"),
}


def _add_verify(commands: _Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare every recipe with its peer",
        description="Compare outputs and all gradients of every recipe, on every backend, with "
        "the layer that it stands for. Exit 1 if an error exceeds its bound.",
    )
    parser.add_argument("--recipe", action="append", metavar="NAME", help="only this; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every check to FILE")
    parser.add_argument(
        "--golden", type=Path, metavar="DIR", help="check the numeric cases DIR/*.npz, too"
    )
    parser.set_defaults(command=_verify)


def _add_demo(commands: _Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="verify, draw, train along the spectrum, and write a report",
        description="On real data that ships with packages: verify every recipe, draw neighbours "
        "on a photograph, train on digits as images and as point clouds at five points of the "
        "spectrum, and write a report. Takes about 75 seconds on two idle CPU cores.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each network (%(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed and little data: to see that it works"
    )
    parser.set_defaults(command=_demo)


def _add_show(commands: _Commands) -> None:
    parser = commands.add_parser(
        "show",
        help="draw the neighbours of pixels of a picture",
        description="Draw the nearest neighbours of pixels by (1 - λ) times the distance of "
        "positions plus λ times the distance of features, from λ = 0 to λ = 1. Ties go to the "
        "lowest index, counted row by row: in a flat region, where many pixels are at the same "
        "distance, the starred pixel itself may not be among its nearest.",
        epilog="example: convnn-geo show --image photo.png --pixel 40,60 --pixel 10,200 "
        "--spectrum 5 --out spectrum.png",
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture; by default one that is shipped"
    )
    parser.add_argument(
        "--pixel",
        action="append",
        metavar="ROW,COLUMN",
        help="whose neighbours; repeatable, the picture's middle by default",
    )
    parser.add_argument(
        "--spectrum",
        type=int,
        default=5,
        metavar="N",
        help="values of λ, from 0 to 1 (%(default)s)",
    )
    parser.add_argument("--k", type=int, default=81, help="neighbours a pixel (%(default)s)")
    parser.add_argument(
        "--width", type=int, default=128, help="search on a copy this wide (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("spectrum.png"),
        metavar="FILE",
        help="the picture to write, in any format that matplotlib writes (%(default)s)",
    )
    parser.set_defaults(command=_show)


def _verify(arguments: argparse.Namespace) -> int:
    from convnn_geo import verify
    from convnn_geo.console import progress
    from convnn_geo.demo.errors import print_errors, save_errors

    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json: there is no folder {arguments.json.parent}")
    golden = []
    if arguments.golden is not None:
        try:
            golden = verify.golden(arguments.golden)
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"--golden: {error}") from error
    try:
        with progress("verify") as tick:
            rows = [*verify.run(arguments.recipe, tick), *golden]
    except ValueError as error:
        raise InputError(error) from error
    print_errors(rows)
    if arguments.json is not None:
        save_errors(rows, arguments.json)
    return 0 if all(row.passed for row in rows) else 1


def _demo(arguments: argparse.Namespace) -> int:
    from convnn_geo.demo import run

    if arguments.seeds < 1:
        raise InputError(f"--seeds: expected at least 1, got {arguments.seeds}")
    done = run(arguments.out, arguments.seeds, arguments.quick)
    print(f"The report is at {done.report}")
    return 0 if done.passed else 1


def _show(arguments: argparse.Namespace) -> int:
    from convnn_geo.demo.show import show

    try:
        pixels = [_pixel(text) for text in arguments.pixel or ()]
        show(
            arguments.out,
            arguments.image,
            pixels,
            arguments.spectrum,
            arguments.k,
            arguments.width,
        )
    except ValueError as error:
        raise InputError(error) from error
    print(f"The picture is at {arguments.out}")
    return 0


def _pixel(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise InputError(f"--pixel: expected ROW,COLUMN such as 40,60, got {text!r}") from None
    return row, column
