"""Gates: declared conditions for release, judged with statistics. Three verdicts, and only "pass" lets a model through.

How a rule is judged:

- A gate is a one-sided claim at the rule's confidence c. It *passes* when the one-sided bound at level c lies on the
  right side of the limit, *fails* when the opposite one-sided bound lies on the wrong side, and is *inconclusive*
  otherwise, or when there are fewer than `min_n` images. So a model that just misses the limit passes with probability
  at most 1 - c. (c = 0.95 uses the ends of the two-sided 90 % interval; reports show two-sided 95 % intervals.)
- A plain rate of independent images uses the exact Clopper-Pearson bound. Everything else uses the bounds described in
  `evaluation.intervals`, with clusters as the unit of resampling where the predictions name them.
- `no_worse_than: zero_shot` is non-inferiority: the bound of the paired change on the same images against the margin.
- A rule on a group attribute judges every group. It passes when *each* group passes at level c: this needs no
  correction, since the claim is wrong only if some group is bad, and that one group passes with probability at most
  1 - c (intersection-union test, Berger 1982). It fails when *any* group fails; that bound is Bonferroni-corrected over
  the groups large enough to be judged, so that the chance of a wrong "fail" stays at 1 - c for the family. (Holm's
  method starts with the same step and gives the same verdict.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from adaptclip.errors import GateError, did_you_mean
from adaptclip.evaluation.estimates import Measurement, align, group_rows, measure
from adaptclip.evaluation.metrics import LOWER_IS_BETTER, METRIC_WORDS
from adaptclip.storage import read_yaml
from adaptclip.types import GateRule, Predictions

Outcome = Literal["pass", "fail", "inconclusive"]

_SEVERITY: dict[str, int] = {"fail": 0, "inconclusive": 1, "pass": 2}


@dataclass(frozen=True)
class Verdict:
    """What the data say about one rule.

    Attributes:
        title: the rule in words.
        metric: name of the metric.
        attribute: the group attribute the rule is about, or None.
        group: the group that decides the verdict (the worst one), or None.
        verdict: "pass", "fail" or "inconclusive".
        value: the estimate, or for `no_worse_than` the change against zero-shot; None where there is none.
        low: one-sided lower bound, or None.
        high: one-sided upper bound, or None.
        n: images behind the value.
        confidence: level of the rule.
        reason: the verdict's grounds in plain words.
        groups: the verdict on every group, worst first; empty for a rule on all images.
    """

    title: str
    metric: str
    attribute: str | None
    group: str | None
    verdict: Outcome
    value: float | None
    low: float | None
    high: float | None
    n: int
    confidence: float
    reason: str
    groups: tuple[Verdict, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict."""
        return asdict(self)


def check_gates(
    predictions: Predictions,
    baseline: Predictions | None,
    rules: Sequence[GateRule],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> list[Verdict]:
    """Judges predictions by declared rules.

    Args:
        predictions: of the model to be released.
        baseline: zero-shot predictions of the same images; needed by `no_worse_than` rules only.
        rules: what was declared; without rules nothing is judged and the list is empty, which is not a pass.
        draws: bootstrap draws, at least 1,000.
        seed: of the bootstrap.

    Returns:
        One verdict per rule, in their order.

    Raises:
        GateError: a rule does not fit (no such group attribute, no baseline, too few classes, no images).
        DataError: the baseline is of other images.
    """
    for rule in rules:
        _check_rule(rule, predictions, baseline)
    base = align(predictions, baseline) if baseline is not None and any(r.no_worse_than for r in rules) else None
    progress = tqdm(rules, desc="gates", unit="rule", disable=None, leave=False)
    return [_judge_rule(rule, predictions, base, draws, seed) for rule in progress]


def overall_verdict(verdicts: Sequence[Verdict]) -> Literal["pass", "fail", "inconclusive", "none"]:
    """Returns the worst verdict, or "none" when there were no rules."""
    if not verdicts:
        return "none"
    return min((v.verdict for v in verdicts), key=lambda verdict: _SEVERITY[verdict])


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Returns 0 when every rule passes, 2 when one fails, else 3 (inconclusive, or no rules: nothing was shown)."""
    return {"pass": 0, "fail": 2, "inconclusive": 3, "none": 3}[overall_verdict(verdicts)]


def load_gates(path: Path | str) -> list[GateRule]:
    """Reads rules from a YAML file: a list under the key `gates`, each with the fields of GateRule.

    Raises:
        StorageError: the file is missing or is not YAML.
        GateError: a rule is not valid; the message names the rule, the reason and the nearest allowed name.
    """
    content = read_yaml(Path(path))
    for key in content:
        if key != "gates":
            raise GateError(f'{path}: unknown key "{key}". {did_you_mean(str(key), ["gates"])}')
    listed = content.get("gates")
    if not isinstance(listed, list):
        raise GateError(f'{path} needs a list of rules under the key "gates", got {type(listed).__name__}')
    return [_parse_rule(entry, f"{path}: gate {i}") for i, entry in enumerate(listed, start=1)]


def _parse_rule(entry: Any, where: str) -> GateRule:
    if not isinstance(entry, dict):
        raise GateError(f"{where} should be a mapping such as {{metric: accuracy, at_least: 0.8}}, got {entry!r}")
    try:
        return GateRule.model_validate(entry)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                problems.append(f'unknown field "{name}". {did_you_mean(name, GateRule.model_fields)}')
            else:
                message = problem["msg"].removeprefix("Value error, ")
                problems.append(f"{name}: {message}, got {problem['input']!r}" if name else message)
        raise GateError(f"{where}: {'; '.join(problems)}") from error


def _check_rule(rule: GateRule, predictions: Predictions, baseline: Predictions | None) -> None:
    if len(predictions) == 0:
        raise GateError("nothing can be judged: the predictions have no rows")
    if rule.group is not None and rule.group not in predictions.groups:
        has = (
            did_you_mean(rule.group, predictions.groups)
            if predictions.groups
            else "They have no group columns at all; name them in the card (columns: groups) and predict again."
        )
        raise GateError(f'gate "{rule.title}": the predictions have no group attribute {rule.group!r}. {has}')
    if rule.no_worse_than and baseline is None:
        raise GateError(f'gate "{rule.title}" compares with zero-shot, but no zero-shot predictions were given')
    if rule.metric == "top5_accuracy" and len(predictions.class_names) <= 5:
        raise GateError(
            f'gate "{rule.title}": with {len(predictions.class_names)} classes every model has a top-5 accuracy of 1; '
            "use accuracy"
        )


def _judge_rule(
    rule: GateRule, predictions: Predictions, baseline: Predictions | None, draws: int, seed: int
) -> Verdict:
    def measured(rows: np.ndarray | None) -> Measurement:
        compared = measure(
            predictions,
            baseline if rule.no_worse_than else None,
            metrics=(rule.metric,),
            rows=rows,
            full_bins=rule.group is not None,
            draws=draws,
            seed=seed,
        )[rule.metric]
        return compared.change if rule.no_worse_than and compared.change else compared.model

    if rule.group is None:
        return _judge(rule, None, measured(None), family=1)
    by_group = {name: measured(rows) for name, rows in group_rows(predictions, rule.group).items()}
    family = sum(m.n >= rule.min_n and m.spread is not None for m in by_group.values())
    direction = 1 if _asks_at_least(rule) else -1
    ordered = sorted(
        (_judge(rule, name, m, max(family, 1)) for name, m in by_group.items()),
        key=lambda v: (_SEVERITY[v.verdict], float("-inf") if v.value is None else direction * v.value),
    )
    return _combine(rule, ordered)


def _combine(rule: GateRule, ordered: list[Verdict]) -> Verdict:
    """Makes the rule's verdict from those of its groups, worst first."""
    worst = ordered[0]
    alike = [str(v.group) for v in ordered[1:] if v.verdict == worst.verdict]
    if worst.verdict == "pass":
        reason = f"All {len(ordered)} groups pass; the worst: {worst.reason}" if len(ordered) > 1 else worst.reason
    elif alike:
        reason = f"{worst.reason} The same verdict for {', '.join(alike)} (of {len(ordered)} groups)."
    else:
        reason = worst.reason
    return replace(worst, reason=reason, groups=tuple(ordered))


def _asks_at_least(rule: GateRule) -> bool:
    """Whether the judged quantity should be high: `at_least`, or the change of a metric that improves upwards."""
    return rule.at_least is not None or (rule.no_worse_than is not None and rule.metric not in LOWER_IS_BETTER)


def _limit(rule: GateRule) -> float:
    if rule.no_worse_than:
        return 0.0 - rule.margin if _asks_at_least(rule) else rule.margin
    limit = rule.at_least if rule.at_least is not None else rule.at_most
    assert limit is not None
    return limit


def _judge(rule: GateRule, group: str | None, measured: Measurement, family: int) -> Verdict:
    """Judges one set of images; `family` groups share the chance of a wrong "fail"."""
    upwards, limit, alpha = _asks_at_least(rule), _limit(rule), 1 - rule.confidence
    good = measured.bound("low" if upwards else "high", alpha, exact=True)
    bad = measured.bound("high" if upwards else "low", alpha / family, exact=True)
    outcome: Outcome = "inconclusive"
    if good is not None and bad is not None and measured.n >= rule.min_n:
        if (good >= limit) if upwards else (good <= limit):
            outcome = "pass"
        elif (bad < limit) if upwards else (bad > limit):
            outcome = "fail"
    low, high = (good, bad) if upwards else (bad, good)
    reason = _reason(rule, group, measured, outcome, (good, bad), family)
    return Verdict(
        rule.title,
        rule.metric,
        rule.group,
        group,
        outcome,
        measured.value,
        low,
        high,
        measured.n,
        rule.confidence,
        reason,
    )


def _reason(
    rule: GateRule,
    group: str | None,
    measured: Measurement,
    outcome: Outcome,
    bounds: tuple[float | None, float | None],
    family: int,
) -> str:
    """Words the grounds of a verdict; `bounds` are the one that lets the rule pass and the one that lets it fail."""

    def show(value: float, digits: str = ".1f") -> str:
        return f"{100 * value:+{digits}} points" if rule.no_worse_than else f"{100 * value:{digits}} %"

    good, bad = bounds
    subject = f"{'change of ' if rule.no_worse_than else ''}{METRIC_WORDS[rule.metric]}"
    subject += f" against {rule.no_worse_than.replace('_', '-')}" if rule.no_worse_than else ""
    subject += f" for {rule.group} = {group}" if group is not None else ""
    images = f"{measured.n} image{'s' * (measured.n != 1)}"
    if measured.value is None:
        return f"The {subject} is not known: {measured.note}."
    found = f"The {subject} is {show(measured.value)} on {images}"
    if measured.n < rule.min_n:
        return f"{found}, too few for a verdict: the rule asks for {rule.min_n}."
    if good is None or bad is None:
        return f"{found}; {measured.note}, so the data cannot tell."
    note = f" ({measured.note}.)" if measured.note else ""
    sure, limit = f"with {100 * rule.confidence:g} % confidence", show(_limit(rule), "g")
    over = f" over {family} groups" if family > 1 else ""
    better, worse = ("at least", "at most") if _asks_at_least(rule) else ("at most", "at least")
    if outcome == "pass":
        return f"{found} and, {sure}, {better} {show(good)}; the rule asks for {better} {limit}.{note}"
    if outcome == "fail":
        return f"{found} and, {sure}{over}, {worse} {show(bad)}; the rule asks for {better} {limit}.{note}"
    return (
        f"{found}; the rule asks for {better} {limit}, but the data only show {better} {show(good)} ({sure}) "
        f"and do not rule out {show(bad)}: they cannot tell.{note}"
    )
