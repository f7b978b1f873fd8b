# SPDX-License-Identifier: Apache-2.0
"""Whether a model's confidence can be relied on: calibration, temperature, abstaining, sets of classes; its section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.errors import DataError
from adaptclip.metrics.calibration import ECE_BINS, confidence_bins, log_loss_values
from adaptclip.metrics.estimates import Measurement, mean_of
from adaptclip.metrics.metric import MIN_CLASS_IMAGES
from adaptclip.reports.bias import sentence
from adaptclip.reports.blocks import (
    MIN_GROUP,
    Block,
    Bullets,
    Cell,
    Figure,
    Paragraph,
    Rows,
    Section,
    change_scale,
    count,
    number,
    one_line,
    plain,
    points,
    rate,
    show_plain,
    show_rate,
    text,
)
from adaptclip.reports.confidence import (
    ConformalSets,
    conformal_sets,
    fewest_validation_images,
    fit_temperature,
    selective_curve,
    with_temperature,
)
from adaptclip.reports.measuring import group_rows, measure, sampling_of
from adaptclip.reports.plots import coverage, reliability

if TYPE_CHECKING:
    from adaptclip.predictions import Predictions

COVERAGES = (0.5, 0.8, 0.9)
"""Shares of the images, the most confident ones, on which selective accuracy is given."""

SET_LEVEL = 0.9
"""Share of images whose set of classes should hold the true one."""

MANY_VALIDATION_IMAGES = 100
"""With fewer validation images the coverage of the sets differs much from one validation set to the next."""

MIN_SET_GROUP = 30
"""A group with fewer images has no coverage of its own."""

_CURVE_POINTS = 60
_UNLIKE = 0.1
NO_VALIDATION = "no validation predictions were given, so nothing could be fitted: test images are never used for that"


def calibration_report(
    predictions: Predictions,
    validation: Predictions | None = None,
    *,
    validation_used_for: str = "nothing",
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Assesses the probabilities.

    Args:
        predictions: the judged model on the test images.
        validation: the same model on images that it was not trained on and that are not judged; None without.
        validation_used_for: what else these images chose, in words; "nothing" otherwise.
        confidence: level of all two-sided intervals.
        draws: bootstrap draws (of the ECE).
        seed: of the bootstrap.

    Returns:
        JSON-able dict: "scores" (uncalibrated), "bins", "temperature", "groups" (attribute -> rows), "selective",
        "sets", "cautions".

    Raises:
        DataError: the validation predictions have other classes, or images of the test.
    """
    if validation is not None:
        _check_validation(predictions, validation)
    options: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    temperature = None if validation is None or len(validation) == 0 else fit_temperature(validation)
    scaled = None if temperature is None else with_temperature(predictions, temperature)
    sets, why_not = _sets(validation)
    return {
        "scores": _scores(predictions, options),
        "bins": _bins(predictions, confidence),
        "temperature": {
            "value": temperature,
            "n": 0 if validation is None else len(validation),
            "scores": None if scaled is None else _scores(scaled, options),
            "bins": None if scaled is None else _bins(scaled, confidence),
            "note": "" if temperature is not None else NO_VALIDATION,
        },
        "groups": {name: _group_rows(predictions, scaled, sets, name, confidence) for name in predictions.groups},
        "selective": _selective(predictions, confidence),
        "sets": _set_report(predictions, sets, why_not, confidence),
        "cautions": _cautions(predictions, validation, validation_used_for),
    }


def _check_validation(predictions: Predictions, validation: Predictions) -> None:
    if validation.class_names != predictions.class_names:
        raise DataError("validation and test predictions have different class names; predict both with one model")
    shared = set(validation.ids) & set(predictions.ids)
    if shared:
        raise DataError(
            f"{len(shared)} images are in both the validation and the test predictions, for example "
            f"{min(shared)!r}: what is fitted on judged images proves nothing"
        )


def _scores(predictions: Predictions, options: dict[str, Any]) -> dict[str, Any]:
    confidence = options["confidence"]
    compared = measure(predictions, metrics=("ece", "brier"), draws=options["draws"], seed=options["seed"])
    return {
        "ece": number(compared["ece"].model, confidence),
        "brier": number(compared["brier"].model, confidence),
        "log_loss": number(_log_loss(predictions), confidence),
        "surplus": number(_surplus(predictions), confidence),
    }


def _log_loss(predictions: Predictions) -> Measurement:
    # On a scale whose upper end is that of a probability of 0, as `log_loss_values` counts it.
    values = log_loss_values(predictions.probs, predictions.labels)
    return mean_of(values, sampling_of(predictions), high=float(-np.log(np.finfo(np.float32).tiny)))


def _surplus(predictions: Predictions, rows: np.ndarray | None = None) -> Measurement:
    """Mean confidence minus accuracy: above 0 the model is overconfident."""
    keep = slice(None) if rows is None else rows
    right = predictions.pred[keep] == predictions.labels[keep]
    values = predictions.probs[keep].max(axis=1).astype(np.float64) - right
    return mean_of(values, sampling_of(predictions, rows), low=-1.0)


def _bins(predictions: Predictions, confidence: float) -> list[dict[str, Any]]:
    """The occupied confidence bins of the reliability diagram."""
    which = confidence_bins(predictions.probs.max(axis=1))
    right = predictions.pred == predictions.labels
    top = predictions.probs.max(axis=1).astype(np.float64)
    rows = []
    for b in np.unique(which):
        inside = np.flatnonzero(which == b)
        rows.append(
            {
                "low": float(b / ECE_BINS),
                "high": float((b + 1) / ECE_BINS),
                "n": len(inside),
                "confidence": float(top[inside].mean()),
                "accuracy": number(mean_of(right[inside], sampling_of(predictions, inside)), confidence),
            }
        )
    return rows


def _group_rows(
    predictions: Predictions, scaled: Predictions | None, sets: ConformalSets | None, attribute: str, confidence: float
) -> list[dict[str, Any]]:
    rows = []
    for group, positions in group_rows(predictions, attribute).items():
        enough = len(positions) >= MIN_SET_GROUP
        members = None if sets is None or not enough else sets.members(predictions.probs[positions])
        few = f"no coverage: {len(positions)} images, and {MIN_SET_GROUP} are needed"
        rows.append(
            {
                "group": group,
                "n": len(positions),
                "brier": number(measure(predictions, metrics=("brier",), rows=positions)["brier"].model, confidence),
                "surplus": number(_surplus(predictions, positions), confidence),
                "surplus_after": None if scaled is None else number(_surplus(scaled, positions), confidence),
                "coverage": None
                if sets is None
                else number(Measurement(None, len(positions), note=few), confidence)
                if members is None
                else number(_coverage(members, predictions, positions), confidence),
                "set_size": None if members is None else float(members.sum(axis=1).mean()),
            }
        )
    return rows


def _selective(predictions: Predictions, confidence: float) -> dict[str, Any]:
    curve = selective_curve(predictions)
    right = predictions.pred == predictions.labels
    top = predictions.probs.max(axis=1)
    points = []
    for asked in COVERAGES:
        i = int(np.searchsorted(curve.coverage, asked - 1e-12))
        answered = top >= curve.threshold[i]
        # A ratio: accuracy among the answered, with the threshold taken as given.
        rows = np.flatnonzero(answered)
        measured = mean_of(right[rows], sampling_of(predictions, rows))
        points.append(
            {
                "asked": asked,
                "coverage": float(curve.coverage[i]),
                "threshold": float(curve.threshold[i]),
                "accuracy": number(measured, confidence),
            }
        )
    thin = np.unique(np.linspace(0, len(curve.coverage) - 1, _CURVE_POINTS).round().astype(int))
    return {
        "points": points,
        "aurc": number(curve.aurc, confidence),
        "curve": [[float(curve.coverage[i]), float(curve.accuracy[i])] for i in thin],
    }


def _sets(validation: Predictions | None) -> tuple[ConformalSets | None, str]:
    """The sets, or why there are none."""
    if validation is None:
        return None, NO_VALIDATION
    needed = fewest_validation_images(SET_LEVEL)
    if len(validation) < needed:
        return None, f"{len(validation)} validation images are too few for {100 * SET_LEVEL:g} %: {needed} are needed"
    return conformal_sets(validation, SET_LEVEL), ""


def _coverage(members: np.ndarray, predictions: Predictions, rows: np.ndarray | None = None) -> Measurement:
    labels = predictions.labels if rows is None else predictions.labels[rows]
    held = members[np.arange(len(labels)), labels]
    return mean_of(held, sampling_of(predictions, rows))


def _set_report(
    predictions: Predictions, sets: ConformalSets | None, why_not: str, confidence: float
) -> dict[str, Any]:
    if sets is None:
        return {"level": SET_LEVEL, "value": None, "note": why_not}
    members = sets.members(predictions.probs)
    sizes = members.sum(axis=1)
    size = mean_of(sizes.astype(np.float64), sampling_of(predictions), high=float(members.shape[1]))
    return {
        "level": sets.level,
        "value": sets.least_probability,
        "n": sets.num_validation,
        "expected": list(sets.expected),
        "coverage": number(_coverage(members, predictions), confidence),
        "size": number(size, confidence),
        "empty": int((sizes == 0).sum()),
        "single": int((sizes == 1).sum()),
        "note": ""
        if sets.num_validation >= MANY_VALIDATION_IMAGES
        else f"with {sets.num_validation} validation images the coverage comes out anywhere between "
        f"{100 * sets.expected[0]:.0f} and {100 * sets.expected[1]:.0f} % in nine of ten cases",
    }


def _cautions(predictions: Predictions, validation: Predictions | None, used_for: str) -> list[str]:
    if validation is None or len(validation) == 0:
        return []
    cautions = []
    if used_for != "nothing":
        cautions.append(f"the validation images were also used for: {used_for}; what is fitted on them looks better")
    unlike = _distance(validation.labels, predictions.labels, len(predictions.class_names))
    if unlike > _UNLIKE:
        cautions.append(
            f"the validation images have another mix of classes than the test images ({100 * unlike:.0f} % of them "
            "would have to change class), as few-shot draws do; the temperature and the sets are meant for the mix "
            "that they were fitted on"
        )
    return cautions


def _distance(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray, num_classes: int) -> float:
    """Total variation distance of two mixtures of classes, 0 to 1."""
    shares = [np.bincount(x, minlength=num_classes) / len(x) for x in (np.asarray(first), np.asarray(second))]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


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
    blocks += [_rows_of_groups(attribute, rows) for attribute, rows in found["groups"].items() if rows]
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


def _rows_of_groups(attribute: str, groups: Sequence[Mapping[str, Any]]) -> Rows:
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
        info = [point for point in selective["curve"] if point[0] * report["num_images"] >= MIN_GROUP]
        svg = coverage(info or selective["curve"], accuracy)
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
