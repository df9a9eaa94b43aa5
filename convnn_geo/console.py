"""The terminal: tables, by rich where it is installed, in plain text otherwise, and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from convnn_geo.extras import MissingExtraError, require

_WIDE = 160
Tick = Callable[[str, int, int], None]
"""Called with what is done now, how much of all is done, and all."""


@contextmanager
def progress(name: str) -> Iterator[Tick]:
    """A bar on standard error while something goes on; none where rich is not installed."""
    try:
        bars = require("rich.progress", extra="viz")
        console = require("rich.console", extra="viz").Console(stderr=True)
    except MissingExtraError:
        yield lambda what, done, total: None
        return
    columns = (
        bars.TextColumn("{task.description:<34}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    bar = bars.Progress(*columns, console=console)
    shown = bar.add_task(name, total=1)

    def tick(what: str, done: int, total: int) -> None:
        bar.start()  # not before: what is refused at once needs no bar
        label = f"{name}: {what}" if what else name
        bar.update(shown, description=label, completed=done, total=total)

    try:
        yield tick
        tick("", bar.tasks[0].total, bar.tasks[0].total)
    finally:
        if bar.live.is_started:
            bar.stop()


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    marked: Collection[int] = (),
) -> None:
    """Print a table.

    Args:
        title: above it.
        columns: their names.
        rows: cells as text, one a column.
        marked: numbers of rows to be shown in red, or with a ``!`` in plain text.
    """
    try:
        table_module = require("rich.table", extra="viz")
        console_module = require("rich.console", extra="viz")
    except MissingExtraError:
        print(plain_table(title, columns, rows, marked))
        return
    table = table_module.Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*row, style="red" if number in marked else None)
    # A file has no width: don't fold what is written to one.
    console_module.Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def plain_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    marked: Collection[int] = (),
) -> str:
    """The same as text.

    Example:
        >>> print(plain_table("Errors", ["recipe", "error"], [["conv2d", "1e-15"]]))
        Errors
          recipe  error
          conv2d  1e-15
    """
    columns = [column.replace("\n", " ") for column in columns]
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    lines = [title]
    for number, row in enumerate((columns, *rows), start=-1):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(("! " if number in marked else "  ") + cells.rstrip())
    return "\n".join(lines)
