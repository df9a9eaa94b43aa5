"""What arguments of the command line are made of, and one line for what they can't be."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from convnn_geo.checks import check_int, check_name, check_number


def names_among(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """Parses names with commas between.

    Example:
        >>> names_among("fruit", ["apple", "pear"])("pear,apple")
        ['pear', 'apple']
    """

    def names(text: str) -> list[str]:
        try:
            return [check_name(what, name.strip(), known) for name in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return names


def counts(text: str) -> list[int]:
    """Parses numbers with commas between.

    Example:
        >>> counts("1,32")
        [1, 32]
    """
    try:
        return list(dict.fromkeys(check_int("count", int(number)) for number in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected counts such as 1,32, got {text!r}") from None


def device(text: str) -> str:
    """The name of a device that is there.

    Example:
        >>> device("cpu")
        'cpu'
    """
    if text != "cpu" and text.partition(":")[0] != "cuda":
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here; take --device cpu")
    return text


def duration(text: str) -> float:
    """Parses a positive number of seconds.

    Example:
        >>> duration("2.5")
        2.5
    """
    try:
        return check_number("seconds", float(text), exclusive=True)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}") from None
