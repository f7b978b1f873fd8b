"""Whether a model's confidence can be relied on: calibration, temperature, answering less often, sets of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptclip.errors import DataError
from adaptclip.evaluation.confidence import (
    ConformalSets,
    conformal_sets,
    fewest_validation_images,
    fit_temperature,
    selective_curve,
    with_temperature,
)
from adaptclip.evaluation.grouping import group_rows
from adaptclip.evaluation.measuring import measure, sampling_of
from adaptclip.metrics.calibration import ECE_BINS, confidence_bins, log_loss_values
from adaptclip.metrics.estimates import Measurement, mean_of
from adaptclip.reports.numbers import number
from adaptclip.types import Predictions

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
    """Mean confidence minus accuracy: above 0 the model is surer than it is right."""
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
