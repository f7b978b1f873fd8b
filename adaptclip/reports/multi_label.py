# SPDX-License-Identifier: Apache-2.0
"""The report on a model that answers yes or no for each class: at its thresholds, and at any (AUC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaptclip.errors import DataError
from adaptclip.metrics import METRICS
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.several_labels import (
    RATES,
    class_rates,
    mean_area,
    mean_of_classes,
    mean_precision,
    measure,
    pooled,
)
from adaptclip.reports.blocks import (
    Block,
    Cell,
    Paragraph,
    Rows,
    Section,
    count,
    number,
    one_line,
    rate,
    show_rate,
    text,
)
from adaptclip.reports.measuring import group_rows
from adaptclip.reports.measuring import judged as judged_images

if TYPE_CHECKING:
    from adaptclip.metrics.judged import Judged
    from adaptclip.predictions import Predictions
    from adaptclip.training.thresholds import Thresholds

ROUGH = 10
"""Fewer validation images of a class than this place its threshold roughly, which is said."""

_WHOLE = {
    "exact": METRICS["subset_accuracy"],
    "hamming": METRICS["hamming_loss"],
    "example_f1": METRICS["example_f1"],
    "example_jaccard": METRICS["example_jaccard"],
}
"""Key of the report -> metric of the images as a whole."""

_HEADS = {"auc": "AUC", "average_precision": "average precision", **{name: name for name in RATES}, "f1": "F1"}


def multi_label_report(
    predictions: Predictions, thresholds: Thresholds, attributes: Sequence[str] = (), *, confidence: float = 0.95
) -> dict[str, Any]:
    """Assesses the probabilities of the single classes.

    Args:
        predictions: with `sigmoid`.
        thresholds: chosen on other images.
        attributes: group columns or intersections to report.
        confidence: level of the intervals.

    Returns:
        JSON-able dict: "thresholds" (`Thresholds.to_dict`), "labels_per_image" (mean number of classes named),
        "unnamed" and "exact" (numbers: share of the images without any class named, and with exactly their own),
        "hamming", "example_f1", "example_jaccard" (numbers: wrong answers, overlap of the classes of an image and those
        named),
        "per_class" (list of "class", "num_positive", "threshold" and the numbers "auc", "average_precision",
        "sensitivity", "specificity", "precision", "f1"), "macro" (the same numbers as means over the classes), "micro"
        (of all pairs of image and class alike, without the two areas), "groups" (attribute -> list of "group", "n",
        "sensitivity", "specificity", means over the classes).

    Raises:
        DataError: there are no such probabilities, or the thresholds are of other classes.
    """
    if predictions.sigmoid is None or len(thresholds.values) != len(predictions.class_names):
        raise DataError("a multi-label report needs sigmoid probabilities, and a threshold for each of their classes")
    judged = judged_images(replace(predictions, thresholds=thresholds.values))
    marks, sampling = judged.marks, judged.sampling
    assert marks is not None
    positive = marks.positive
    per_class = []
    for c, name in enumerate(predictions.class_names):
        info = {"class": name, "num_positive": int(positive[:, c].sum()), "threshold": float(thresholds.values[c])}
        measured = class_rates(marks, sampling, c)
        per_class.append(info | {key: number(value, confidence) for key, value in measured.items()})
    macro = {"auc": measure(mean_area(marks), sampling), "average_precision": measure(mean_precision(marks), sampling)}
    macro |= {name: measure(mean_of_classes(marks, name), sampling) for name in RATES}
    whole = {name: metric.compare(judged).model for name, metric in _WHOLE.items()}
    return {
        "thresholds": thresholds.to_dict(),
        "labels_per_image": float(marks.named.sum(axis=1).mean()),
        "unnamed": number(mean_of(marks.named.sum(axis=1) == 0, sampling), confidence),
        **{name: number(value, confidence) for name, value in whole.items()},
        "per_class": per_class,
        "macro": {name: number(value, confidence) for name, value in macro.items()},
        "micro": {name: number(measure(pooled(marks, name), sampling), confidence) for name in RATES},
        "groups": {
            attribute: [_group(name, judged.take(rows), confidence) for name, rows in found.items()]
            for attribute, found in ((a, group_rows(predictions, a)) for a in attributes)
        },
    }


def _group(name: str, judged: Judged, confidence: float) -> dict[str, Any]:
    marks = judged.marks
    assert marks is not None
    rates = {
        key: number(measure(mean_of_classes(marks, key), judged.sampling), confidence)
        for key in ("sensitivity", "specificity")
    }
    return {"group": name, "n": len(judged), **rates}


def multi_label_section(report: Mapping[str, Any]) -> Section | None:
    """Every class at its threshold, their means, and the groups."""
    info = report.get("multi_label")
    if not info:
        return None
    blocks: list[Block] = [Paragraph(summary(info)), Paragraph(how_chosen(info["thresholds"]), "muted"), _rows(info)]
    blocks += [_group_rows(attribute, rows) for attribute, rows in info["groups"].items()]
    words = (
        "Sensitivity: share of the images of a class that it is named for; specificity: share of the others that it is "
        "not named for; precision: share of right ones among those named. Macro is the mean over the classes, micro "
        "counts all pairs of image and class alike."
    )
    return Section("Several labels at once", "multi-label", [*blocks, Paragraph(words, "muted")])


def summary(info: Mapping[str, Any]) -> str:
    """The section in a line."""
    macro = info["macro"]
    return (
        f"Each class by itself, mean over the classes: AUC {show_rate(macro['auc'])}, F1 {show_rate(macro['f1'])}, "
        f"sensitivity {show_rate(macro['sensitivity'])}, specificity {show_rate(macro['specificity'])}; "
        f"{info['labels_per_image']:.2f} classes named per image, none for {show_rate(info['unnamed'])} of them; "
        f"exactly the right ones for {show_rate(info['exact'])}."
    )


def how_chosen(thresholds: Mapping[str, Any]) -> str:
    """What the thresholds are and how much stands behind them."""
    rule, positives = thresholds["rule"], thresholds["positives"]
    if rule != "f1" and not rule.startswith("sensitivity="):
        return f"Thresholds: {rule} for every class, fixed."
    words = {"f1": "best F1"}.get(rule, rule.replace("=", " of at least "))
    few = [n for n in positives if n]
    between = str(min(few)) if few and min(few) == max(few) else f"{min(few, default=0)} to {max(few, default=0)}"
    behind = f", {between} of each class{'; so few place a threshold roughly' * (min(few) < ROUGH)}" if few else ""
    info = f"Thresholds: {words} on {thresholds['num_images']:,} validation images{behind}."
    if thresholds["fallbacks"]:
        shown = ", ".join(map(one_line, thresholds["fallbacks"][:5])) + ", …" * (len(thresholds["fallbacks"]) > 5)
        info += f" {len(thresholds['fallbacks'])} classes could not be chosen on them and stay at 0.5: {shown}."
    return info


def _rows(info: Mapping[str, Any]) -> Rows:
    rows = []
    for row in sorted(info["per_class"], key=lambda row: (row["f1"]["value"] is None, row["f1"]["value"] or 0)):
        cells = [text(one_line(row["class"])), count(row["num_positive"]), _threshold(row["threshold"])]
        rows.append([*cells, *(rate(row[name]) for name in _HEADS)])
    blank = [Cell("", numeric=True)] * 2
    rows.append([text("macro"), *blank, *(rate(info["macro"][name]) for name in _HEADS)])
    rows.append([text("micro"), *blank, *(rate(info["micro"].get(name)) for name in _HEADS)])
    scales = dict.fromkeys(range(3, 3 + len(_HEADS)), (0.0, 1.0))
    return Rows("Classes, lowest F1 first", ["class", "n", "threshold", *_HEADS.values()], rows, scales)


def _threshold(value: float) -> Cell:
    return Cell(f"{value:.3g}", numeric=True)


def _group_rows(attribute: str, rows: Sequence[Mapping[str, Any]]) -> Rows:
    cells = [
        [text(one_line(row["group"])), count(row["n"]), rate(row["sensitivity"]), rate(row["specificity"])]
        for row in sorted(rows, key=lambda row: row["sensitivity"]["value"] or 0)
    ]
    header = ["group", "n", "sensitivity, mean over the classes", "specificity, mean over the classes"]
    return Rows(f"By {one_line(attribute)}", header, cells, {2: (0.0, 1.0), 3: (0.0, 1.0)})
