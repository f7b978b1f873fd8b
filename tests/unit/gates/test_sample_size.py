# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from adaptclip.gates.sample_size import Claim, more_images, smallest_factor
from adaptclip.metrics.intervals import RateSpread, ScoreSpread


def rate(value, n, limit, **more):
    return Claim(value, RateSpread(value, n, n), limit, upwards=True, alpha=0.05, **more)


@pytest.mark.parametrize(
    ("truth", "limit", "n"), [(0.9, 0.8, 100), (0.85, 0.8, 400), (0.97, 0.9, 80), (0.99, 0.95, 200)]
)
def test_power_of_a_rate_is_that_of_the_exact_binomial_test(truth, limit, n):
    """Without its saw teeth: whole images make the exact power jump, so it is averaged over neighbouring numbers."""
    exact = []
    for size in range(n - 12, n + 13):
        least = next(k for k in range(size + 1) if binom.sf(k - 1, size, limit) <= 0.05)
        exact.append(binom.sf(least - 1, size, truth))
    assert rate(truth, n, limit).power() == pytest.approx(np.mean(exact), abs=0.03)
    downwards = Claim(1 - truth, RateSpread(1 - truth, n, n), 1 - limit, upwards=False, alpha=0.05)
    assert downwards.power() == pytest.approx(rate(truth, n, limit).power(), abs=1e-3)


def test_power_of_a_score_is_that_of_the_z_test():
    claim = Claim(0.0, ScoreSpread(0.0, 0.01, 1e6, 1e6, (-1, 1)), -0.02, upwards=True, alpha=0.05)
    assert claim.power() == pytest.approx(0.6388, abs=0.002)  # Phi(2 - 1.645)
    assert claim.power(4) == pytest.approx(0.9907, abs=0.002)  # Phi(4 - 1.645)


def test_what_can_never_pass_never_does():
    assert rate(1.0, 20, 0.99).power() == 0
    assert rate(0.8, 100, 0.8).power() < 0.08
    assert smallest_factor(rate(0.8, 100, 0.8).power, 0.8, most=1000) is None


def test_a_decided_rule_needs_no_factor_and_the_chance_grows_with_it():
    assert rate(0.95, 200, 0.8).decided(1.0) == 1
    found = [rate(0.83, 200, 0.8).decided(factor) for factor in (1, 1.5, 2, 4, 10)]
    assert found == sorted(found)
    assert found[0] == 0


def needed(claim, n, units, missing=0):
    more = more_images(claim, n, units, missing)
    assert more is not None
    assert more.images is not None
    return more.images


def answers(truth, limit, n, repeats=300, seed=0):
    """The answers to inconclusive samples, those of taking the estimate for the truth, and how many were settled."""
    rng = np.random.default_rng(seed)
    ours, plain, settled = [], [], 0
    cache = {}
    for correct in rng.binomial(n, truth, repeats):
        claim = rate(correct / n, n, limit)
        if claim.decided(1.0):
            continue
        more = cache.setdefault(int(correct), needed(claim, n, n))
        ours.append(more)
        ahead = claim.value - limit
        bound = claim.spread.bound("low" if ahead >= 0 else "high", 0.05, exact=True)
        plain.append(n * (max((bound - claim.value) ** 2 / max(ahead**2, 1e-9), 1) - 1))
        both = n + more
        settled += bool(rate((correct + rng.binomial(more, truth)) / both, both, limit).decided(1.0))
    return np.array(ours), np.array(plain), settled / len(ours)


@pytest.mark.parametrize(("truth", "often"), [(0.85, 0.5), (0.83, 0.4), (0.8, 0.0)])
def test_the_answer_is_stable_where_the_estimate_taken_for_the_truth_is_not(truth, often):
    ours, plain, settled = answers(truth, 0.8, 200)
    assert len(ours) > 80
    spread = [np.subtract(*np.quantile(found, (0.75, 0.25))) for found in (ours, plain)]
    assert spread[0] < 0.7 * spread[1]
    assert ours.max() < 10 * 200
    assert settled >= often  # at the limit itself no number of images may decide more often than the level allows


def test_an_even_chance_is_one():
    """Over truths that are as likely as the present images make them, half of the answers settle it."""
    rng, settled, asked = np.random.default_rng(1), 0, 0
    for correct in (155, 158, 160, 163, 166):
        more = needed(rate(correct / 200, 200, 0.8), 200, 200)
        for truth in rng.beta(correct + 0.5, 200 - correct + 0.5, 60):
            both = 200 + more
            settled += bool(rate((correct + rng.binomial(more, truth)) / both, both, 0.8).decided(1.0))
            asked += 1
    assert abs(settled / asked - 0.5) < 4 * 0.5 / np.sqrt(asked)


def test_patients_are_counted_and_what_is_missing_is_the_least():
    more = more_images(rate(0.83, 200, 0.8), 200, 40)
    assert more is not None
    assert more.clusters == -(-needed(rate(0.83, 200, 0.8), 200, 40) // 5)
    assert needed(rate(0.95, 50, 0.8), 50, 50, missing=50) == 50
    assert more_images(None, 0, 0) is None
    assert needed(None, 20, 20, missing=80) == 80
