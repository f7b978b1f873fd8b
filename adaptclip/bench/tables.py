# SPDX-License-Identifier: Apache-2.0
"""Tables of means and of paired differences, as Markdown and LaTeX, and what they advise in plain sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptclip.bench.protocols import HARMONIC_MEAN
from adaptclip.bench.summary import (
    ALL_CARDS,
    Cell,
    Estimate,
    Row,
    Values,
    column_cells,
    estimate,
    honest_difference,
    paired,
    values_by_cell,
)
from adaptclip.methods.registry import named
from adaptclip.metrics import METRICS
from adaptclip.progress import duration

METRIC_NAMES = {
    name: metric.words for name, metric in METRICS.items()
    if metric.decides and not metric.of_outcome and (metric.is_general or metric.of_labels)
}  # fmt: skip
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


CHEAPER_BY_S = 1.0
"""A method counts as cheaper when it takes half the time of fitting or less, and saves at least so many seconds."""

CAUTION = (
    "The best of several methods on the same test images looks better than it is, and these intervals count seeds "
    "only. To pick a method for release, decide on other images than those you report."
)
"""What must stand beside any advice of this kind."""


def advice(
    rows: Sequence[Row], *, metric: str, num_seeds: int, not_published: Mapping[str, str] | None = None
) -> list[str]:
    """Returns sentences for every card and number of shots.

    Where methods that are cheaper (CHEAPER_BY_S, by the measured times) may be as good as the best (their paired
    difference does not exclude 0), the best of those is advised: the dearer one was not shown to be worth its cost.
    With one seed nothing can be said about that, and the sentences say so.

    Args:
        rows: of `tidy_rows`; methods without all seeds are left out.
        metric: a key of METRIC_NAMES.
        num_seeds: seeds that were asked for.
        not_published: method -> how its settings differ from the published ones; named after the advice.
    """
    cells = values_by_cell(rows, metric)
    sentences = []
    cards = list(dict.fromkeys(row["card"] for row in rows))
    targets = {row["target"] for row in rows}
    main = HARMONIC_MEAN if HARMONIC_MEAN in targets else next(iter(row["target"] for row in rows), "")
    for card in cards:
        for shots in sorted({row["shots"] for row in rows}, key=lambda k: k or float("inf")):
            column = {m: cells[key] for m in named() if (key := (card, _target(rows, card, main), shots, m)) in cells}
            column = {m: values for m, values in column.items() if len(values) == num_seeds}
            if len(column) > 1:
                cost = {m: _seconds(rows, card, shots, m) for m in column}
                words = f"{card}, {shots_in_words(shots)} ({METRIC_NAMES[metric]})"
                sentences.append(f"{words}: {_sentence(column, cost)}")
    differ = "; ".join(f"{name} ({info})" for name, info in (not_published or {}).items())
    mode = [f"Not with their published settings here, so that nothing is said of them as published: {differ}."]
    return [*sentences, *(mode if differ else []), CAUTION] if sentences else []


def _target(rows: Sequence[Row], card: str, main: str) -> str:
    """The judged set that is advised on: the main one, or the card's first (its own test images)."""
    own = [row["target"] for row in rows if row["card"] == card]
    return main if main in own else own[0]


def _sentence(column: dict[str, dict[int, float]], cost: dict[str, float]) -> str:
    means = {m: estimate(list(values.values())) for m, values in column.items()}
    best = max(means, key=lambda m: means[m].mean)
    text = f"{best} is best with {_rate(means[best])}, fitted in {duration(cost[best])}."
    differences = {m: paired(column[best], column[m]) for m in column if m != best}
    if all(d is None or d.half is None for d in differences.values()):
        return f"{text} With one seed, nothing can be said about whether another is worse; give three or more --seeds."
    cheaper = [m for m in column if 2 * cost[m] <= cost[best] and cost[best] - cost[m] >= CHEAPER_BY_S]
    reach = honest_difference({m: v for m, v in column.items() if set(v) == set(column[best])}) or 0.0
    as_good = [m for m in cheaper if differences[m] is not None and means[best].mean - means[m].mean <= reach]
    if as_good:
        take = max(as_good, key=lambda m: (means[m].mean, -cost[m]))
        gap = differences[take]
        assert gap is not None
        return (
            f"{text} {take} costs {duration(cost[take])} and is behind by {_points(gap)}, which may be chance: take "
            f"{take}; that {best} is worth its cost was not shown."
        )
    if not cheaper:
        runner_up = max((m for m in means if m != best), key=lambda m: means[m].mean)
        gap = differences[runner_up]
        assert gap is not None
        return f"{text} None is much cheaper; the next, {runner_up}, is behind by {_points(gap)}: take {best}."
    runner_up = max(cheaper, key=lambda m: means[m].mean)
    gap = differences[runner_up]
    assert gap is not None
    more = cost[best] / max(cost[runner_up], 1e-9)
    return (
        f"{text} The best of the cheaper ones, {runner_up} ({duration(cost[runner_up])}), is behind by {_points(gap)}: "
        f"the dearer one was worth it, at {more:,.0f} times the time of fitting."
    )


def _rate(found: Estimate) -> str:
    return f"{100 * found.mean:.1f} %" + (f" ± {100 * found.half:.1f}" if found.half is not None else "")


def _points(found: Estimate) -> str:
    low, high = found.mean - (found.half or 0), found.mean + (found.half or 0)
    return f"{100 * found.mean:.1f} points [{100 * low:.1f}, {100 * high:.1f}]".replace("-", "−")


def _seconds(rows: Sequence[Row], card: str, shots: int, method: str) -> float:
    own = [r["fit_s"] for r in rows if (r["card"], r["shots"], r["method"]) == (card, shots, method)]
    return statistics.median(own)
