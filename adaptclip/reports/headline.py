# SPDX-License-Identifier: Apache-2.0
"""What a reader takes away in ten seconds: the verdict, three numbers, what to worry about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from adaptclip.errors import agree
from adaptclip.metrics.gaps import holm
from adaptclip.metrics.rates import ACCURACY, MEAN_PER_CLASS
from adaptclip.metrics.worst_decile import WORST_DECILE
from adaptclip.reports import findings_page
from adaptclip.reports.bias import sentence
from adaptclip.reports.blocks import one_line, show_points, show_rate
from adaptclip.reports.probe import probe_worries
from adaptclip.reports.slices import slice_worries

NO_GATES = "No gates were declared: nothing was judged, which is not a pass."

MAX_WORRIES = 8

UNEVEN = 3
"""From this ratio of the largest class to the smallest the mean per class stands first, not the accuracy."""

MUCH_CONFIDENCE = 0.05
"""A surplus of confidence is worth a worry when it is larger than this with the report's confidence."""


_DIGITS = 12
"""So many digits of a digest stand on pages; JSON has all 64."""


class JudgedGate(Protocol):
    """What rendering needs of a verdict (gates.Verdict has it)."""

    @property
    def title(self) -> str:
        """The rule in words."""
        ...

    @property
    def verdict(self) -> str:
        """Pass, fail or inconclusive."""
        ...

    @property
    def reason(self) -> str:
        """Grounds in plain words."""
        ...


def verdict_of(verdicts: Sequence[JudgedGate] | None) -> tuple[str | None, str]:
    """Returns the worst verdict, "none" without gates, None where gates are no part of the report; and it in words."""
    if verdicts is None:
        return None, "Gates are no part of this report."
    if not verdicts:
        return "none", NO_GATES
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in ("fail", "inconclusive", "pass")}
    total = len(verdicts)
    if counts["fail"]:
        more = f", {counts['inconclusive']} could not be decided" if counts["inconclusive"] else ""
        return "fail", f"{counts['fail']} of {total} gates failed{more}: not for release."
    if counts["inconclusive"]:
        several = counts["inconclusive"]
        return "inconclusive", f"The data cannot decide {several} of {total} gates, which is not a pass."
    words = f"All {total} gates pass" if total > 1 else "The gate passes"
    if all(getattr(v, "asks_little", False) for v in verdicts):
        # One gate that asks for something is enough to show something.
        return "pass", f"{words}, but a model with the same answer for every image would pass too: nothing is shown."
    return "pass", f"{words}."


def judged_words(report: Mapping[str, Any]) -> tuple[str, str]:
    """What the verdicts belong to, and what the headline has to say of it: other images, or several judgements."""
    judged = report.get("judged")
    if not judged:
        return "", ""
    belongs = (
        f"Judged: {judged['num_images']:,} images (digest {judged['images'][:_DIGITS]}) by the gates of digest "
        f"{judged['gates'][:_DIGITS]}."
    )
    said = [sentence(judged["another_set"])] if judged["another_set"] else []
    if judged["times"] > 1:
        sets, times = judged["gate_sets"], judged["times"]
        by = f"with {sets} different sets of gates" if sets > 1 else "with the same gates"
        said.append(f"These test images were judged {times} times in this run folder, {by}.")
    return belongs, " ".join(said)


def three_numbers(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The three numbers to know, each (name, value, explanation)."""
    if report.get("findings"):
        return findings_page.three_numbers(report)
    return [_first(report), _weakest(report), _third(report)]


def _first(report: Mapping[str, Any]) -> tuple[str, str, str]:
    sizes = [row["n"] for row in report["per_class"] if row["n"]]
    metric = MEAN_PER_CLASS if max(sizes) >= UNEVEN * min(sizes) else ACCURACY
    name = metric.words[:1].upper() + metric.words[1:]
    compared = report["overall"][metric.name]
    about = f"on {report['num_images']:,} images"
    if compared["zero_shot"] is not None:
        about += f"; zero-shot {show_rate(compared['zero_shot'])}"
    return name, show_rate(compared["model"]), about


def _weakest(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """The lowest group over all attributes, or the worst tenth of the classes."""
    worst = [
        (table["worst_group"], attribute)
        for attribute, table in report["groups"].items()
        if table["worst_group"] is not None and len(table["rows"]) > 1 and table["worst_group"]["value"] is not None
    ]
    if worst:
        group, attribute = min(worst, key=lambda w: w[0]["value"])
        total = sum(row["large_enough"] for table in report["groups"].values() for row in table["rows"])
        small = _small_groups(report)
        about = f"{one_line(attribute)} = {one_line(group['group'])}, {group['n']:,} images"
        # Of many groups one is the lowest by luck, and its interval does not know that it was picked.
        about += f"; the lowest of {total} groups, which may partly be chance" if total > 1 else ""
        about += f"; {small}" if small else ""
        return "Lowest accuracy of a group", show_rate(group), about
    fine = report.get("fine_grained")
    decile = fine["overall"][WORST_DECILE.name] if fine else None
    if fine and decile and decile["model"]["value"] is not None:
        picked = fine["worst_classes"]["classes"]
        names = ", ".join(one_line(name) for name in picked[:3]) + ", …" * (len(picked) > 3)
        about = f"mean accuracy of the tenth that truly is the worst; lowest on these images: {names}"
        if decile["zero_shot"] is not None:
            about += f"; zero-shot, of its own worst tenth, {show_rate(decile['zero_shot'])}"
        return "Worst tenth of the classes", show_rate(decile["model"]), about
    return "Lowest accuracy of a group", "–", _small_groups(report) or "no groups of 2 or more were given"


def _small_groups(report: Mapping[str, Any]) -> str:
    """How many groups take no part, as they are smaller than the report asks for; "" where none is."""
    tables = report["groups"].values()
    small = sum(not row["large_enough"] for table in tables for row in table["rows"])
    small += sum(len(table["too_small"]) for table in tables)
    least = max((table["min_group"] for table in tables), default=0)
    return f"{small} {agree(small, 'group', 'groups')} of fewer than {least} images left out" if small else ""


def _third(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """The first declared outcome's sensitivity, else what is known of confidence, else the classes that got worse."""
    outcomes = [o for o in report.get("outcomes", ()) if o["sensitivity"]["model"]["value"] is not None]
    if outcomes:
        name, found = one_line(outcomes[0]["name"]), outcomes[0]["sensitivity"]
        about = f"{name}: the share of its {outcomes[0]['num_positive']:,} images that is found; the others are missed"
        if found["zero_shot"] is not None:
            about += f"; zero-shot {show_rate(found['zero_shot'])}"
        return "Sensitivity", show_rate(found["model"]), about
    calibration = report.get("calibration")
    if calibration:
        surplus = calibration["scores"]["surplus"]
        about = "it is overconfident" if surplus["value"] > 0 else "it is underconfident"
        if surplus["low"] is not None and surplus["low"] <= 0 <= surplus["high"]:
            about = "no more than chance explains"
        return "Confidence minus accuracy", f"{show_points(surplus)} points", about
    shift = report.get("shift")
    if shift and shift.get("classes"):
        return (
            "Classes that got worse",
            f"{len(shift['worse'])} of {shift['tested']}",
            "significantly less accurate than zero-shot",
        )
    return "Classes", f"{report['num_classes']:,}", f"{len(report['absent_classes'])} of them without test images"


def worries(report: Mapping[str, Any], verdicts: Sequence[JudgedGate] | None) -> list[str]:
    """What to worry about, at most MAX_WORRIES sentences: who is served badly, then what is in doubt or not known.

    What is of one kind stands in one sentence, so that three leaks do not hide a group that is missed.
    """
    found = [
        *_gate_worries(verdicts or []),
        *_group_worries(report),
        *_class_worries(report),
        *findings_page.finding_worries(report),
        *slice_worries(report),
        *_confidence_worries(report),
        *probe_worries(report),
        *_data_worries(report),
        *_unknown_worries(report),
    ]
    kept = [sentence(worry) for worry in found]
    if len(kept) > MAX_WORRIES:
        kept = [*kept[: MAX_WORRIES - 1], f"{len(kept) - MAX_WORRIES + 1} more are listed below."]
    return kept


def _gate_worries(verdicts: Sequence[JudgedGate]) -> Iterator[str]:
    for v in verdicts:
        if v.verdict == "fail":
            first = one_line(v.reason).partition(". ")[0]  # the rule and its whole reason stand in the table of gates
            yield f"Gate failed: {first[:1].lower()}{first[1:]}"
    open_ones = [one_line(v.title) for v in verdicts if v.verdict == "inconclusive"]
    if open_ones:
        yield f"Not decided, which is not a pass: {'; '.join(open_ones)}"


def _class_worries(report: Mapping[str, Any]) -> Iterator[str]:
    shift = report.get("shift")
    if shift and shift.get("worse"):
        lost = {row["class"]: row for row in shift["classes"]}
        named = [f"{one_line(n)} ({show_points(lost[n]['change'])} points)" for n in shift["worse"]]
        yield f"Significantly less accurate than zero-shot for {_some(named)}"
    domains = (shift or {}).get("domains")
    if domains and (domains["accuracy"]["change"]["high"] or 0) < 0:
        yield f"Accuracy drops on the target domain: {show_points(domains['accuracy']['change'])} points"


def _group_worries(report: Mapping[str, Any]) -> Iterator[str]:
    """What groups have to fear; p-values are Holm-corrected over the attributes, and over attributes and outcomes."""
    level, tables = 1 - report["confidence"], report["groups"]
    gaps = [
        (attribute, outcome["name"], outcome.get("sensitivity_gap"))
        for attribute, table in tables.items()
        for outcome in table.get("outcomes", [])
    ]
    missing = _beyond_noise([gap for *_, gap in gaps], level)
    for attribute, outcome, gap in gaps:
        if gap and any(gap is found for found in missing):
            missed, more = one_line(outcome), f"{one_line(attribute)} = {one_line(gap['worst_group'])}"
            yield (
                f"{missed[:1].upper()}{missed[1:]} is missed more often for {more} than for "
                f"{one_line(gap['best_group'])}, by {100 * gap['value']:.1f} points, more than chance explains"
            )
    losing = _losing(tables, level)
    lost = [
        f"{one_line(attribute)} = {one_line(row['group'])} ({show_points(row['accuracy']['change'])} points)"
        for attribute, table in tables.items()
        for row in table["rows"]
        if any(row is found for found in losing)
    ]
    if lost:
        yield f"Less accurate than zero-shot for {_some(lost)}"
    differing = _beyond_noise([table["gap"] for table in tables.values()], level)
    differ = [
        (one_line(attribute), f"{100 * gap['value']:.1f} points, lowest for {one_line(gap['worst_group'])}")
        for attribute, table in tables.items()
        if (gap := table["gap"]) and any(gap is found for found in differing)
    ]
    if differ:
        others = "".join(f"; by {name} too: {words}" for name, words in differ[1:])
        yield f"Accuracy differs by {differ[0][0]} more than chance explains: {differ[0][1]}{others}"


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _losing(tables: Mapping[str, Mapping[str, Any]], level: float) -> list[Mapping[str, Any]]:
    """Groups that lost accuracy against zero-shot, Holm-corrected over all groups that are large enough."""
    tested = [
        row for table in tables.values() for row in table["rows"]
        if row.get("change_p") is not None and row["large_enough"]
    ]  # fmt: skip
    corrected = holm([row["change_p"] for row in tested])
    return [
        row for row, p in zip(tested, corrected, strict=True) if p <= level and row["accuracy"]["change"]["value"] < 0
    ]


def _beyond_noise(gaps: Sequence[Mapping[str, Any] | None], level: float) -> list[Mapping[str, Any]]:
    """Those gaps that noise does not explain, Holm-corrected for how many there are."""
    known = [gap for gap in gaps if gap and gap.get("p_value") is not None]
    return [gap for gap, p in zip(known, holm([gap["p_value"] for gap in known]), strict=True) if p <= level]


def _confidence_worries(report: Mapping[str, Any]) -> Iterator[str]:
    calibration = report.get("calibration")
    if calibration:
        surplus = calibration["scores"]["surplus"]
        if surplus["low"] is not None and surplus["low"] > MUCH_CONFIDENCE:
            fitted = calibration["temperature"]
            helped = (
                f"; {show_points(fitted['scores']['surplus'])} with a temperature of {fitted['value']:.2f}"
                if fitted["scores"]
                else ""
            )
            yield f"Too confident: mean confidence less accuracy is {show_points(surplus)} points{helped}"


def _data_worries(report: Mapping[str, Any]) -> Iterator[str]:
    """What puts every number in doubt, such as allowed leaks: the first of them, the others under Data."""
    found = (report.get("data") or {}).get("worries", [])
    if found:
        others = len(found) - 1
        more = f" ({others} more {agree(others, 'finding', 'findings')} of this kind: see Data)" if others else ""
        yield f"{one_line(found[0]).removesuffix('.')}{more}"


def _unknown_worries(report: Mapping[str, Any]) -> Iterator[str]:
    few = [row for row in report["per_class"] if not row["sufficient"]]
    if few and not report.get("findings"):  # which tells of those with few images by name
        known = f"next to nothing is known about {agree(len(few), 'it', 'them')}"
        have = agree(len(few), "has", "have")
        yield f"{len(few)} of {report['num_classes']} classes {have} fewer than 10 test images: {known}"
    if not report["groups"]:
        yield "No groups were reported: without group columns, differences between groups cannot be assessed"
    issues = (report.get("data") or {}).get("known_issues", [])
    if issues:
        yield f"The data card names {len(issues)} known {agree(len(issues), 'issue', 'issues')}: see Data"
