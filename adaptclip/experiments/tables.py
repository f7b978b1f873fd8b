"""Tables of means and of paired differences, as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptclip.experiments.summary import (
    ALL_CARDS,
    Cell,
    Estimate,
    Row,
    Values,
    column_cells,
    paired,
    values_by_cell,
)
from adaptclip.methods.registry import named
from adaptclip.metrics import METRICS

METRIC_NAMES = {name: metric.words for name, metric in METRICS.items() if metric.is_general and metric.decides}
"""Metrics that tables can show, in words."""

MARKS = "Best of a column bold; † marks what is not significantly worse than it (within Tukey's honest significant \
difference at 95 %, which allows for the number of methods)."


COLLAPSED = "‡: median; the seed named fell far below the others, so that a mean would describe neither. Such a cell \
takes no part in the comparison: look into that run before you report it."

DIFFERENCES = "Points, paired by seed, mean ± half of the 95 % t interval. Bold: the interval excludes 0."


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table: a text, whether it is the best, and whether it is marked."""

    text: str
    bold: bool = False
    mark: bool = False


@dataclass(frozen=True)
class ResultTable:
    """A table of methods by columns.

    Attributes:
        title: what it shows, of which card.
        columns: headings after the method's.
        rows: (method, entries); None where there is no result.
        note: what must be known to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry | None, ...]], ...]
    note: str


def result_tables(rows: Sequence[Row], *, metric: str, baseline: str, num_seeds: int) -> list[ResultTable]:
    """Returns, for every card, a table of means and one of paired differences to the baseline.

    With one number of shots, several judged sets stand side by side; else each has tables of its own.

    Args:
        rows: of `tidy_rows`.
        metric: a key of METRIC_NAMES.
        baseline: the method that differences are taken to.
        num_seeds: seeds that were asked for.
    """
    cells = values_by_cell(rows, metric)
    shots = sorted({row["shots"] for row in rows}, key=lambda k: k or float("inf"))
    methods = [name for name in named() if any(row["method"] == name for row in rows)]
    tables = []
    for card in dict.fromkeys(key[0] for key in cells):
        own = [row for row in rows if card in (row["card"], ALL_CARDS)]
        targets = list(dict.fromkeys(row["target"] for row in own))
        images = "" if card == ALL_CARDS else f"; up to {max(row['n'] for row in own):,} test images"
        note = (
            f"Per cent, mean ± half of the 95 % t interval over {num_seeds} seeds{images}. {MARKS} Rows without an "
            "interval learn from no image."
        )
        for title, places in _layouts(targets, shots):
            heads = tuple(places)
            columns = [
                {m: cells[card, target, k, m] for m in methods if (card, target, k, m) in cells}
                for target, k in places.values()
            ]
            title = f"{card}: {METRIC_NAMES[metric]}, {title}"
            marked = [column_cells(column, num_seeds) for column in columns]
            lines = tuple((m, tuple(_mean_entry(column.get(m)) for column in marked)) for m in methods)
            fell = any(cell.collapsed for column in marked for cell in column.values())
            said = f"{note} {COLLAPSED}" if fell else note
            tables.append(ResultTable(title, heads, lines, said))
            if baseline in methods and len(methods) > 1:
                lines = tuple((m, _differences(columns, m, baseline)) for m in methods if m != baseline)
                tables.append(ResultTable(f"{title}, difference to {baseline}", heads, lines, DIFFERENCES))
    return tables


def _layouts(targets: Sequence[str], shots: Sequence[int]) -> list[tuple[str, dict[str, tuple[str, int]]]]:
    """Tables of one card: (what they show, heading -> judged set and shots)."""
    if len(shots) == 1 and len(targets) > 1:
        return [(shots_in_words(shots[0]), {target: (target, shots[0]) for target in targets})]
    return [(target, {shots_in_words(k): (target, k) for k in shots}) for target in targets]


def _differences(columns: Sequence[Mapping[str, Values]], method: str, baseline: str) -> tuple[Entry | None, ...]:
    return tuple(
        _difference_entry(paired(column[method], column[baseline])) if {method, baseline} <= set(column) else None
        for column in columns
    )


def cost_table(rows: Sequence[Row]) -> ResultTable:
    """Returns what every method costs at every number of shots: median seconds of fitting, parameters, validation."""
    shots = sorted({row["shots"] for row in rows}, key=lambda k: k or float("inf"))
    lines = []
    for method in [name for name in named() if any(row["method"] == name for row in rows)]:
        own = [row for row in rows if row["method"] == method]
        seconds = [sorted(row["fit_s"] for row in own if row["shots"] == k) for k in shots]
        texts = [f"{s[len(s) // 2]:.3g}" if s else "–" for s in seconds]
        uses = "no" if all(row["validation_used_for"] == "nothing" for row in own) else "yes"
        learnt = sorted({row["trainable_parameters"] for row in own})
        many = f"{learnt[0]:,}" if len(learnt) == 1 else f"{learnt[0]:,} to {learnt[-1]:,}"
        lines.append((method, tuple(Entry(text) for text in (*texts, many, uses))))
    heads = (*map(shots_in_words, shots), "parameters", "uses validation shots")
    return ResultTable(
        "Cost: seconds of fitting alone", heads, tuple(lines),
        "Median over cards and seeds, without reading or encoding images that jobs share.",
    )  # fmt: skip


def shots_in_words(count: int) -> str:
    """Returns a number of shots as a heading: 1 shot, 4 shots, all shots (0)."""
    return f"{count or 'all'} shot{'s' * (count != 1)}"


def _mean_entry(cell: Cell | None) -> Entry | None:
    if cell is None:
        return None
    found = cell.value
    if cell.collapsed:
        seeds = ", ".join(f"seed {seed}: {100 * value:.1f}" for seed, value in cell.collapsed)
        return Entry(f"{100 * found.mean:.1f} ‡ ({seeds})")
    half = f" ± {100 * found.half:.1f}" if found.half is not None and cell.learns else ""
    short = "" if cell.full else f" (n = {found.n})"
    return Entry(f"{100 * found.mean:.1f}{half}{short}", cell.best, cell.tied)


def _difference_entry(found: Estimate | None) -> Entry | None:
    if found is None:
        return None
    half = f" ± {100 * found.half:.1f}" if found.half is not None else ""
    return Entry(f"{100 * found.mean:+.1f}{half}".replace("-", "−"), found.is_clear)


def to_markdown(table: ResultTable) -> str:
    """Returns a table in Markdown, under its title in bold."""
    lines = [
        f"**{table.title}**",
        "",
        f"| method | {' | '.join(table.columns)} |",
        "|---" * (len(table.columns) + 1) + "|",
    ]
    for name, entries in table.rows:
        lines.append(f"| {name} | {' | '.join(_markdown(entry) for entry in entries)} |")
    return "\n".join([*lines, "", table.note])


def _markdown(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    return f"**{entry.text}**" if entry.bold else entry.text + (" †" if entry.mark else "")


LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "†": r"$^\dagger$",
         "–": "--"}  # fmt: skip


def latex_text(text: str) -> str:
    """Returns a text with everything escaped that LaTeX reads otherwise."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def to_latex(table: ResultTable) -> str:
    """Returns a table in LaTeX, with rules of the package booktabs."""
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{latex_text(f'{table.title}. {table.note}')}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule",
        " & ".join(["method", *map(latex_text, table.columns)]) + r" \\", r"\midrule",
    ]  # fmt: skip
    for name, entries in table.rows:
        lines.append(" & ".join([latex_text(name), *map(_latex, entries)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _latex(entry: Entry | None) -> str:
    if entry is None:
        return "--"
    text = latex_text(entry.text)
    return rf"\textbf{{{text}}}" if entry.bold else text + (r"$^\dagger$" if entry.mark else "")
