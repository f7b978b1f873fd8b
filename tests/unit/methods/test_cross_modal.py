# SPDX-License-Identifier: Apache-2.0
"""Cross-modal adaptation against its loss written plainly, its start at zero-shot, its training and its artifact."""

from __future__ import annotations

import numpy as np
import pytest
import real_features
import torch
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.methods.cross_modal import CrossModal
from adaptclip.types import Batch


@pytest.fixture(scope="module")
def real() -> real_features.Real:
    return real_features.load()


def test_it_starts_at_zero_shot_and_every_text_is_an_example(real):
    zero_shot = ac.ZeroShotClassifier(real.clip, templates=("{}",))
    model = CrossModal(real.clip, templates=("{}",))
    train, _ = real.draw(2, 1)
    batch = Batch(labels=train.labels, index=torch.arange(len(train)), features=train.values[0])
    with torch.no_grad():
        torch.testing.assert_close(model(batch), zero_shot(batch))
        assert float(model.penalty()) == 0
    model.train()
    loss = F.cross_entropy(model(batch), batch.labels) + model.penalty()
    loss.backward()
    weight = zero_shot.weights.double().clone().requires_grad_()
    images, texts = 100 * train.values[0].double() @ weight.T, 100 * zero_shot.weights.double() @ weight.T
    plain = F.cross_entropy(images, train.labels) + F.cross_entropy(texts, torch.arange(19))
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert model.weight.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(model.weight.grad.double(), weight.grad, atol=1e-4, rtol=1e-3)


def test_it_learns_and_reloads_with_the_norms_of_its_weights(real, tmp_path):
    train, _ = real.draw(4, 1)
    model = CrossModal(real.clip, templates=("{}",)).fit(train, steps=300)
    assert real.accuracy(model) > real.accuracy(ac.ZeroShotClassifier(real.clip, templates=("{}",))) + 5
    np.testing.assert_allclose(
        model.head().logits(real.images[:5]).softmax(dim=1).numpy(), model.predict_proba(real.images[:5]), atol=1e-5
    )
    model.save(tmp_path / "model")
    found = ac.load(tmp_path / "model").probabilities_of_features(real.images[:5]).numpy()
    np.testing.assert_allclose(found, model.predict_proba(real.images[:5]), atol=1e-6)
