# SPDX-License-Identifier: Apache-2.0
"""CLIP-Adapter against its formula, its start, its training and its artifact."""

from __future__ import annotations

import numpy as np
import pytest
import real_features
import torch
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.errors import ConfigError
from adaptclip.methods.clip_adapter import ClipAdapter
from adaptclip.types import Batch


@pytest.fixture(scope="module")
def real() -> real_features.Real:
    return real_features.load()


def batch_of(features: torch.Tensor) -> Batch:
    rows = torch.arange(len(features))
    return Batch(labels=rows, index=rows, features=features)


def test_logits_are_those_of_the_paper(real):
    model = ClipAdapter(real.clip, ratio=0.3, seed=4)
    features = real.images[:7]
    down, up = (tensor.detach().double().numpy() for tensor in (model.down, model.up))
    assert down.shape == (128, 512)
    f, text = features.double().numpy(), real.clip.class_features(real_features.NAMES).double().numpy()
    hidden = np.maximum(f @ down.T, 0)
    mixed = 0.3 * np.maximum(hidden @ up.T, 0) + 0.7 * f
    expected = 100 * (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)) @ text.T
    with torch.no_grad():
        np.testing.assert_allclose(model(batch_of(features)).numpy(), expected, atol=2e-4)


def test_a_ratio_of_nothing_is_zero_shot_and_others_are_refused(real):
    zero_shot = ac.ZeroShotClassifier(real.clip, templates=("{}",))
    model = ClipAdapter(real.clip, templates=("{}",), ratio=0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(batch_of(real.images[:9])), zero_shot(batch_of(real.images[:9])))
    for ratio in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="ratio must be from 0"):
            ClipAdapter(real.clip, ratio=ratio)
    with pytest.raises(ConfigError, match="has no fixed head"):
        model.head()


def test_it_learns_reloads_and_is_the_same_every_time(real, tmp_path):
    train, _ = real.draw(4, 1)
    model = ClipAdapter(real.clip, templates=("{}",)).fit(train, epochs=40, lr=0.05)
    before = real.accuracy(ac.ZeroShotClassifier(real.clip, templates=("{}",)))
    assert real.accuracy(model) > before + 3
    assert all(float(p.detach().abs().sum()) > 0 for p in model.trainable_parameters())
    again = ClipAdapter(real.clip, templates=("{}",)).fit(train, epochs=40, lr=0.05)
    for own, other in zip(model.adapter_state().values(), again.adapter_state().values(), strict=True):
        assert torch.equal(own, other)
    model.save(tmp_path / "model")
    found = ac.load(tmp_path / "model").probabilities_of_features(real.images[:5]).numpy()
    np.testing.assert_allclose(found, model.predict_proba(real.images[:5]), atol=1e-6)
    assert F.normalize(model.class_weights(), dim=-1).shape == (19, 512)
