# SPDX-License-Identifier: Apache-2.0
"""Judging any model's answers, without a card or a run: labels and probabilities in, a report and verdicts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from adaptclip.data.dataset import UNKNOWN
from adaptclip.errors import DataError, GateError, did_you_mean
from adaptclip.feature_clip import in_order
from adaptclip.gate_rules import ZERO_SHOT, GateRule, Outcome
from adaptclip.gates import Verdict, check_gates, load_gates
from adaptclip.gates.label_sets import chosen_thresholds, given_probabilities, label_sets, shows_several
from adaptclip.gates.loading import parse_rule
from adaptclip.gates.verdicts import exit_code, overall_verdict
from adaptclip.metrics import Metric
from adaptclip.predictions import Predictions
from adaptclip.reports.blocks import one_line
from adaptclip.reports.full import full_report
from adaptclip.reports.headline import three_numbers, verdict_of, worries
from adaptclip.reports.render import print_report, to_html, to_markdown


@dataclass(frozen=True)
class Judgement:
    """What was found; in a notebook it shows itself as the page that a run's report.html is.

    Attributes:
        predictions: what was judged.
        report: JSON-able, as `full_report` makes it.
        verdicts: one for each gate, in their order; empty without gates, which is not a pass.
    """

    predictions: Predictions = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    verdicts: tuple[Verdict, ...]

    def __repr__(self) -> str:
        """One line; `print` shows the headline, a notebook the page."""
        return f"<Judgement: {self.verdict} by {len(self.verdicts)} gates, {repr(self.predictions)[1:-1]}>"

    def __str__(self) -> str:
        """The headline: the verdicts with their reasons, the three numbers to know, what to worry about."""
        lines = [verdict_of(self.verdicts)[1], *(f"- {v.verdict}: {v.title}. {v.reason}" for v in self.verdicts)]
        lines += [f"{name}: {value}, {about}" for name, value, about in three_numbers(self.report)]
        lines += [f"! {worry}" for worry in worries(self.report, self.verdicts)]
        return "\n".join(one_line(line) for line in lines)

    @property
    def verdict(self) -> str:
        """The verdict on all gates together: pass, fail, inconclusive, or none without gates."""
        return overall_verdict(self.verdicts)

    @property
    def exit_code(self) -> int:
        """As `adaptclip gate` returns: 0 all passed or there is none, 2 one failed, 3 one is inconclusive."""
        return exit_code(self.verdicts) if self.verdicts else 0

    def to_html(self) -> str:
        """Returns the report as one page that needs no other file."""
        return to_html(self.report, self.verdicts)

    def to_markdown(self) -> str:
        """Returns the report as Markdown."""
        return to_markdown(self.report, self.verdicts)

    def print(self) -> None:
        """Prints the report's first screen on the terminal."""
        print_report(self.report, self.verdicts)

    def _repr_html_(self) -> str:
        return self.to_html()


def judge(
    y_true: Any,
    probabilities: Any,
    *,
    class_names: Sequence[str] | None = None,
    thresholds: Any = None,
    groups: Any = None,
    clusters: Sequence[Any] | None = None,
    zero_shot: Any = None,
    gates: Sequence[GateRule | Mapping[str, Any]] | Path | str = (),
    outcomes: Sequence[Mapping[str, Any]] = (),
    metrics: Sequence[Metric | Callable[..., Any]] = (),
    ids: Sequence[Any] | None = None,
    fixed_classes: bool = False,
) -> Judgement:
    """Judges a model's probabilities on labelled images that it has not seen, as the end of every recipe does.

    Args:
        y_true: (N,) labels, a sequence, array, tensor or column: class names, or class ids from 0. Where an image may
            show several classes, or none: (N, C) 1 and 0, with NaN or -1 where nobody knows, or N lists of class names.
        probabilities: (N, C) class probabilities, each row summing to 1; an array or tensor with columns in the order
            of `class_names`, or a DataFrame whose columns are the class names. Where an image may show several classes,
            the probability of each by itself, and rows have any sum.
        class_names: C names in the order of the columns, or for a DataFrame in the order of the ids; its columns are
            put in that order. Needed where labels are names and `probabilities` has none; ids without names are called
            "class 0", "class 1" …
        thresholds: where an image may show several classes, the probability from which each is named, chosen on other
            images: (C,) numbers, a mapping of names to numbers, or one number for all; None for 0.5.
        groups: attribute -> N values (a mapping or a DataFrame), such as {"sex": [...]}; missing values are "unknown".
        clusters: N patients, sites or the like, the unit that was sampled; None where each image is its own.
        zero_shot: (N, C) probabilities, of the same kind, of the model without adaptation on the same images, for
            changes and for gates of `no_worse_than: zero_shot`.
        gates: rules (`{"metric": "accuracy", "at_least": 0.8}`), or a YAML file of them.
        outcomes: two-sided questions (`{"positive": ["melanoma"]}`), as in a card.
        metrics: of your own, `Metric.of(name, function)`.
        ids: N names of the images; their numbers where not given.
        fixed_classes: the study fixed how many images there are of each class; otherwise their mix is random.

    Raises:
        DataError: lengths or shapes do not fit, a label is unknown, rows are no probabilities, columns have other names
            than the classes, or pandas objects have their rows in different orders (rows are taken as they stand).
        GateError: a gate is not valid or does not fit.
    """
    asked = None if class_names is None else in_order(class_names, "class_names")
    _refuse_answers(y_true, probabilities)
    several = shows_several(y_true)
    probs, names = _probabilities(probabilities, "probabilities", asked, least=1 if several else 2)
    _check_rows(y_true=y_true, probabilities=probabilities, groups=groups, clusters=clusters, zero_shot=zero_shot)
    truth: dict[str, Any]
    if several:
        truth, names = label_sets(y_true, names, probs.shape)
    else:
        labels, names = _labels(y_true, names, probs.shape)
        truth = {"labels": labels}
    labels = truth["labels"]
    rows = tuple(map(str, range(len(labels)))) if ids is None else tuple(map(str, ids))
    info: dict[str, Any] = {
        "ids": rows, **truth, "class_names": names, "groups": _groups(groups, len(labels)),
        "clusters": None if clusters is None else _clusters(clusters),
        "cluster_name": str(getattr(clusters, "name", None) or ""),
        "outcomes": tuple(map(_outcome, outcomes)), "fixed_classes": fixed_classes,
    }  # fmt: skip
    least = chosen_thresholds(thresholds, names, several=several)
    predictions = Predictions(**given_probabilities(probs, several=several), thresholds=least, **info)
    baseline = None
    if zero_shot is not None:
        before, _ = _probabilities(zero_shot, "zero_shot", names, least=1 if several else 2)
        made_by = {"method": ZERO_SHOT}
        baseline = Predictions(
            **given_probabilities(before, several=several), thresholds=least, **info, made_by=made_by
        )
    if isinstance(gates, Mapping):
        raise GateError(
            "gates should be a list of rules, or a YAML file; put brackets around a single one: gates=[...]"
        )
    rules = load_gates(gates) if isinstance(gates, Path | str) else [
        rule if isinstance(rule, GateRule) else parse_rule(rule, f"gate {number}")
        for number, rule in enumerate(gates, start=1)
    ]  # fmt: skip
    report = full_report(predictions, baseline, metrics=[_metric(metric) for metric in metrics])
    return Judgement(predictions, report, tuple(check_gates(predictions, baseline, rules)))


def _refuse_answers(y_true: Any, probabilities: Any) -> None:
    """Says what to do where a model's answers come in the place of its probabilities, or the two are swapped."""
    shape = np.shape(probabilities)
    if len(shape) != 1 or not shape[0]:
        return
    if len(np.shape(y_true)) == 2:
        raise DataError("y_true comes first and the probabilities second; they seem to be swapped")
    first = _plain(probabilities)[:100]
    if all(isinstance(value, str) or float(value).is_integer() for value in first if not _is_gap(value)):
        raise DataError(
            f"probabilities should be (N, C) numbers, and these are {shape[0]:,} labels: give what the model's "
            "predict_proba returns. Where there are labels only, np.eye(C)[label_ids] judges accuracy and the "
            "other rates; calibration and areas under curves then say nothing"
        )


def _clusters(clusters: Any) -> tuple[str, ...]:
    values = _plain(clusters)
    missing = len(values) - len(_known(values))
    if missing:
        raise DataError(
            f"{missing:,} images have no cluster; give each a name of its own (it is then a unit by itself), or leave "
            "these images out"
        )
    return tuple(map(str, values))


def _outcome(outcome: Mapping[str, Any]) -> Outcome:
    try:
        return Outcome.model_validate(dict(outcome))
    except (ValidationError, TypeError, ValueError) as error:
        raise DataError(
            f'an outcome should be a mapping such as {{"positive": ["melanoma"]}}, got {outcome!r:.200}: {error}'
        ) from error


def _metric(metric: Metric | Callable[..., Any]) -> Metric:
    if isinstance(metric, Metric):
        return metric
    name = getattr(metric, "__name__", "")
    if not name or name == "<lambda>":
        raise DataError("a metric of your own needs a name: Metric.of(name, function)")
    return Metric.of(name, metric)


def _is_gap(value: Any) -> bool:
    """Whether a value is Python's None or NaN."""
    return value is None or (isinstance(value, float) and np.isnan(value))


def _known(values: list[Any]) -> list[Any]:
    return [value for value in values if not _is_gap(value)]


def _plain(values: Any) -> list[Any]:
    """A column of a DataFrame, an array, a tensor or a sequence as a list."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _text(value: Any) -> str:
    """A cell as text; what is missing in pandas' or Python's way is "unknown"."""
    missing = _is_gap(value) or str(value) in ("nan", "<NA>", "NaT") or not str(value).strip()
    return UNKNOWN if missing else str(value)


def _check_rows(**given: Any) -> None:
    """Refuses pandas objects whose rows are in different orders: nothing is joined, and pandas users may expect it."""
    indices = {name: value.index for name, value in given.items() if hasattr(value, "iloc")}
    for (first, a), (second, b) in zip(indices.items(), list(indices.items())[1:], strict=False):
        if len(a) == len(b) and not a.equals(b):
            raise DataError(
                f"the rows of {first} and {second} have different indices; rows are taken as they stand, not joined. "
                "Bring both into one order (`.loc[index]`), or drop the indices (`.reset_index(drop=True)`)"
            )


def _probabilities(
    values: Any, what: str, names: tuple[str, ...] | None, *, least: int = 2
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """(N, C) float32 with columns in the order of `names`, and the names; the columns' own where none are given."""
    columns = getattr(values, "columns", None)
    if columns is not None:
        own = tuple(map(str, columns))
        if len(set(own)) != len(own):
            raise DataError(f"{what} has two columns of one name; each class needs its own")
        if names is not None and set(own) != set(names):
            strange = [name for name in own if name not in names] or [name for name in names if name not in own]
            other, lead = (names, "The classes are") if strange[0] in own else (own, "The columns are")
            raise DataError(
                f"the columns of {what} are not the classes: {strange[0]!r} is only in one of the two. "
                f"{did_you_mean(strange[0], other, lead=lead)} Rename the columns, or give an array"
            )
        names = names or own
        values = values[[columns[own.index(name)] for name in names]]
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} should be (N, C) numbers, got {type(values).__name__}: {error}") from error
    if array.ndim != 2 or array.shape[1] < least:
        one = "; give a column for each of the two classes, 1 - p and p" if array.ndim == 1 else ""
        raise DataError(f"{what} should be (N, C) numbers with two classes or more, got {array.shape}{one}")
    return array, names


def _labels(y_true: Any, names: tuple[str, ...] | None, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) class ids and C names."""
    labels, (num_rows, num_classes) = _plain(y_true), shape
    if len(labels) != num_rows:
        raise DataError(f"there are {len(labels):,} labels and {num_rows:,} rows of probabilities; give one for each")
    if names is not None and len(names) != num_classes:
        raise DataError(f"there are {len(names)} class names and {num_classes} columns of probabilities")
    if any(hasattr(label, "__len__") and not isinstance(label, str) for label in labels):
        raise DataError("y_true should be one label for each image, got several in a row; for (N, 1) take [:, 0]")
    known = _known(labels)
    if any(isinstance(label, float) and not label.is_integer() for label in known):
        raise DataError("labels should be class names or whole numbers, got numbers such as 0.5")
    if len(known) < len(labels):
        raise DataError(f"{len(labels) - len(known):,} labels are missing; leave these rows out")
    # A column of whole numbers that once had a gap is one of floats in pandas.
    labels = [int(label) if isinstance(label, float) else label for label in labels]
    whole = all(isinstance(label, int | np.integer) and not isinstance(label, bool) for label in labels)
    if whole and (names is None or not {str(label) for label in labels} <= set(names)):
        ids = np.asarray(labels, dtype=np.int64).reshape(-1)
        if len(ids) and not (ids.min() >= 0 and ids.max() < num_classes):
            raise DataError(f"labels are ids {ids.min()}..{ids.max()}; with {num_classes} columns 0..{num_classes - 1}")
        return ids, names or tuple(f"class {c}" for c in range(num_classes))
    if names is None:
        raise DataError(
            "labels are names, and nothing says which column of the probabilities is of which class; give class_names "
            "in the order of the columns"
        )
    place = {name: c for c, name in enumerate(names)}
    for label in labels:
        if str(label) not in place:
            raise DataError(
                f"the label {label!r} is no class. {did_you_mean(str(label), names, lead='The classes are')}"
            )
    return np.asarray([place[str(label)] for label in labels], dtype=np.int64), names


def _groups(groups: Any, num_rows: int) -> dict[str, tuple[str, ...]]:
    """Attribute -> N values as text."""
    if groups is None:
        return {}
    if not hasattr(groups, "keys"):
        raise DataError(
            'groups should be a mapping of an attribute to its values, or a DataFrame: {"sex": [...]}, got '
            f"{type(groups).__name__}"
        )
    found = {str(name): tuple(_text(value) for value in _plain(groups[name])) for name in groups.keys()}  # noqa: SIM118
    for name, values in found.items():
        if len(values) != num_rows:
            raise DataError(f"the group {name!r} has {len(values):,} values for {num_rows:,} images")
    return found
