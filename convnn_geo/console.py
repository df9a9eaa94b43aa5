"""Tables for the terminal: by rich where it is installed, in plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from convnn_geo.extras import MissingExtraError, require

_WIDE = 160


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
