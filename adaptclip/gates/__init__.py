# SPDX-License-Identifier: Apache-2.0
"""Gates: declared conditions for release, judged with statistics. Three verdicts, and only "pass" lets a model through.

How a rule is judged:

- A gate is a one-sided claim at the rule's confidence c. It *passes* when the one-sided bound at level c lies on the
  right side of the limit, *fails* when the opposite one-sided bound lies on the wrong side, and is *inconclusive*
  otherwise, or when there are fewer than `min_n` images. So a model that just misses the limit passes with probability
  at most 1 - c. (c = 0.95 uses the ends of the two-sided 90 % interval; reports show two-sided 95 % intervals.)
- A plain rate of independent images uses the exact Clopper-Pearson bound. Everything else uses the bounds described in
  `metrics.intervals`, with clusters as the unit of resampling where the predictions name them.
- `no_worse_than: zero_shot`, or of another run, is non-inferiority: the bound of the paired change on the same images
  against the margin.
- Nothing passes on copies of rows, on a baseline that is not what it stands for, or without images that the card
  expects (`gates.doubts`).
- A rule on a group attribute judges every group. It passes when *each* group passes at level c: this needs no
  correction, since the claim is wrong only if some group is bad, and that one group passes with probability at most
  1 - c (intersection-union test, Berger 1982). It fails when *any* group fails; that bound is Bonferroni-corrected over
  the groups large enough to be judged, so that the chance of a wrong "fail" stays at 1 - c for the family. (Holm's
  method starts with the same step and gives the same verdict.) So do several rules, and several seeds: a release needs
  all of them, and no correction makes that safer.
- Groups may be left out by name, with a reason that is shown; nothing else takes a group out of a rule.
- `gap_at_most` is judged as `gates.gap` says.
- Sensitivity and its like are rates of some of the images (`reports.measuring`); `min_n` counts those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.errors import GateError, did_you_mean
from adaptclip.gate_rules import ARGMAX, ZERO_SHOT, GateRule
from adaptclip.gates.doubts import (
    asks_little,
    doubts_of_baseline,
    doubts_of_expected,
    doubts_of_reference,
    doubts_of_rows,
    held,
)
from adaptclip.gates.gap import judge_gap
from adaptclip.gates.loading import check_rules, load_gates
from adaptclip.gates.sample_size import Claim, More, more_images
from adaptclip.gates.verdicts import (
    SEVERITY,
    Conclusion,
    Verdict,
    exit_code,
    gates_digest,
    images_digest,
    overall_verdict,
)
from adaptclip.gates.wording import clusters_named, excluded_words, family_reason, reason_of
from adaptclip.metrics.gaps import gap_test
from adaptclip.progress import progress_bar
from adaptclip.reports.any_of import rule_words
from adaptclip.reports.measuring import Question, align, ask, group_rows, judged

if TYPE_CHECKING:
    from adaptclip.metrics.estimates import Measurement
    from adaptclip.metrics.metric import Support
    from adaptclip.predictions import Predictions

__all__ = ["Verdict", "check_gates", "check_rules", "exit_code", "load_gates", "overall_verdict"]


def check_gates(
    predictions: Predictions,
    baseline: Predictions | None,
    rules: Sequence[GateRule],
    *,
    references: Mapping[str, Predictions] | None = None,
    bound: Predictions | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> list[Verdict]:
    """Judges predictions by declared rules.

    Args:
        predictions: of the model to be released.
        baseline: zero-shot predictions of the same images; needed by `no_worse_than: zero_shot`, and by `gap_at_most`
            to tell a closed gap from a levelled-down model.
        rules: what was declared; without rules nothing is judged and the list is empty, which is not a pass.
        references: name of a run -> its predictions of the same images, for rules of `no_worse_than` that name it.
        bound: the zero-shot predictions that the run was made with, where `baseline` was given in their place.
        draws: bootstrap draws, at least 1,000.
        seed: of the bootstrap.

    Returns:
        One verdict per rule, in their order.

    Raises:
        GateError: a rule does not fit (no such group, level or class, no baseline, too few classes, no images).
        DataError: the baseline or a reference is of other images.
    """
    check_rules(rules, predictions)
    known = dict(references or {}) | ({ZERO_SHOT: baseline} if baseline is not None else {})
    compared = {rule: _compared_with(rule, known) for rule in rules}
    aligned = {name: align(predictions, known[name]) for name in dict.fromkeys(compared.values()) if name is not None}
    of_rows = doubts_of_rows(predictions) if rules else []
    of_baseline = doubts_of_baseline(predictions, baseline, bound) if ZERO_SHOT in aligned else []
    images, gates, found = images_digest(predictions), gates_digest(rules), []
    for rule in progress_bar(rules, desc="gates", unit="rule", leave=False):
        name = compared[rule]
        verdict = _judge_rule(rule, predictions, None if name is None else aligned[name], draws, seed)
        doubts = [*of_rows, *doubts_of_expected(rule, predictions)]
        doubts += of_baseline if name == ZERO_SHOT else doubts_of_reference(rule, predictions, known)
        verdict = held(verdict, doubts)
        little = verdict.verdict == "pass" and asks_little(rule, predictions)
        verdict = replace(verdict, images=images, gates=gates, asks_little=little)
        found.append(clusters_named(verdict, predictions.cluster_name))
    return found


def _compared_with(rule: GateRule, known: Mapping[str, Predictions]) -> str | None:
    """The name of the predictions that a rule compares with, or None."""
    if rule.gap_at_most is not None:
        return ZERO_SHOT if ZERO_SHOT in known else None
    name = rule.no_worse_than
    if name == ZERO_SHOT and name not in known:
        raise GateError(
            f'gate "{rule.title}" compares with zero-shot, but no zero-shot predictions were given (--baseline)'
        )
    if name is not None and name not in known:
        near = did_you_mean(name, [ZERO_SHOT, *known], lead="There are")
        raise GateError(f'gate "{rule.title}" compares with {name!r}, whose predictions were not given. {near}')
    return name


def _judge_rule(
    rule: GateRule, predictions: Predictions, baseline: Predictions | None, draws: int, seed: int
) -> Verdict:
    needs_base = rule.no_worse_than or rule.gap_at_most
    outcome = rule.outcome_among(predictions.outcomes)
    question = ask(rule.metric, predictions, baseline if needs_base else None, rule.level, outcome)
    verdict = _judge_question(rule, question, predictions, draws, seed)
    decided = outcome is not None and (outcome.rule != ARGMAX or predictions.several) and rule.measure.decides
    if outcome is None or not decided:
        return verdict
    return replace(verdict, reason=f"{verdict.reason} Decision rule: {rule_words(predictions, outcome)}.")


def _judge_question(rule: GateRule, question: Question, predictions: Predictions, draws: int, seed: int) -> Verdict:
    settings: dict[str, Any] = {"full_bins": rule.group is not None, "draws": draws, "seed": seed}
    if rule.attribute is None:
        compared = question.measure(**settings)
        measured = compared.change if rule.no_worse_than and compared.change else compared.model
        return _judge(rule, None, measured, question.supports(), question.units(), family=1)
    everything = group_rows(predictions, rule.attribute)
    excluded = tuple({"group": g, "n": len(rows)} for g, rows in everything.items() if g in rule.exclude)
    by_group = {g: rows for g, rows in everything.items() if g not in rule.exclude}
    found = {g: question.measure(rows, **settings) for g, rows in by_group.items()}
    supports = {g: question.supports(rows) for g, rows in by_group.items()}
    units = {g: question.units(rows) for g, rows in by_group.items()}
    if rule.gap_at_most is not None:
        verdict = judge_gap(rule, found, supports, units, _noise(question, by_group, draws, seed), excluded)
        return replace(verdict, reason=verdict.reason + excluded_words(rule, excluded))
    parts = {g: c.change if rule.no_worse_than and c.change else c.model for g, c in found.items()}
    family = sum(rule.lacking(supports[g]) is None and m.spread is not None for g, m in parts.items())
    direction = 1 if _asks_at_least(rule) else -1
    ordered = sorted(
        (_judge(rule, g, m, supports[g], units[g], max(family, 1)) for g, m in parts.items()),
        key=lambda v: (SEVERITY[v.verdict], float("-inf") if v.value is None else direction * v.value),
    )
    reason = family_reason(rule, ordered) + excluded_words(rule, excluded)
    return replace(ordered[0], reason=reason, groups=tuple(ordered), excluded=excluded)


def _noise(question: Question, by_group: dict[str, np.ndarray], draws: int, seed: int) -> float | None:
    """The gap of equal groups of these sizes that noise alone stays within in 95 % of cases; of means over images."""
    if question.metric.values is None:
        return None
    parts = [found for rows in by_group.values() if (found := question.own(rows)) is not None]
    code = np.repeat(np.arange(len(parts)), list(map(len, parts)))
    images = judged(question.predictions, np.concatenate(parts))
    counted = (
        np.arange(len(images)) if question.metric.selects is None else question.metric.selects(images).nonzero()[0]
    )
    images, code = images.take(counted), np.unique(code[counted], return_inverse=True)[1]
    if len(np.unique(code)) < 2 or question.metric.missing(images):
        return None
    return gap_test(question.metric.values(images), code, images.sampling, draws=draws, seed=seed).null_quantile


def _asks_at_least(rule: GateRule) -> bool:
    """Whether the judged quantity should be high: `at_least`, or the change of a metric that improves upwards."""
    return rule.at_least is not None or (rule.no_worse_than is not None and not rule.measure.lower_is_better)


def _limit(rule: GateRule) -> float:
    if rule.no_worse_than:
        return 0.0 - rule.margin if _asks_at_least(rule) else rule.margin
    limit = rule.at_least if rule.at_least is not None else rule.at_most
    assert limit is not None
    return limit


def _judge(
    rule: GateRule, group: str | None, measured: Measurement, supports: Sequence[Support], units: int, family: int
) -> Verdict:
    """Judges one set of images; `family` groups share the chance of a wrong "fail"."""
    upwards, limit, alpha = _asks_at_least(rule), _limit(rule), 1 - rule.confidence
    good = measured.bound("low" if upwards else "high", alpha, exact=True)
    bad = measured.bound("high" if upwards else "low", alpha / family, exact=True)
    lacking = rule.lacking(supports)
    conclusion: Conclusion = "inconclusive"
    if good is not None and bad is not None and lacking is None:
        if (good >= limit) if upwards else (good <= limit):
            conclusion = "pass"
        elif (bad < limit) if upwards else (bad > limit):
            conclusion = "fail"
    more = _more(rule, measured, lacking, units, family) if conclusion == "inconclusive" else None
    reason = reason_of(
        rule, group, measured, lacking, conclusion, (good, bad), family, more, limit=limit, upwards=upwards
    )
    low, high = (good, bad) if upwards else (bad, good)
    return Verdict(
        rule.title, rule.measure.name, rule.attribute, group, conclusion, measured.value, low, high, measured.n,
        rule.confidence, reason, (), "change" if rule.no_worse_than else "level", limit,
        more and more.images, (), more and more.clusters,
    )  # fmt: skip


def _more(rule: GateRule, measured: Measurement, lacking: Support | None, units: int, family: int) -> More | None:
    """How many more images, of as many to a cluster as now, would settle a rule."""
    missing, claim = 0 if lacking is None else lacking.least(rule.min_n) - lacking.count, None
    if measured.value is not None and measured.spread is not None:
        upwards, alpha = _asks_at_least(rule), 1 - rule.confidence
        claim = Claim(measured.value, measured.spread, _limit(rule), upwards, alpha, family)
    return more_images(claim, measured.n, units, missing)
