# SPDX-License-Identifier: Apache-2.0
"""How a model does on each group of an attribute, with intervals, and how adaptation changed that; the section of it.

Definitions and names are fairlearn's. Differences between groups are compared with what noise alone would give; see
`metrics.gaps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.gate_rules import BETWEEN
from adaptclip.metrics import GROUP_METRICS, METRICS, Metric, find_metric
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.gaps import GapTest, holm
from adaptclip.metrics.rates import ACCURACY, absent_classes
from adaptclip.reports.blocks import (
    MAX_SCREEN_ROWS,
    MIN_GROUP,
    Block,
    Bullets,
    Cell,
    Paragraph,
    Rows,
    Section,
    change_scale,
    comparison,
    count,
    gap_of_means,
    one_line,
    points,
    rate,
    show_rate,
    text,
)
from adaptclip.reports.measuring import difference, group_rows, group_values, listed, measure, sampling_of, sign_test
from adaptclip.reports.outcomes import group_outcome, one_vs_rest

if TYPE_CHECKING:
    from adaptclip.metrics.judged import Sampling
    from adaptclip.predictions import Predictions

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
        "metrics": {metric.name: metric.info() for metric in asked},
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
    pool = [row for row in rows if row["large_enough"] and row["accuracy"]["model"]["value"] is not None]
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


def info(report: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """How a metric of a report (or of a table of one) is shown: `Metric.info`, kept in the report itself."""
    return report.get("metrics", {}).get(metric) or METRICS[metric].info()


def sentence(words: str) -> str:
    """Makes a note or caution a sentence."""
    words = one_line(words)
    return words if words.endswith((".", "!", "?")) else words + "."


def is_paired(compared: Mapping[str, Any]) -> bool:
    """Whether a comparison has a baseline."""
    return compared["zero_shot"] is not None


def overall_section(report: Mapping[str, Any]) -> Section:
    """All images together."""
    return Section("Overall", "overall", overall_blocks(report, "All images"))


def overall_blocks(report: Mapping[str, Any], title: str) -> list[Block]:
    """The metrics of a report, or of a part of one, in a table, and what to know when reading them."""
    blocks: list[Block] = [overall_rows(report, "words", title)]
    notes = sorted(
        {
            f"{info(report, metric)['words']}: {number['note']}"
            for metric, compared in _with_meaning(report).items()
            for number in compared.values()
            if number is not None and number["note"]
        }
    )
    if notes:
        blocks.append(Bullets([sentence(note) for note in notes]))
    return blocks


def _with_meaning(report: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a report without those that say nothing about so few classes, such as the top 5 of three."""
    classes = report.get("num_classes")
    return {
        name: compared for name, compared in report["overall"].items()
        if classes is None or name not in METRICS or METRICS[name].least_classes <= classes
    }  # fmt: skip


def overall_rows(report: Mapping[str, Any], words: str, title: str, *, sign: str = " %") -> Rows:
    """One row per metric, named by its "words" or its "short" ones: value, or zero-shot, adapted and change."""
    overall = _with_meaning(report)
    paired = any(is_paired(c) for c in overall.values())
    header = ["metric", "zero-shot", "adapted", "change in points", "n"] if paired else ["metric", "value", "n"]
    rows = []
    for metric, c in overall.items():
        how = info(report, metric)
        cells = [c["zero_shot"], c["model"]] if paired else [c["model"]]
        shown = [_metric_cell(how, number, sign) for number in cells]
        change = [_change_cell(how, c["change"])] if paired else []
        rows.append([text(how[words]), *shown, *change, count(c["model"]["n"])])
    scales = {1: (0.0, 1.0), 2: (0.0, 1.0)} if paired else {1: (0.0, 1.0)}
    if paired:
        scales[3] = change_scale(rows, 3)
    return Rows(title, header, rows, scales, {3: 0.0} if paired else {})


def _rule_words(outcome: Mapping[str, Any]) -> str:
    return outcome.get("rule") or f"positive above a summed probability of {outcome['threshold']:g}"


def _baseline_words(outcome: Mapping[str, Any]) -> str:
    """How zero-shot is judged, where a threshold decides; nothing without one."""
    if outcome["threshold"] is None or not is_paired(outcome["sensitivity"]):
        return ""
    chosen = ", which was not chosen for it" if "chosen" in outcome.get("rule", "") else ""
    return f" Zero-shot is judged by the same threshold{chosen}; the AUC compares the two without any."


def _has_bar(how: Mapping[str, Any]) -> bool:
    """Whether a metric lies between 0 and 1, where bars are drawn; others are shown as plain decimals."""
    return list(how["scale"]) == [0.0, 1.0]


def _metric_cell(how: Mapping[str, Any], number: Mapping[str, Any] | None, sign: str = " %") -> Cell:
    if not _has_bar(how) and number is not None and number["value"] is not None:
        words = f"{number['value']:.3f}"
        if number["low"] is not None:
            words += f" [{number['low']:.3f}, {number['high']:.3f}]"
        return Cell(words, numeric=True)
    return rate(number, sign=sign)


def _change_cell(how: Mapping[str, Any], number: Mapping[str, Any] | None) -> Cell:
    if not _has_bar(how) and number is not None and number["value"] is not None:
        words = f"{number['value']:+.3f}"
        if number["low"] is not None:
            words += f" [{number['low']:+.3f}, {number['high']:+.3f}]"
        return Cell(words, numeric=True)
    return points(number)


def outcome_section(report: Mapping[str, Any]) -> Section | None:
    """Declared two-sided outcomes, such as malignant or not, over all images."""
    outcomes: Sequence[Mapping[str, Any]] = report.get("outcomes", [])
    if not outcomes:
        return None
    blocks: list[Block] = []
    for outcome in outcomes:
        rows = []
        for metric in outcome.get("metrics", ("sensitivity", "specificity", "selection_rate", "auc")):
            how, c = info(outcome, metric), outcome[metric]
            before = [_metric_cell(how, c["zero_shot"])] if is_paired(c) else []
            change = [_change_cell(how, c["change"])] if is_paired(c) else []
            rows.append([text(how["words"]), *before, _metric_cell(how, c["model"]), *change])
        paired = is_paired(outcome["sensitivity"])
        header = ["metric", "zero-shot", "adapted", "change in points"] if paired else ["metric", "value"]
        scales = {1: (0.0, 1.0), 2: (0.0, 1.0)} if paired else {1: (0.0, 1.0)}
        if paired:
            scales[3] = change_scale(rows, 3)
        title = f"{outcome['name']}: {outcome['num_positive']:,} images with it, {outcome['num_negative']:,} without"
        blocks.append(Rows(title, header, rows, scales, {3: 0.0} if paired else {}))
        blocks.append(
            Paragraph(
                f"Classes that count as {one_line(outcome['positive'])}: "
                f"{', '.join(map(one_line, outcome['classes']))}. Decision rule, here and in gates: "
                f"{_rule_words(outcome)}.{_baseline_words(outcome)}",
                "muted",
            )
        )
        if explained := list(_explained(outcome)):
            blocks.append(Bullets(explained))
    return Section("Declared outcomes", "outcomes", blocks)


def _explained(outcome: Mapping[str, Any]) -> Iterator[str]:
    """What its numbers say, and under which conditions."""
    for metric in outcome.get("metrics", {}):
        how, note = info(outcome, metric), outcome[metric]["model"]["note"]
        words = "; ".join(filter(None, (how.get("meaning", ""), note)))
        if words:
            yield sentence(f"{how['words']}: {words}")


def group_section(attribute: str, table: Mapping[str, Any]) -> Section:
    """One attribute's groups."""
    return Section(f"Groups: {one_line(attribute)}", "", list(_group_blocks(table)))


def _group_blocks(table: Mapping[str, Any]) -> Iterator[Block]:
    if not table["rows"]:
        yield Paragraph("There are no groups.")
        return
    yield rows_of_groups(table)
    yield Paragraph(_extremes(table))
    if cautions := [sentence(c) for c in table["cautions"]]:
        yield Bullets(cautions, caution=True)
    yield from _rest_rows(table)
    for outcome in table.get("outcomes", []):
        yield from outcome_blocks(outcome)
    yield from _one_vs_rest(table.get("one_vs_rest"))
    notes: dict[str, dict[str, list[str]]] = {}
    for row in table["rows"]:
        for m in group_metrics(table):
            if note := row[m]["model"]["note"]:
                notes.setdefault(note, {}).setdefault(info(table, m)["short"], []).append(str(row["group"]))
    if notes:  # what is said of several groups and numbers is said once
        yield Bullets([sentence(f"{_of_groups(of)}: {note}") for note, of in notes.items()])


def _of_groups(of: Mapping[str, Sequence[str]]) -> str:
    """Words the numbers that a note is about: "ECE of ear, hand"."""
    same: dict[tuple[str, ...], list[str]] = {}
    for short, groups in of.items():
        same.setdefault(tuple(groups), []).append(short)
    return "; ".join(f"{' and '.join(shorts)} of {listed(groups)}" for groups, shorts in same.items())


def group_metrics(table: Mapping[str, Any]) -> list[str]:
    """Metrics of a group table that at least one group has a value of."""
    known = list(table.get("metrics", METRICS))
    known = [m for m in known if table["rows"] and m in table["rows"][0]]
    return [m for m in known if any(row[m]["model"]["value"] is not None for row in table["rows"])]


def rows_of_groups(
    table: Mapping[str, Any],
    *,
    sign: str = " %",
    title: str = "Groups, lowest accuracy first",
    by: str = ACCURACY.name,
) -> Rows:
    """One row per group, lowest `by` first, whose change is shown; only metrics that some group has."""
    metrics, words = group_metrics(table), info(table, by)["short"]
    paired = any(is_paired(row[by]) for row in table["rows"])
    header = ["group", "n", *(info(table, m)["short"] for m in metrics), *[f"change of {words}"] * paired]

    def lowest(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = row[by]["model"]["value"]
        return value is None, value or 0.0

    worst_first = sorted(table["rows"], key=lowest)
    rows = []
    for row in worst_first:
        small = row.get("large_enough") is False
        cells = [text(one_line(row["group"]), "muted" if small else ""), count(row["n"])]
        cells += [_metric_cell(info(table, m), row[m]["model"], sign) for m in metrics]
        cells += [points(row[by]["change"])] * paired
        rows.append(cells)
    scales = {i + 2: (0.0, 1.0) for i, m in enumerate(metrics) if _has_bar(info(table, m))}
    marks: dict[int, float] = {}
    if paired:
        scales[len(header) - 1] = change_scale(rows, len(header) - 1)
        marks[len(header) - 1] = 0.0
    return Rows(
        title,
        header,
        rows,
        scales,
        marks,
        limit=MAX_SCREEN_ROWS,
        hidden=f"more groups with a higher {words}, in the report",
    )


def _extremes(table: Mapping[str, Any]) -> str:
    """Words the worst group and the max-min gap."""
    worst, gap = table["worst_group"], table["gap"]
    if worst is None:
        return "No group is large enough to be compared."
    lowest = f"Lowest accuracy: {one_line(worst['group'])}, {show_rate(worst, count=True)}."
    if gap is None:
        return f"{lowest} There are not two groups that are large enough to compare."
    return f"{lowest} Gap (max-min over the groups): {100 * gap['value']:.1f} points; {sentence(gap['note'])}"


def _rest_rows(table: Mapping[str, Any]) -> Iterator[Block]:
    tested = [row for row in table["rows"] if row.get("against_rest")]
    if not tested:
        return
    rows = []
    for row in sorted(tested, key=lambda row: row["against_rest"]["difference"]):
        rest = row["against_rest"]
        words = "differs" if rest["differs"] else "noise can explain it"
        tone = "fail" if rest["differs"] and rest["difference"] < 0 else ""
        number = {"value": rest["difference"], "low": rest["low"], "high": rest["high"]}
        rows.append([text(one_line(row["group"])), points(number), p_cell(rest["p_value"]), p_cell(rest["p_holm"]),
                     text(words, tone)])  # fmt: skip
    header = ["group", "difference in points", "p", "p (Holm)", ""]
    yield Rows("Each group against all other images", header, rows, {1: change_scale(rows, 1)}, {1: 0.0})


def p_cell(value: float | None) -> Cell:
    """A cell with a p-value."""
    return Cell("–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}", numeric=True)


def outcome_blocks(outcome: Mapping[str, Any]) -> Iterator[Block]:
    """A two-sided outcome in every group, and its gaps."""
    rows = []
    paired = any(is_paired(row["sensitivity"]) for row in outcome["rows"])
    for row in sorted(outcome["rows"], key=lambda row: row["sensitivity"]["model"]["value"] or 0.0):
        cells = [text(one_line(row["group"])), count(row["num_positive"]), rate(_missed(row["sensitivity"]["model"]))]
        cells += [rate(row["sensitivity"]["model"]), rate(row["specificity"]["model"]), rate(row["auc"]["model"])]
        cells += [points(row["sensitivity"]["change"])] if paired else []
        rows.append(cells)
    name = one_line(outcome["name"])
    header = ["group", "images with it", "missed", "sensitivity", "specificity", "AUC"]
    header += ["change of sensitivity"] if paired else []
    scales = dict.fromkeys(range(2, 6), (0.0, 1.0))
    if paired:
        scales[6] = change_scale(rows, 6)
    yield Rows(f"{name}: who is missed", header, rows, scales, {6: 0.0} if paired else {})
    words = [
        f"{METRICS[metric].short}: gap {100 * gap['value']:.1f} points between "
        f"{one_line(gap['best_group'])} and {one_line(gap['worst_group'])}; {sentence(gap['note'])}"
        for metric in ("sensitivity", "specificity")
        if (gap := outcome.get(f"{metric}_gap")) and gap["value"] > 0
    ]
    named = ("demographic_parity_difference", "equal_opportunity_difference", "equalized_odds_difference")
    known = [_difference_words(key, outcome) for key in named if outcome.get(key) is not None]
    if known:
        words.append(
            f"In fairlearn's names: {', '.join(known)}. Brackets are simultaneous bounds over all pairs of groups."
        )
    if outcome.get("note"):
        words.append(sentence(outcome["note"]))
    if words:
        yield Bullets(words)


def _difference_words(key: str, outcome: Mapping[str, Any]) -> str:
    found = outcome.get("intervals", {}).get(key)
    ends = "" if not found or found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{key.replace('_', ' ')} {outcome[key]:.3f}{ends}"


def _missed(number: Mapping[str, Any]) -> dict[str, Any]:
    """The false-negative rate that goes with a sensitivity."""
    if number["value"] is None:
        return dict(number)
    ends = (None, None) if number["low"] is None else (1 - number["high"], 1 - number["low"])
    return {**number, "value": 1 - number["value"], "low": ends[0], "high": ends[1]}


def _one_vs_rest(found: Mapping[str, Any] | None) -> Iterator[Block]:
    if not found or not found["classes"]:
        return
    rows = []
    compared = [entry for entry in found["classes"] if entry["equal_opportunity_difference"] is not None]
    if not compared:
        yield Paragraph("No class has enough images in two groups for its rates to be compared.", "muted")
        return
    for entry in compared[:10]:
        rates = "; ".join(f"{one_line(group)} {show_rate(number)}" for group, number in entry["tpr"].items())
        gap = entry["equal_opportunity_difference"]
        rows.append([text(one_line(entry["class"])), count(entry["n"]), Cell(f"{100 * gap:.1f}", numeric=True),
                     p_cell(entry["p_holm"]), text(rates)])  # fmt: skip
    header = ["class", "n", "gap, points", "p (Holm)", "share that is found (true positive rate), by group"]
    yield Rows("Is each class found as often in all groups? Largest gaps first", header, rows)
    if found.get("note"):
        yield Paragraph(sentence(found["note"]), "muted")
