# SPDX-License-Identifier: Apache-2.0
"""Writes what a grid of jobs found: rows, tables, curves, published numbers beside one's own, and one page."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import markupsafe
import pyarrow as pa
from pyarrow import csv

from adaptclip.bench.protocols import PROTOCOLS
from adaptclip.bench.summary import ALL_CARDS, Estimate, Row, clear_falls, estimate, tidy_rows, values_by_cell
from adaptclip.bench.tables import METRIC_NAMES, advice, cost_table, result_tables, to_latex, to_markdown
from adaptclip.files import read_json, write_bytes, write_parquet, write_text
from adaptclip.methods.registry import named
from adaptclip.reports.render import page
from adaptclip.terminal import safe_cell


@dataclass(frozen=True)
class Comparison:
    """A published number and one's own.

    Attributes:
        method: name of a method (`methods.registry.named`).
        cards: a card, or the name of a published group of sets.
        target: judged set.
        shots: k.
        published: 0 to 1.
        own: mean over seeds with its interval.
        source: where the number is printed.
    """

    method: str
    cards: str
    target: str
    shots: int
    published: float
    own: Estimate
    source: str

    @property
    def difference(self) -> float:
        """One's own minus the published number."""
        return self.own.mean - self.published

    @property
    def is_flagged(self) -> bool | None:
        """Whether the difference is larger than the half width of one's own interval; None without an interval."""
        return None if self.own.half is None else abs(self.difference) > self.own.half


@cache
def published_tables() -> dict[str, Any]:
    """Returns the packaged tables: `cards`, `backbones`, and `tables` with protocol, source and values in per cent."""
    return read_json(Path(__file__).with_name("published.json"))


def compare(rows: Sequence[Row], *, leave_out: Collection[str] = ()) -> list[Comparison]:
    """Returns every published number that a run has a counterpart of.

    Sets are matched by the names of their cards: a card `eurosat` is taken for that data set. A number that is a mean
    of several sets is shown only when the run has all of them and no other. Only accuracy is published.

    Args:
        rows: of `tidy_rows`.
        leave_out: methods whose settings are not the published ones.
    """
    if not rows:
        return []
    known = published_tables()
    cells = values_by_cell(rows, "accuracy")
    cards = {row["card"] for row in rows}
    found = []
    for table in known["tables"]:
        pairs = [tuple(pair) for pair in known["backbones"][table["backbone"]]]
        if table["protocol"] != rows[0]["protocol"] or (rows[0]["backbone"], rows[0]["pretrained"]) not in pairs:
            continue
        for label, card, method, shots, value in _entries(table, known["cards"], cards, rows):
            own = cells.get((card, table["target"], shots, method))
            if own and method not in leave_out:
                found.append(
                    Comparison(
                        method,
                        label,
                        table["target"],
                        shots,
                        value / 100,
                        estimate(list(own.values())),
                        table["source"],
                    )
                )
    return found


def _entries(
    table: dict[str, Any], groups: dict[str, list[str]], cards: set[str], rows: Sequence[Row]
) -> Iterator[tuple[str, str, str, int, float]]:
    """Yields (label, card in the rows, method, shots, per cent) of a published table."""
    if table["cards"] == "each":
        shots = sorted({row["shots"] for row in rows})
        for card, value in table["values"].items():
            # Zero-shot is the same at every number of shots.
            yield card, card, "zero_shot", shots[0], value
    elif set(groups[table["cards"]]) == cards:
        for method, by_shots in table["values"].items():
            for shots, value in by_shots.items():
                yield table["cards"], ALL_CARDS, method, int(shots), value


def comparison_markdown(found: Sequence[Comparison]) -> str:
    """Returns the comparisons as a Markdown table with their sources, or a sentence that there are none."""
    if not found:
        return (
            "No published number fits this run: they are shown where settings, backbone, protocol and data sets (by "
            "the names of their cards) are the published ones."
        )
    lines = ["| method | sets | shots | published | own | difference |", "|---|---|---|---|---|---|"]
    for one in found:
        half = f" ± {100 * one.own.half:.1f}" if one.own.half is not None else " (one seed)"
        flag = " ⚑" if one.is_flagged else ""
        difference = f"{100 * one.difference:+.1f}{flag}".replace("-", "−")
        lines.append(
            f"| {one.method} | {one.cards}, {one.target} | {one.shots} | {100 * one.published:.2f} | "
            f"{100 * one.own.mean:.1f}{half} | {difference} |"
        )
    sources = "; ".join(dict.fromkeys(one.source for one in found))
    note = "⚑: the difference is larger than half of one's own 95 % interval over seeds."
    return "\n".join([*lines, "", f"{note} Sources: {sources}."])


MARKERS = "osD^v<>PX*hp"


def draw_curves(rows: Sequence[Row], *, metric: str) -> dict[str, dict[str, bytes]]:
    """Returns, for every card (and the mean of several), a figure as bytes by format: "svg" and "png".

    Every judged set has a panel. Bars are 95 % t intervals over seeds; methods that learn from no image are horizontal
    lines. The same rows give the same bytes.

    Args:
        rows: of `tidy_rows`.
        metric: a key of METRIC_NAMES.
    """
    cells = values_by_cell(rows, metric)
    figures = {}
    for card in dict.fromkeys(key[0] for key in cells):
        own = {key[1:]: values for key, values in cells.items() if key[0] == card}
        figures[card] = _figure(card, own, metric)
    return figures


def _figure(card: str, cells: Mapping[tuple[str, int, str], dict[int, float]], metric: str) -> dict[str, bytes]:
    import matplotlib
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(target for target, _, _ in cells))
    found = {shots for _, shots, _ in cells}
    shots = [k for k in sorted(found) if k] + [0] * (0 in found)
    worker = {k: i for i, k in enumerate(shots)}
    methods = [method for method in named() if any(key[2] == method for key in cells)]
    with matplotlib.rc_context({"svg.hashsalt": "adaptclip", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2 * len(targets) + 1.6, 4.2), layout="constrained")
        panels = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
        for panel, target in zip(panels, targets, strict=True):
            for number, method in enumerate(methods):
                line = {k: cells[target, k, method] for k in shots if (target, k, method) in cells}
                # A little apart, so that bars of several methods can be told from each other.
                apart = 0.03 * (number - (len(methods) - 1) / 2) if named()[method].learns else 0.0
                _line(panel, [worker[k] + apart for k in line], list(line.values()), method)
            low, high = panel.get_ylim()
            panel.set_ylim(max(low, 0), min(high, 100))
            panel.set_xticks(range(len(shots)), [str(k or "all") for k in shots])
            panel.set_xlabel("images per class")
            panel.set_title(f"{card}: {target}")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"{METRIC_NAMES[metric]}, %")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return {"svg": _bytes(figure, "svg"), "png": _bytes(figure, "png")}


def _line(panel: Any, places: list[float], seeds: list[dict[int, float]], method: str) -> None:
    from matplotlib import colormaps

    number = list(named()).index(method)  # a method looks the same in every figure
    colour = colormaps["tab20"](number % 20)
    estimates = [estimate(list(values.values())) for values in seeds]
    means = [100 * e.mean for e in estimates]
    if not named()[method].learns:
        panel.plot(places, means, color=colour, linestyle=":" if number % 2 else "--", label=method)
        return
    halves = [100 * (e.half or 0.0) for e in estimates]
    panel.errorbar(
        places, means, halves, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.2,
        elinewidth=0.7, capsize=2, label=method,
    )  # fmt: skip


def _bytes(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class BenchSettings:
    """What a run was asked for, as far as its tables say it.

    Attributes:
        protocol: a name of PROTOCOLS.
        backbone: name and weights, in words.
        metric: shown in tables and curves.
        baseline: method that differences are taken to.
        num_seeds: seeds.
        num_jobs: jobs of the grid.
        give_advice: whether to end with advice.
        changes: settings that differ from the published ones, as they were given.
        not_published: method -> how its settings differ from the published ones (`methods.not_published`).
        search: the search's budget in words, or "".
        worries: what puts the results of a card in doubt, such as an allowed leak.
    """

    protocol: str
    backbone: str
    metric: str
    baseline: str
    num_seeds: int
    num_jobs: int
    give_advice: bool = False
    changes: tuple[str, ...] = ()
    not_published: Mapping[str, str] = field(default_factory=dict)
    search: str = ""
    worries: tuple[str, ...] = ()


def write_output(
    out: Path, results: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]], settings: BenchSettings
) -> list[str]:
    """Writes results.parquet and .csv, tables.md and .tex, curves_<card>.svg and .png, costs.md, and index.html.

    The tables and curves hold no times, so that the same jobs give the same files, whoever did them. Files of cards
    that are not part of the results are left alone.

    Args:
        out: folder.
        results: of finished jobs, as `JobStore.result` gives them.
        failures: of failed jobs.
        settings: what the run was about.

    Returns:
        The advice, sentence by sentence; empty where none was asked for.

    Raises:
        StorageError: a file cannot be written.
    """
    rows = tidy_rows(results)
    if not rows:
        return []
    write_rows(out, rows)
    tables = result_tables(rows, metric=settings.metric, baseline=settings.baseline, num_seeds=settings.num_seeds)
    how = {"metric": settings.metric, "num_seeds": settings.num_seeds, "not_published": settings.not_published}
    said = advice(rows, **how) if settings.give_advice else []
    failed = [f"{failure['job']}: {failure['error']}: {failure['message']}" for failure in failures]
    facts = _facts(rows, results, settings)
    figures = draw_curves(rows, metric=settings.metric)
    for name, formats in figures.items():
        for kind, content in formats.items():
            write_bytes(out / f"curves_{_file_name(name)}.{kind}", content)
    title = f"Few-shot experiments, {settings.protocol}"
    comparisons = compare(rows, leave_out=settings.not_published)
    costs = cost_table(rows)
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts)]
    parts += ["## What to worry about", "\n".join(f"- {line}" for line in settings.worries)] if settings.worries else []
    parts += ["## Failed jobs", "\n".join(f"- {line}" for line in failed)] if failed else []
    parts += [*(to_markdown(table) for table in tables), "## Published numbers", comparison_markdown(comparisons)]
    write_text(out / "tables.md", "\n\n".join(parts) + "\n")
    write_text(out / "tables.tex", "\n\n".join(to_latex(table) for table in tables) + "\n")
    parts = ["# Costs", to_markdown(costs)]
    parts += ["## Advice", "\n".join(f"- {sentence}" for sentence in said)] if said else []
    write_text(out / "costs.md", "\n\n".join(parts) + "\n")
    whole = page("bench.html").render(
        title=title, facts=facts, worries=settings.worries, failures=failed, advice=said, tables=[*tables, costs],
        comparisons=comparisons,
        figures={name: markupsafe.Markup(_inline(formats["svg"])) for name, formats in figures.items()},
    )  # fmt: skip
    write_text(out / "index.html", whole)
    return said


def write_rows(out: Path, rows: Sequence[Row]) -> None:
    """Writes results.parquet and results.csv, one row per job and judged set."""
    table = pa.Table.from_pylist(list(rows))
    write_parquet(
        out / "results.parquet", table, {"rows": "one per job and judged set; rates 0 to 1, times in seconds"}
    )
    buffer = io.BytesIO()
    csv.write_csv(pa.Table.from_pylist([{k: safe_cell(v) for k, v in row.items()} for row in rows]), buffer)
    write_bytes(out / "results.csv", buffer.getvalue())


def _facts(rows: Sequence[Row], results: Sequence[Mapping[str, Any]], settings: BenchSettings) -> list[str]:
    """What has to be known of every number below."""
    uses = sorted({row["method"] for row in rows if row["validation_used_for"] != "nothing"})
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    schedules: dict[str, dict[int, str]] = {}
    for row in rows:
        schedules.setdefault(row["method"], {})[row["shots"]] = row["schedule"]
    facts = [
        f"Protocol {settings.protocol}: {PROTOCOLS[settings.protocol].about}.",
        f"Backbone: {settings.backbone}. Cards: {', '.join(dict.fromkeys(row['card'] for row in rows))}.",
        f"{len(results)} of {settings.num_jobs} jobs are done; seeds: {seeds}.",
        "Validation: at most min(shots, 4) images per class beside the training images; used by "
        f"{', '.join(uses) or 'no method'}. Test images were read once per job, after fitting; nothing was chosen on "
        "them.",
    ]
    looked_at, falls = clear_falls(rows, settings.metric)
    if looked_at:
        info = "; ".join(falls) or "none"
        facts.append(
            f"Falls from one number of shots to the next, significant over the seeds, of {looked_at} steps: {info}."
        )
    facts += [f"Settings other than published: {', '.join(settings.changes)}."] if settings.changes else []
    facts += [f"Search for settings: {settings.search}."] if settings.search else []
    longest = {m: by_shots[max(by_shots, key=lambda k: k or float("inf"))] for m, by_shots in schedules.items()}
    trained = [
        f"{method}: {text}" for method, text in longest.items() if text not in ("closed form", "nothing is learnt")
    ]
    return [*facts, f"Schedules at the most shots: {'; '.join(trained)}."] if trained else facts


def _file_name(card: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in card)


def _inline(svg: bytes) -> str:
    """An SVG without what belongs to a file of its own."""
    text = svg.decode()
    return text[text.index("<svg") :]
