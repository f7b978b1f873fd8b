# SPDX-License-Identifier: Apache-2.0
"""Data sets of the planned size pass in about the stated share: the plan's formula against whole studies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from worlds import World

from adaptclip.gate_rules import GateRule
from adaptclip.gates.sample_size import Assumed, plan
from adaptclip.metrics.metric import Drawing

REPEATS = 250
SENSITIVITY = {"metric": "sensitivity", "positive": "ill"}


def passes(rule: GateRule, world: World, groups: int, rng: np.random.Generator) -> bool:
    """Whether a rule passes on one study with so many groups, as `adaptclip gate` judges it."""
    for _ in range(groups):
        after, before = world.draw(rng)
        compared = rule.measure.compare(after, before, Drawing(1000))
        part = compared.change if rule.no_worse_than else compared.model
        assert part is not None
        low = part.bound("low", 1 - rule.confidence, exact=True)
        limit = -rule.margin if rule.no_worse_than else rule.at_least
        assert limit is not None
        if rule.lacking(rule.measure.supports(after)) is not None or low is None or low < limit:
            return False
    return True


@pytest.mark.parametrize(
    ("fields", "assumed"),
    [
        ({"at_least": 0.8}, Assumed(0.9)),
        ({"at_least": 0.8}, Assumed(0.87, power=0.9)),
        ({"at_least": 0.8}, Assumed(0.9, per_patient=5, icc=0.3)),
        ({"at_least": 0.8}, Assumed(0.88, per_patient=10, icc=0.8)),
        ({"at_least": 0.8, "metric": "mean_per_class_accuracy"}, Assumed(0.88, classes=5)),
        ({"at_least": 0.8, **SENSITIVITY}, Assumed(0.9, prevalence=0.2)),
        ({"at_least": 0.6, **SENSITIVITY}, Assumed(0.9, prevalence=0.2)),
        ({"no_worse_than": "zero_shot", "margin": 0.05}, Assumed(changed=2 * 0.9 * 0.1)),
        ({"at_least": 0.8, "group": "site"}, Assumed(0.9, groups={"site": 4})),
    ],
)
def test_a_study_of_the_planned_size_passes_in_the_stated_share(fields, assumed):
    rule = GateRule(**fields)
    (found,) = plan([rule], assumed)
    assert found.in_group is not None
    assert found.power is not None
    classes = assumed.classes or 2
    shares = (1 / classes,) * classes
    if assumed.prevalence is not None:
        shares = (1 - assumed.prevalence, assumed.prevalence)
    recalls = (assumed.expect or 0.9,) * len(shares)
    clustered = assumed.per_patient > 1
    world = World("planned", shares, recalls, before=recalls if rule.no_worse_than else None,
                  patients=found.in_group // assumed.per_patient, sizes=assumed.per_patient,
                  alike=assumed.icc if clustered else 0.0)  # fmt: skip
    rng = np.random.default_rng(0)
    passed = sum(passes(rule, world, found.groups, rng) for _ in range(REPEATS))
    # The formula is an approximation: five points more or less than stated, and the chance of this many studies.
    assert found.power >= assumed.power
    assert (
        binom.ppf(0.001, REPEATS, found.power - 0.05)
        <= passed
        <= binom.isf(0.001, REPEATS, min(found.power + 0.05, 0.999))
    ), passed
