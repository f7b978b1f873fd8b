"""A report for people: Markdown and a page for the run folder, one screen for the terminal.

Names of classes, groups and attributes come from users. In Markdown and HTML they are escaped here, and only here; on
the terminal they are `Text`, which knows no markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from adaptclip import terminal
from adaptclip.reports.blocks import Block, Bullets, Cell, Figure, Gallery, Paragraph, Rows, one_line
from adaptclip.reports.document import document, screen
from adaptclip.reports.headline import JudgedGate as JudgedGate

if TYPE_CHECKING:
    from jinja2 import Template

_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "muted": "dim", "": ""}

_SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "none": "–"}
"""A sign and a word beside every colour."""


_WIDE = 50
"""Letters from which a cell holds sentences, which a narrow page sets below each other."""


def escape_markdown(text: str) -> str:
    """Makes a user's string literal in a Markdown table cell or line, HTML included."""
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", plain)


def _prose(text: str) -> str:
    """Escapes prose, and leaves an interval such as [71.2, 75.0] as it is."""
    return re.sub(r"\\\[([-+0-9., ]+)\\\](?!\()", r"[\1]", escape_markdown(text))


def to_markdown(report: Mapping[str, Any], verdicts: Sequence[JudgedGate] | None = None) -> str:
    """Renders a whole report as Markdown.

    Args:
        report: what `build_report` or `full_report` made.
        verdicts: what `check_gates` made; None leaves gates out, an empty list says that there were none.
    """
    made = document(report, verdicts)
    parts = [f"# {escape_markdown(made.title)}", escape_markdown(made.about)]
    if made.verdict is not None:
        verdict = "not judged" if made.verdict == "none" else made.verdict
        parts.append(f"**{verdict}**: {_prose(made.verdict_words)}")
    numbers = [tuple(map(_prose, number)) for number in made.numbers]
    parts.append("\n".join(f"- {name}: **{value}** ({about})" for name, value, about in numbers))
    if made.worries:
        parts += ["What to worry about:", "\n".join(f"- {_prose(worry)}" for worry in made.worries)]
    for section in made.sections:
        parts.append(f"## {escape_markdown(section.title)}")
        parts += [part for block in section.blocks if (part := _markdown(block))]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Paragraph():
            return _prose(block.words)
        case Bullets():
            return "\n".join(f"- {_prose(point)}" for point in block.points)
        case Rows():
            head = [escape_markdown(name) for name in block.header]
            cells = [[_markdown_cell(cell) for cell in row] for row in block.rows]
            marks = ["---:" if block.rows and block.rows[0][i].numeric else "---" for i in range(len(head))]
            lines = [" | ".join(row) for row in (head, *cells)]
            table = [f"| {lines[0]} |", "|" + "|".join(marks) + "|", *(f"| {line} |" for line in lines[1:])]
            return f"{escape_markdown(_capital(block.title))}:\n\n" + "\n".join(table)
        case Figure():
            return f"Figure (in report.html): {escape_markdown(block.title)}. {_prose(block.words)}"
        case Gallery():
            return ""


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _markdown_cell(cell: Cell) -> str:
    words = _prose(cell.words)
    return f"**{words}**" if words and cell.tone in ("pass", "fail", "inconclusive") else words


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("adaptclip.reports", "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.globals |= {"bar": _bar, "signs": _SIGNS, "kind": lambda block: type(block).__name__, "capital": _capital}
    pages.globals |= {"wide": _WIDE, "is_wordy": _is_wordy}
    # A number and its unit stay on one line.
    pages.filters["shown"] = lambda words: one_line(words).replace(" %", "\u00a0%")
    return pages.get_template("report.html")


def to_html(
    report: Mapping[str, Any],
    verdicts: Sequence[JudgedGate] | None = None,
    *,
    pictures: Mapping[str, str] | None = None,
) -> str:
    """Renders a whole report as one page that needs nothing else: no script, no font, no request.

    Args:
        report: what `build_report` or `full_report` made.
        verdicts: as in `to_markdown`.
        pictures: row id -> data: URI of a thumbnail (`reports.thumbnails`); None leaves pictures out.
    """
    return _template().render(made=document(report, verdicts, pictures=pictures, plots=True))


def _is_wordy(rows: Rows) -> bool:
    return any(len(cell.words) > _WIDE for row in rows.rows for cell in row)


def _bar(rows: Rows, column: int, cell: Cell) -> Mapping[str, float | None] | None:
    """Places of a cell's dot, interval and mark, in per cent of the column's scale."""
    if cell.bar is None or column not in rows.scales:
        return None
    low, high = rows.scales[column]
    mark = rows.marks.get(column)

    def place(x: float | None) -> float | None:
        return None if x is None else round(100 * min(1.0, max(0.0, (x - low) / (high - low))), 2)

    return dict(zip(("value", "low", "high", "mark"), map(place, (*cell.bar, mark)), strict=True))


def print_report(
    report: Mapping[str, Any], verdicts: Sequence[JudgedGate] | None = None, *, console: Console | None = None
) -> None:
    """Prints one screen: headline metrics, groups, gate verdicts with their reasons.

    Args:
        report: what `build_report` or `full_report` made.
        verdicts: what `check_gates` made; None leaves gates out.
        console: where to; None is standard output.
    """
    parts = [part for block in screen(report, verdicts) for part in _terminal(block)]
    (console or terminal.console()).print(Group(*parts))


def _terminal(block: Block) -> Iterator[Table | Text]:
    match block:
        case Paragraph():
            yield Text(one_line(block.words), style=_STYLES[block.tone])
        case Bullets():
            for point in block.points:
                yield Text(("! " if block.caution else "- ") + one_line(point), style="yellow" if block.caution else "")
        case Rows():
            yield _terminal_table(block)
            if block.limit is not None and len(block.rows) > block.limit:
                yield Text(f"… and {len(block.rows) - block.limit} {block.hidden}", style="dim")
        case _:
            return


def _terminal_table(block: Rows) -> Table:
    # The title goes in as Text: a user's brackets are no markup.
    table = Table(title=Text(block.title, style="italic"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(block.header):
        numeric = bool(block.rows) and block.rows[0][i].numeric
        table.add_column(Text(one_line(name)), justify="right" if numeric else "left", overflow="fold")
    for row in block.rows[: block.limit]:
        table.add_row(*(Text(one_line(cell.words), style=_STYLES[cell.tone]) for cell in row))
    return table
