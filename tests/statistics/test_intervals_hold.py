# SPDX-License-Identifier: Apache-2.0
"""Intervals and gates in worlds in which what is usually assumed fails; the full study is benchmarks/interval_coverage.

Every line draws fixed-seed data sets. A 95 % interval covers 93 % or more, a gate at its limit passes or fails wrongly
in 6 % at most; a line is wrong where it misses this by more than one study in a thousand would by chance. The tests
below take one correction away at a time, and see its world fall.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom
from worlds import CALIBRATION, PAIRED, PATIENTS, RARE, SMALL_CLASSES, World, tally

from adaptclip.metrics import estimates, find_metric
from adaptclip.metrics.judged import Sampling
from adaptclip.metrics.metric import Drawing

REPEATS = 250
LEAST_COVERED = int(binom.ppf(0.001, REPEATS, 0.93)) / REPEATS
MOST_WRONG = int(binom.isf(0.001, REPEATS, 0.06)) / REPEATS

BY_NAME = {world.name: world for world in (*PATIENTS, *SMALL_CLASSES, *CALIBRATION, *PAIRED, RARE)}

LINES = [
    *(
        (f"{patients}, recalls {recalls}, ICC {alike}", "accuracy", False)
        for patients, recalls, alike in (
            ("100 patients x 5", "0.98/0.2", "0"),
            ("100 patients x 5", "0.98/0.5", "0.3, mixed"),
            ("100 patients x 5", "0.85/0.85", "0.8"),
            ("40 patients x 10", "0.98/0.2", "0.8"),
            ("40 patients x 10", "0.98/0.5", "0"),
            ("40 patients x 10", "0.85/0.85", "0.3"),
            ("12 patients x 10", "0.98/0.5", "0.3"),
            ("12 patients x 10", "0.85/0.85", "0.8"),
            ("50 patients x 1 to 20", "0.98/0.5", "0.8"),
            ("20 patients x 1 to 20", "0.85/0.85", "0.8"),
            ("8 patients x 20", "0.85/0.85", "0.3"),
        )
    ),
    *(
        (name, "mean_per_class_accuracy", False)
        for name in (
            "100 patients x 5, recalls 0.98/0.5, ICC 0",
            "40 patients x 10, recalls 0.85/0.85, ICC 0.8",
            "20 patients x 1 to 20, recalls 0.98/0.5, ICC 0.3, mixed",
            RARE.name,
            *(world.name for world in SMALL_CLASSES),
        )
    ),
    (RARE.name, "macro_f1", False),
    ("40 patients x 10, recalls 0.98/0.5, ICC 0.3", "macro_f1", False),
    (SMALL_CLASSES[0].name, "macro_f1", False),
    (RARE.name, "macro_auc", False),
    (SMALL_CLASSES[0].name, "macro_auc", False),
    ("100 patients x 5, recalls 0.98/0.5, ICC 0.3", "macro_auc", False),
    ("100 patients x 5, recalls 0.98/0.2, ICC 0.8", "brier", False),
    (CALIBRATION[0].name, "ece", False),
    *((world.name, "accuracy", True) for world in PAIRED[::2]),
    *((world.name, "mean_per_class_accuracy", True) for world in PAIRED[1:6:2]),
    (PAIRED[1].name, "brier", True),
]


def test_enough_is_looked_at():
    assert len(LINES) >= 30
    assert len({metric for _, metric, _ in LINES}) >= 6
    assert LEAST_COVERED < 0.93 < 0.97
    assert 0.06 < MOST_WRONG < 0.12


@pytest.mark.parametrize(("name", "metric", "change"), LINES)
def test_intervals_cover_and_gates_hold_their_level(name, metric, change):
    found = tally(BY_NAME[name], metric, REPEATS, change=change)
    assert found.covered >= LEAST_COVERED, found
    assert found.passed <= MOST_WRONG, found
    assert found.failed <= MOST_WRONG, found


@pytest.mark.parametrize("world", [SMALL_CLASSES[0], SMALL_CLASSES[2], RARE], ids=lambda world: world.name)
@pytest.mark.parametrize("metric", ["mean_per_class_accuracy", "macro_f1", "macro_auc"])
def test_a_class_of_a_handful_decides_no_gate(world, metric):
    assert tally(world, metric, 20).unknown == 1


def covered(world: World, metric: str, sampling: str = "", repeats: int = REPEATS) -> float:
    """Share of covered truths with the images' drawing told wrongly: "classes fixed" or "independent"."""
    rng, truth, held = np.random.default_rng(0), world.truth(metric), 0
    for repeat in range(repeats):
        judged, _ = world.draw(rng)
        info = judged.sampling
        if sampling == "classes fixed":
            info = Sampling(info.unit, judged.labels)
        elif sampling == "independent":
            info = Sampling.of(len(judged))
        bounds = find_metric(metric).compare(replace(judged, sampling=info), None, Drawing(1000, repeat)).model
        low, high = bounds.interval(0.95) or (1.0, 0.0)
        held += low <= truth <= high
    return held / repeats


def test_a_random_mix_of_classes_taken_for_fixed_is_seen():
    """The fault that was: 71 % of the intervals called 95 % covered."""
    world = BY_NAME["100 patients x 5, recalls 0.98/0.2, ICC 0"]
    assert covered(world, "accuracy", "classes fixed") < 0.85
    assert covered(CALIBRATION[0], "ece", "classes fixed", 100) < 0.9
    assert covered(world, "accuracy") >= LEAST_COVERED


def test_patients_taken_for_independent_images_are_seen():
    assert covered(BY_NAME["40 patients x 10, recalls 0.98/0.5, ICC 0.8"], "accuracy", "independent") < 0.75


def test_without_the_doubt_about_alike_images_few_patients_pass_wrongly(monkeypatch):
    world = BY_NAME["8 patients x 20, recalls 0.85/0.85, ICC 0.3"]
    lone = replace(world, name="8 patients x 20, recalls .95", recalls=(0.95, 0.95))
    with_it = tally(lone, "accuracy", 500).passed
    monkeypatch.setattr(estimates, "_ALIKE", 0.0)
    assert with_it <= 0.06 < 0.08 < tally(lone, "accuracy", 500).passed


def test_without_the_floor_a_class_of_five_makes_the_mean_certain(monkeypatch):
    with_it = covered(SMALL_CLASSES[0], "mean_per_class_accuracy")
    monkeypatch.setattr(estimates, "FEW_UNITS", 0)
    assert with_it >= LEAST_COVERED > covered(SMALL_CLASSES[0], "mean_per_class_accuracy")


def test_without_degrees_of_freedom_small_classes_are_too_sure(monkeypatch):
    world = World("a class of 200 and one of 6", (0.5, 0.5), (0.95, 0.7), counts=(200, 6))
    with_it = covered(world, "mean_per_class_accuracy")
    monkeypatch.setattr(estimates._Cells, "degrees", property(lambda self: 1e6))
    assert with_it >= LEAST_COVERED
    assert covered(world, "mean_per_class_accuracy") < with_it - 0.02
