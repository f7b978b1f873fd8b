# SPDX-License-Identifier: Apache-2.0
"""A number that a page shows twice has one interval: the whole report is walked, with its gates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptclip.gate_rules import GateRule, Outcome
from adaptclip.gates import check_gates
from adaptclip.predictions import Predictions
from adaptclip.reports.full import full_report

ALIASES = {"tpr": "sensitivity"}
PARTS = ("model", "zero_shot", "change")
Named = tuple[str, str, str]
"""Metric, images, and which part: the model's number, zero-shot's, or the change."""


def world(n, c, seed, clustered, fixed, prefix="i"):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    probs = rng.dirichlet(np.ones(c), n)
    probs[np.arange(n), labels] += 0.5
    probs = (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    return Predictions(
        tuple(f"{prefix}{i}" for i in range(n)), labels, probs, tuple(f"c{i}" for i in range(c)),
        {"site": tuple(np.where(np.arange(n) % 3 == 0, "a", "b")), "whole": ("all",) * n},
        tuple(f"p{i // 3}" for i in range(n)) if clustered else None, {}, (Outcome(positive=("c0",)),),
        fixed_classes=fixed,
    )  # fmt: skip


def numbers(name: str, images: str, found: Mapping[str, Any] | None) -> Iterator[tuple[Named, Mapping[str, Any]]]:
    """A number, or the parts of a comparison."""
    if found is None:
        return
    if "value" in found:
        yield (ALIASES.get(name, name), images, "model"), found
    else:
        yield from (((ALIASES.get(name, name), images, part), found[part]) for part in PARTS if found.get(part))


def walk(report: Mapping[str, Any]) -> Iterator[tuple[Named, Mapping[str, Any]]]:
    """Every number of a report under the name of what it is, wherever it stands."""
    for name, found in report["overall"].items():
        yield from numbers(name, "", found)
    for name, found in report["fine_grained"]["overall"].items():
        yield from numbers(name, "", found)
    for name, found in report["calibration"]["scores"].items():
        yield from numbers(name, "", found)
    for row in report["per_class"]:
        yield from numbers("sensitivity", f"/{row['class']}", row["accuracy"])
    for row in report["shift"]["classes"]:
        yield ("sensitivity", f"/{row['class']}", "change"), row["change"]
    for outcome in report["outcomes"]:
        for name in outcome["metrics"]:
            yield from numbers(name, f"/{outcome['name']}", outcome[name])
    for attribute, table in report["groups"].items():
        where = {row["group"]: "" if attribute == "whole" else f"{attribute}={row['group']}" for row in table["rows"]}
        if table["worst_group"] is not None:  # none of the groups of the small worlds is large enough
            yield from numbers("accuracy", where[table["worst_group"]["group"]], table["worst_group"])
        for row in table["rows"]:
            for name in table["metrics"]:
                yield from numbers(name, where[row["group"]], row[name])
        for row in report["calibration"]["groups"].get(attribute, ()):
            yield from numbers("brier", where[row["group"]], row["brier"])
            yield from numbers("surplus", where[row["group"]], row["surplus"])
        for outcome in table["outcomes"]:
            for row in outcome["rows"]:
                for name in ("sensitivity", "specificity", "selection_rate", "auc"):
                    yield from numbers(name, f"{where[row['group']]}/{outcome['name']}", row[name])
        for entry in table["one_vs_rest"]["classes"]:
            for name in ("selection_rate", "tpr", "fpr"):
                for group, found in entry[name].items():
                    yield from numbers(name, f"{where[group]}/{entry['class']}", found)


@pytest.mark.parametrize(
    ("n", "c", "clustered", "fixed"),
    [(300, 7, True, False), (300, 7, False, True), (240, 2, True, True), (30, 3, False, False)],
)
def test_every_number_has_one_interval(n, c, clustered, fixed):
    model = world(n, c, 0, clustered, fixed)
    baseline = replace(model, probs=world(n, c, 9, clustered, fixed).probs)
    report = full_report(model, baseline, validation=world(100, c, 3, clustered, fixed, "v"), draws=1000)
    seen: dict[Named, list[tuple[Any, ...]]] = defaultdict(list)
    for name, found in walk(report):
        if found["value"] is not None:
            seen[name].append((found["value"], found["low"], found["high"]))
    assert sum(len(places) > 1 for places in seen.values()) >= 20
    for name, places in seen.items():
        for place in places[1:]:
            assert place == pytest.approx(places[0], abs=1e-9), f"{name}: {places}"
    rules = [
        GateRule(metric="accuracy", at_least=0.3),
        GateRule(metric="accuracy", group="site", at_least=0.3, min_n=5),
        GateRule(metric="sensitivity", positive=("c0",), group="site", at_least=0.1, min_n=5),
        GateRule(metric="brier", at_most=1.9),
    ]
    judged = 0
    for rule, verdict in zip(rules, check_gates(model, baseline, rules), strict=True):
        for one in verdict.groups or (verdict,):
            images = f"site={one.group}" * bool(one.group) + ("/c0" if rule.positive else "")
            assert one.value == seen[rule.measure.name, images, "model"][0][0]
            judged += 1
    assert judged == 6
