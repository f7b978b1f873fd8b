"""How a model does on each group of an attribute, with intervals, and how adaptation changed that.

Definitions and names are fairlearn's. Differences between groups are compared with what noise alone would give; see
`metrics.gaps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptclip.evaluation.comparisons import difference, sign_test
from adaptclip.evaluation.grouping import group_rows, group_values, listed
from adaptclip.evaluation.measuring import measure, sampling_of
from adaptclip.gate_rules import BETWEEN
from adaptclip.metrics import GROUP_METRICS, Metric, find_metric
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.gaps import GapTest, holm
from adaptclip.metrics.judged import Sampling
from adaptclip.metrics.rates import absent_classes
from adaptclip.reports.numbers import MIN_GROUP, comparison, gap_of_means
from adaptclip.reports.numbers import number as number
from adaptclip.reports.one_vs_rest import one_vs_rest
from adaptclip.reports.outcomes import group_outcome
from adaptclip.types import Predictions

SMALL_GROUP = 100
"""Below this many images a group's accuracy is known to no better than about 8 points: a caution is given."""

ES_NOTE = (
    "FairCLIP's equity-scaled accuracy: accuracy / (1 + sum over the groups of |accuracy of the group - accuracy|). It "
    "falls with the number of groups and with their noise, so attributes cannot be compared by it"
)


def group_table(
    predictions: Predictions,
    baseline: Predictions | None,
    attribute: str,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    min_group: int = MIN_GROUP,
    metrics: Sequence[Metric] = (),
) -> dict[str, Any]:
    """Assesses every group of one attribute.

    Args:
        predictions: the judged model.
        baseline: zero-shot predictions, aligned, or None.
        attribute: name of a group column, or an intersection such as "sex × age_group".
        confidence: level of the two-sided intervals.
        draws: bootstrap draws, and random deals of the permutation tests.
        seed: of both.
        min_group: images a group needs to take part in gaps and tests. Smaller groups of an intersection have
            no row: crossing attributes makes many of them.
        metrics: of your own, beside GROUP_METRICS.

    Returns:
        JSON-able dict:
            "rows": per group "group", "n", "clusters", "classes_present", "large_enough", each of GROUP_METRICS
                compared, and "against_rest": accuracy minus that of all other images, with interval, p-value and
                p-value corrected by Holm's method for the number of groups ("p_holm"); None where not tested;
                "change_p", the uncorrected p-value of the change of accuracy.
            "worst_group": name and accuracy of the worst group that is large enough.
            "gap", "gap_zero_shot": max-min accuracy (`gap_of_means`); None without two groups that are large enough.
            "outcomes": per declared outcome, sensitivity and specificity of the groups (`group_outcome`).
            "one_vs_rest": each class against the rest (`one_vs_rest`).
            "too_small": groups of an intersection without a row, each {"group", "n"}.
            "es_accuracy", "intersection", "min_group", "cautions".

    Raises:
        DataError: the predictions have no such attribute.
    """
    crossed = attribute not in predictions.groups and BETWEEN in attribute
    names, code = group_values(predictions, attribute)
    sampling = sampling_of(predictions)
    by_group = group_rows(predictions, attribute)
    too_small = [
        {"group": name, "n": len(rows)} for name, rows in by_group.items() if crossed and len(rows) < min_group
    ]
    shown = {name: rows for name, rows in by_group.items() if not crossed or len(rows) >= min_group}
    asked = [*map(find_metric, GROUP_METRICS), *metrics]
    rows = [
        _row(predictions, baseline, name, positions, asked, (confidence, draws, seed))
        for name, positions in shown.items()
    ]
    for row in rows:
        row["large_enough"] = row["n"] >= min_group
    settings: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed, "min_group": min_group}
    right = predictions.pred == predictions.labels
    gap, test = gap_of_means(right, code, names, sampling, what="accuracy", **settings)
    before = None
    if baseline is not None:
        hits = baseline.pred == baseline.labels
        before, _ = gap_of_means(hits, code, names, sampling, what="zero-shot accuracy", **settings)
    _add_against_rest(rows, right, {names[i]: i for i in range(len(names))}, code, sampling, test, confidence)
    return {
        "rows": rows,
        "metrics": {metric.name: metric.told() for metric in asked},
        "worst_group": _worst(rows),
        "gap": gap,
        "gap_zero_shot": before,
        "outcomes": [group_outcome(predictions, baseline, attribute, outcome, **settings)
                     for outcome in predictions.outcomes],
        "one_vs_rest": one_vs_rest(predictions, names, code, sampling, **settings),
        "es_accuracy": _equity_scaled(rows, float(right.mean()) if len(right) else None),
        "intersection": crossed,
        "too_small": too_small,
        "min_group": min_group,
        "cautions": _cautions(attribute, rows, too_small, min_group),
    }  # fmt: skip


def _row(
    predictions: Predictions,
    baseline: Predictions | None,
    name: str,
    positions: np.ndarray,
    metrics: Sequence[Metric],
    settings: tuple[float, int, int],
) -> dict[str, Any]:
    """One group's line."""
    confidence, draws, seed = settings
    measured = measure(predictions, baseline, metrics=metrics, rows=positions, full_bins=True, draws=draws, seed=seed)
    absent = absent_classes(predictions.labels[positions], len(predictions.class_names))
    return {
        "group": name,
        "n": len(positions),
        "clusters": None if predictions.clusters is None else sampling_of(predictions, positions).num_units,
        "classes_present": len(predictions.class_names) - len(absent),
        **{metric: comparison(compared, confidence) for metric, compared in measured.items()},
        "change_p": None if baseline is None else _change_p(predictions, baseline, positions),
    }


def _change_p(predictions: Predictions, baseline: Predictions, positions: np.ndarray) -> float:
    """Two-sided p-value of the change of accuracy, not corrected for the number of groups."""
    right = predictions.pred[positions] == predictions.labels[positions]
    before = baseline.pred[positions] == predictions.labels[positions]
    return sign_test(right, before, sampling_of(predictions, positions).unit)


def _add_against_rest(
    rows: list[dict[str, Any]],
    right: np.ndarray,
    place: dict[str, int],
    code: np.ndarray,
    sampling: Sampling,
    test: GapTest | None,
    confidence: float,
) -> None:
    """Adds to each row how its accuracy differs from that of the other images (of groups that are large enough)."""
    for row in rows:
        row["against_rest"] = None
    if test is None:
        return
    tested, corrected = [row for row in rows if row["large_enough"]], holm(test.rest_p)
    among = np.isin(code, [place[row["group"]] for row in tested])
    for k, row in enumerate(tested):
        own = code == place[row["group"]]
        other = among & ~own
        one, rest = (mean_of(right[part], sampling.take(np.flatnonzero(part))) for part in (own, other))
        low, high = difference(one, rest).interval(confidence) or (None, None)
        row["against_rest"] = {
            "difference": float(test.rest[k]),
            "low": low,
            "high": high,
            "p_value": float(test.rest_p[k]),
            "p_holm": float(corrected[k]),
            "differs": bool(corrected[k] <= 1 - confidence),
            "n": one.n,
            "note": one.note or rest.note,
        }


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    known = [row for row in rows if row["accuracy"]["model"]["value"] is not None]
    pool = [row for row in known if row["large_enough"]] or known
    if not pool:
        return None
    worst = min(pool, key=lambda row: row["accuracy"]["model"]["value"])
    return {"group": worst["group"], **worst["accuracy"]["model"]}


def _equity_scaled(rows: list[dict[str, Any]], overall: float | None) -> dict[str, Any] | None:
    values = [row["accuracy"]["model"]["value"] for row in rows if row["large_enough"]]
    if overall is None or len(values) < 2:
        return None
    return {"value": overall / (1 + sum(abs(value - overall) for value in values)), "note": ES_NOTE}


def _cautions(attribute: str, rows: list[dict[str, Any]], too_small: list[dict[str, Any]], min_group: int) -> list[str]:
    if len(rows) < 2:
        return [f"{attribute} has {len(rows)} group(s): there is nothing to compare"]
    cautions = []
    tiny = [f"{row['group']} ({row['n']})" for row in [*rows, *too_small] if row["n"] < min_group]
    small = [f"{row['group']} ({row['n']})" for row in rows if min_group <= row["n"] < SMALL_GROUP]
    if tiny:
        cautions.append(
            f"groups of fewer than {min_group} images take no part in gaps and tests, and no gate can decide on them: "
            + listed(tiny)
        )
    if small:
        cautions.append(f"groups of fewer than {SMALL_GROUP} images say little: {listed(small)}")
    few = [row["group"] for row in rows if row["accuracy"]["model"]["note"].startswith("no interval: ")]
    if few:
        cautions.append(f"groups of too few clusters for an interval: {listed(few)}")
    return cautions
