# SPDX-License-Identifier: Apache-2.0
"""How images are drawn again: strata, whole units, and the variance that follows."""

from __future__ import annotations

import numpy as np
import pytest

from adaptclip.errors import DataError
from adaptclip.metrics.calibration import ECE_BINS, bootstrap_sums, ece_parts
from adaptclip.metrics.judged import Judged, Sampling


def share(values):
    """A part with one cell: its sums over all images are the mean."""
    values = np.asarray(values, float)
    return values, np.zeros(len(values), int), 1


def drawn_means(sampling, values, **options):
    return bootstrap_sums([share(values)], sampling, **options)[0][:, 0]


def fixed(labels, clusters=None):
    """Images of a study that fixed how many there are of each class."""
    return Sampling.of(len(labels), clusters, np.asarray(labels))


def test_the_class_mix_is_random_unless_the_study_fixed_it():
    labels = np.array([2, 0, 2, 0, 0])
    assert Sampling.of(5).strata.tolist() == [0] * 5
    assert fixed(labels).strata.tolist() == [1, 0, 1, 0, 0]
    assert fixed(labels).unit.tolist() == [0, 1, 2, 3, 4]


def test_a_mixed_cluster_belongs_to_its_most_frequent_class():
    labels = np.array([0, 0, 1, 1, 1, 0, 0, 1])
    clusters = np.array(["a", "a", "a", "b", "b", "c", "d", "d"])
    sampling = fixed(labels, clusters)
    assert sampling.unit.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    # Cluster d is a tie: the lower class. b is alone in class 1 and joins the others.
    assert sampling.strata.tolist() == [0, 0, 0, 0]


def test_classes_with_one_image_share_a_stratum():
    strata = fixed([0, 0, 1, 2, 3]).strata
    assert strata[0] == strata[1]
    assert len(set(strata[2:])) == 1
    assert strata[0] != strata[2]
    assert fixed([0, 0, 0, 1, 1, 2]).strata.tolist() == [0, 0, 0, 1, 1, 1]


def test_taken_images_keep_their_units_and_classes():
    sampling = fixed([0, 0, 1, 1, 1], np.array(["p", "q", "q", "r", "r"]))
    assert sampling.clustered
    part = sampling.take(np.array([1, 3, 4]))
    assert part.unit.tolist() == [0, 1, 1]
    assert part.strata.tolist() == [0, 0]
    assert not sampling.take(np.array([0, 1, 3])).clustered


def test_draws_are_deterministic_and_depend_on_the_seed_only():
    sampling, values = fixed(np.repeat([0, 1], 20)), np.arange(40) % 3 == 0
    first, again = (drawn_means(sampling, values, draws=1000, seed=3) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, drawn_means(sampling, values, draws=1000, seed=4))
    both = bootstrap_sums([share(values), share(np.arange(40) % 2 == 0)], sampling, draws=1000, seed=3)
    assert np.array_equal(first, both[0][:, 0])


def test_large_samples_are_drawn_in_parts(monkeypatch):
    values = np.arange(100) % 7 == 0
    monkeypatch.setattr("adaptclip.metrics.calibration._CHUNK", 3000)
    draws = drawn_means(fixed(np.repeat([0, 1], 50)), values, draws=1001, seed=0)
    assert draws.shape == (1001,)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)


@pytest.mark.parametrize("sizes", [[2, 2], [2, 3, 7], [5, 1, 1]])
def test_a_resample_has_as_many_images_of_each_stratum_as_the_study(sizes):
    """m - 1 of m units, each m / (m - 1) times: what is counted of a whole stratum never varies (Rao & Wu 1988)."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    sampling = fixed(labels)
    for stratum in np.unique(sampling.strata):
        own = sampling.strata == stratum
        draws = drawn_means(sampling, own, draws=1000)
        assert draws == pytest.approx(np.full(1000, own.mean()))


@pytest.mark.parametrize("per_class", [2, 5, 40])
def test_variance_is_that_of_a_stratified_mean_even_with_two_images_per_class(per_class):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), per_class)
    values = rng.normal(size=len(labels)) + labels
    drawn = drawn_means(fixed(labels), values, draws=3000)
    within = [values[labels == c].var(ddof=1) / per_class for c in range(12)]
    assert drawn.var(ddof=1) == pytest.approx(np.sum(within) / 12**2, rel=0.1)
    assert drawn.mean() == pytest.approx(values.mean(), abs=4 * drawn.std() / np.sqrt(3000) + 1e-9)
    # With a random mix the classes' means count too.
    random_mix = drawn_means(Sampling.of(len(labels)), values, draws=3000)
    assert random_mix.var(ddof=1) == pytest.approx(values.var(ddof=1) / len(values), rel=0.1)


def test_clusters_are_drawn_whole():
    rng = np.random.default_rng(0)
    by_cluster = rng.random(50) < 0.7
    cluster = np.repeat(np.arange(50), 8)
    values = by_cluster[cluster]
    whole = drawn_means(Sampling.of(400, cluster), values, draws=2000)
    single = drawn_means(Sampling.of(400), values, draws=2000)
    assert whole.var() / single.var() == pytest.approx(8, rel=0.2)
    assert set(np.round(whole * 49).astype(int)) == set(np.round(whole * 49, 6))


def test_many_units_are_drawn_from_the_normal_distribution_with_the_same_spread(monkeypatch):
    rng = np.random.default_rng(0)
    values, cluster = rng.random(900) < 0.7, np.repeat(np.arange(300), 3)
    plain = drawn_means(Sampling.of(900, cluster), values, draws=4000)
    monkeypatch.setattr("adaptclip.metrics.calibration.NORMAL_UNITS", 299)
    normal = drawn_means(Sampling.of(900, cluster), values, draws=4000)
    assert normal.std() == pytest.approx(plain.std(), rel=0.06)
    assert normal.mean() == pytest.approx(values.mean(), abs=0.002)


def test_calibration_parts_add_up_in_every_draw():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 60)
    labels = rng.integers(0, 4, 60)
    images = Judged(labels, probs, Sampling.of(60))
    [drawn] = bootstrap_sums([(*ece_parts(images), ECE_BINS)], images.sampling, draws=1000)
    assert drawn.shape == (1000, 15)
    surplus = (probs.argmax(1) == labels) - probs.max(1)
    assert drawn.sum(axis=1).mean() == pytest.approx(surplus.mean(), abs=0.01)


@pytest.mark.parametrize(("draws", "units"), [(999, 2), (1000, 1)])
def test_too_few_draws_or_units_are_refused(draws, units):
    with pytest.raises(DataError, match=f"at least 1000 draws and two units, got {draws} draws of {units}"):
        drawn_means(Sampling.of(units), np.ones(units), draws=draws)
