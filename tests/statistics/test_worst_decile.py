# SPDX-License-Identifier: Apache-2.0
"""Gates on the worst tenth of the classes hold their level, though the classes are picked on the images that judge."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import World, tally

from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.worst_decile import WORST_DECILE, WorstSpread, pick_worst

REPEATS = 200


def of(name: str, recalls: tuple[float, ...], size: int) -> World:
    classes = len(recalls)
    return World(name, (1 / classes,) * classes, recalls, counts=(size,) * classes)


WORLDS = [
    of("20 equal classes of 30", (0.7,) * 20, 30),
    of("20 classes of 30, two far worse", (0.9,) * 18 + (0.3, 0.4), 30),
    of("40 spread classes of 20", tuple(np.linspace(0.4, 0.99, 40)), 20),
    of("10 spread classes of 200", tuple(np.linspace(0.5, 0.95, 10)), 200),
    of("2 classes of 50, alike", (0.85, 0.85), 50),
    World("300 patients x 5, ICC .3", (0.1,) * 10, (0.8,) * 9 + (0.6,), patients=300, sizes=5, alike=0.3),
]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_wrong_verdicts_at_the_limit_are_6_percent_at_most(world):
    found = tally(world, WORST_DECILE, REPEATS)
    assert found.passed <= 0.06, found
    assert found.failed <= 0.06, found
    assert found.covered >= 0.93, found
    assert found.unknown < 0.2, found


def test_an_upper_bound_of_the_classes_as_picked_would_not_hold():
    """The reason for two estimates: of equal classes, those that look worst look far worse than they are."""
    rng, world, wrong = np.random.default_rng(0), WORLDS[0], 0
    for _ in range(40):
        images, _ = world.draw(rng)
        spread = WORST_DECILE.compare(images).model.spread
        assert isinstance(spread, WorstSpread)
        wrong += spread.low.bound("high", 0.05) < 0.7
        assert spread.bound("high", 0.05) >= spread.low.bound("high", 0.05)
    assert wrong > 10


def test_a_change_has_bounds_and_a_handful_of_images_has_no_number():
    labels = np.repeat(np.arange(10), 20)
    good = Judged(labels, np.eye(10, dtype=np.float32)[labels], Sampling.of(200))
    wrong = np.where(labels == 3, 4, labels)
    bad = Judged(labels, np.eye(10, dtype=np.float32)[wrong], Sampling.of(200))
    compared = WORST_DECILE.compare(bad, good)
    assert compared.change is not None
    assert compared.change.value == -1
    assert (compared.change.interval(0.95) or (0, 0))[1] < -0.3
    assert pick_worst(bad).classes.tolist() == [3]
    few = good.take(np.arange(25))
    assert WORST_DECILE.value(few) is None
    assert "fewer than two classes have at least 10 images" in WORST_DECILE.compare(few).model.note
