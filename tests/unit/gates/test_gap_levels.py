# SPDX-License-Identifier: Apache-2.0
"""Every share of alpha in gates on gaps: the verdict turns exactly where the bound at that level does.

Uncertainties are normal ones, so that each bound that holds for certain is value ± z · error, written out here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import normal_spread
import numpy as np
import pytest
from scipy.stats import norm

from adaptclip.gate_rules import GateRule
from adaptclip.gates.gap import _Largest, judge_gap
from adaptclip.gates.sample_size import Claim, more_images
from adaptclip.gates.verdicts import Verdict
from adaptclip.metrics.estimates import Comparison, Measurement
from adaptclip.metrics.metric import Support

ALPHA, NEAR = 0.05, 1e-6


def number(value, error, n=1000):
    return normal_spread.number(value, error, n, exactly=1.0, plainly=0.5)


@pytest.fixture(params=["accuracy", "fnr"])
def judge(request):
    """Judges accuracies as they are, or as error rates of a metric that is better when lower: all turned round."""
    turned = request.param == "fnr"
    about: dict[str, Any] = {"metric": "fnr", "positive": ("ill",)} if turned else {}

    def flip(part, change=False) -> Any:
        if part is None or not turned:
            return part
        value = -part.value if change else 1 - part.value
        return replace(part, value=value, spread=part.spread and replace(part.spread, value=value))

    def run(after, before=None, change=None, *, floor=None, small=(), noise=None, **rule) -> Verdict:
        if floor is not None:
            rule["at_most" if turned else "at_least"] = 1 - floor if turned else floor
        compared = {
            name: Comparison(
                flip(after[name]), flip(before and before[name]), flip(change[name] if change else None, True)
            )
            for name in after
        }
        supports = {name: (Support(3 if name in small else 1000),) for name in after}
        return judge_gap(
            GateRule(group="site", **about, **rule), compared, supports, dict.fromkeys(after, 1000), noise, ()
        )

    return run


THREE: dict[str, Any] = {"a": number(0.90, 0.010), "b": number(0.84, 0.015), "c": number(0.87, 0.030)}
PAIRS = [(i, j) for i in THREE for j in THREE if i != j]


def largest(z):
    """The largest bound of a difference of two of THREE, at z standard errors."""
    return max(
        THREE[i].value - THREE[j].value + z * np.hypot(THREE[i].spread.error, THREE[j].spread.error) for i, j in PAIRS
    )


def test_a_gap_passes_where_the_upper_bound_of_every_pair_at_alpha_does(judge):
    upper = largest(norm.isf(ALPHA))
    assert judge(THREE, floor=0.5, gap_at_most=upper + NEAR).verdict == "pass"
    assert judge(THREE, floor=0.5, gap_at_most=upper - NEAR).verdict == "inconclusive"
    assert judge(THREE, floor=0.5, gap_at_most=upper).high == pytest.approx(upper)


def test_a_gap_fails_where_a_lower_bound_corrected_for_the_six_ordered_pairs_does(judge):
    lower = largest(-norm.isf(ALPHA / 6))
    assert judge(THREE, floor=0.5, gap_at_most=lower - NEAR).verdict == "fail"
    assert judge(THREE, floor=0.5, gap_at_most=lower + NEAR).verdict == "inconclusive"
    assert judge(THREE, floor=0.5, gap_at_most=lower + NEAR).low == pytest.approx(lower)
    equal = judge({"a": number(0.8, 0.1), "b": number(0.8, 0.1)}, floor=0.1, gap_at_most=0.1)
    assert equal.low == 0


def test_every_group_keeps_a_floor_at_alpha_and_misses_it_at_a_share_of_it(judge):
    keeps = min(part.value - norm.isf(ALPHA) * part.spread.error for part in THREE.values())
    misses = min(part.value + norm.isf(ALPHA / 3) * part.spread.error for part in THREE.values())
    assert judge(THREE, floor=keeps - NEAR, gap_at_most=0.49).verdict == "pass"
    unsure = judge(THREE, floor=keeps + NEAR, gap_at_most=0.49)
    assert unsure.verdict == "inconclusive"
    assert "It is not certain that b keeps the limit of" in unsure.reason
    assert judge(THREE, floor=misses - NEAR, gap_at_most=0.49).verdict == "inconclusive"
    missed = judge(THREE, floor=misses + NEAR, gap_at_most=0.49)
    assert missed.verdict == "fail"
    assert "With the confidence asked for, b misses the limit of" in missed.reason
    assert "each of the groups a, b, c misses" in judge(THREE, floor=0.99, gap_at_most=0.49).reason
    assert "Every group keeps" in judge(THREE, floor=0.5, gap_at_most=0.49).reason


BEFORE: dict[str, Any] = {"a": number(0.80, 0.010), "b": number(0.70, 0.012), "c": number(0.90, 0.014)}


def judged_beside(judge, after, change, slack):
    return judge(after, BEFORE, change, gap_at_most=0.49, margin=slack)


def test_half_of_alpha_goes_to_the_change_of_the_group_itself(judge):
    """Only its own change can show that b keeps its level."""
    after = {"a": number(0.80, 0.01), "b": number(0.69, 0.1), "c": number(0.80, 0.01)}
    change = {"a": number(0.0, 0.02), "b": number(-0.01, 0.01), "c": number(-0.1, 0.02)}
    slack = 0.01 + norm.isf(ALPHA / 2) * 0.01
    assert judged_beside(judge, after, change, slack + NEAR).verdict == "pass"
    unsure = judged_beside(judge, after, change, slack - NEAR)
    assert unsure.verdict == "inconclusive"
    assert "It is not ruled out that b is worse than the zero-shot model's worst group" in unsure.reason
    assert "No group is worse than" in judged_beside(judge, after, change, slack + NEAR).reason


def test_the_other_half_is_shared_by_the_comparisons_with_other_groups(judge):
    """c lost more than the margin, and keeps the level of b, which was the worst: one of two others."""
    after = {"a": number(0.80, 0.01), "b": number(0.75, 0.01), "c": number(0.71, 0.02)}
    change = {"a": number(0.0, 0.01), "b": number(0.05, 0.01), "c": number(-0.19, 0.02)}
    slack = -(0.71 - 0.70 - norm.isf(ALPHA / 2 / 2) * np.hypot(0.02, 0.012))
    assert judged_beside(judge, after, change, slack + NEAR).verdict == "pass"
    unsure = judged_beside(judge, after, change, slack - NEAR)
    assert unsure.verdict == "inconclusive"
    assert "not ruled out that c is worse" in unsure.reason


def test_a_group_is_levelled_down_where_it_lies_below_all_of_before_at_a_share_of_alpha(judge):
    after = {"a": number(0.80, 0.01), "b": number(0.75, 0.01), "c": number(0.60, 0.02)}
    change = {"a": number(0.0, 0.01), "b": number(0.05, 0.01), "c": number(-0.30, 0.02)}
    slack = -(0.60 - 0.70 + norm.isf(ALPHA / 3) * np.hypot(0.02, 0.012))
    down = judged_beside(judge, after, change, slack - NEAR)
    assert down.verdict == "fail"
    # What decides stands first: a page's headline has room for one sentence. The gap itself is within its limit.
    assert down.reason.startswith("Levelled down: with the confidence asked for, the ")
    assert " of c is worse than that of the zero-shot model's worst group by more than" in down.reason.split(". ")[0]
    assert judged_beside(judge, after, change, slack + NEAR).verdict == "inconclusive"


def test_a_group_without_an_interval_of_its_change_or_of_before_is_no_evidence(judge):
    after = {"a": number(0.9, 0.01), "b": number(0.9, 0.01)}
    silent = {"a": Measurement(0.1, 1000), "b": Measurement(0.1, 1000)}
    before = {"a": Measurement(0.8, 1000), "b": Measurement(0.8, 1000)}
    assert judge(after, before, silent, gap_at_most=0.49).verdict == "inconclusive"
    low = {"a": number(0.45, 0.001), "b": number(0.9, 0.001)}
    assert judge(low, before, silent, gap_at_most=0.49).verdict == "inconclusive"


def test_the_default_margin_is_two_points_and_none_may_be_asked_for(judge):
    after = {"a": number(0.79, 1e-4), "b": number(0.79, 1e-4)}
    before = {"a": number(0.80, 1e-4), "b": number(0.80, 1e-4)}
    change = {"a": number(-0.01, 1e-4), "b": number(-0.01, 1e-4)}
    assert judge(after, before, change, gap_at_most=0.49).verdict == "pass"
    assert judge(after, before, change, gap_at_most=0.49, margin=0.0).verdict == "fail"


def test_small_groups_keep_a_gap_from_passing_and_not_from_failing(judge):
    four = THREE | {"d": number(0.87, 0.01, 3)}
    found = judge(four, floor=0.5, small=("d",), gap_at_most=0.49)
    assert found.verdict == "inconclusive"
    assert "Too small for a verdict, or without an interval: d (3)" in found.reason
    assert (found.more_images, found.more_clusters) == (97, None)
    assert judge(four, floor=0.5, small=("d",), gap_at_most=1e-6).verdict == "fail"
    assert "Too small" not in judge(THREE, floor=0.5, gap_at_most=0.49).reason


def test_too_few_groups_say_how_many_and_what_is_missing(judge):
    found = judge(THREE, floor=0.5, small=("a", "b"), gap_at_most=0.49)
    assert found.verdict == "inconclusive"
    assert "site has 1 of them. Too small or without an interval: a (3), b (3)." in found.reason
    assert (found.more_images, found.n, found.group, found.limit, found.kind) == (97, 3000, "a", 0.49, "gap")
    single = judge({"a": THREE["a"]}, floor=0.5, gap_at_most=0.49)
    assert single.reason.endswith("without an interval: none.")
    assert (single.more_images, single.group) == (None, None)


def test_the_verdict_names_worst_and_best_and_says_what_noise_gives(judge):
    found = judge(THREE, floor=0.5, gap_at_most=0.49, noise=0.04)
    assert (found.group, found.value, found.n) == ("b", pytest.approx(0.06), 3000)
    assert "is 6.0 points (a against b) and, with 95 % confidence, at most" in found.reason
    assert "a gap of up to 4.0 points in 95 % of cases" in found.reason
    assert "Noise" not in judge(THREE, floor=0.5, gap_at_most=0.49).reason
    alike = {"a": number(0.9, 0.02), "b": number(0.89, 0.02)}
    assert " and at least " not in judge(alike, floor=0.5, gap_at_most=0.49).reason
    apart = {"a": number(0.9, 0.001), "b": number(0.5, 0.001)}
    assert (
        " and at least 39.7 points; the rule asks for at most 5 points"
        in judge(apart, floor=0.1, gap_at_most=0.05).reason
    )


def test_a_bound_at_the_floor_itself_keeps_it():
    low = THREE["b"].bound("low", 1 - 0.95, exact=True)
    compared = {name: Comparison(part) for name, part in THREE.items()}
    rule = GateRule(group="site", gap_at_most=0.49, at_least=low)
    supports = dict.fromkeys(THREE, (Support(1000),))
    assert judge_gap(rule, compared, supports, dict.fromkeys(THREE, 1000), None, ()).verdict == "pass"


def test_a_rate_without_a_better_side_cannot_be_levelled_down():
    rule = GateRule(metric="selection_rate", positive=("ill",), group="site", gap_at_most=0.49)
    compared = {name: Comparison(part) for name, part in THREE.items()}
    found = judge_gap(rule, compared, dict.fromkeys(THREE, (Support(1000),)), dict.fromkeys(THREE, 1000), None, ())
    assert found.verdict == "pass"
    assert found.reason.endswith("the rule asks for at most 49 points.")


def test_further_images_are_those_of_the_worst_group_at_the_corrected_level():
    parts = [number(0.90, 0.020, 300), number(0.84, 0.025, 200), number(0.87, 0.030, 100)]
    compared = {name: Comparison(part) for name, part in zip("abc", parts, strict=True)}
    supports = dict.fromkeys("abc", (Support(1000), Support(70, "images of a class", 10)))
    rule = GateRule(group="site", gap_at_most=0.09, at_least=0.1)
    found = judge_gap(rule, compared, supports, {"a": 150, "b": 50, "c": 100}, None, ())
    claim = Claim(0.06, _Largest(parts), 0.09, upwards=False, alpha=1 - 0.95, family=6)
    more = more_images(claim, 200, 50)
    assert more is not None
    assert (found.more_images, found.more_clusters) == (more.images, more.clusters)
    uncorrected = more_images(replace(claim, family=1), 200, 50)
    assert more != uncorrected
    blunt = compared | {"c": Comparison(Measurement(0.87, 100))}
    said = judge_gap(rule, blunt, supports, dict.fromkeys("abc", 100), None, ()).reason
    assert "without an interval: c (1,000)." in said


def test_only_what_images_would_settle_says_how_many(judge):
    """An open floor is not settled by the gap's images, and an open gap is."""
    after = {"a": number(0.90, 0.02), "b": number(0.89, 0.02)}
    assert judge(after, floor=0.88, gap_at_most=0.49).more_images is None
    unsure = judge(after, floor=0.1, gap_at_most=0.05)
    assert unsure.verdict == "inconclusive"
    assert unsure.more_images is not None
    assert "more " in unsure.reason
    assert "images of b, and of the other groups in proportion, would settle the gap" in unsure.reason
