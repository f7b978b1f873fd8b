# SPDX-License-Identifier: Apache-2.0
"""What methods on features must do on real CLIP features: WHU-RS19, 19 classes, 625 test images, seeds 1 to 3."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import real_features
from real_features import NAMES, Real
from scipy.stats import t as student

from adaptclip.methods import LinearProbe, TipAdapter, ZeroShotClassifier
from adaptclip.methods.registry import named

TEMPLATES = ("{}",)
MODELS = ("openai-vit-b-32", "openai-vit-l-14")
METHODS = ("logistic", "text_init", "clap", "lp_plus_plus", "tip_adapter", "tip_adapter_f", "gda", "ss_text")


@cache
def read(path: Any) -> Real:
    return real_features.load(path)


@pytest.fixture(params=MODELS)
def real(request, shared_data) -> Real:
    if request.param == "openai-vit-b-32":
        return read(real_features.VIT_B_32)
    return read(shared_data("whurs19") / "whurs19" / "features" / f"{request.param}.safetensors")


def fitted(real: Real, method: str, shots: int, seed: int) -> Any:
    """A method at its default settings; one view."""
    train, validation = real.draw(shots, seed)
    return named()[method].build(real.clip, NAMES, TEMPLATES, seed).fit(train, validation=validation, seed=seed)


def accuracies(real: Real, method: str, shots: int) -> np.ndarray:
    return np.array([real.accuracy(fitted(real, method, shots, seed)) for seed in (1, 2, 3)])


def half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of the mean over seeds."""
    return float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_one_shot_is_not_below_zero_shot(real, method):
    zero_shot = real.accuracy(ZeroShotClassifier(real.clip, NAMES, TEMPLATES))
    assert 79 < zero_shot < 87
    found = accuracies(real, method, 1)
    if method == "logistic":  # it reads no words, and its papers show it below
        assert found.mean() > 60
    else:
        assert found.mean() > zero_shot - half_width(found)


def test_zs_lp_at_one_shot(real):
    least = 87 if real.text.shape[1] == 512 else 95
    assert accuracies(real, "text_init", 1).mean() >= least
    unit = []
    for seed in (1, 2, 3):
        probe = LinearProbe(real.clip, NAMES, head="text_init", templates=TEMPLATES, start_norm=1.0)
        probe.fit_features(real.draw(1, seed)[0], seed=seed)
        unit.append(real.accuracy(probe))
    assert np.mean(unit) < least - 8, "from unit norm the steps are far too large"


@pytest.mark.parametrize("method", METHODS[1:])
def test_what_moves_by_a_millionth_moves_no_accuracy(real, method):
    moved = real.moved(1e-6)
    for shots in (1, 4):
        found, again = (real.accuracy(fitted(it, method, shots, 1)) for it in (real, moved))
        assert abs(found - again) <= 0.5


def test_learnt_keys_are_better_than_fixed_ones_at_16_shots(real):
    tip, learnt = (accuracies(real, method, 16) for method in ("tip_adapter", "tip_adapter_f"))
    assert learnt.mean() > tip.mean()
    assert learnt.mean() > 96


def test_tip_f_trains_at_a_published_setting_that_validation_chooses():
    real = read(real_features.VIT_B_32)
    train, validation = real.draw(4, 1)
    adapter = TipAdapter(real.clip, NAMES, templates=TEMPLATES, learn_keys=True)
    assert (adapter.alpha, adapter.beta) == (3.0, 1.0)
    adapter.fit_features(train)
    choice = adapter.choose_training(validation)
    assert choice.grid == {"alpha": (1.17, 10.0, 5), "beta": (1.0, 1.0, 1)}
    assert (adapter.alpha, adapter.beta) == (choice.values["alpha"], 1.0)


def test_trained_keys_keep_their_pair_unless_another_is_better_by_more_than_chance():
    real = read(real_features.VIT_B_32)
    train, validation = real.draw(4, 1)
    adapter = TipAdapter(real.clip, NAMES, templates=TEMPLATES, learn_keys=True)
    adapter.fit_features(train)
    best = adapter.choose(validation)
    kept = {}
    for pair in ((10.0, 1.0), (40.0, 27.0), (best.values["alpha"], best.values["beta"]), (0.1, 0.1)):
        present = adapter.choose(validation, alphas=pair[:1], betas=pair[1:])
        error = (present.accuracy * (1 - present.accuracy) / 76) ** 0.5
        kept[pair] = best.accuracy - present.accuracy <= error
        found = adapter.choose_trained(validation).values
        assert found == ({"alpha": pair[0], "beta": pair[1]} if kept[pair] else best.values)
        assert found == {"alpha": adapter.alpha, "beta": adapter.beta}
    assert set(kept.values()) == {True, False}
