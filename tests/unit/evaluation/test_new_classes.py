"""Base-to-new: each half judged among its own classes, by the adapted and by the frozen towers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch.nn import functional as F

from adaptclip.adapters import LoRA
from adaptclip.adapters.zero_shot import ZeroShotClassifier
from adaptclip.data.base_new import base_and_new
from adaptclip.data.card import load_card
from adaptclip.data.sources import open_data
from adaptclip.evaluation.new_classes import judge_new_classes
from adaptclip.evaluation.predict import predict
from adaptclip.features import FeatureCache
from adaptclip.types import Batch, Predictions


@pytest.fixture(scope="module")
def halves():
    return base_and_new(open_data(load_card("digits"), check=False))


@pytest.fixture(scope="module")
def adapted(tiny_backbone, halves):
    """LoRA after a few steps on a few base images, so that it answers otherwise than the frozen towers."""
    base = halves[0]
    lora = LoRA(tiny_backbone, base.prompt_names, templates=base.card.templates, dropout=0.0)
    few = base.train.select(range(25))
    pixels = torch.stack([tiny_backbone.transform(few.image(i)) for i in range(len(few))])
    batch = Batch(torch.as_tensor(few.labels), torch.arange(len(few)), images=pixels)
    optimizer = torch.optim.AdamW(lora.trainable_parameters(), lr=2e-2)
    lora.train()
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(lora(batch), batch.labels).backward()
        optimizer.step()
    return lora.eval()


def toy(right: int, count: int) -> Predictions:
    """`count` predictions of which the first `right` are right."""
    probs = np.zeros((count, 2), np.float32)
    probs[np.arange(count), [0] * right + [1] * (count - right)] = 1
    return Predictions(tuple(map(str, range(count))), np.zeros(count, np.int64), probs, ("a", "b"))


def right_answers(model, backbone, names, templates, images) -> tuple[int, int]:
    """Numbers of right answers among these names and of images, in float64 from a stock open_clip model."""

    def unit(values):
        values = values.double().numpy()
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    with torch.no_grad():
        text = np.stack(
            [unit(model.encode_text(backbone.tokenize([t.replace("{}", n) for t in templates]))).mean(0) for n in names]
        )
        pixels = torch.stack([backbone.transform(images.image(i)) for i in range(len(images))])
        values = unit(model.encode_image(pixels))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return int(((values @ text.T).argmax(axis=1) == images.labels).sum()), len(images)


def test_new_classes_are_judged_among_themselves(tiny_backbone, halves, adapted):
    base, new = halves
    got = judge_new_classes(adapted.encoder, tiny_backbone, new, toy(6, 10), toy(1, 10))
    models = {"adapted": adapted.merged_model(), "zero_shot": tiny_backbone.model}
    accuracy = {"adapted": 0.6, "zero_shot": 0.1}
    assert list(got) == ["adapted", "zero_shot"]
    for name, model in models.items():
        right, count = right_answers(model, tiny_backbone, new.prompt_names, base.card.templates, new.test)
        own = got[name]
        assert count == own["new_n"] == 359
        assert own["new"] == pytest.approx(right / count)
        assert (own["base"], own["base_n"]) == (accuracy[name], 10)
        assert own["new_interval"] == pytest.approx(list(binomtest(right, count).proportion_ci(method="wilson")))
        assert own["harmonic_mean"] == pytest.approx(2 / (1 / accuracy[name] + count / right))
    assert got["adapted"]["new"] != got["zero_shot"]["new"]


def test_the_base_accuracy_is_that_of_the_predictions(tiny_backbone, halves):
    base, new = halves
    frozen = FeatureCache(None).get(tiny_backbone, base.test)
    classifier = ZeroShotClassifier(tiny_backbone, base.prompt_names, base.card.templates)
    judged = predict(classifier, frozen, base.test)
    small = replace(new, test=new.test.select(range(30)))
    got = judge_new_classes(tiny_backbone, tiny_backbone, small, judged, judged)
    assert got["adapted"] == got["zero_shot"]  # nothing was adapted
    assert got["adapted"]["base"] == pytest.approx((judged.probs.argmax(axis=1) == base.test.labels).mean())
    assert got["adapted"]["base_n"] == len(base.test)
    assert got["adapted"]["new_n"] == 30
