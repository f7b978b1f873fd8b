"""The report on confidence in words, tables and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptclip.metrics.metric import MIN_CLASS_IMAGES
from adaptclip.reports.bias_sections import sentence
from adaptclip.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Figure,
    Paragraph,
    Rows,
    Section,
    change_scale,
    count,
    one_line,
    plain,
    points,
    rate,
    show_plain,
    show_rate,
    text,
)
from adaptclip.reports.numbers import MIN_GROUP
from adaptclip.reports.plots import coverage, reliability


def calibration_section(report: Mapping[str, Any], *, plots: bool) -> Section | None:
    """Calibration: scores, reliability, temperature, groups."""
    found = report.get("calibration")
    if not found:
        return None
    blocks: list[Block] = [_score_rows(found)]
    temperature = found["temperature"]
    if temperature["value"] is None:
        blocks.append(Paragraph("No temperature was fitted: " + sentence(temperature["note"]), "muted"))
    else:
        blocks.append(
            Paragraph(
                f"The temperature {temperature['value']:.2f} was fitted on {temperature['n']} validation images by log "
                "loss; it changes no decision, only confidences. It is not built into the artifact.",
                "muted",
            )
        )
    if plots:
        svg = reliability(found["bins"], temperature["bins"])
        blocks.append(Figure("Reliability: accuracy by confidence", svg, _reliability_words(found)))
    if cautions := [sentence(c) for c in found["cautions"]]:
        blocks.append(Bullets(cautions, caution=True))
    blocks += [_group_rows(attribute, rows) for attribute, rows in found["groups"].items() if rows]
    return Section("Calibration", "calibration", blocks)


def _reliability_words(found: Mapping[str, Any]) -> str:
    surplus = found["scores"]["surplus"]
    how = "more" if surplus["value"] > 0 else "less"
    fullest = max(found["bins"], key=lambda row: row["n"])
    bins = [*found["bins"], *(found["temperature"]["bins"] or ())]
    few = f"; open points stand for fewer than {MIN_CLASS_IMAGES}" * any(row["n"] < MIN_CLASS_IMAGES for row in bins)
    return (
        f"Its mean confidence is {abs(100 * surplus['value']):.1f} points {how} than its accuracy. In the fullest bin "
        f"({fullest['n']} images) the mean confidence is {100 * fullest['confidence']:.0f} % and the accuracy "
        f"{show_rate(fullest['accuracy'])}. Grey bars show where the images are{few}."
    )


def _score_rows(found: Mapping[str, Any]) -> Rows:
    before, after = found["scores"], found["temperature"]["scores"]
    kinds = (
        ("ece", "calibration error (ECE)", rate),
        ("surplus", "confidence minus accuracy, points", points),
        ("brier", "Brier score, 0 to 2", plain),
        ("log_loss", "log loss, nats", plain),
    )
    rows = []
    for key, name, cell in kinds:
        cells = [text(name), _bare(cell(before[key]))]
        rows.append(cells if after is None else [*cells, _bare(cell(after[key]))])
    header = ["", "as it is", "with the temperature"] if after is not None else ["", "value"]
    return Rows("Scores, lower is better", header, rows)


def _bare(cell: Cell) -> Cell:
    return Cell(cell.words, numeric=True)


def _group_rows(attribute: str, groups: Sequence[Mapping[str, Any]]) -> Rows:
    fitted = any(row["surplus_after"] is not None for row in groups)
    sets = any(row["coverage"] is not None for row in groups)
    rows = []
    for row in groups:
        cells = [text(one_line(row["group"])), count(row["n"]), points(row["surplus"])]
        cells += [points(row["surplus_after"])] * fitted
        cells.append(plain(row["brier"]))
        if sets:
            size = row["set_size"]
            cells += [rate(row["coverage"]), Cell("–" if size is None else f"{size:.1f}", numeric=True)]
        rows.append(cells)
    header = ["group", "n", "confidence minus accuracy", *["with the temperature"] * fitted, "Brier score"]
    header += ["sets hold the truth", "classes per set"] * sets
    scales = {i: change_scale(rows, i) for i in range(2, 3 + fitted)}
    if sets:
        scales[4 + fitted] = (0.0, 1.0)
    marks = dict.fromkeys(range(2, 3 + fitted), 0.0)
    return Rows(f"Calibration by {one_line(attribute)}", header, rows, scales, marks)


def selective_section(report: Mapping[str, Any], *, plots: bool) -> Section | None:
    """Answering less often, and answering with several classes."""
    found = report.get("calibration")
    if not found:
        return None
    selective = found["selective"]
    rows = [
        [Cell(f"{100 * p['coverage']:.0f} %", numeric=True), Cell(f"{100 * p['threshold']:.1f} %", numeric=True),
         rate(p["accuracy"]), count(p["accuracy"]["n"])]
        for p in selective["points"]
    ]  # fmt: skip
    header = ["share answered", "confidence at least", "accuracy of the answers", "n"]
    blocks: list[Block] = [Rows("If it answers only when it is sure", header, rows, {2: (0.0, 1.0)})]
    blocks.append(
        Paragraph(
            f"Area under the risk-coverage curve: {show_plain(selective['aurc'])} (0 is best). The thresholds are of "
            "these test images; choose one on validation images before using it.",
            "muted",
        )
    )
    if plots:
        accuracy = report["overall"]["accuracy"]["model"]["value"]
        words = "; ".join(
            f"{100 * p['coverage']:.0f} % answered: {show_rate(p['accuracy'])} right" for p in selective["points"]
        )
        # The first few answers are right or wrong by luck, and a line would make something of it.
        told = [point for point in selective["curve"] if point[0] * report["num_images"] >= MIN_GROUP]
        svg = coverage(told or selective["curve"], accuracy)
        blocks.append(Figure("Accuracy of the answers by share answered", svg, words + "."))
    blocks += list(_set_blocks(found["sets"]))
    return Section("When to answer", "answers", blocks)


def _set_blocks(sets: Mapping[str, Any]) -> Iterator[Block]:
    level = f"{100 * sets['level']:g} %"
    if sets["value"] is None:
        yield Paragraph(f"No sets of classes that hold the truth in {level}: {sentence(sets['note'])}", "muted")
        return
    yield Paragraph(
        f"Sets of classes meant to hold the true one in {level} of cases (split conformal, calibrated on "
        f"{sets['n']} validation images: every class with a probability of {100 * sets['value']:.2g} % or more). On "
        f"the test images they hold it in {show_rate(sets['coverage'])} and have {show_plain(sets['size'], 2)} "
        f"classes; sets of exactly one class: {sets['single']:,}, empty ones: {sets['empty']:,}."
    )
    if sets["note"]:
        yield Paragraph(sentence(sets["note"]), "muted")
