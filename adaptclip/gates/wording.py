# SPDX-License-Identifier: Apache-2.0
"""The reasons of a verdict in plain words, and verdicts as JUnit XML for continuous-integration services."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from adaptclip.gate_rules import ZERO_SHOT, GateRule
from adaptclip.gates.sample_size import POWER, More
from adaptclip.gates.verdicts import Conclusion, Verdict, overall_verdict
from adaptclip.reports.measuring import listed

if TYPE_CHECKING:
    from adaptclip.metrics.estimates import Measurement
    from adaptclip.metrics.metric import Support


def shown(rule: GateRule, value: float, digits: str = ".1f", *, signed: bool | None = None) -> str:
    """A value of the rule's metric: per cent, points or, where they are usual, decimals."""
    signed = bool(rule.no_worse_than) if signed is None else signed
    if not rule.measure.per_cent:
        return f"{value:{'+' if signed else ''}{'.3f' if digits == '.1f' else 'g'}}"
    return f"{100 * value:+{digits}} points" if signed else f"{100 * value:{digits}} %"


def counted(rule: GateRule, n: int) -> str:
    """A number of images of the kind that the metric counts, for example "120 positive images"."""
    return f"{n:,} {rule.measure.about}image{'s' * (n != 1)}"


def subject_of(rule: GateRule, group: str | None = None) -> str:
    """The judged quantity, for example "sensitivity (malignancy = malignant) for sex = female"."""
    words = rule.measure.words
    if rule.outcome is not None:
        words += f" ({rule.outcome.name})"
    elif rule.level is not None:
        words += f" at the level {rule.level}"
    if rule.no_worse_than:
        words = f"change of {words} against {'zero-shot' if rule.no_worse_than == ZERO_SHOT else rule.no_worse_than}"
    return words + (f" for {rule.attribute} = {group}" if group is not None else "")


MORE_CLUSTERS = "more clusters"


def more_words(rule: GateRule, more: More | None, of: str, lacking: Support | None = None, *, it: str = "it") -> str:
    """How many more images would settle an inconclusive verdict.

    Args:
        rule: the rule.
        more: the numbers.
        of: of which images, after their number: " of sex = female", or "".
        lacking: what the number rests on and has too little of, or None.
        it: what would be settled.
    """
    needed, missing = "", 0
    if lacking is not None:
        missing = lacking.least(rule.min_n) - lacking.count
        needed = f" At least {missing:,} more {lacking.what}{of} are needed."
    if more is None or (lacking is not None and more.images is not None and more.images <= missing):
        return needed
    if more.images is None:
        return needed + f" No realistic number of further images would settle {it}: ten times as many might well not."

    def many(images: int) -> str:
        if more.per_cluster is None:
            return counted(rule, images).replace(" ", " more ", 1)
        each = f"{more.per_cluster:.1f}".removesuffix(".0")
        return f"{more.clusters_for(images):,} {MORE_CLUSTERS} of {each} {rule.measure.about}images"

    said = f"{needed} About {many(more.images)}{of} would settle {it}, either way, with an even chance"
    if more.likely is None:
        return (
            f"{said}; for a chance of {100 * POWER:.0f} % no number is realistic, as close as it may be to the limit."
        )
    if more.likely > more.images:
        number = more.likely if more.per_cluster is None else more.clusters_for(more.likely)
        return f"{said}, about {number:,} with one of {100 * POWER:.0f} %."
    return f"{said}."


def reason_of(
    rule: GateRule,
    group: str | None,
    measured: Measurement,
    lacking: Support | None,
    conclusion: Conclusion,
    bounds: tuple[float | None, float | None],
    family: int,
    more: More | None,
    *,
    limit: float,
    upwards: bool,
) -> str:
    """Words the grounds of a verdict on one set of images.

    Args:
        rule: the rule.
        group: the group, or None.
        measured: what was found.
        lacking: what the number rests on and has too little of, or None.
        conclusion: the verdict.
        bounds: the one that lets the rule pass and the one that lets it fail.
        family: groups that share the chance of a wrong "fail".
        more: how many more images would settle it, or None.
        limit: what the value is compared with.
        upwards: whether it should be high.
    """
    good, bad = bounds
    subject = subject_of(rule, group)
    if measured.value is None:
        return f"The {subject} is not known: {measured.note}."
    of = "" if group is None else f" of {rule.attribute} = {group}"
    found = f"The {subject} is {shown(rule, measured.value)} on {counted(rule, measured.n)}"
    if lacking is not None:
        fewer = f" ({lacking.count:,} {lacking.what})" if lacking.count != measured.n else ""
        asked = f"the rule asks for {lacking.least(rule.min_n):,}"
        return f"{found}{fewer}, too few for a verdict: {asked}.{more_words(rule, more, of, lacking)}"
    if good is None or bad is None:
        return f"{found}; {measured.note}, so the data cannot tell."
    note = f" ({measured.note}.)" if measured.note else ""
    sure, wanted = f"with {100 * rule.confidence:g} % confidence", shown(rule, limit, "g")
    over = f" over {family} groups" if family > 1 else ""
    better, worse = ("at least", "at most") if upwards else ("at most", "at least")
    if conclusion == "pass":
        return f"{found} and, {sure}, {better} {shown(rule, good)}; the rule asks for {better} {wanted}.{note}"
    if conclusion == "fail":
        return f"{found} and, {sure}{over}, {worse} {shown(rule, bad)}; the rule asks for {better} {wanted}.{note}"
    return (
        f"{found}; the rule asks for {better} {wanted}, but the data only show {better} {shown(rule, good)} ({sure}) "
        f"and do not rule out {shown(rule, bad)}: they cannot tell.{more_words(rule, more, of)}{note}"
    )


def family_reason(rule: GateRule, ordered: Sequence[Verdict]) -> str:
    """Words the verdict on all groups from those of the single groups, worst first."""
    worst = ordered[0]
    alike = [v for v in ordered[1:] if v.verdict == worst.verdict]
    if worst.verdict == "pass":
        every = "Both" if len(ordered) == 2 else f"All {len(ordered)}"
        reason = worst.reason[:1].lower() + worst.reason[1:]
        return f"{every} groups pass; the worst: {reason}" if len(ordered) > 1 else worst.reason
    if not alike:
        return worst.reason
    named = [str(v.group) + _more_of(v) for v in alike]
    return f"{worst.reason} The same verdict for {listed(named)} (of {len(ordered)} groups)."


def _more_of(verdict: Verdict) -> str:
    number, more = (
        (verdict.more_images, "more") if verdict.more_clusters is None else (verdict.more_clusters, MORE_CLUSTERS)
    )
    return "" if number is None else f" (about {number:,} {more})"


def clusters_named(verdict: Verdict, name: str) -> Verdict:
    """The verdict with its clusters called as the source calls them: "about 6 more clusters (patient_id)"."""
    if name in ("", "cluster"):
        return verdict
    groups = tuple(clusters_named(of_group, name) for of_group in verdict.groups)
    reason = verdict.reason.replace(MORE_CLUSTERS, f"{MORE_CLUSTERS} ({name})")
    return replace(verdict, reason=reason, groups=groups)


def excluded_words(rule: GateRule, excluded: Sequence[dict[str, object]]) -> str:
    """What was left out by declaration, and why."""
    if not excluded:
        return ""
    named = listed(f"{e['group']} ({e['n']} images)" for e in excluded)
    return f" Left out by declaration: {named}. Reason given: {rule.reason.strip().rstrip('.')}."


def to_junit(judged: Mapping[str, Sequence[Verdict]]) -> str:
    """Returns JUnit XML with one test suite per run and one test case per rule.

    A failed rule is a `failure`. An inconclusive one is an `error`, because a skipped test would count as good; so is
    a run without rules.

    Properties of a suite are the digests of its images and gates.

    Args:
        judged: name of the run -> its verdicts.
    """
    root = ElementTree.Element("testsuites", name="adaptclip gate")
    for run, verdicts in judged.items():
        count = {kind: sum(v.verdict == kind for v in verdicts) for kind in ("fail", "inconclusive")}
        errors = count["inconclusive"] + (not verdicts)
        suite = ElementTree.SubElement(
            root, "testsuite", name=_printable(run), tests=str(max(len(verdicts), 1)), failures=str(count["fail"]),
            errors=str(errors), skipped="0",
        )  # fmt: skip
        if verdicts:
            properties = ElementTree.SubElement(suite, "properties")
            for name, value in (("images", verdicts[0].images), ("gates", verdicts[0].gates)):
                ElementTree.SubElement(properties, "property", name=name, value=value)
        for v in verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=_printable(run), name=_printable(v.title))
            if v.verdict == "pass":
                ElementTree.SubElement(case, "system-out").text = _printable(v.reason)
            else:
                tag = "failure" if v.verdict == "fail" else "error"
                ElementTree.SubElement(case, tag, type=v.verdict, message=_printable(v.reason))
        if not verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=_printable(run), name="gates")
            message = "No gates were declared: nothing was judged, which is not a pass."
            ElementTree.SubElement(case, "error", type="none", message=message)
    root.set("verdict", overall_verdict([v for verdicts in judged.values() for v in verdicts]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Replaces what XML 1.0 cannot hold: control characters, lone surrogates."""
    return "".join(c if c.isprintable() else " " for c in text)
