# SPDX-License-Identifier: Apache-2.0
"""What may be declared about a model before it is judged: outcomes of interest, and gates. Nothing here computes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adaptclip.errors import DataError, did_you_mean
from adaptclip.metrics import METRICS, Metric, find_metric
from adaptclip.metrics.metric import Support

LEVELLING_MARGIN = 0.02
"""How far below the reference's worst group a gate on a gap lets its worst group lie, unless `margin` is given."""

ZERO_SHOT = "zero_shot"
"""What `no_worse_than` calls the backbone without adaptation; any other name is a run."""

ARGMAX = "argmax"
"""The decision rule of an outcome that has no other: the most probable class."""

_KEPT = {"sensitivity": "positive", "specificity": "negative"}
"""What a threshold can be chosen to keep, and the side it is a rate of."""

SURE = 0.8
"""A gate of lower confidence needs a reason."""

BETWEEN = " × "
"""Joins the attributes of an intersection, as in "sex × age_group"."""

DECIMAL_COMMA = re.compile(r"-?\d+,\d+")

_CONDITIONS = ("at_least", "at_most", "no_worse_than", "gap_at_most")


def _as_tuple(value: Any) -> Any:
    """A single name stands for a list of one. Raises ValueError for what is no name: YAML reads 3 and yes as such."""
    for one in value if isinstance(value, list | tuple) else (value,):
        if isinstance(one, bool | int | float):
            own = (
                "yes, no, on, off, true and false are no text in YAML" if isinstance(one, bool) else "this is a number"
            )
            raise ValueError(f'a name is text, and {own}: put the name in quotes, such as "{str(one).lower()}"')
    return (value,) if isinstance(value, str) else value


def _as_number(value: Any) -> Any:
    """Refuses with ValueError what would pass for another number than was meant: yes (1) and 0,5."""
    if isinstance(value, bool):
        raise ValueError("should be a number; yes, no, true and false are none")
    if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value.strip()):
        raise ValueError(f"has a decimal comma; write {value.strip().replace(',', '.')}")
    return value


class Outcome(BaseModel):
    """A two-sided question about the classes: is it one of the positive ones?

    One rule decides which images count as positive, in gates, tables and sentences alike.

    Attributes:
        positive: class names or, where `level` is given, values of that level; one name or several.
        level: taxonomy level whose values `positive` names; None for the classes themselves.
        rule: "argmax": the side of the most probable class. "threshold": the probability of the positive side (the sum
            over its classes) is above `threshold`. "sensitivity=0.95" or "specificity=0.9": a threshold that keeps this
            on the validation images, chosen when a run is judged and kept with its predictions; never on judged images.
        threshold: of rule "threshold", between 0 and 1; given alone it stands for that rule.
        prevalence: share of positive images where the model will be used, between 0 and 1; the predictive values and
            the net benefit are for it. None takes the share among the judged images, and says so.
        chosen_on: images of the kept side among the validation images that chose the threshold; set when a run is
            judged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: tuple[str, ...] = Field(min_length=1)
    level: str | None = None
    rule: str = ARGMAX
    threshold: float | None = Field(default=None, gt=0, lt=1)
    prevalence: float | None = Field(default=None, gt=0, lt=1)
    chosen_on: int | None = Field(default=None, ge=1)

    _one_or_several = field_validator("positive", mode="before")(_as_tuple)
    _numbers = field_validator("threshold", "prevalence", "chosen_on", mode="before")(_as_number)

    @model_validator(mode="before")
    @classmethod
    def _threshold_alone(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("threshold") is not None and "rule" not in given:
            return {**given, "rule": "threshold"}
        return given

    @model_validator(mode="after")
    def _check_rule(self) -> Outcome:
        kept = self.keeps
        if kept is None and self.rule not in (ARGMAX, "threshold"):
            raise ValueError(
                f"unknown rule {self.rule!r}; allowed: argmax, threshold (with threshold: 0.3), sensitivity=0.95, "
                f"specificity=0.9. {did_you_mean(self.rule.split('=')[0], (ARGMAX, 'threshold', *_KEPT))}"
            )
        if kept is not None and not 0 < kept[1] < 1:
            raise ValueError(f"rule {self.rule!r} asks for a {kept[0]} between 0 and 1")
        if self.rule == "threshold" and self.threshold is None:
            raise ValueError("rule threshold needs a threshold: a probability between 0 and 1")
        if self.rule == ARGMAX and self.threshold is not None:
            raise ValueError("rule argmax takes the most probable class and has no threshold; leave one of them out")
        return self

    @property
    def keeps(self) -> tuple[str, float] | None:
        """What a threshold is chosen to keep, such as ("sensitivity", 0.95), or None."""
        name, found, value = self.rule.partition("=")
        try:
            return (name.strip(), float(value)) if found and name.strip() in _KEPT else None
        except ValueError:
            return None

    @property
    def rule_words(self) -> str:
        """The decision rule in words, for tables and sentences."""
        if self.rule == ARGMAX:
            return "the most probable class decides"
        if self.threshold is None:
            return f"a threshold that keeps a {self._kept_words} on validation images, which is not chosen yet"
        if self.keeps is None:
            return f"positive above a probability of {self.threshold:g}"
        side = _KEPT[self.keeps[0]]
        several = "s" * (self.chosen_on != 1)
        on = f"{self.chosen_on:,} {side} validation image{several}" if self.chosen_on else "validation images"
        return f"positive above a probability of {self.threshold:g}, chosen on {on} to keep a {self._kept_words}"

    @property
    def _kept_words(self) -> str:
        assert self.keeps is not None
        return f"{self.keeps[0]} of {self.keeps[1]:g}"

    @property
    def undecided(self) -> str:
        """Why nothing is called positive or negative yet: the rule's threshold was not chosen. "" otherwise."""
        if self.rule == ARGMAX or self.threshold is not None:
            return ""
        return (
            f"no validation image chose the threshold that keeps a {self._kept_words}; judge a run that leaves "
            "validation images of both sides, or state a threshold (threshold: 0.3)"
        )

    @property
    def name(self) -> str:
        """The outcome in words, for example "malignancy = malignant"."""
        values = " or ".join(self.positive)
        return f"{self.level} = {values}" if self.level else values

    def check(self, class_names: Sequence[str], levels: Mapping[str, Sequence[str]], *, several: bool = False) -> None:
        """Refuses what is not among the classes or levels, and an outcome that every class has.

        Args:
            class_names: C names.
            levels: taxonomy level -> C coarse names.
            several: whether an image may show several classes, or none: then every class may be positive, which asks
                whether it shows any.

        Raises:
            DataError: it does not fit; the message holds the nearest name.
        """
        if self.level is not None and self.level not in levels:
            has = (
                did_you_mean(self.level, levels, lead="There are") if levels else "There are no taxonomy levels at all."
            )
            raise DataError(f"outcome {self.name!r}: no taxonomy level {self.level!r}. {has}")
        values = class_names if self.level is None else levels[self.level]
        for value in self.positive:
            if value not in values:
                has = did_you_mean(value, values, lead="There are")
                raise DataError(f"outcome {self.name!r}: nothing is {value!r}. {has}")
        if set(values) <= set(self.positive) and not several:
            raise DataError(f"outcome {self.name!r}: every class is positive, so there is nothing to tell apart")


class Expected(BaseModel):
    """What must be among the judged images for a gate that depends on it to pass.

    Attributes:
        groups: group attribute -> values of which there shall be images.
        classes: class names of which there shall be images, or "all".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    classes: Literal["all"] | tuple[str, ...] = ()

    @field_validator("groups", mode="before")
    @classmethod
    def _one_value(cls, given: Any) -> Any:
        return {name: _as_tuple(values) for name, values in given.items()} if isinstance(given, Mapping) else given

    @field_validator("classes", mode="before")
    @classmethod
    def _one_class(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) and given != "all" else given

    @model_validator(mode="after")
    def _check_something(self) -> Expected:
        if not self.groups and not self.classes:
            raise ValueError("names nothing; give groups: {ATTRIBUTE: [VALUE, ...]}, classes: all, or class names")
        for name, values in self.groups.items():
            if not values:
                raise ValueError(f"groups.{name} names no value; list those of which there shall be images")
        return self

    def of_classes(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """The expected classes by name, of `class_names` where all are."""
        return tuple(class_names) if self.classes == "all" else tuple(self.classes)


class GateRule(BaseModel):
    """One declared condition for release.

    Exactly one of `at_least`, `at_most`, `no_worse_than` and `gap_at_most` is given; only `gap_at_most` may come with
    a limit that every group has to keep as well (`at_least`, or `at_most` for metrics that are better when lower).

    Attributes:
        metric: one of METRICS, or (in Python) a Metric; rates are 0 to 1.
        group: attribute whose every group must satisfy the rule, or a list of attributes for their intersection; None
            judges all images together.
        level: taxonomy level at which the metric is computed (a prediction within the right value is right).
        positive: class name(s), or value(s) of `level`, that count as positive; needed by metrics of an outcome.
        threshold: see Outcome; without one the declared outcome's rule decides, else the most probable class.
        at_least: lowest acceptable value.
        at_most: highest acceptable value.
        no_worse_than: the reference model of a paired comparison: zero_shot, or the name of another run whose
            predictions are given (a folder such as runs/coop).
        gap_at_most: largest acceptable difference between the best and the worst group; below half the metric's range.
        margin: slack in the metric's own unit (0.02 is 2 points) against the reference: for `no_worse_than`, and for
            `gap_at_most` how much lower than the reference's worst group the worst group may lie (default 0.02).
        confidence: level of the interval that must lie on the right side.
        min_n: fewest images (of the smallest group, where there are groups) that allow a verdict, counted where the
            metric rests on them: positive images (sensitivity), negative ones (specificity). By default 100; 30 for
            metrics of an outcome. Means over the classes ask for two numbers, of both of which it takes the place: 10
            images of the smallest class, and 100 as far as the classes share them evenly.
        exclude: groups that the rule does not judge, named one by one.
        reason: why they are left out, or why a confidence below 0.8 will do; shown with every verdict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    metric: str | Metric = "accuracy"
    group: str | tuple[str, ...] | None = None
    level: str | None = None
    positive: tuple[str, ...] | None = Field(default=None, min_length=1)
    threshold: float | None = Field(default=None, gt=0, lt=1)
    at_least: float | None = None
    at_most: float | None = None
    no_worse_than: str | None = None
    gap_at_most: float | None = Field(default=None, gt=0, le=1)
    margin: float = Field(default=0.0, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    min_n: int | None = Field(default=None, ge=1)
    exclude: tuple[str, ...] = ()
    reason: str = ""

    _one_or_several = field_validator("positive", "exclude", mode="before")(_as_tuple)
    _numbers = field_validator(
        "threshold", "at_least", "at_most", "gap_at_most", "margin", "confidence", "min_n", mode="before"
    )(_as_number)

    @model_validator(mode="after")
    def _check(self) -> GateRule:
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}. {did_you_mean(self.metric, METRICS)}")
        self._check_condition()
        self._check_outcome()
        if not isinstance(self.group, str | None) and (len(self.group) < 2 or len(set(self.group)) < len(self.group)):
            raise ValueError(f"a list of groups is an intersection of different attributes; got {list(self.group)}")
        if self.exclude and self.group is None:
            raise ValueError("exclude leaves groups out, and this rule has no group")
        unsure = self.confidence < SURE
        if (self.exclude or unsure) and not self.reason.strip():
            what = "leaving groups out" if self.exclude else f"a confidence of {self.confidence:g}, below {SURE:g},"
            raise ValueError(f"{what} needs a reason, which every verdict shows (reason: ...)")
        if self.reason.strip() and not (self.exclude or unsure):
            raise ValueError("a reason belongs to exclude: the groups it is about, or to a confidence below 0.8")
        return self

    def _check_condition(self) -> None:
        given = [name for name in _CONDITIONS if getattr(self, name) is not None]
        measure, lower = self.measure, self.measure.lower_is_better
        right, wrong = ("at_most", "at_least") if lower else ("at_least", "at_most")
        if given != ["gap_at_most"] and not (len(given) == 2 and set(given) == {"gap_at_most", right}):
            if len(given) != 1:
                raise ValueError(
                    f"needs exactly one of {', '.join(_CONDITIONS)} (or gap_at_most with {right}); "
                    f"got {' and '.join(given) or 'none'}"
                )
            if given == [wrong] and measure.better != "neither":
                better = "lower" if lower else "higher"
                raise ValueError(f"{measure.name} is better when {better}: use {right}, not {wrong}")
        if self.gap_at_most is not None and self.group is None:
            raise ValueError("gap_at_most compares groups: name the attribute (group: sex)")
        if measure.better == "neither" and self.no_worse_than:
            raise ValueError(
                f"{measure.name} has no better side, so none is worse; use at_least, at_most or gap_at_most"
            )
        self._check_sense()
        if self.margin and not (self.no_worse_than or self.gap_at_most):
            raise ValueError("margin belongs to no_worse_than and gap_at_most; put the slack into the limit itself")

    def _check_sense(self) -> None:
        """Refuses limits that nothing can miss, or nothing can keep."""
        measure = self.measure
        low, high = measure.scale
        for name, value, trivial in (("at_least", self.at_least, low), ("at_most", self.at_most, high)):
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"{name} must lie within {low:g} and {high:g}, where {measure.name} does, got {value:g}"
                )
            if value is not None and value == trivial:
                raise ValueError(f"{name}: {value:g} is kept by every model, so that the rule tests nothing")
        for words, value in (("margin", self.margin), ("gap_at_most", self.gap_at_most or 0)):
            if value >= (high - low) / 2:
                raise ValueError(
                    f"a {words} of {value:g} lets nearly every model through; {measure.name} lies within {low:g} and "
                    f"{high:g}, and {words} is usually 0.01 to {'0.05' if words == 'margin' else '0.1'} of that"
                )

    def _check_outcome(self) -> None:
        measure = self.measure
        if measure.of_outcome and self.positive is None:
            raise ValueError(
                f"{measure.name} needs to know what is positive: positive: CLASS, or level: LEVEL and positive: VALUE"
            )
        if self.threshold is not None and not (measure.of_outcome and measure.decides):
            raise ValueError("threshold decides between positive and negative; it belongs to rates of an outcome")
        if measure.of_labels and self.positive is not None:
            raise ValueError(
                f"{measure.name} is of all classes at once; of one class use sensitivity, specificity or auc"
            )
        if measure.least_classes > 2 and self.positive is not None:
            raise ValueError(f"of two sides, {measure.words} says nothing; use sensitivity")

    @property
    def measure(self) -> Metric:
        """The metric."""
        return find_metric(self.metric)

    @property
    def attribute(self) -> str | None:
        """The group attribute as reports call it; an intersection reads "sex × age_group"."""
        return self.group if self.group is None or isinstance(self.group, str) else BETWEEN.join(self.group)

    @property
    def outcome(self) -> Outcome | None:
        """The outcome the rule is about, or None."""
        if self.positive is None:
            return None
        if self.threshold is None:
            return Outcome(positive=self.positive, level=self.level)
        return Outcome(positive=self.positive, level=self.level, threshold=self.threshold)

    def outcome_among(self, declared: Sequence[Outcome]) -> Outcome | None:
        """The outcome with its decision rule: the gate's own threshold, else that of the same declared outcome.

        Args:
            declared: outcomes of the card, as the predictions have them.
        """
        own = self.outcome
        if own is None or self.threshold is not None:
            return own
        same = (one for one in declared if (set(one.positive), one.level) == (set(own.positive), own.level))
        return next(same, own)

    def lacking(self, supports: Sequence[Support]) -> Support | None:
        """Of what a metric rests on, the first that is too little for a verdict; None where all suffices."""
        return next((support for support in supports if support.count < support.least(self.min_n)), None)

    @property
    def slack(self) -> float:
        """The margin against the reference, with its default for gaps."""
        return LEVELLING_MARGIN if self.gap_at_most and "margin" not in self.model_fields_set else self.margin

    @property
    def title(self) -> str:
        """The rule in words, for tables and errors."""
        subject = self.measure.name
        if self.outcome is not None:
            subject += f" ({self.outcome.name})"
        elif self.level is not None:
            subject += f" at level {self.level}"
        if self.gap_at_most is not None:
            floor = "" if self.at_least is None else f", every group ≥ {self.at_least:g}"
            floor += "" if self.at_most is None else f", every group ≤ {self.at_most:g}"
            return f"gap of {subject} by {self.attribute} ≤ {self.gap_at_most:g}{floor}"
        subject += f" of every {self.attribute}" if self.attribute else ""
        if self.no_worse_than:
            return f"{subject} no worse than {self.no_worse_than}" + (f" − {self.margin:g}" if self.margin else "")
        return f"{subject} ≥ {self.at_least:g}" if self.at_least is not None else f"{subject} ≤ {self.at_most:g}"
