# SPDX-License-Identifier: Apache-2.0
"""The one place that compares declared names (outcomes, intersections, gates) with the groups, levels and classes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from adaptclip.errors import did_you_mean

if TYPE_CHECKING:
    from adaptclip.gate_rules import Expected, GateRule, Outcome


def check_declared(
    gates: Sequence[GateRule],
    outcomes: Sequence[Outcome],
    intersections: Sequence[Sequence[str]],
    *,
    expect: Expected | None = None,
    groups: Collection[str] | None = None,
    levels: Collection[str] | Mapping[str, Sequence[str]] | None = None,
    class_names: Collection[str] | None = None,
    several: bool = False,
) -> None:
    """Checks declared names against those that are known so far; None is not known yet, and not checked.

    Args:
        gates: the card's gates.
        outcomes: the card's outcomes.
        intersections: lists of group attributes.
        expect: groups and classes of which there shall be images, or None.
        groups: names of the group attributes.
        levels: names of the taxonomy levels, or level -> its value for each class.
        class_names: names of the classes.
        several: whether an image may show several classes, or none, so that metrics of one class per image say nothing.

    Raises:
        ValueError: something is named that is not there, or a metric says nothing; the message holds the place in the
            card and the nearest name.
    """
    asked = [(f"outcomes.{i}", outcome) for i, outcome in enumerate(outcomes)]
    asked += [(f"gates.{i}", rule.outcome) for i, rule in enumerate(gates) if rule.outcome is not None]
    for i, rule in enumerate(gates if several else ()):
        if rule.positive is None and not rule.measure.of_labels:
            raise ValueError(f"gates.{i}: {rule.measure.of_one_class}")
    if groups is not None:
        crossed = [(f"intersections.{i}", name) for i, names in enumerate(intersections) for name in names]
        for i, rule in enumerate(gates):
            names = (rule.group,) if isinstance(rule.group, str) else rule.group or ()
            crossed += [(f"gates.{i}.group", name) for name in names]
        crossed += [("expect.groups", name) for name in (expect.groups if expect else ())]
        _require("a group that columns.groups lacks", groups, crossed)
    if levels is not None:
        named = [(f"{place}.level", outcome.level) for place, outcome in asked]
        named += [(f"gates.{i}.level", rule.level) for i, rule in enumerate(gates)]
        _require("a level that columns.levels lacks", levels, [(p, name) for p, name in named if name is not None])
    if class_names is not None:
        named = [(f"{place}.positive", name) for place, o in asked if o.level is None for name in o.positive]
        named += [("expect.classes", name) for name in (expect.of_classes(()) if expect else ())]
        _require("a class that there is not", class_names, named)
    if isinstance(levels, Mapping):
        for place, o in asked:
            if o.level is not None:
                values = [(f"{place}.positive", name) for name in o.positive]
                _require(f"a value that the level {o.level} lacks", levels[o.level], values)


def _require(what: str, known: Collection[str], asked: Iterable[tuple[str, str]]) -> None:
    for place, name in asked:
        if name not in known:
            raise ValueError(f"{place} names {what}: {name!r}. {did_you_mean(name, known, lead='There are')}")
