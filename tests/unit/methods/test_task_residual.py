# SPDX-License-Identifier: Apache-2.0
"""TaskRes against its formula, its start at zero-shot, its lengths, its training and its artifact."""

from __future__ import annotations

import numpy as np
import pytest
import real_features
import torch

import adaptclip as ac
from adaptclip.methods.task_residual import TaskResidual
from adaptclip.types import Batch


@pytest.fixture(scope="module")
def real() -> real_features.Real:
    return real_features.load()


def logits(model, features: torch.Tensor) -> np.ndarray:
    rows = torch.arange(len(features))
    with torch.no_grad():
        return model(Batch(labels=rows, index=rows, features=features)).numpy()


def test_it_starts_at_zero_shot_and_follows_its_formula(real):
    zero_shot = ac.ZeroShotClassifier(real.clip, templates=("{}",))
    model = TaskResidual(real.clip, templates=("{}",), alpha=0.5)
    np.testing.assert_allclose(logits(model, real.images[:9]), logits(zero_shot, real.images[:9]), atol=1e-4)
    move = torch.randn(19, 512, generator=torch.Generator().manual_seed(0))
    model.load_adapter_state({"residual": move})
    sums = (zero_shot.weights + 0.5 * move).double().numpy()
    expected = 100 * real.images[:9].double().numpy() @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
    np.testing.assert_allclose(logits(model, real.images[:9]), expected, atol=2e-4)
    np.testing.assert_allclose(model.head().logits(real.images[:9]).numpy(), expected, atol=2e-4)


def test_lengths_are_the_papers(real):
    model = TaskResidual(real.clip)
    assert [model.schedule(shots).epochs for shots in (1, 2, 4, 8, 16)] == [100, 100, 100, 200, 200]
    plan = model.schedule(16)
    assert (plan.lr, plan.batch_size, plan.views) == (2e-3, 256, None)


def test_it_learns_and_reloads(real, tmp_path):
    train, _ = real.draw(4, 1)
    model = TaskResidual(real.clip, templates=("{}",)).fit(train, epochs=60)
    assert real.accuracy(model) > real.accuracy(ac.ZeroShotClassifier(real.clip, templates=("{}",))) + 5
    model.save(tmp_path / "model")
    found = ac.load(tmp_path / "model").probabilities_of_features(real.images[:5]).numpy()
    np.testing.assert_allclose(found, model.predict_proba(real.images[:5]), atol=1e-6)
