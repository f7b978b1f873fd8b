"""Whether rules fit the images that they are about, which is known before a model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from adaptclip.errors import DataError, GateError, did_you_mean
from adaptclip.evaluation.grouping import group_values
from adaptclip.gate_rules import GateRule


class Described(Protocol):
    """Images with classes and groups: `Predictions` and `ImageDataset` are that."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        ...

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Attribute name -> N values."""
        ...

    @property
    def levels(self) -> Mapping[str, Sequence[str]]:
        """Taxonomy level name -> C coarse names."""
        ...

    def __len__(self) -> int:
        """Number of images N."""
        ...


def check_rules(rules: Sequence[GateRule], images: Described) -> None:
    """Refuses rules that name what there is not: attributes, groups left out, levels, classes.

    Args:
        rules: what was declared.
        images: those that will be judged.

    Raises:
        GateError: a rule does not fit; the message names the rule and the nearest name that would.
    """
    if rules and len(images) == 0:
        raise GateError("nothing can be judged: the predictions have no rows")
    for rule in rules:
        _check_rule(rule, images)


def _check_rule(rule: GateRule, images: Described) -> None:
    where = f'gate "{rule.title}"'
    for name in (rule.group,) if isinstance(rule.group, str) else rule.group or ():
        if name not in images.groups:
            has = (
                did_you_mean(name, images.groups)
                if images.groups
                else "There are no group columns at all; name them in the card (columns: groups) or the file (group:X)."
            )
            raise GateError(f"{where}: there is no group attribute {name!r}. {has}")
    num_sides = len(images.class_names)
    if rule.level is not None:
        if rule.level not in images.levels:
            has = did_you_mean(rule.level, images.levels) if images.levels else "There are no levels at all."
            raise GateError(f"{where}: there is no taxonomy level {rule.level!r}. {has}")
        num_sides = len(set(images.levels[rule.level]))
    if rule.outcome is not None:
        try:
            rule.outcome.check(images.class_names, images.levels)
        except DataError as error:
            raise GateError(f"{where}: {error}") from error
    if num_sides < rule.measure.least_classes:
        raise GateError(f"{where}: {rule.measure.words} says nothing about {num_sides} classes; use accuracy")
    if rule.attribute is not None and rule.exclude:
        _check_excluded(rule, group_values(images, rule.attribute)[0], where)


def _check_excluded(rule: GateRule, names: Sequence[str], where: str) -> None:
    for name in rule.exclude:
        # "unknown" may well have no images in one split of several.
        if name not in names and name != "unknown":
            raise GateError(f"{where} excludes {name!r}, which is no group here. {did_you_mean(name, names)}")
    if set(names) <= set(rule.exclude):
        raise GateError(f"{where} excludes all groups of {rule.attribute}, so that nothing is left to judge")
