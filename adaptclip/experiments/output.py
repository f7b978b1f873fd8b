"""Writes what a grid of jobs found: rows, tables, curves, one page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pyarrow as pa
from pyarrow import csv

from adaptclip.experiments.advice import advice
from adaptclip.experiments.curves import draw_curves
from adaptclip.experiments.protocols import PROTOCOLS
from adaptclip.experiments.published import compare, comparison_markdown
from adaptclip.experiments.summary import Row, clear_falls, tidy_rows
from adaptclip.experiments.tables import cost_table, result_tables, to_latex, to_markdown
from adaptclip.storage import write_bytes, write_parquet, write_text
from adaptclip.terminal import safe_cell


@dataclass(frozen=True)
class Asked:
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
    out: Path, results: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]], asked: Asked
) -> list[str]:
    """Writes results.parquet and .csv, tables.md and .tex, curves_<card>.svg and .png, costs.md, and index.html.

    The tables and curves hold no times, so that the same jobs give the same files, whoever did them. Files of cards
    that are not part of the results are left alone.

    Args:
        out: folder.
        results: of finished jobs, as `Board.result` gives them.
        failures: of failed jobs.
        asked: what the run was about.

    Returns:
        The advice, sentence by sentence; empty where none was asked for.

    Raises:
        StorageError: a file cannot be written.
    """
    rows = tidy_rows(results)
    if not rows:
        return []
    write_rows(out, rows)
    tables = result_tables(rows, metric=asked.metric, baseline=asked.baseline, num_seeds=asked.num_seeds)
    how = {"metric": asked.metric, "num_seeds": asked.num_seeds, "not_published": asked.not_published}
    said = advice(rows, **how) if asked.give_advice else []
    failed = [f"{failure['job']}: {failure['error']}: {failure['message']}" for failure in failures]
    facts = _facts(rows, results, asked)
    figures = draw_curves(rows, metric=asked.metric)
    for name, formats in figures.items():
        for kind, content in formats.items():
            write_bytes(out / f"curves_{_file_name(name)}.{kind}", content)
    title = f"Few-shot experiments, {asked.protocol}"
    comparisons = compare(rows, leave_out=asked.not_published)
    costs = cost_table(rows)
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts)]
    parts += ["## What to worry about", "\n".join(f"- {line}" for line in asked.worries)] if asked.worries else []
    parts += ["## Failed jobs", "\n".join(f"- {line}" for line in failed)] if failed else []
    parts += [*(to_markdown(table) for table in tables), "## Published numbers", comparison_markdown(comparisons)]
    write_text(out / "tables.md", "\n\n".join(parts) + "\n")
    write_text(out / "tables.tex", "\n\n".join(to_latex(table) for table in tables) + "\n")
    parts = ["# Costs", to_markdown(costs)]
    parts += ["## Advice", "\n".join(f"- {sentence}" for sentence in said)] if said else []
    write_text(out / "costs.md", "\n\n".join(parts) + "\n")
    page = _template().render(
        title=title, facts=facts, worries=asked.worries, failures=failed, advice=said, tables=[*tables, costs],
        comparisons=comparisons,
        figures={name: markupsafe.Markup(_inline(formats["svg"])) for name, formats in figures.items()},
    )  # fmt: skip
    write_text(out / "index.html", page)
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


def _facts(rows: Sequence[Row], results: Sequence[Mapping[str, Any]], asked: Asked) -> list[str]:
    """What has to be known of every number below."""
    uses = sorted({row["method"] for row in rows if row["validation_used_for"] != "nothing"})
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    schedules: dict[str, dict[int, str]] = {}
    for row in rows:
        schedules.setdefault(row["method"], {})[row["shots"]] = row["schedule"]
    facts = [
        f"Protocol {asked.protocol}: {PROTOCOLS[asked.protocol].about}.",
        f"Backbone: {asked.backbone}. Cards: {', '.join(dict.fromkeys(row['card'] for row in rows))}.",
        f"{len(results)} of {asked.num_jobs} jobs are done; seeds: {seeds}.",
        "Validation: at most min(shots, 4) images per class beside the training images; used by "
        f"{', '.join(uses) or 'no method'}. Test images were read once per job, after fitting; nothing was chosen on "
        "them.",
    ]
    looked_at, falls = clear_falls(rows, asked.metric)
    if looked_at:
        told = "; ".join(falls) or "none"
        facts.append(
            f"Falls from one number of shots to the next, beyond chance by seeds, of {looked_at} steps: {told}."
        )
    facts += [f"Settings other than published: {', '.join(asked.changes)}."] if asked.changes else []
    facts += [f"Search for settings: {asked.search}."] if asked.search else []
    longest = {m: by_shots[max(by_shots, key=lambda k: k or float("inf"))] for m, by_shots in schedules.items()}
    trained = [
        f"{method}: {text}" for method, text in longest.items() if text not in ("closed form", "nothing is learnt")
    ]
    return [*facts, f"Schedules at the most shots: {'; '.join(trained)}."] if trained else facts


def _file_name(card: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in card)


def _template() -> jinja2.Template:
    text = (files("adaptclip.experiments") / "page.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)


def _inline(svg: bytes) -> str:
    """An SVG without what belongs to a file of its own."""
    text = svg.decode()
    return text[text.index("<svg") :]
