"""What may be declared about a model before it is judged: outcomes of interest, and gates. Nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adaptclip.errors import DataError, did_you_mean

GENERAL_METRICS = ("accuracy", "mean_per_class_accuracy", "top5_accuracy", "ece", "brier", "macro_auc")
"""Metrics of any classifier: rates 0 to 1, except `brier`, which is 0 to 2 (the sum over the classes, not halved)."""

OUTCOME_METRICS = ("sensitivity", "specificity", "tpr", "fpr", "fnr", "selection_rate", "auc")
"""Metrics of a two-sided outcome (`positive` against the rest), rates 0 to 1; `tpr` is another name of sensitivity."""

METRICS = GENERAL_METRICS + OUTCOME_METRICS
"""Names of the metrics that a gate can be set on."""

LOWER_IS_BETTER = frozenset({"ece", "brier", "fpr", "fnr"})
"""Metrics that are better when lower; the others are better when higher (`selection_rate`: neither)."""

MIN_IMAGES = 100
"""Images (of every group) that a gate asks for by default: fewer tell a rate to no better than 8 points."""

MIN_OUTCOMES = 30
"""The same for metrics of an outcome: positive images, negative images, or for `auc` the fewer of the two."""

LEVELLING_MARGIN = 0.02
"""How far below the reference's worst group a gate on a gap lets its worst group lie, unless `margin` is given."""

BETWEEN = " × "
"""Joins the attributes of an intersection, as in "sex × age_group"."""

_CONDITIONS = ("at_least", "at_most", "no_worse_than", "gap_at_most")


def _as_tuple(value: Any) -> Any:
    """A single name stands for a list of one."""
    return (value,) if isinstance(value, str) else value


class Outcome(BaseModel):
    """A two-sided question about the classes: is it one of the positive ones? Probabilities of each side are summed.

    Attributes:
        positive: class names or, where `level` is given, values of that level; one name or several.
        level: taxonomy level whose values `positive` names; None for the classes themselves.
        threshold: probability of the positive side above which an image counts as positive, 0 to 1; 0.5 takes the
            more probable side. Any other value has to come from validation images, never from the judged ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: tuple[str, ...] = Field(min_length=1)
    level: str | None = None
    threshold: float = Field(default=0.5, gt=0, lt=1)

    _one_or_several = field_validator("positive", mode="before")(_as_tuple)

    @property
    def name(self) -> str:
        """The outcome in words, for example "malignancy = malignant"."""
        values = " or ".join(self.positive)
        return f"{self.level} = {values}" if self.level else values

    def check(self, class_names: Sequence[str], levels: Mapping[str, Sequence[str]]) -> None:
        """Refuses what is not among the classes or levels, and an outcome that every class has.

        Args:
            class_names: C names.
            levels: taxonomy level -> C coarse names.

        Raises:
            DataError: it does not fit; the message holds the nearest name.
        """
        if self.level is not None and self.level not in levels:
            has = did_you_mean(self.level, levels) if levels else "There are no taxonomy levels at all."
            raise DataError(f"outcome {self.name!r}: no taxonomy level {self.level!r}. {has}")
        values = class_names if self.level is None else levels[self.level]
        for value in self.positive:
            if value not in values:
                raise DataError(f"outcome {self.name!r}: nothing is {value!r}. {did_you_mean(value, values)}")
        if set(values) <= set(self.positive):
            raise DataError(f"outcome {self.name!r}: every class is positive, so there is nothing to tell apart")


class GateRule(BaseModel):
    """One declared condition for release.

    Exactly one of `at_least`, `at_most`, `no_worse_than` and `gap_at_most` is given; only `gap_at_most` may come with
    a limit that every group has to keep as well (`at_least`, or `at_most` for metrics that are better when lower).

    Attributes:
        metric: one of METRICS; rates are 0 to 1.
        group: attribute whose every group must satisfy the rule, or a list of attributes for their intersection; None
            judges all images together.
        level: taxonomy level at which the metric is computed (a prediction within the right value is right).
        positive: class name(s), or value(s) of `level`, that count as positive; needed by OUTCOME_METRICS.
        threshold: see Outcome.
        at_least: lowest acceptable value.
        at_most: highest acceptable value.
        no_worse_than: the reference model of a paired comparison.
        gap_at_most: largest acceptable difference between the best and the worst group.
        margin: slack in the metric's own unit (0.02 is 2 points) against the reference: for `no_worse_than`, and for
            `gap_at_most` how much lower than the reference's worst group the worst group may lie (default 0.02).
        confidence: level of the interval that must lie on the right side.
        min_n: fewest images (of the smallest group, where there are groups) that allow a verdict; 100 by default, 30
            for metrics of an outcome, where positive (sensitivity) or negative (specificity) images are counted.
        exclude: groups that the rule does not judge, named one by one.
        reason: why they are left out; shown with every verdict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = "accuracy"
    group: str | tuple[str, ...] | None = None
    level: str | None = None
    positive: tuple[str, ...] | None = Field(default=None, min_length=1)
    threshold: float = Field(default=0.5, gt=0, lt=1)
    at_least: float | None = Field(default=None, ge=0, le=1)
    at_most: float | None = Field(default=None, ge=0, le=1)
    no_worse_than: Literal["zero_shot"] | None = None
    gap_at_most: float | None = Field(default=None, gt=0, le=1)
    margin: float = Field(default=0.0, ge=0, le=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    min_n: int | None = Field(default=None, ge=1)
    exclude: tuple[str, ...] = ()
    reason: str = ""

    _one_or_several = field_validator("positive", "exclude", mode="before")(_as_tuple)

    @model_validator(mode="after")
    def _check(self) -> GateRule:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}. {did_you_mean(self.metric, METRICS)}")
        self._check_condition()
        self._check_outcome()
        if not isinstance(self.group, str | None) and (len(self.group) < 2 or len(set(self.group)) < len(self.group)):
            raise ValueError(f"a list of groups is an intersection of different attributes; got {list(self.group)}")
        if self.exclude and self.group is None:
            raise ValueError("exclude leaves groups out, and this rule has no group")
        if bool(self.exclude) != bool(self.reason.strip()):
            missing = "a reason, which every verdict shows" if self.exclude else "exclude: the groups it is about"
            raise ValueError(f"exclude and reason belong together; this rule needs {missing}")
        return self

    def _check_condition(self) -> None:
        given = [name for name in _CONDITIONS if getattr(self, name) is not None]
        lower = self.metric in LOWER_IS_BETTER
        right, wrong = ("at_most", "at_least") if lower else ("at_least", "at_most")
        if given != ["gap_at_most"] and not (len(given) == 2 and set(given) == {"gap_at_most", right}):
            if len(given) != 1:
                raise ValueError(
                    f"needs exactly one of {', '.join(_CONDITIONS)} (or gap_at_most with {right}); "
                    f"got {' and '.join(given) or 'none'}"
                )
            if given == [wrong] and self.metric != "selection_rate":
                better = "lower" if lower else "higher"
                raise ValueError(f"{self.metric} is better when {better}: use {right}, not {wrong}")
        if self.gap_at_most is not None and self.group is None:
            raise ValueError("gap_at_most compares groups: name the attribute (group: sex)")
        if self.metric == "selection_rate" and self.no_worse_than:
            raise ValueError(
                "selection_rate has no better side, so none is worse; use at_least, at_most or gap_at_most"
            )
        if self.margin and not (self.no_worse_than or self.gap_at_most):
            raise ValueError("margin belongs to no_worse_than and gap_at_most; put the slack into the limit itself")

    def _check_outcome(self) -> None:
        if self.metric in OUTCOME_METRICS and self.positive is None:
            raise ValueError(
                f"{self.metric} needs to know what is positive: positive: CLASS, or level: LEVEL and positive: VALUE"
            )
        if self.threshold != 0.5 and (self.positive is None or self.metric in (*GENERAL_METRICS, "auc")):
            raise ValueError("threshold decides between positive and negative; it belongs to rates of an outcome")
        if self.metric == "top5_accuracy" and self.positive is not None:
            raise ValueError("of two sides, every model has the right one among its first five; use sensitivity")

    @property
    def attribute(self) -> str | None:
        """The group attribute as reports call it; an intersection reads "sex × age_group"."""
        return self.group if self.group is None or isinstance(self.group, str) else BETWEEN.join(self.group)

    @property
    def outcome(self) -> Outcome | None:
        """The outcome the rule is about, or None."""
        if self.positive is None:
            return None
        return Outcome(positive=self.positive, level=self.level, threshold=self.threshold)

    @property
    def needed(self) -> int:
        """Fewest images that allow a verdict."""
        return self.min_n or (MIN_OUTCOMES if self.metric in OUTCOME_METRICS else MIN_IMAGES)

    @property
    def slack(self) -> float:
        """The margin against the reference, with its default for gaps."""
        return LEVELLING_MARGIN if self.gap_at_most and "margin" not in self.model_fields_set else self.margin

    @property
    def title(self) -> str:
        """The rule in words, for tables and errors."""
        subject = self.metric
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
