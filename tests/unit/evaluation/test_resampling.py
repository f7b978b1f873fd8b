from __future__ import annotations

import numpy as np
import pytest

from adaptclip.errors import DataError
from adaptclip.evaluation.metrics import Cells, metric_cells
from adaptclip.evaluation.resampling import ResamplingPlan, bootstrap, plan_resampling


def share(values) -> Cells:
    values = np.asarray(values, float)
    return Cells(values, np.zeros(len(values), int), 1, lambda sums, weights: sums[:, 0] / weights[:, 0])


def test_units_are_images_and_strata_classes():
    plan = plan_resampling(np.array([2, 0, 2, 0, 0]), None)
    assert plan.unit.tolist() == [0, 1, 2, 3, 4]
    assert plan.stratum.tolist() == [1, 0, 1, 0, 0]
    assert plan.df == 3


def test_a_mixed_cluster_belongs_to_its_most_frequent_class():
    labels = np.array([0, 0, 1, 1, 1, 0, 0, 1])
    clusters = np.array(["a", "a", "a", "b", "b", "c", "d", "d"])
    plan = plan_resampling(labels, clusters)
    assert plan.unit.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    # Cluster d is a tie: the lower class. b is alone in class 1 and joins the others.
    assert plan.stratum.tolist() == [0, 0, 0, 0]


def test_classes_with_one_image_share_a_stratum():
    plan = plan_resampling(np.array([0, 0, 1, 2, 3]), None)
    assert plan.stratum[0] == plan.stratum[1]
    assert len(set(plan.stratum[2:])) == 1
    assert plan.stratum[0] != plan.stratum[2]
    lonely = plan_resampling(np.array([0, 0, 0, 1, 1, 2]), None)
    assert lonely.stratum.tolist() == [0, 0, 0, 1, 1, 1]


def test_draws_are_deterministic_and_depend_on_the_seed_only():
    plan = plan_resampling(np.repeat([0, 1], 20), None)
    cells = {"x": share(np.arange(40) % 3 == 0)}
    first, again = (bootstrap(plan, cells, draws=1000, seed=3)["x"] for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, bootstrap(plan, cells, draws=1000, seed=4)["x"])
    both = bootstrap(plan, {**cells, "y": share(np.arange(40) % 2 == 0)}, draws=1000, seed=3)
    assert np.array_equal(first, both["x"])


def test_large_samples_are_drawn_in_parts(monkeypatch):
    plan = plan_resampling(np.repeat([0, 1], 50), None)
    cells = {"x": share(np.arange(100) % 7 == 0)}
    monkeypatch.setattr("adaptclip.evaluation.resampling._CHUNK", 3000)
    draws = bootstrap(plan, cells, draws=1001, seed=0)["x"]
    assert draws.shape == (1001,)
    assert draws.mean() == pytest.approx(cells["x"].values.mean(), abs=0.01)


@pytest.mark.parametrize("per_class", [2, 5, 40])
def test_variance_is_that_of_a_stratified_mean_even_with_two_images_per_class(per_class):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), per_class)
    values = rng.normal(size=len(labels)) + labels
    drawn = bootstrap(plan_resampling(labels, None), {"x": share(values)}, draws=3000)["x"]
    within = [values[labels == c].var(ddof=1) / per_class for c in range(12)]
    assert drawn.var(ddof=1) == pytest.approx(np.sum(within) / 12**2, rel=0.1)
    assert drawn.mean() == pytest.approx(values.mean(), abs=4 * drawn.std() / np.sqrt(3000) + 1e-9)


def test_clusters_are_drawn_whole():
    rng = np.random.default_rng(0)
    by_cluster = rng.random(50) < 0.7
    cluster = np.repeat(np.arange(50), 8)
    values = by_cluster[cluster]
    labels = np.zeros(400, int)
    whole = bootstrap(plan_resampling(labels, cluster), {"x": share(values)}, draws=2000)["x"]
    single = bootstrap(plan_resampling(labels, None), {"x": share(values)}, draws=2000)["x"]
    assert whole.var() / single.var() == pytest.approx(8, rel=0.2)
    assert set(np.round(whole * 49).astype(int)) == set(np.round(whole * 49, 6))


def test_calibration_parts_add_up_in_every_draw():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 60)
    labels = rng.integers(0, 4, 60)
    drawn = bootstrap(plan_resampling(labels, None), {"e": metric_cells("ece", probs, labels)}, draws=1000)["e"]
    assert drawn.shape == (1000, 15)
    surplus = (probs.argmax(1) == labels) - probs.max(1)
    assert drawn.sum(axis=1).mean() == pytest.approx(surplus.mean(), abs=0.01)


@pytest.mark.parametrize(("draws", "units"), [(999, 2), (1000, 1)])
def test_too_few_draws_or_units_are_refused(draws, units):
    plan = ResamplingPlan(np.arange(units), np.zeros(units, int))
    with pytest.raises(DataError, match=f"at least 1000 draws and two units, got {draws} draws of {units}"):
        bootstrap(plan, {"x": share(np.ones(units))}, draws=draws)
