"""The report on groups in words and tables: overall numbers, groups and their gaps, declared outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptclip.evaluation.grouping import listed
from adaptclip.metrics import METRICS
from adaptclip.reports.blocks import (
    MAX_SCREEN_ROWS,
    Block,
    Bullets,
    Cell,
    Paragraph,
    Rows,
    Section,
    change_scale,
    count,
    one_line,
    points,
    rate,
    show_rate,
    text,
)


def told(report: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """How a metric of a report (or of a table of one) is shown: `Metric.told`, kept in the report itself."""
    return report.get("metrics", {}).get(metric) or METRICS[metric].told()


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
            f"{told(report, metric)['words']}: {number['note']}"
            for metric, compared in report["overall"].items()
            for number in compared.values()
            if number is not None and number["note"]
        }
    )
    if notes:
        blocks.append(Bullets([sentence(note) for note in notes]))
    return blocks


def overall_rows(report: Mapping[str, Any], words: str, title: str, *, sign: str = " %") -> Rows:
    """One row per metric, named by its "words" or its "short" ones: value, or zero-shot, adapted and change."""
    overall: Mapping[str, Any] = report["overall"]
    paired = any(is_paired(c) for c in overall.values())
    header = ["metric", "zero-shot", "adapted", "change in points", "n"] if paired else ["metric", "value", "n"]
    rows = []
    for metric, c in overall.items():
        how = told(report, metric)
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
            how, c = told(outcome, metric), outcome[metric]
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
        how, note = told(outcome, metric), outcome[metric]["model"]["note"]
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
    yield group_rows(table)
    yield Paragraph(_extremes(table))
    if cautions := [sentence(c) for c in table["cautions"]]:
        yield Bullets(cautions, caution=True)
    yield from _rest_rows(table)
    for outcome in table.get("outcomes", []):
        yield from _outcome_blocks(outcome)
    yield from _one_vs_rest(table.get("one_vs_rest"))
    notes: dict[str, dict[str, list[str]]] = {}
    for row in table["rows"]:
        for m in group_metrics(table):
            if note := row[m]["model"]["note"]:
                notes.setdefault(note, {}).setdefault(told(table, m)["short"], []).append(str(row["group"]))
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


def group_rows(table: Mapping[str, Any], *, sign: str = " %", title: str = "Groups, lowest accuracy first") -> Rows:
    """One row per group, lowest accuracy first; only metrics that some group has."""
    metrics = group_metrics(table)
    paired = any(is_paired(row["accuracy"]) for row in table["rows"])
    header = ["group", "n", *(told(table, m)["short"] for m in metrics), *["change of accuracy"] * paired]
    worst_first = sorted(table["rows"], key=lambda row: (row["accuracy"]["model"]["value"] is None, _accuracy(row)))
    rows = []
    for row in worst_first:
        small = row.get("large_enough") is False
        cells = [text(one_line(row["group"]), "muted" if small else ""), count(row["n"])]
        cells += [_metric_cell(told(table, m), row[m]["model"], sign) for m in metrics]
        cells += [points(row["accuracy"]["change"])] * paired
        rows.append(cells)
    scales = {i + 2: (0.0, 1.0) for i, m in enumerate(metrics) if _has_bar(told(table, m))}
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
        hidden="more groups with a higher accuracy, in the report",
    )


def _accuracy(row: Mapping[str, Any]) -> float:
    return row["accuracy"]["model"]["value"] or 0.0


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


def _outcome_blocks(outcome: Mapping[str, Any]) -> Iterator[Block]:
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
