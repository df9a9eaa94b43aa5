"""The page that a person opens: what was run, what came out, and what it does and does not show."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
h1 { margin-bottom: 0; } h2 { margin: 2.5rem 0 .5rem; } .lead { color: #57606a; margin-top: .3rem; }
figure { margin: 1.2rem 0; } figure img { display: block; max-width: 100%; margin: 0 auto; }
figcaption, caption { color: #57606a; font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; }
thead th { border-bottom: 2px solid #8c959f; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } .failed { color: #c00; }
summary { cursor: pointer; } code { background: #f3f5f7; padding: .1rem .3rem; }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: .15rem 1rem; background: #f6f8fa;
     padding: .8rem 1rem; } dt { font-weight: 600; } dd { margin: 0; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Args:
        file: beside the page.
        caption: what it shows.
    """

    file: str
    caption: str


@dataclass(frozen=True)
class Section:
    """One experiment on the page.

    Args:
        title: of the section.
        what: was run, in words.
        pictures: of what came out.
        scores: of the networks; none where nothing was trained.
        said: sentences on what came out, the most important one first.
    """

    title: str
    what: str
    pictures: Sequence[Picture]
    scores: Sequence[Score] = ()
    said: Sequence[str] = ()


def write_report(
    path: Path, rows: Sequence[Row], sections: Sequence[Section], facts: dict[str, str]
) -> None:
    """Write the page; pictures are looked for beside it.

    Args:
        path: of the page.
        rows: of :func:`convnn_geo.verify.run`.
        sections: experiments, in order.
        facts: command, machine, versions, times.
    """
    seen = [(EXACT, f"{verdict(rows)}."), *((s.title, s.said[0]) for s in sections if s.said)]
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>convnn_geo: demonstration</title><style>{_STYLE}</style>",
        "<h1>convnn_geo: demonstration</h1>",
        '<p class="lead">Convolution, attention and what lies between, as one operator: '
        "choose neighbours, weigh them, combine them.</p>",
        "<h2>What was run</h2>",
        "<dl>",
        *(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()),
        "</dl>",
        "<p>Every epoch of every run is in <a href='metrics.csv'>metrics.csv</a>, the settings in "
        "<a href='config.json'>config.json</a>.</p>",
        "<h2>What was seen</h2>",
        "<ul>",
        *(
            f'<li><a href="#{_anchor(title)}">{escape(title)}</a> {_text(sentence)}</li>'
            for title, sentence in seen
        ),
        "</ul>",
        *(_section(section) for section in sections),
        _errors(rows),
        "</html>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


EXACT = "Is it exact?"


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")


def _text(text: str) -> str:
    """Escaped, and without line breaks inside ``λ = 0.5`` and ``90.1 ± 0.4 %``."""
    for kept in ("λ = ", " ± ", " %"):
        text = text.replace(kept, kept.replace(" ", "\N{NO-BREAK SPACE}"))
    return escape(text)


def _heading(title: str) -> str:
    return f'<h2 id="{_anchor(title)}">{escape(title)}</h2>'


def _section(section: Section) -> str:
    parts = [_heading(section.title), f"<p>{_text(section.what)}</p>"]
    parts += [
        f'<figure><img src="{escape(picture.file)}" alt="{escape(section.title)}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
        for picture in section.pictures
    ]
    if section.scores:
        cells = [score_cells(score) for score in section.scores]
        parts.append(_table(f"{section.title}: accuracies", COLUMNS, cells))
    parts += ["<ul>", *(f"<li>{_text(sentence)}</li>" for sentence in section.said), "</ul>"]
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
    title = "Worst absolute error of each recipe on each backend"
    table = _table(title, ERROR_COLUMNS, lines, failed)
    return (
        f"{_heading(EXACT)}<p>Each recipe is compared with the layer that it stands for, or "
        "with a double loop where there is none: the output and all gradients, on every backend "
        "that can run it.</p>"
        f"<p{' class=failed' if failed else ''}>{escape(verdict(rows))}.</p>"
        f"<details{' open' if failed else ''}><summary>The table</summary>{table}</details>"
    )


def _table(
    title: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    failed: Collection[int] = (),
) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        f"<tr{' class=failed' if number in failed else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>"
        for number, line in enumerate(lines)
    )
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}\n</tbody></table>"
    )
