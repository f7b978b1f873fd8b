# SPDX-License-Identifier: Apache-2.0
"""How training went: loss and learning rate by step, read from a run's metrics.jsonl, and their section."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptclip.errors import StorageError
from adaptclip.files import parse_json
from adaptclip.reports.blocks import Block, Figure, Paragraph, Section, one_line
from adaptclip.reports.plots import BLUE, ORANGE, curve

MOST_POINTS = 500
"""A curve of more logged steps is thinned out to about as many."""

_KINDS = {"loss": ("loss", BLUE), "lr": ("learning rate", ORANGE)}


def learning_curves(run: Path) -> list[dict[str, Any]]:
    """Reads what a run logged of its loss and learning rate; lines that cannot be read are passed over.

    Args:
        run: the run folder; stages of a training of several have folders in it.

    Returns:
        One entry per stage with logged losses, the run's own first: "stage" (its name, "" for the run's own), "every"
        (of so many logged steps one is kept), "step" (ints), "loss" and "lr" (numbers, or None where it was not finite
        or not logged). Empty where nothing was learnt in steps.
    """
    found = []
    for path in [run / "metrics.jsonl", *sorted(run.glob("*/metrics.jsonl"))]:
        rows = list(_rows(path))
        if not any(row["loss"] is not None for row in rows):
            continue
        every = -(-len(rows) // MOST_POINTS)
        kept = rows[::-every][::-1]  # counted from the end, so that the last step is there
        kept = kept if kept[0] is rows[0] else [rows[0], *kept]
        columns = {key: [row[key] for row in kept] for key in ("step", *_KINDS)}
        found.append({"stage": "" if path.parent == run else path.parent.name, "every": every, **columns})
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line, where="a line")
        except StorageError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield {"step": row["step"], **{key: _number(row.get(key)) for key in _KINDS}}


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def learning_section(report: Mapping[str, Any], *, plots: bool) -> Section | None:
    """Tells the first, last and lowest loss of each stage, and draws its curves; None where there were no steps."""
    stages = report.get("learning")
    if not stages:
        return None
    words = (
        "Each loss is that of one batch of training images, with whatever the method adds to it. It shows how "
        "training went, not how good the model is on other images."
    )
    blocks = [block for i, stage in enumerate(stages) for block in _blocks(stage, i, plots=plots)]
    return Section("Training curve", "curve", [*blocks, Paragraph(words, "muted")])


def _blocks(stage: Mapping[str, Any], number: int, *, plots: bool) -> Iterator[Block]:
    before = f"{one_line(stage['stage'])}: " if stage["stage"] else ""
    for key, (what, colour) in _KINDS.items():
        known = [(step, value) for step, value in zip(stage["step"], stage[key], strict=True) if value is not None]
        if not known:
            continue
        words = f"{before}{what} {_path(known, lowest=key == 'loss')}."
        words, title = (text[:1].upper() + text[1:] for text in (words, f"{before}{what} by step"))
        if plots and len(known) > 1:
            if stage["every"] > 1:
                words += f" Of {stage['every']} logged steps one is drawn."
            drawn = curve(f"{key}-{number}", stage["step"], stage[key], what, colour)
            yield Figure(title, drawn, words)
        else:
            yield Paragraph(words)


def _path(known: Sequence[tuple[int, float]], *, lowest: bool) -> str:
    (first, start), (last, end) = known[0], known[-1]
    if len(known) == 1:
        return f"{start:.4g} at step {first:,}, the only one that was logged"
    words = f"{start:.4g} at step {first:,}, {end:.4g} at step {last:,}"
    step, low = min(known, key=lambda point: point[1])
    return words + (f"; lowest {low:.4g} at step {step:,}" if lowest and step != last else "")
