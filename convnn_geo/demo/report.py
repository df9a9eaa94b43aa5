"""The page that a person opens: what was run, what came out, and what it does and does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from convnn_geo.demo.errors import COLUMNS as ERROR_COLUMNS
from convnn_geo.demo.errors import error_table, verdict
from convnn_geo.demo.summary import Score, percent
from convnn_geo.verify import Row

COLUMNS = ("network", "parameters", "learning rate", "validation (%)", "test (%)")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } img { max-width: 100%; }
.lead { color: #57606a; margin-top: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; } tr.failed { color: #c00; }
summary { cursor: pointer; } dt { font-weight: 600; float: left; clear: left; width: 10rem; }
dd { margin-left: 10.5rem; }
"""


@dataclass(frozen=True)
class Section:
    """One experiment on the page.

    Args:
        title: of the section.
        what: was run, in words.
        pictures: files beside the page, and what each shows.
        scores: of the networks; none where nothing was trained.
        sentences: what the scores show.
    """

    title: str
    what: str
    pictures: Sequence[tuple[str, str]]
    scores: Sequence[Score] = ()
    sentences: Sequence[str] = ()


def write_report(
    path: Path, rows: Sequence[Row], sections: Sequence[Section], facts: dict[str, str]
) -> None:
    """Write the page; pictures are looked for beside it.

    Args:
        path: of the page.
        rows: of :func:`convnn_geo.verify.run`.
        sections: experiments, in order.
        facts: versions, processor, times: what is listed at the end.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>convnn_geo: demonstration</title><style>{_STYLE}</style>",
        "<h1>convnn_geo: demonstration</h1>",
        '<p class="lead">Convolution, attention and what lies between, as one operator: '
        "choose neighbours, weigh them, combine them.</p>",
        *(_section(section) for section in sections),
        _errors(rows),
        "<h2>How it was run</h2>",
        "<dl>",
        *(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()),
        "</dl>",
        "<p>Every epoch of every run is in <a href='metrics.csv'>metrics.csv</a>, the settings in "
        "<a href='config.json'>config.json</a>.</p></html>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.what)}</p>"]
    parts += [
        f'<p><img src="{escape(file)}" alt="{escape(shows)}"></p>'
        for file, shows in section.pictures
    ]
    if section.scores:
        parts.append(_table(COLUMNS, [score_cells(score) for score in section.scores]))
    if section.sentences:
        parts.append(f"<p>{escape(' '.join(section.sentences))}</p>")
    return "\n".join(parts)


def score_cells(score: Score) -> list[str]:
    """A score as cells by :data:`COLUMNS`."""
    return [
        score.network,
        f"{score.parameters}",
        f"{score.rate:g}",
        percent(score.validation),
        percent(score.test),
    ]


def _errors(rows: Sequence[Row]) -> str:
    lines, failed = error_table(rows)
    table = _table(ERROR_COLUMNS, lines, failed)
    return (
        "<h2>Is it exact?</h2><p>Each recipe is compared with the layer that it stands for, or "
        "with a double loop where there is none: the output and all gradients, on every backend "
        f"that can run it. {escape(verdict(rows))}.</p>"
        f"<details{' open' if failed else ''}><summary>Worst absolute error of each recipe"
        f"</summary>{table}</details>"
    )


def _table(
    columns: Sequence[str], lines: Sequence[Sequence[str]], failed: set[int] | None = None
) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        f"<tr{' class=failed' if failed and number in failed else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>"
        for number, line in enumerate(lines)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
