"""What keeps a verdict from being a pass whatever the numbers say: absent groups, copied rows, wrong references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from adaptclip.evaluation.grouping import group_rows
from adaptclip.evaluation.measuring import judged
from adaptclip.evaluation.outcomes import ask
from adaptclip.evaluation.repeated import repeated_rows, same_predictions
from adaptclip.gate_rules import ZERO_SHOT, GateRule
from adaptclip.gates.verdicts import Verdict
from adaptclip.types import Predictions

_MOST_NAMED = 5


def held(verdict: Verdict, doubts: list[str]) -> Verdict:
    """Returns a verdict that does not pass while there are doubts; a failure stays one."""
    if not doubts:
        return verdict
    words = " ".join(doubts)
    if verdict.verdict == "fail":
        return replace(verdict, reason=f"{verdict.reason} {words}")
    # More images would not settle what is in doubt.
    return replace(verdict, verdict="inconclusive", reason=f"{words} {verdict.reason}", more_images=None)


def doubts_of_rows(predictions: Predictions) -> list[str]:
    """Says where rows are copies of others, so that every interval is narrower than the images allow."""
    found = repeated_rows(predictions)
    if found is None:
        return []
    return [
        f"{found.words[:1].upper()}{found.words[1:]}, which chance does not explain: there are fewer images than rows, "
        "and nothing can pass. Take the copies out, or give the rows that belong together one cluster."
    ]


def doubts_of_expected(rule: GateRule, predictions: Predictions) -> list[str]:
    """Says what the card expects among the judged images and a rule depends on, and is not there."""
    if predictions.expected is None:
        return []
    said = []
    for name in (rule.group,) if isinstance(rule.group, str) else rule.group or ():
        there = set(predictions.groups.get(name, ()))
        wanted = predictions.expected.groups.get(name, ())
        absent = [value for value in wanted if value not in there and value not in rule.exclude]
        if absent:
            said.append(f"The card expects images of {name} = {_listed(absent)}, and there is none.")
    names = _absent_classes(rule, predictions)
    if names:
        said.append(f"The card expects images of the class {_listed(names)}, and there is none.")
    return said


def _absent_classes(rule: GateRule, predictions: Predictions) -> list[str]:
    """Expected classes without an image on which the rule depends."""
    assert predictions.expected is not None
    names = predictions.class_names
    seen = np.bincount(predictions.labels, minlength=len(names)) > 0
    wanted = predictions.expected.of_classes(names)
    absent = [c for c, name in enumerate(names) if name in wanted and not seen[c]]
    values = names if rule.level is None else predictions.levels[rule.level]
    if rule.positive is not None:
        sides = rule.measure.sides or (0, 1)
        absent = [c for c in absent if (values[c] in rule.positive) in sides]
    elif rule.level is not None:
        known = {value for value, there in zip(values, seen, strict=True) if there}
        absent = [c for c in absent if values[c] not in known]
    return [*(names[c] for c in absent), *(name for name in wanted if name not in names)]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def doubts_of_baseline(predictions: Predictions, baseline: Predictions | None, bound: Predictions | None) -> list[str]:
    """Says where a baseline is not the zero-shot run that it stands for.

    Args:
        predictions: the judged model.
        baseline: what is called zero-shot.
        bound: the zero-shot predictions that the run was made with, where another baseline is given.
    """
    if baseline is None or (bound is not None and same_predictions(baseline, bound)):
        return []
    method = baseline.made_by.get("method")
    if method not in (None, ZERO_SHOT):
        return [f"The baseline is a run of {method} and not zero-shot; name it in the gate (no_worse_than: RUN)."]
    if bound is not None:
        return [
            "The baseline that was given is not the zero-shot run that the model was trained beside; name it in the "
            "gate (no_worse_than: RUN), or leave it out."
        ]
    ours, theirs = (p.made_by.get("backbone") for p in (predictions, baseline))
    if ours is not None and theirs is not None and ours != theirs:
        return [f"The baseline is zero-shot of the backbone {theirs}, and the model was adapted from {ours}."]
    if method is None and same_predictions(predictions, baseline):
        return ["The baseline is the model itself: every answer is the same, so that nothing is compared."]
    return []


def doubts_of_reference(rule: GateRule, predictions: Predictions, references: Mapping[str, Predictions]) -> list[str]:
    """Says where the run that a rule compares with is the judged one."""
    named = rule.no_worse_than
    if named is None or named == ZERO_SHOT or not same_predictions(predictions, references[named]):
        return []
    return [f"{named} is the model itself: every answer is the same, so that nothing is compared."]


def asks_little(rule: GateRule, predictions: Predictions) -> bool:
    """Whether a model that gives every image the same answer, how frequent each class is, would keep the limit too.

    Its most probable class is the most frequent one. Comparisons and gaps ask for something else.
    """
    if rule.no_worse_than is not None or rule.gap_at_most is not None:
        return False
    frequencies = np.bincount(predictions.labels, minlength=len(predictions.class_names)) / len(predictions)
    constant = np.broadcast_to(frequencies.astype(np.float32), predictions.probs.shape)
    unskilled = replace(predictions, probs=np.ascontiguousarray(constant), sigmoid=None, ranked=None, confident=True)
    question = ask(rule.metric, unskilled, None, rule.level, rule.outcome_among(predictions.outcomes))
    groups = {"": None} if rule.attribute is None else group_rows(predictions, rule.attribute)
    for rows in (rows for group, rows in groups.items() if group not in rule.exclude):
        value = rule.measure.value(judged(question.predictions, rows))
        if value is None or (rule.at_least is not None and value < rule.at_least):
            return False
        if rule.at_most is not None and value > rule.at_most:
            return False
    return True
