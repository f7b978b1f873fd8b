# SPDX-License-Identifier: Apache-2.0
"""Linearised numbers against scikit-learn, against numerical derivatives, and their intervals against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from adaptclip.errors import DataError
from adaptclip.metrics.estimates import linearised, mean_of
from adaptclip.metrics.intervals import wilson
from adaptclip.metrics.rates import macro_f1_parts


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 7, 60), rng.integers(0, 9, 60)
    value, influence = macro_f1_parts(predicted, labels)
    assert value == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert influence.sum() == pytest.approx(0, abs=1e-12)


def test_macro_f1_degenerate():
    one = np.zeros(5, int)
    assert macro_f1_parts(one, one)[0] == 1
    assert macro_f1_parts(one + 1, one)[0] == 0
    assert macro_f1_parts(np.arange(3), np.arange(3))[0] == 1
    assert macro_f1_parts(np.array([0, 2]), np.array([0, 2]))[0] == 1
    assert macro_f1_parts(np.array([0, 0]), np.array([0, 3]))[0] == pytest.approx(1 / 3)


def test_influence_is_the_derivative_with_the_weight_of_an_image():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 4, 40), rng.integers(0, 4, 40)
    value, influence = macro_f1_parts(predicted, labels)
    for i in range(40):
        weights = np.ones(40)
        weights[i] += 1e-6
        moved = f1_score(labels, predicted, average="macro", sample_weight=weights)
        assert influence[i] == pytest.approx((moved - value) / 1e-6, abs=1e-5)


def test_shares_of_independent_images_have_wilsons_interval():
    hits = np.arange(50) < 37
    measured = mean_of(hits)
    assert measured.value == pytest.approx(0.74)
    assert measured.interval(0.95) == pytest.approx(wilson(37, 50))
    alone = [f"p{i}" for i in range(50)]
    assert mean_of(hits, alone).interval(0.95) == pytest.approx(wilson(37, 50))


def test_intervals_hold_their_level():
    """Mean of a skewed number of clustered images: 95 % intervals miss in about 5 %."""
    rng = np.random.default_rng(0)
    missed, draws = 0, 400
    for _ in range(draws):
        levels = rng.beta(0.5, 2.0, 60)
        clusters = np.repeat(np.arange(60), 3)
        values = np.clip(levels[clusters] + rng.normal(0, 0.05, 180), 0, 1)
        low, high = mean_of(values, list(map(str, clusters))).interval(0.95) or (1, 0)
        missed += not low <= 0.2048 <= high  # the mean of ten million clipped numbers
    assert 0.02 < missed / draws < 0.09


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (1.0, 3.0), (-1.0, 1.0)])
def test_numbers_without_variation_keep_an_interval_inside_their_scale(low_high):
    low, high = low_high
    for value in (low, high, (low + high) / 2):
        measured = mean_of(np.full(40, value), low=low, high=high)
        bounds = measured.interval(0.95)
        assert bounds is not None
        assert low <= bounds[0] <= value <= bounds[1] <= high
        assert bounds[1] - bounds[0] > 0.05 * (high - low)


def test_too_little_to_say():
    assert mean_of(np.zeros(0)).value is None
    assert mean_of(np.array([0.5])).interval(0.95) is None
    few = mean_of(np.linspace(0, 1, 20), ["a", "b"] * 10)
    assert few.interval(0.95) is None
    assert "2 clusters" in few.note
    with pytest.raises(DataError, match="scale 0 to 1"):
        linearised(1.5, np.zeros(3))
