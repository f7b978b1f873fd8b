# SPDX-License-Identifier: Apache-2.0
"""What a report shows where images may show several classes: its numbers, worries, sections and rows on a screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptclip.errors import agree
from adaptclip.metrics import METRICS
from adaptclip.metrics.metric import MIN_OUTCOMES
from adaptclip.reports.bias import outcome_blocks, p_cell, rows_of_groups, sentence
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
    plain,
    points,
    rate,
    show_points,
    show_rate,
    text,
)
from adaptclip.reports.multi_label import how_chosen

MOST_SHOWN = 5
"""So many findings are written out group by group: those whose gap chance does not explain."""

MUCH_TOGETHER = 0.1
"""So much more often than elsewhere a finding must be named beside another one to be a worry."""

MOST_ROWS = 20
"""So many findings stand in a table of groups, the largest gaps first; the JSON has them all."""


ON_SCREEN = (
    "labels_macro_auc", "labels_macro_sensitivity", "labels_macro_specificity", "labels_micro_f1", "subset_accuracy",
)  # fmt: skip
"""Metrics of all findings together that a terminal shows."""


def three_numbers(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The three numbers to know, each (name, value, explanation)."""
    mean, rows = report["overall"]["labels_macro_auc"], report["findings"]["rows"]
    about = f"of {len(rows)} {agree(len(rows), 'finding', 'findings')} on {report['num_images']:,} images"
    if mean["zero_shot"] is not None:
        about += f"; zero-shot {show_rate(mean['zero_shot'])}"
    return [("AUC, mean of the findings", show_rate(mean["model"]), about), _weakest(rows), _weakest_group(report)]


def worst_finding(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The finding of the lowest sensitivity: of those with enough images, if there are any; None without a value."""
    known = [row for row in rows if row["sensitivity"]["model"]["value"] is not None]
    pool = [row for row in known if row["enough"]] or known
    return min(pool, key=lambda row: row["sensitivity"]["model"]["value"], default=None)


def _weakest(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    worst = worst_finding(rows)
    if worst is None:
        return "Lowest sensitivity of a finding", "–", "no test image is known to show one"
    about = f"{one_line(worst['class'])}: found on so many of the {worst['num_positive']:,} images that show it"
    if len(rows) > 1:
        about += f"; the lowest of {len(rows)}, which may partly be chance"
    return "Lowest sensitivity of a finding", show_rate(worst["sensitivity"]["model"]), about


def _weakest_group(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """The group in which the worst finding is missed most, or how many images are all right."""
    worst = worst_finding(report["findings"]["rows"])
    found = [
        (row["sensitivity"]["model"]["value"], attribute, row)
        for attribute, table in report["groups"].items()
        for outcome in table["outcomes"]
        if worst is not None and outcome["name"] == worst["class"]
        for row in outcome["rows"]
        if row["group"] not in outcome["left_out"] and row["sensitivity"]["model"]["value"] is not None
    ]
    if worst is None or not found:
        exact = report["overall"]["subset_accuracy"]
        about = "every finding of the image is answered rightly"
        if exact["zero_shot"] is not None:
            about += f"; zero-shot {show_rate(exact['zero_shot'])}"
        return "Images that are all right", show_rate(exact["model"]), about
    _, attribute, row = min(found, key=lambda one: one[0])
    about = (
        f"{one_line(worst['class'])} for {one_line(attribute)} = {one_line(row['group'])}, {row['num_positive']:,} "
        "images that show it"
    )
    about += f"; the lowest of {len(found)} groups, which may partly be chance" if len(found) > 1 else ""
    return "Its sensitivity in the worst group", show_rate(row["sensitivity"]["model"]), about


def finding_worries(report: Mapping[str, Any]) -> Iterator[str]:
    """Findings that got worse, of which little is known, with rough thresholds, or that are named together."""
    found = report.get("findings")
    if not found:
        return
    rows = found["rows"]
    lost = [
        f"{one_line(row['class'])} (AUC {show_points(change)} points)"
        for row in rows
        if (change := row["auc"]["change"]) and change["high"] is not None and change["high"] < 0
    ]
    if lost:
        yield f"Worse than zero-shot: {_some(lost)}"
    few = [one_line(row["class"]) for row in rows if not row["enough"]]
    if few:
        have, them = agree(len(few), "has", "have"), agree(len(few), "it", "them")
        yield (
            f"{len(few)} of {len(rows)} findings {have} fewer than {MIN_OUTCOMES} test images that are known to show "
            f"{them}, or known not to; no gate decides on {them}: {_some(few)}"
        )
    rough = [one_line(row["class"]) for row in rows if row["chosen_on"] is not None and row["chosen_on"] < 10]
    if rough:
        yield f"Thresholds chosen on fewer than 10 validation images that show the finding: {_some(rough)}"
    pair = found["pairs"][0] if found["pairs"] else None
    if pair and pair["share"]["value"] - pair["elsewhere"] >= MUCH_TOGETHER:
        yield (
            f"{one_line(pair['named'])} is named on {show_rate(pair['share'])} of the images that show "
            f"{one_line(pair['shown'])} without it, and on {100 * pair['elsewhere']:.1f} % of those that show neither"
        )


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def findings_section(report: Mapping[str, Any]) -> Section | None:
    """Every finding by itself."""
    found = report.get("findings")
    if not found:
        return None
    blocks: list[Block] = [Paragraph(_summary(report)), finding_rows(found)]
    blocks.append(
        Paragraph(
            "Sensitivity: share of the images that show the finding on which it is named; specificity: share of the "
            "others on which it is not. PPV and NPV: how often it is shown where it is named, and not shown where it "
            f"is not, {_at_words(found['rows'])}. Every number is of the images of which it is known whether they "
            f"show it.{_few_words(found['rows'])}",
            "muted",
        )
    )
    if any(row["auc"]["change"] for row in found["rows"]):
        blocks.append(_paired_rows(found["rows"]))
        blocks.append(
            Paragraph(
                "Each model names findings at thresholds of its own; the AUC compares the two without any. An interval "
                "that leaves out zero is one of many: of twenty findings without a change one shows it by chance.",
                "muted",
            )
        )
    blocks += [_probability_rows(found["rows"]), Paragraph(_threshold_words(found), "muted")]
    if found["pairs"]:
        blocks += _pairs(found)
    return Section("Findings", "findings", blocks)


def _summary(report: Mapping[str, Any]) -> str:
    found = report["findings"]
    words = (
        f"An image shows {found['shown_per_image']:.2f} findings on average, and {found['named_per_image']:.2f} are "
        f"named. {show_rate(found['none_shown'])} of the images are known to show none; none is named on "
        f"{show_rate(found['none_named'])}."
    )
    if found["unknown"]:
        words += f" Of {100 * found['unknown']:.1f} % of all pairs of image and finding the truth is not known."
    return words


def _at_words(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [(one_line(row["class"]), row["declared_prevalence"]) for row in rows if row["declared_prevalence"]]
    declared = [f"{name} {100 * share:.3g} %" for name, share in known]
    here = "at the prevalence among these images"
    return f"{here}, or at the declared one ({_some(declared, 5)})" if declared else here


def _few_words(rows: Sequence[Mapping[str, Any]]) -> str:
    if all(row["enough"] for row in rows):
        return ""
    return " Findings in grey have fewer than 30 images on one side: too few for a gate."


def finding_rows(
    found: Mapping[str, Any],
    *,
    sign: str = " %",
    metrics: Sequence[str] = ("auc", "sensitivity", "specificity", "ppv", "npv"),
) -> Rows:
    """One row per finding, lowest sensitivity first, and one for all of them together."""
    rows = []
    for row in _worst_first(found["rows"]) + ([found["any"]] if found["any"] else []):
        cells = [text(one_line(row["class"]), "" if row["enough"] else "muted"), count(row["num_positive"])]
        cells += [count(row["num_known"])]
        cells += [rate(row[name]["model"], sign=sign) for name in metrics]
        rows.append(cells)
    header = ["finding", "shown", "known", *(METRICS[name].short for name in metrics)]
    return Rows(
        "Findings, lowest sensitivity first", header, rows, dict.fromkeys(range(3, len(header)), (0.0, 1.0)),
        limit=MAX_SCREEN_ROWS, hidden="more findings with a higher sensitivity, in the report",
    )  # fmt: skip


def _worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    def key(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = row["sensitivity"]["model"]["value"]
        return value is None, value or 0.0

    return sorted(rows, key=key)


def _paired_rows(rows: Sequence[Mapping[str, Any]]) -> Rows:
    cells = [
        [
            text(one_line(row["class"]), "" if row["enough"] else "muted"),
            rate(row["auc"]["zero_shot"]), rate(row["auc"]["model"]),
            points(row["auc"]["change"]), points(row["sensitivity"]["change"]), points(row["specificity"]["change"]),
        ]
        for row in sorted(rows, key=lambda r: (r["auc"]["change"]["value"] is None, r["auc"]["change"]["value"] or 0.0))
    ]  # fmt: skip
    header = ["finding", "AUC, zero-shot", "AUC, adapted", "change of AUC", "of sensitivity", "of specificity"]
    scales = {1: (0.0, 1.0), 2: (0.0, 1.0), **{k: change_scale(cells, k) for k in (3, 4, 5)}}
    return Rows(
        "Against zero-shot, largest loss first (changes in points)", header, cells, scales, {3: 0.0, 4: 0.0, 5: 0.0}
    )


def _probability_rows(rows: Sequence[Mapping[str, Any]]) -> Rows:
    cells = [
        [
            text(one_line(row["class"]), "" if row["enough"] else "muted"),
            Cell("–" if row["prevalence"] is None else f"{100 * row['prevalence']:.1f} %", numeric=True),
            Cell("–" if row["threshold"] is None else f"{row['threshold']:.3g}", numeric=True),
            count(row["chosen_on"]),
            rate(row["average_precision"]["model"]), plain(row["outcome_brier"]["model"]), rate(row["outcome_ece"]),
            points(row["surplus"]),
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "finding", "prevalence", "threshold", "chosen on", "average precision", "Brier", "calibration error",
        "excess",
    ]  # fmt: skip
    scales = {4: (0.0, 1.0), 6: (0.0, 1.0), 7: change_scale(cells, 7)}
    return Rows("Thresholds and probabilities", header, cells, scales, {7: 0.0})


def _threshold_words(found: Mapping[str, Any]) -> str:
    words = (
        "“Chosen on” counts the validation images that show the finding. Brier: mean squared distance of the "
        "probability from 0 or 1 (0 is best). Calibration error: how far the probability is from the share of images "
        "that show the finding, mean over 15 bins. Excess: mean probability less prevalence, in points."
    )
    own = [one_line(row["class"]) for row in found["rows"] if row["declared_rule"]]
    if own:
        words += f" Declared outcomes have rules of their own, here and in gates: {_some(own)}."
    info = found["thresholds"]
    if info is not None:
        return f"{how_chosen(info)} {words}"
    given = any(row["threshold"] not in (None, 0.5) for row in found["rows"])
    how = "as given with the predictions" if given else "0.5 for every finding; none was chosen"
    return f"Thresholds: {how}. {words}"


def _pairs(found: Mapping[str, Any]) -> list[Block]:
    rows = [
        [
            text(one_line(pair["shown"])), text(one_line(pair["named"])), count(pair["n"]), rate(pair["share"]),
            Cell(f"{100 * pair['elsewhere']:.1f} %", numeric=True, bar=(pair["elsewhere"], None, None)),
        ]
        for pair in found["pairs"]
    ]  # fmt: skip
    header = ["shown", "not shown", "n", "named all the same", "named where neither is shown"]
    scales = {3: (0.0, 1.0), 4: (0.0, 1.0)}
    words = (
        f"Of {found['num_pairs']:,} pairs those are listed whose interval lies above the share on images that show "
        "neither; as they were picked from so many, the first shares are somewhat too high."
    )
    return [Rows("Named together without being shown together", header, rows, scales), Paragraph(words, "muted")]


def finding_group_section(attribute: str, table: Mapping[str, Any]) -> Section:
    """Every finding in the groups of an attribute."""
    return Section(f"Groups: {one_line(attribute)}", "", list(_group_blocks(table)))


def _group_blocks(table: Mapping[str, Any]) -> Iterator[Block]:
    if not table["rows"]:
        yield Paragraph("There are no groups.")
        return
    yield rows_of_groups(
        table, title="All findings together, lowest mean sensitivity first", by="labels_macro_sensitivity"
    )
    if cautions := [sentence(c) for c in table["cautions"]]:
        yield Bullets(cautions, caution=True)
    for key, words, of in (
        ("sensitivity", "Is each finding found as often in all groups?", "num_positive"),
        ("specificity", "Is each finding left alone as often in all groups?", "num_negative"),
    ):
        compared = [outcome for outcome in table["outcomes"] if outcome[f"{key}_gap"]]
        compared.sort(key=lambda outcome: -outcome[f"{key}_gap"]["value"])
        if compared:
            yield _gap_rows(compared[:MOST_ROWS], key, f"{words} {key.capitalize()}, largest gaps first", of)
    sure = [o for o in table["outcomes"] if (gap := o["sensitivity_gap"]) and gap["p_holm"] <= 0.05]
    for outcome in sorted(sure, key=lambda o: -o["sensitivity_gap"]["value"])[:MOST_SHOWN]:
        yield from outcome_blocks(outcome)
    if any(outcome["sensitivity_gap"] for outcome in table["outcomes"]):
        yield Paragraph(
            "A gap is the largest rate less the smallest, of groups with 30 images on that side or more; equal groups "
            "have one too, by chance. p is the chance of so large a one if all groups were equal; p (Holm) allows for "
            "the number of findings.",
            "muted",
        )


def _gap_rows(outcomes: Sequence[Mapping[str, Any]], key: str, title: str, of: str) -> Rows:
    rows = []
    for outcome in outcomes:
        gap = outcome[f"{key}_gap"]
        shown = [row for row in outcome["rows"] if row["group"] not in gap["left_out"]]
        shown.sort(key=lambda row: row[key]["model"]["value"] or 0.0)
        rates = "; ".join(f"{one_line(row['group'])} {show_rate(row[key]['model'])}" for row in shown)
        rows.append(
            [text(one_line(outcome["name"])), count(sum(row[of] for row in shown)),
             Cell(f"{100 * gap['value']:.1f}", numeric=True), p_cell(gap["p_value"]), p_cell(gap["p_holm"]),
             text(rates)]
        )  # fmt: skip
    return Rows(title, ["finding", "n", "gap, points", "p", "p (Holm)", "by group, lowest first"], rows)


def on_screen(report: Mapping[str, Any]) -> Iterator[Block]:
    """What a terminal shows of the findings and their groups, below the overall numbers."""
    yield finding_rows(report["findings"], sign="", metrics=("auc", "sensitivity", "specificity", "ppv"))
    for attribute, table in report["groups"].items():
        compared = [outcome for outcome in table["outcomes"] if outcome["sensitivity_gap"]]
        if compared:
            compared.sort(key=lambda outcome: -outcome["sensitivity_gap"]["value"])
            rows = _gap_rows(
                compared[:MAX_SCREEN_ROWS], "sensitivity", f"sensitivity by {one_line(attribute)}", "num_positive"
            )
            yield rows
        yield from (Paragraph(f"Caution: {sentence(caution)}", "muted") for caution in table["cautions"])
