# SPDX-License-Identifier: Apache-2.0
"""Gates that a new card proposes: what fits two classes or many, patients and groups, with what was counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptclip.errors import agree, shown
from adaptclip.metrics.metric import MIN_CLASS_IMAGES, MIN_CLUSTERS, MIN_IMAGES, MIN_OUTCOMES

UNKNOWN = "unknown"
"""The group of images without a value."""

MANY_CLASSES = 20
"""From so many classes on a tenth of them is two or more."""

_MOST_FINDINGS = 10
"""So many of the classes of which an image may show several get gates of their own."""

_MOST_GROUPS = 6
"""Attributes that gates are drafted for; more are left to the reader."""


@dataclass(frozen=True)
class Units:
    """What images are of, besides their class.

    Attributes:
        cluster: column of what is never in two parts, and how many different values it has; None without one.
        groups: column of proposed groups -> value -> images; no values for a number, whose bins the card names.
    """

    cluster: tuple[str, int] | None = None
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def drafted_outcome(classes: Mapping[str, int]) -> list[str]:
    """Lines of YAML for the block's `outcomes`, of a card with two classes; none with more.

    Args:
        classes: class name -> images.
    """
    if len(classes) != 2:
        return []
    return [
        "# A choice to check: which class is the one that must not be missed? Taken here is the rarer one.",
        "outcomes:",
        f"  - positive: {_quoted(_rarer(classes))}",
        "    rule: argmax                # the most probable class decides; or a threshold: sensitivity=0.95",
    ]


def drafted_gates(classes: Mapping[str, int], units: Units, *, several: bool = False) -> list[str]:
    """Lines of YAML below `gates:`; limits that only the author can know are commented out.

    Args:
        classes: class name -> images.
        units: what else is known of the images.
        several: whether an image may show several classes, or none; `classes` counts those that show each.
    """
    lines = ["# How to choose them: docs/choosing_gates.md of adaptclip."]
    two_sides = len(classes) == 2 and not several
    lines += _of_findings(classes) if several else _of_two(_rarer(classes)) if two_sides else _of_many(classes)
    if units.cluster is not None:
        name, number = units.cluster
        lines += [
            f"# What is sampled is {_quoted(name)} ({number:,} of them), not images: every interval counts them.",
            f"# With fewer than {MIN_CLUSTERS} of them among the test images no gate can pass.",
        ]
    positive = max(classes, key=lambda name: (classes[name], name)) if several else _rarer(classes)
    of_outcome = several or two_sides
    rate = f"sensitivity, positive: {_quoted(positive)}" if of_outcome else "accuracy"
    for name, counts in list(units.groups.items())[:_MOST_GROUPS]:
        lines += _of_group(name, counts, rate, MIN_OUTCOMES if of_outcome else MIN_IMAGES)
    if len(units.groups) > _MOST_GROUPS:
        lines.append(f"# The same can be asked of {len(units.groups) - _MOST_GROUPS} more columns above.")
    return lines


def _of_two(positive: str) -> list[str]:
    side = f"positive: {_quoted(positive)}"
    return [
        "# Sensitivity: the share of positive images that are found. Specificity: the share of the others left alone.",
        "# Both follow the decision rule of the outcome above. Accuracy alone hides a positive side that is missed.",
        f"- {{metric: sensitivity, {side}, no_worse_than: zero_shot, margin: 0.02}}",
        f"- {{metric: specificity, {side}, no_worse_than: zero_shot, margin: 0.02}}",
        "# Fill in what the use asks for, then uncomment:",
        f"# - {{metric: sensitivity, {side}, at_least: 0.9}}",
        f"# - {{metric: specificity, {side}, at_least: 0.8}}",
    ]


def _of_findings(classes: Mapping[str, int]) -> list[str]:
    lines = [
        "# An image may show several classes, or none, so that each class is a question of its own. Sensitivity: the",
        "# share of the images that show it on which it is named. Specificity: the share of the others left alone.",
        "- {metric: labels_macro_auc, no_worse_than: zero_shot, margin: 0.02}",
        "# Fill in what the use asks for, then uncomment:",
    ]
    for name in sorted(classes, key=lambda name: (-classes[name], name))[:_MOST_FINDINGS]:
        lines.append(f"# - {{metric: sensitivity, positive: {_quoted(name)}, at_least: 0.9}}")
        lines.append(f"# - {{metric: specificity, positive: {_quoted(name)}, at_least: 0.8}}")
    if len(classes) > _MOST_FINDINGS:
        lines.append(f"# The same can be asked of {len(classes) - _MOST_FINDINGS} more classes.")
    few = [shown(name) for name, count in classes.items() if count < MIN_OUTCOMES]
    if few:
        lines.append(
            f"# A gate on a class needs {MIN_OUTCOMES} test images that show it. All parts together have fewer of: "
            f"{', '.join(few[:_MOST_FINDINGS])}."
        )
    return lines


def _of_many(classes: Mapping[str, int]) -> list[str]:
    lines = [
        "- {metric: accuracy, no_worse_than: zero_shot, margin: 0.02}",
        "# The mean over the classes counts a rare class like a frequent one; accuracy follows the frequent ones.",
        "- {metric: mean_per_class_accuracy, no_worse_than: zero_shot, margin: 0.02}",
        "# Fill in what the use asks for, then uncomment:",
        "# - {metric: accuracy, at_least: 0.8}",
        "# - {metric: mean_per_class_accuracy, at_least: 0.7}",
    ]
    if len(classes) >= MANY_CLASSES:
        lines.append("# - {metric: worst_decile, at_least: 0.5}")
        lines.append("# The last is the mean over the worst tenth of the classes: how bad it gets where it is worst.")
    small = sum(count < MIN_CLASS_IMAGES for count in classes.values())
    if small:
        lines.append(
            f"# {small:,} of {len(classes):,} classes {agree(small, 'has', 'have')} fewer than {MIN_CLASS_IMAGES} "
            f"images in all, and a mean over the classes asks for {MIN_CLASS_IMAGES} test images of each: it may stay "
            "inconclusive."
        )
    return lines


def _of_group(name: str, counts: Mapping[str, int], rate: str, least: int) -> list[str]:
    quoted = _quoted(name)
    info = ", ".join(f"{shown(value)}: {count:,}" for value, count in counts.items()) or "bins of a number"
    left_out = ""
    if UNKNOWN in counts:
        left_out = f', exclude: [{UNKNOWN}], reason: "fill in: why nothing is asked of images without a value"'
    small = [shown(value) for value, count in counts.items() if count < least and value != UNKNOWN]
    lines = [
        f"# Groups of {quoted} ({info}); uncomment together with the group above.",
        "# Every group by itself, and the gap from the best group to the worst:",
        f"# - {{metric: {rate}, group: {quoted}, at_least: 0.7{left_out}}}",
        f"# - {{metric: {rate}, group: {quoted}, gap_at_most: 0.1{left_out}}}",
    ]
    if small:
        what = "positive test images" if least == MIN_OUTCOMES else "test images"
        lines.append(
            f"# A group needs {least} {what} (min_n) for a verdict; already in all parts together too few: "
            f"{', '.join(small)}."
        )
    return lines


def _rarer(classes: Mapping[str, int]) -> str:
    return min(classes, key=lambda name: (classes[name], name))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
