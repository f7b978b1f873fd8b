# SPDX-License-Identifier: Apache-2.0
"""A report for people: its document, and that as Markdown, as a page for the run folder, and on a terminal.

Names of classes, groups and attributes come from users. In Markdown and HTML they are escaped here, and only here; on
the terminal they are `Text`, which knows no markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from adaptclip import terminal
from adaptclip.reports.bias import (
    group_metrics,
    group_section,
    info,
    outcome_section,
    overall_rows,
    overall_section,
    rows_of_groups,
    sentence,
)
from adaptclip.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Document,
    Figure,
    Gallery,
    Paragraph,
    Rows,
    Section,
    one_line,
    text,
)
from adaptclip.reports.calibration import calibration_section, selective_section
from adaptclip.reports.findings_page import ON_SCREEN, finding_group_section, findings_section, on_screen
from adaptclip.reports.fine_grained import (
    class_section,
    confusion_section,
    name_section,
    shift_section,
    taxonomy_section,
)
from adaptclip.reports.headline import NO_GATES, JudgedGate, judged_words, three_numbers, verdict_of, worries
from adaptclip.reports.learning import learning_section
from adaptclip.reports.multi_label import multi_label_section, summary
from adaptclip.reports.plots import confusion_matrix
from adaptclip.reports.probe import probe_section
from adaptclip.reports.slices import slice_section

if TYPE_CHECKING:
    from jinja2 import Template

_SKIPPED = 10
"""So many sentences about what was not used are shown."""


def document(
    report: Mapping[str, Any],
    verdicts: Sequence[JudgedGate] | None = None,
    *,
    pictures: Mapping[str, str] | None = None,
    plots: bool = False,
) -> Document:
    """Lays out a report.

    Args:
        report: what `build_report` or `full_report` made.
        verdicts: what `check_gates` made; None leaves gates out, an empty list says that there were none.
        pictures: row id -> data: URI of a thumbnail; None where images are not at hand.
        plots: draw plots (for HTML).
    """
    verdict, words = verdict_of(verdicts)
    said = judged_words(report)[1] if verdicts is not None else ""
    return Document(
        title="Evaluation report",
        about=_about(report),
        verdict=verdict,
        verdict_words=f"{words} {said}".rstrip(),
        numbers=three_numbers(report),
        worries=worries(report, verdicts),
        sections=_with_anchors(_sections(report, verdicts, pictures, plots)),
    )


def _with_anchors(sections: Iterator[Section | None]) -> list[Section]:
    kept = [section for section in sections if section is not None]
    return [replace(section, anchor=section.anchor or f"part-{i}") for i, section in enumerate(kept)]


def _about(report: Mapping[str, Any]) -> str:
    data = report.get("data")
    where = f" of {one_line(data['name'])}" if data else ""
    method = f"{one_line(report['method'])}, " if report.get("method") else ""
    several = " of which an image may show several, or none" if report.get("findings") else ""
    return f"{method}{report['num_images']:,} test images{where}, {report['num_classes']:,} classes{several}."


def _sections(
    report: Mapping[str, Any],
    verdicts: Sequence[JudgedGate] | None,
    pictures: Mapping[str, str] | None,
    plots: bool,
) -> Iterator[Section | None]:
    if verdicts is not None:
        blocks = [gate_rows(verdicts, "Declared conditions for release") if verdicts else Paragraph(NO_GATES)]
        belongs = judged_words(report)[0]
        yield Section("Gates", "gates", [*blocks, Paragraph(belongs)] if belongs else blocks)
    yield overall_section(report)
    yield findings_section(report)
    yield outcome_section(report)
    yield multi_label_section(report)
    for attribute, table in report["groups"].items():
        yield (finding_group_section if report.get("findings") else group_section)(attribute, table)
    if not report.get("findings"):
        yield from _one_class_sections(report, pictures, plots)
    if report.get("names"):
        yield name_section(report["names"])
    yield probe_section(report)
    yield _data_section(report)
    yield _training_section(report)
    yield learning_section(report, plots=plots)
    yield _reading_section(report)


def _one_class_sections(
    report: Mapping[str, Any], pictures: Mapping[str, str] | None, plots: bool
) -> Iterator[Section | None]:
    """What is said of images with one class each."""
    yield slice_section(report)
    yield shift_section(report)
    yield class_section(report, plots=plots)
    counts = (report.get("fine_grained") or {}).get("matrix")
    names = [row["class"] for row in report["per_class"]]
    matrix = confusion_matrix(np.array(counts), names) if plots and counts else None
    yield confusion_section(report, pictures, matrix=matrix)
    yield taxonomy_section(report)
    yield calibration_section(report, plots=plots)
    yield selective_section(report, plots=plots)


def gate_rows(verdicts: Sequence[JudgedGate], title: str = "gates") -> Rows:
    """One row per rule."""
    rows = [[text(v.verdict, _tone(v.verdict)), text(one_line(v.title)), text(one_line(v.reason))] for v in verdicts]
    return Rows(title, ["verdict", "gate", "reason"], rows)


def _tone(verdict: str) -> Any:
    return verdict if verdict in ("pass", "fail", "inconclusive") else ""


def _data_section(report: Mapping[str, Any]) -> Section | None:
    data = report.get("data")
    if not data:
        return None
    rows = [[text("data card"), text(one_line(data["name"]))]]
    rows += [
        [text(key.replace("_", " ")), text(one_line(str(data[key])))]
        for key in ("pretty_name", "license", "source", "digest")
        if data.get(key)
    ]
    rows.append([text("images"), text(", ".join(f"{part} {n:,}" for part, n in data["images"].items()))])
    blocks: list[Block] = [Rows("Where the images are from", ["", ""], rows)]
    if data["known_issues"]:
        blocks.append(Paragraph("Known issues of the data:"))
        blocks.append(Bullets([sentence(issue) for issue in data["known_issues"]], caution=True))
    else:
        blocks.append(Paragraph("The data card names no known issues, which does not mean that there are none."))
    if data["allowed"]:
        blocks.append(Paragraph("Found by the checks, and allowed by the card:"))
        blocks.append(Bullets([sentence(note) for note in data["allowed"]]))
    if data["skipped"]:
        blocks.append(Paragraph("Not used:"))
        more = [f"and {len(data['skipped']) - _SKIPPED} more"] if len(data["skipped"]) > _SKIPPED else []
        blocks.append(Bullets([sentence(words) for words in [*data["skipped"][:_SKIPPED], *more]]))
    return Section("Data", "data", blocks)


def _training_section(report: Mapping[str, Any]) -> Section | None:
    # What the validation images were used for stands in both.
    info = {**(report.get("training") or {}), **(report.get("split") or {})}
    words = {"num_train": "training images", "num_validation": "validation images"}
    rows = [
        [text(words.get(key, key.replace("_", " "))), text(one_line(_worded(value)))]
        for key, value in info.items()
        if value not in (None, "", {}, [])
    ]
    if not rows:
        return None
    return Section("How it was made", "training", [Rows("Split and training", ["", ""], rows)])


def _worded(value: Any, longest: int = 300) -> str:
    if isinstance(value, Mapping):
        worded = ", ".join(f"{key}: {_worded(v)}" for key, v in value.items())
    elif isinstance(value, list | tuple):
        worded = ", ".join(map(_worded, value))
    else:
        worded = f"{value:.4g}" if isinstance(value, float) else str(value)
    return worded if len(worded) <= longest else worded[: longest - 1] + "…"


def _reading_section(report: Mapping[str, Any]) -> Section:
    words = (
        f"Brackets hold {100 * report['confidence']:g} % intervals; changes are paired, on the same images, in "
        "percentage points. Every number is of these test images, and says something of images like them only: another "
        "place, device or time needs an assessment of its own."
    )
    blocks: list[Block] = [Paragraph(words)]
    if report.get("sampling"):
        blocks.append(Paragraph(_sampling_words(report["sampling"])))
    if report["groups"]:
        words = (
            "A gap, difference or skew that noise does not explain is tested for itself, and among many tests some "
            "show one by chance: p (Holm) allows for the rows of its table, and only “What to worry about” allows for "
            "the number of attributes and outcomes too."
        )
        blocks.append(Paragraph(words))
    notes = [sentence(note) for note in [*report["cautions"], *report.get("notes_on_input", [])]]
    if notes:
        blocks.append(Bullets(notes))
    if report["absent_classes"]:
        names = ", ".join(map(one_line, report["absent_classes"]))
        blocks.append(Paragraph(f"Classes without test images: {names}."))
    return Section("How to read this", "reading", blocks)


def _sampling_words(sampling: Mapping[str, Any]) -> str:
    unit, num, name = one_line(sampling["unit"]), sampling["num_units"], one_line(sampling.get("name") or "cluster")
    called = "" if name == "cluster" else f" ({name})"
    drawn = {
        "image": f"other images like these {num:,} could have given, each taken as drawn by itself (no cluster such as "
        "a patient is known)",
        "cluster": f"other clusters{called} like these {num:,} could have given; the unit is the cluster, not the "
        "image",
    }[unit]
    mix = {
        "random": "The mix of classes counts as met by chance, and would differ there",
        "fixed": "The card says that the study fixed how many images there are of each class, so their mix would be "
        "the same there",
    }[sampling["classes"]]
    return f"Intervals say what {drawn}. {mix}."


def screen(report: Mapping[str, Any], verdicts: Sequence[JudgedGate] | None = None) -> Iterator[Block]:
    """The part of a report that fits one screen: headline metrics, groups, cautions, gates."""
    narrow = [metric for metric in report["overall"] if info(report, metric)["per_cent"]]
    if report.get("findings"):
        narrow = list(ON_SCREEN)
    shown = {**report, "overall": {metric: report["overall"][metric] for metric in narrow}}
    title = (
        f"{report['num_images']:,} images, {report['num_classes']} classes; per cent "
        f"[{100 * report['confidence']:g} % interval], changes in points"
    )
    rows = overall_rows(shown, "short", title, sign="")
    # The number of images stands in the title, and so does the unit of changes.
    heads = [head.removesuffix(" in points") for head in rows.header[1:-1]]
    yield replace(rows, header=["", *heads], rows=[row[:-1] for row in rows.rows])
    if report.get("findings"):
        yield from on_screen(report)
    for attribute, table in report["groups"].items():
        if not table["rows"] or report.get("findings"):
            continue
        wide = [metric for metric in group_metrics(table) if not info(table, metric)["per_cent"]]
        rows_shown = [{k: v for k, v in row.items() if k not in wide} for row in table["rows"]]
        paired = any(row["accuracy"]["zero_shot"] for row in rows_shown)
        name = f"by {one_line(attribute)}" + "; change is of accuracy" * paired
        groups = rows_of_groups({**table, "rows": rows_shown}, sign="", title=name)
        yield replace(groups, header=[head.replace("change of accuracy", "change") for head in groups.header])
        yield from (Paragraph(f"Caution: {sentence(caution)}", "muted") for caution in table["cautions"])
    if report.get("multi_label"):
        yield Paragraph(summary(report["multi_label"]))
    yield from (Paragraph(f"Note: {sentence(caution)}", "muted") for caution in report["cautions"])
    if verdicts is not None:
        yield gate_rows(verdicts) if verdicts else Paragraph(NO_GATES, "inconclusive")
        belongs, said = judged_words(report)
        if belongs:
            yield Paragraph(belongs, "muted")
        if said:
            yield Paragraph(said, "inconclusive")
    fears = [w for w in worries(report, None) if not w.startswith(("No groups were reported", "The data card names"))]
    if fears and "fine_grained" in report:
        yield Bullets(fears[:3], caution=True)


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
def page(name: str) -> Template:
    """Returns one of the templates of pages, all of which extend `base.html`: its colours, type and rules of print."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("adaptclip.reports", "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.globals |= {"bar": _bar, "signs": _SIGNS, "kind": lambda block: type(block).__name__, "capital": _capital}
    pages.globals |= {"wide": _WIDE, "is_wordy": _is_wordy}
    # A number and its unit stay on one line.
    pages.filters["shown"] = lambda words: one_line(words).replace(" %", "\u00a0%")
    return pages.get_template(name)


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
        pictures: row id -> data: URI of a thumbnail (`reports.plots`); None leaves pictures out.
    """
    return page("report.html").render(made=document(report, verdicts, pictures=pictures, plots=True))


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
