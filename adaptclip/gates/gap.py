# SPDX-License-Identifier: Apache-2.0
"""Gates on the gap between the best and the worst group.

- *Pass*: for every ordered pair of groups the one-sided upper bound of their difference at the rule's confidence is
  within the limit. If the true gap is larger, some pair lies beyond the limit, and that one test passes with
  probability at most 1 - c: an intersection-union test that holds its level however many groups there are. The
  bootstrap of the max-min gap is not used, because it never leaves out zero with several groups.
- *Fail*: the lower bound of some pair's difference, Bonferroni-corrected over the ordered pairs, lies beyond the limit.
- *Levelling down*: a gap can close because the better groups got worse. So a small gap passes only if no group can be
  worse than the reference's worst group by more than the margin, and fails if one certainly is. That a group g keeps
  the level min z of the reference is shown by b_g >= z_w - margin for any group w (one with itself, paired; the others
  as independent), with half of 1 - c for w = g and the other half shared. Without a reference a limit that each group
  has to keep (`at_least`) takes its place; with neither the rule cannot pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.gates.sample_size import Claim, More, more_images
from adaptclip.gates.verdicts import Conclusion, Verdict
from adaptclip.gates.wording import more_words, shown, subject_of
from adaptclip.metrics import gaps
from adaptclip.metrics.intervals import DifferenceSpread, Side
from adaptclip.reports.measuring import listed

if TYPE_CHECKING:
    from adaptclip.gate_rules import GateRule
    from adaptclip.metrics.estimates import Comparison, Measurement
    from adaptclip.metrics.metric import Support


def pair_bounds(parts: Sequence[Measurement], side: Side, alpha: float) -> np.ndarray:
    """One-sided bounds of all differences between groups.

    Args:
        parts: G measurements with values and spreads.
        side: which bound.
        alpha: probability that a true difference lies beyond its bound.

    Returns:
        (G, G) bound of group i minus group j; the diagonal is 0.
    """
    known = [(part.value, part.spread) for part in parts if part.value is not None and part.spread is not None]
    return gaps.pair_bounds([value for value, _ in known], [spread for _, spread in known], side, alpha, exact=True)


@dataclass(frozen=True)
class _Largest:
    """Uncertainty of the largest difference between groups, as the rule bounds it."""

    parts: Sequence[Measurement]
    method: str = "newcombe, square-and-add, of every pair"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """The largest of the pairs' bounds, which always hold their level for certain."""
        return float(pair_bounds(self.parts, side, alpha).max())


def judge_gap(
    rule: GateRule,
    compared: Mapping[str, Comparison],
    supports: Mapping[str, Sequence[Support]],
    units: Mapping[str, int],
    noise: float | None,
    excluded: Sequence[dict[str, Any]],
) -> Verdict:
    """Judges a rule with `gap_at_most`.

    Args:
        rule: the rule.
        compared: group -> its measurement, with the reference's where there is one.
        supports: group -> what its number rests on.
        units: group -> clusters, or independent images, behind its number.
        noise: gap that equal groups of these sizes stay within, or None where that is not known.
        excluded: groups left out by declaration.
    """
    limit, alpha = rule.gap_at_most, 1 - rule.confidence
    assert limit is not None
    usable = {
        name: c for name, c in compared.items()
        if rule.lacking(supports[name]) is None and c.model.spread is not None and c.model.value is not None
    }  # fmt: skip
    small = [name for name in compared if name not in usable]
    lacking = {name: found for name in small if (found := rule.lacking(supports[name])) is not None}
    shown_small = _small_words(rule, small, lacking, supports)
    if len(usable) < 2:
        return _undecided(rule, compared, small, lacking, shown_small, excluded)
    parts = [c.model for c in usable.values()]
    names, pairs = list(usable), len(usable) * (len(usable) - 1)
    upper, lower = float(pair_bounds(parts, "high", alpha).max()), float(pair_bounds(parts, "low", alpha / pairs).max())
    values = [part.value or 0.0 for part in parts]
    gap, guard = max(values) - min(values), _guard(rule, usable)
    conclusion: Conclusion = "inconclusive"
    if lower > limit or guard[0] == "fail":
        conclusion = "fail"
    elif upper <= limit and guard[0] == "pass" and not small:
        conclusion = "pass"
    worst_first = sorted(range(len(names)), key=lambda i: values[i], reverse=rule.measure.lower_is_better)
    worst, best = names[worst_first[0]], names[worst_first[-1]]
    more = None
    if conclusion == "inconclusive" and not lower <= limit < upper:
        missing = max((found.least(rule.min_n) - found.count for found in lacking.values()), default=0)
        more = more_images(None, len(usable), len(usable), missing)
    elif conclusion == "inconclusive":
        claim = Claim(gap, _Largest(parts), limit, upwards=False, alpha=alpha, family=pairs)
        more = more_images(claim, parts[worst_first[0]].n, units[worst])
    sentences = _sentences(rule, gap, (best, worst), (lower, upper), conclusion, guard, shown_small, noise, more)
    return Verdict(
        rule.title, rule.measure.name, rule.attribute, worst, conclusion, gap, max(lower, 0.0), upper,
        sum(part.n for part in parts), rule.confidence, sentences, (), "gap", limit,
        more and more.images, tuple(excluded), more and more.clusters,
    )  # fmt: skip


def _small_words(
    rule: GateRule, small: Sequence[str], lacking: Mapping[str, Support], supports: Mapping[str, Sequence[Support]]
) -> str:
    """Groups that take no part, each with what it has too little of."""
    counts = {name: lacking.get(name, supports[name][0]) for name in small}
    kind = {name: "" if support.what == "images" else f" {support.what}" for name, support in counts.items()}
    return listed(f"{name} ({support.count:,}{kind[name]})" for name, support in counts.items())


def _undecided(
    rule: GateRule,
    compared: Mapping[str, Comparison],
    small: Sequence[str],
    lacking: Mapping[str, Support],
    shown_small: str,
    excluded: Sequence[dict[str, Any]],
) -> Verdict:
    known = len(compared) - len(small)
    reason = (
        f"A gap needs two groups that are large enough and have an interval; {rule.attribute} has {known} of them. Too "
        f"small or without an interval: {shown_small or 'none'}."
    )
    missing = [found.least(rule.min_n) - found.count for found in lacking.values()]
    return Verdict(
        rule.title, rule.measure.name, rule.attribute, small[0] if small else None, "inconclusive", None, None, None,
        sum(c.model.n for c in compared.values()), rule.confidence, reason, (), "gap", rule.gap_at_most,
        max(missing, default=None), tuple(excluded),
    )  # fmt: skip


def _guard(rule: GateRule, usable: Mapping[str, Comparison]) -> tuple[Conclusion, str]:
    """Whether the worst group keeps its level: against a declared limit, or against the reference's worst group."""
    alpha, num = 1 - rule.confidence, len(usable)
    lower_better = rule.measure.lower_is_better
    floor = rule.at_most if lower_better else rule.at_least
    good, bad = ("high", "low") if lower_better else ("low", "high")
    sign = -1 if lower_better else 1
    if floor is not None:
        kept = [sign * ((c.model.bound(good, alpha, exact=True) or 0.0) - floor) >= 0 for c in usable.values()]
        lost = [sign * ((c.model.bound(bad, alpha / num, exact=True) or 0.0) - floor) < 0 for c in usable.values()]
        asked = f"the limit of {shown(rule, floor, 'g')} for every group"
        if any(lost):
            return "fail", f"With the confidence asked for, {_named(usable, lost)} misses {asked}."
        if all(kept):
            return "pass", f"Every group keeps {asked}."
        return "inconclusive", f"It is not certain that {_named(usable, [not k for k in kept])} keeps {asked}."
    if rule.measure.better == "neither":
        return "pass", ""
    if any(c.baseline is None for c in usable.values()):
        return "inconclusive", (
            "There is no reference to tell a closed gap from a levelled-down model: give zero-shot predictions "
            "(--baseline), or a limit that every group has to keep (at_least)."
        )
    kept = [_keeps(name, usable, sign, rule.slack, alpha) for name in usable]
    lost = [_loses(name, usable, sign, rule.slack, alpha / num) for name in usable]
    margin = f"by more than {shown(rule, rule.slack, 'g').replace(' %', ' points')}"
    if any(lost):
        return "fail", (
            f"Levelled down: with the confidence asked for, the {subject_of(rule)} of {_named(usable, lost)} is worse "
            f"than that of the zero-shot model's worst group {margin}."
        )
    if all(kept):
        return "pass", f"No group is worse than the zero-shot model's worst group {margin}."
    unsure = _named(usable, [not k for k in kept])
    return (
        "inconclusive",
        f"It is not ruled out that {unsure} is worse than the zero-shot model's worst group {margin}.",
    )


def _named(usable: Mapping[str, Comparison], which: Sequence[bool]) -> str:
    named = [name for name, chosen in zip(usable, which, strict=True) if chosen]
    return f"each of the groups {listed(named)}" if len(named) > 1 else named[0]


def _against(group: Comparison, reference: Comparison, side: Side, alpha: float) -> float:
    """Bound of a group of the judged model minus a group of the reference; paired where they are the same group."""
    if group is reference:
        assert group.change is not None
        bound = group.change.bound(side, alpha, exact=True)
        return -np.inf if bound is None and side == "low" else np.inf if bound is None else bound
    before = reference.baseline
    if before is None or before.value is None or before.spread is None:
        return -np.inf if side == "low" else np.inf
    assert group.model.value is not None
    assert group.model.spread is not None
    difference = DifferenceSpread((group.model.value, group.model.spread), (before.value, before.spread))
    return difference.bound(side, alpha, exact=True)


def _keeps(name: str, usable: Mapping[str, Comparison], sign: int, slack: float, alpha: float) -> bool:
    side: Side = "low" if sign > 0 else "high"
    shared = alpha / 2 / max(len(usable) - 1, 1)
    return any(
        sign * _against(usable[name], other, side, alpha / 2 if other is usable[name] else shared) >= -slack
        for other in usable.values()
    )


def _loses(name: str, usable: Mapping[str, Comparison], sign: int, slack: float, alpha: float) -> bool:
    side: Side = "high" if sign > 0 else "low"
    return all(sign * _against(usable[name], other, side, alpha) < -slack for other in usable.values())


def _sentences(
    rule: GateRule,
    gap: float,
    extremes: tuple[str, str],
    bounds: tuple[float, float],
    conclusion: Conclusion,
    guard: tuple[Conclusion, str],
    small: str,
    noise: float | None,
    more: More | None,
) -> str:
    def points(value: float, digits: str = ".1f") -> str:
        return shown(rule, value, digits).replace(" %", " points")

    (best, worst), (lower, upper), limit = extremes, bounds, rule.gap_at_most or 0.0
    said = [
        f"The gap of {subject_of(rule)} by {rule.attribute} is {points(gap)} ({best} against {worst}) and, with "
        f"{100 * rule.confidence:g} % confidence, at most {points(upper)}"
        + (f" and at least {points(lower)}" if lower > 0 else "")
        + f"; the rule asks for at most {points(limit, 'g')}."
    ]
    if noise is not None:
        said.append(f"Noise alone gives equal groups of these sizes a gap of up to {points(noise)} in 95 % of cases.")
    # What decides stands first: the headline has room for one sentence.
    decides = guard[0] == "fail" and lower <= limit
    said = [guard[1], *said] if decides else [*said, guard[1]]
    if small:
        said.append(f"Too small for a verdict, or without an interval: {small}.")
    if conclusion == "inconclusive" and lower <= limit < upper:
        said.append(
            more_words(rule, more, f" of {worst}, and of the other groups in proportion,", it="the gap").strip()
        )
    return " ".join(filter(None, said))
