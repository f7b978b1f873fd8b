# SPDX-License-Identifier: Apache-2.0
"""What keeps a verdict from being a pass whatever the numbers say: absent groups, copied rows, wrong references.

Copied rows stand in predictions more than once under different ids, so that the images are fewer than they seem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import chdtr, lambertw

from adaptclip.gate_rules import ZERO_SHOT, GateRule
from adaptclip.reports.measuring import ask, encode, group_rows

if TYPE_CHECKING:
    from adaptclip.gates.verdicts import Verdict
    from adaptclip.predictions import Predictions

_CHANCE = 1e-4
"""A repetition is told only where chance would bring it about less often than this."""

_FEWEST, _SHARE = 3, 0.02
"""So many rows, and so large a share of all, must be copies of another row to be told."""

_DIFFERENT = 30
"""From so many different answers on, how often each stands there tells whether that is by chance."""

_PRECISE, _UNEVEN = 3, 2.0
"""With so many decimals rows are rarely equal by nature: how many are may vary so much more than by chance."""

_SURE = 0.999
"""Rows of such a confidence are equal because numbers end, not because they are copies."""


@dataclass(frozen=True)
class Repeated:
    """How rows are repeated.

    Attributes:
        rows: rows that are copies of a row before them.
        total: all rows.
        words: what was seen.
    """

    rows: int
    total: int
    words: str


def repeated_rows(predictions: Predictions) -> Repeated | None:
    """Finds rows that equal another row in class and all probabilities, in numbers that chance does not explain.

    Rows of one cluster may be equal: they count as one unit anyway. Otherwise three things give copies away:

    - The whole table is one sequence of rows (classes, groups, probabilities) several times over. That is found even
      where answers are coarse; what classes and groups make alike by design does not count, only the answers do.
    - At least 2 % of the rows have a copy, most rows are different, and rounding all probabilities once more makes
      hardly any further rows equal.
    - Most rows have copies, and how often they stand there varies less than chance would have it: all three times, or
      some twice and others three times, in any order, as a join brings about.

    Rounded answers, votes and steps of a calibration are equal by nature and are left alone: there, rounding makes many
    more rows equal, few rows are different, or the numbers of equal ones vary more than chance would have it, many
    answers standing there once and some very often.

    Copies of answers that are coarse themselves, in a new order, cannot be told from answers that are equal by nature.
    """
    n = len(predictions)
    if n < 2 * _FEWEST:
        return None
    unit = np.arange(n) if predictions.clusters is None else encode(predictions.clusters)[1]
    answers = _codes(*_rows(predictions))
    return _several_times(predictions, answers, unit) or _copies(predictions, answers, unit)


def _rows(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """(N,) what each image shows, as a number, and (N, C) the probabilities that answer it."""
    if predictions.positive is None or predictions.sigmoid is None:
        return predictions.labels, predictions.probs
    shown = predictions.positive if predictions.known is None else predictions.positive + 2 * ~predictions.known
    return np.unique(shown, axis=0, return_inverse=True)[1].ravel(), predictions.sigmoid


def same_predictions(first: Predictions, second: Predictions) -> bool:
    """Whether two predictions are the same rows with the same answers, up to the rounding of a text file."""
    if first.class_names != second.class_names or len(first) != len(second) or first.several != second.several:
        return False
    position = {row: i for i, row in enumerate(second.ids)}
    order = np.fromiter((position.get(row, -1) for row in first.ids), np.int64, len(first))
    if (order < 0).any() or (first.labels != second.labels[order]).any():
        return False
    if first.several and not _same_sets(first, second, order):
        return False
    ours, theirs = _rows(first)[1], _rows(second)[1]
    return bool(np.abs(ours - theirs[order]).max(initial=0) < 1e-6)


def _same_sets(first: Predictions, second: Predictions, order: np.ndarray) -> bool:
    assert first.positive is not None
    assert second.positive is not None
    known = [np.ones_like(p.positive) if p.known is None else p.known for p in (first, second)]
    return bool((first.positive == second.positive[order]).all() and (known[0] == known[1][order]).all())


def _codes(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) whole numbers that are equal exactly where label and all values are."""
    factors = np.random.default_rng(0).integers(1, 2**63, values.shape[1] + 1, dtype=np.uint64) | np.uint64(1)
    mixed = labels.astype(np.uint64) * factors[-1]
    bits = np.ascontiguousarray(values + np.float32(0), dtype=np.float32).view(np.uint32)  # no negative zero
    for column, factor in zip(bits.T, factors, strict=False):
        mixed = (mixed ^ column) * factor
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed, return_inverse=True)[1]


def _several_times(predictions: Predictions, answers: np.ndarray, unit: np.ndarray) -> Repeated | None:
    n = len(predictions)
    stratum = _rows(predictions)[0].astype(np.int64)
    for values in predictions.groups.values():
        names, code = encode(values)
        stratum = np.unique(stratum * len(names) + code, return_inverse=True)[1]
    rows = np.unique(answers.astype(np.int64) * (int(stratum.max()) + 1) + stratum, return_inverse=True)[1]
    for length in (p for p in range(1, n // 2 + 1) if n % p == 0):
        probe = slice(0, min(n - length, 1000))
        if not (rows[length:][probe] == rows[:-length][probe]).all() or not (rows[length:] == rows[:-length]).all():
            continue
        if (unit[length:] == unit[:-length]).any():
            return None
        if _chance(answers, stratum, length) < np.log(_CHANCE):
            words = f"the same sequence of {length:,} rows stands in the table {n // length} times"
            return Repeated(n - length, n, words)
        return None  # a longer sequence that repeats consists of this one
    return None


def _chance(answers: np.ndarray, stratum: np.ndarray, length: int) -> float:
    """Logarithm of how likely rows after the first `length` would answer like those by chance, given their stratum."""
    pairs, counts = np.unique(np.stack([stratum, answers]), axis=1, return_counts=True)
    total = np.bincount(stratum)
    alike = np.bincount(pairs[0], weights=(counts / total[pairs[0]]) ** 2, minlength=len(total))
    return float(np.log(alike[stratum[length:]]).sum())


def _copies(predictions: Predictions, answers: np.ndarray, unit: np.ndarray) -> Repeated | None:
    if not predictions.confident or predictions.ranked is not None:
        return None  # their numbers are made from an order
    distinct, (shown, given) = int(answers.max()) + 1, _rows(predictions)
    if distinct < 3 * len(predictions.class_names):
        return None
    # One row of each answer and unit, and none whose probabilities are equal because numbers end.
    kept = np.unique(answers.astype(np.int64) * (int(unit.max()) + 1) + unit, return_index=True)[1]
    kept = kept[(np.abs(given[kept] - 0.5) < _SURE - 0.5).any(axis=1)]
    labels, probs, unit = shown[kept], given[kept], unit[kept]
    first, times = np.unique(answers[kept], return_index=True, return_counts=True)[1:]
    n, copies = len(predictions), int((times - 1).sum())
    if copies < max(_FEWEST, _SHARE * n):
        return None
    if not _too_even(times, labels[first]):
        varied = times.var() / _by_chance(times.mean())
        by_nature = varied > (_UNEVEN if _decimals(probs) >= _PRECISE else 1)
        if distinct < n / 2 or by_nature or _rounded(labels, probs, unit, times):
            return None
    return Repeated(
        copies, n, f"{copies:,} of {n:,} rows equal another row in class and all probabilities, under ids of their own"
    )


def _too_even(times: np.ndarray, labels: np.ndarray) -> bool:
    """Whether the numbers of rows with the same answer vary less than chance would have it: too few stand there once.

    How many rows a class has may be fixed, so that its answers are compared with their own mean. Fewer than two rows of
    an answer on average say nothing.

    Args:
        times: (D,) rows of each answer.
        labels: (D,) the class of those rows.
    """
    answers = np.bincount(labels)
    mean = (np.bincount(labels, times) / np.maximum(answers, 1))[labels]
    info = mean >= 2
    df = int(info.sum()) - len(np.unique(labels[info]))
    if df < _DIFFERENT or times.mean() < 2:
        return False
    return bool(chdtr(df, ((times - mean) ** 2 / _by_chance(np.maximum(mean, 2)))[info].sum()) < _CHANCE)


def _by_chance(mean: np.ndarray) -> np.ndarray:
    """Variance of how often an answer that is there stands there, by its mean, if each row took any answer by chance.

    That is Poisson's distribution without zero; where some answers are likelier than others there is more of it.
    """
    rate = mean + lambertw(-mean * np.exp(-mean)).real
    return mean * (1 + rate - mean)


def _rounded(labels: np.ndarray, probs: np.ndarray, unit: np.ndarray, times: np.ndarray) -> bool:
    """Whether rows are equal because they are rounded: with one decimal less, ten times as many are."""
    coarser = _codes(labels, np.round(probs.astype(np.float64) * 10.0 ** (_decimals(probs) - 1)).astype(np.float32))
    of_units = np.unique(coarser.astype(np.int64) * (int(unit.max()) + 1) + unit) // (int(unit.max()) + 1)
    among = np.unique(of_units, return_counts=True)[1]
    return bool((among * (among - 1)).sum() > 3 * (times * (times - 1)).sum())


def _decimals(probs: np.ndarray) -> int:
    """With how many decimals probabilities were written, 1 to 7; 7 stands for full precision."""
    sample = probs[:: max(1, len(probs) // 1000)].astype(np.float64)
    for digits in range(1, 7):
        scaled = sample * 10**digits
        if np.abs(scaled - np.round(scaled)).max() < 1e-7 * 10**digits + 1e-9:
            return digits
    return 7


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
            said.append(f"The card expects images of {name} = {_listed(absent)}, but there are none.")
    names = _absent_classes(rule, predictions)
    if names:
        said.append(f"The card expects images of the class {_listed(names)}, but there are none.")
    return said


def _absent_classes(rule: GateRule, predictions: Predictions) -> list[str]:
    """Expected classes without an image on which the rule depends."""
    assert predictions.expected is not None
    names = predictions.class_names
    seen = predictions.shown_counts > 0
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
    known = len(predictions) if predictions.known is None else np.maximum(predictions.known.sum(axis=0), 1)
    frequencies = (predictions.shown_counts / known).astype(np.float32)
    constant = np.ascontiguousarray(np.broadcast_to(frequencies, predictions.probs.shape))
    unskilled = (
        replace(predictions, sigmoid=constant) if predictions.several
        else replace(predictions, probs=constant, sigmoid=None, ranked=None, confident=True)
    )  # fmt: skip
    question = ask(rule.metric, unskilled, None, rule.level, rule.outcome_among(predictions.outcomes))
    groups = {"": None} if rule.attribute is None else group_rows(predictions, rule.attribute)
    for rows in (rows for group, rows in groups.items() if group not in rule.exclude):
        value = rule.measure.value(question.images(rows))
        if value is None or (rule.at_least is not None and value < rule.at_least):
            return False
        if rule.at_most is not None and value > rule.at_most:
            return False
    return True
