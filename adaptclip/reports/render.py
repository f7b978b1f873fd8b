"""A report and its gate verdicts for people: Markdown for the run folder, one screen for the terminal.

Names of classes, groups and attributes come from users. In Markdown they are escaped; on the terminal they are `Text`,
which knows no markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from adaptclip.evaluation.metrics import METRIC_SHORT, METRIC_WORDS

MAX_TERMINAL_GROUPS = 8
"""Rows per attribute on the terminal, worst first; the Markdown report has them all."""

NO_GATES = "No gates were declared: nothing was judged, which is not a pass."

_GROUP_COLUMNS = ("accuracy", "mean_per_class_accuracy", "ece")

_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


class JudgedGate(Protocol):
    """What rendering needs of a verdict (gates.Verdict has it)."""

    @property
    def title(self) -> str:
        """The rule in words."""
        ...

    @property
    def verdict(self) -> str:
        """Pass, fail or inconclusive."""
        ...

    @property
    def reason(self) -> str:
        """Grounds in plain words."""
        ...


def _one_line(text: str) -> str:
    """Replaces line breaks and other control characters (terminal escapes among them) by spaces."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def escape_markdown(text: str) -> str:
    """Makes a user's string literal in a Markdown table cell or line, HTML included."""
    plain = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", plain)


def _rate(number: dict[str, Any] | None, *, sign: str = " %", count: bool = False) -> str:
    """Renders a rate, for example `71.2 % [67.1, 75.0]`, with `n = 400` on demand; "–" where there is none."""
    if number is None or number["value"] is None:
        return "–"
    text = f"{100 * number['value']:.1f}{sign}"
    if number["low"] is not None:
        text += f" [{100 * number['low']:.1f}, {100 * number['high']:.1f}]"
    return text + (f", n = {number['n']}" if count else "")


def _points(number: dict[str, Any] | None) -> str:
    """Renders a change in percentage points, for example `+12.3 [+9.1, +15.4]`."""
    if number is None or number["value"] is None:
        return "–"
    text = f"{100 * number['value']:+.1f}"
    if number["low"] is not None:
        text += f" [{100 * number['low']:+.1f}, {100 * number['high']:+.1f}]"
    return text


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _notes(comparisons: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the distinct notes of the numbers, each with the metric it belongs to."""
    notes = {
        f"{METRIC_WORDS[metric]}: {number['note']}"
        for metric, compared in comparisons.items()
        for number in compared.values()
        if number is not None and number["note"]
    }
    return sorted(notes)


def to_markdown(report: dict[str, Any], verdicts: Sequence[JudgedGate] | None = None) -> str:
    """Renders a whole report as Markdown.

    Args:
        report: what `build_report` made.
        verdicts: what `check_gates` made; None leaves gates out, an empty list says that there were none.
    """
    parts = ["# Evaluation report", *_markdown_head(report)]
    if verdicts is not None:
        parts += ["## Gates", _markdown_gates(verdicts)]
    parts += ["## Overall", *_markdown_overall(report)]
    for attribute, table in report["groups"].items():
        parts += [f"## Groups: {escape_markdown(attribute)}", *_markdown_groups(table)]
    parts += ["## Classes", *_markdown_classes(report)]
    return "\n\n".join(parts) + "\n"


def _markdown_head(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{report['num_images']} images, {report['num_classes']} classes. Brackets hold "
        f"{100 * report['confidence']:g} % intervals; changes are paired, on the same images, in percentage points."
    )
    if report["cautions"]:
        yield "\n".join(f"- {escape_markdown(caution)}." for caution in report["cautions"])
    if report["absent_classes"]:
        yield "Classes without test images: " + ", ".join(map(escape_markdown, report["absent_classes"])) + "."


def _markdown_gates(verdicts: Sequence[JudgedGate]) -> str:
    if not verdicts:
        return NO_GATES
    rows = [[escape_markdown(v.title), f"**{v.verdict}**", escape_markdown(v.reason)] for v in verdicts]
    return _markdown_table(("gate", "verdict", "reason"), rows)


def _markdown_overall(report: dict[str, Any]) -> Iterator[str]:
    paired = any(c["zero_shot"] for c in report["overall"].values())
    header = ["metric", "zero-shot", "adapted", "change", "n"] if paired else ["metric", "value", "n"]
    rows = []
    for metric, c in report["overall"].items():
        values = [_rate(c["zero_shot"]), _rate(c["model"]), _points(c["change"])] if paired else [_rate(c["model"])]
        rows.append([METRIC_WORDS[metric], *values, str(c["model"]["n"])])
    yield _markdown_table(header, rows)
    if notes := _notes(report["overall"]):
        yield "\n".join(f"- {escape_markdown(note)}." for note in notes)


def _group_metrics(table: dict[str, Any]) -> list[str]:
    return [metric for metric in _GROUP_COLUMNS if table["rows"] and metric in table["rows"][0]]


def _markdown_groups(table: dict[str, Any]) -> Iterator[str]:
    metrics = _group_metrics(table)
    paired = any(row["accuracy"]["change"] for row in table["rows"])
    header = ["group", "n", *(METRIC_WORDS[m] for m in metrics), "classes present"]
    header += ["change of accuracy", "change of mean per class"] if paired else []
    rows = []
    for row in table["rows"]:
        cells = [escape_markdown(row["group"]), str(row["n"]), *(_rate(row[m]["model"]) for m in metrics)]
        cells.append(str(row["classes_present"]))
        if paired:
            cells += [_points(row["accuracy"]["change"]), _points(row["mean_per_class_accuracy"]["change"])]
        rows.append(cells)
    yield _markdown_table(header, rows)
    yield _extremes(table, escape=True)
    notes = [
        f"{row['group']}: {METRIC_WORDS[m]}: {row[m]['model']['note']}"
        for row in table["rows"]
        for m in metrics
        if row[m]["model"]["note"]
    ]
    if lines := [*table["cautions"], *notes]:
        yield "\n".join(f"- {escape_markdown(line)}." for line in lines)


def _extremes(table: dict[str, Any], *, escape: bool) -> str:
    """Words the worst group and the max-min gap."""
    worst, gap = table["worst_group"], table["gap"]
    if worst is None:
        return "There are no groups."
    name = escape_markdown(worst["group"]) if escape else _one_line(worst["group"])
    lowest = f"Lowest accuracy: {name}, {_rate(worst, count=True)}."
    if gap is None:
        return lowest
    note = escape_markdown(gap["note"]) if escape else _one_line(gap["note"])
    return f"{lowest} Gap (max-min over the groups): {100 * gap['value']:.1f} points; {note}."


def _markdown_classes(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        [escape_markdown(r["class"]), str(r["n"]), _rate(r["accuracy"]), "" if r["sufficient"] else "insufficient"]
        for r in report["per_class"]
    ]
    yield _markdown_table(("class", "n", "accuracy", "images"), rows)
    if not all(r["sufficient"] for r in report["per_class"]):
        yield "Insufficient: fewer than 10 test images; such an accuracy says next to nothing."


def print_report(
    report: dict[str, Any], verdicts: Sequence[JudgedGate] | None = None, *, console: Console | None = None
) -> None:
    """Prints one screen: headline metrics, groups, gate verdicts with their reasons.

    Args:
        report: what `build_report` made.
        verdicts: what `check_gates` made; None leaves gates out.
        console: where to; None is standard output.
    """
    parts: list[Any] = [_overall_table(report)]
    for attribute, table in report["groups"].items():
        parts += [_group_table(attribute, table), *_group_lines(table)]
    parts += [Text(f"Note: {caution}.", style="dim") for caution in report["cautions"]]
    if verdicts is not None:
        parts.append(_gate_table(verdicts) if verdicts else Text(NO_GATES, style="yellow"))
    (console or Console()).print(Group(*parts))


def _overall_table(report: dict[str, Any]) -> Table:
    paired = any(c["zero_shot"] for c in report["overall"].values())
    title = (
        f"{report['num_images']} images, {report['num_classes']} classes; "
        f"per cent [{100 * report['confidence']:g} % interval], changes in points"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "zero-shot", "adapted", "change") if paired else ("", "value"):
        table.add_column(column, justify="left" if not column else "right")
    for metric, c in report["overall"].items():
        rates = [c["zero_shot"], c["model"]] if paired else [c["model"]]
        cells = [*(_rate(rate, sign="") for rate in rates), *[_points(c["change"])] * paired]
        table.add_row(METRIC_SHORT[metric], *map(Text, cells))
    return table


def _group_table(attribute: str, table: dict[str, Any]) -> Table:
    paired = any(row["accuracy"]["change"] for row in table["rows"])
    title = f"by {_one_line(attribute)}" + "; change is of accuracy" * paired
    drawn = Table(title=Text(title, style="italic"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    metrics = [m for m in _group_metrics(table) if any(row[m]["model"]["value"] is not None for row in table["rows"])]
    for i, column in enumerate(["group", "n", *(METRIC_SHORT[m] for m in metrics), *["change"] * paired]):
        drawn.add_column(column, justify="right" if i else "left")
    worst_first = sorted(table["rows"], key=lambda row: row["accuracy"]["model"]["value"])
    for row in worst_first[:MAX_TERMINAL_GROUPS]:
        cells = [_rate(row[m]["model"], sign="") for m in metrics]
        cells += [_points(row["accuracy"]["change"])] * paired
        drawn.add_row(*map(Text, [_one_line(row["group"]), str(row["n"]), *cells]))
    return drawn


def _group_lines(table: dict[str, Any]) -> Iterator[Text]:
    hidden = len(table["rows"]) - MAX_TERMINAL_GROUPS
    if hidden > 0:
        yield Text(f"… and {hidden} more groups with a higher accuracy, in the Markdown report", style="dim")
    for caution in table["cautions"]:
        yield Text(f"Caution: {_one_line(caution)}.", style="dim")


def _gate_table(verdicts: Sequence[JudgedGate]) -> Table:
    table = Table(title="gates", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("verdict", "gate", "reason"):
        table.add_column(column, overflow="fold")
    for v in verdicts:
        table.add_row(Text(v.verdict, style=_STYLES[v.verdict]), Text(_one_line(v.title)), Text(_one_line(v.reason)))
    return table
