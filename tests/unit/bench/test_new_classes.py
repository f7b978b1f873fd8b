# SPDX-License-Identifier: Apache-2.0
"""Base-to-new: each half judged among its own classes, by the adapted and by the frozen towers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adaptclip.bench.interpolation import predict_new_classes
from adaptclip.data.card import load_card
from adaptclip.data.shots import base_and_new
from adaptclip.data.sources import open_data
from adaptclip.methods import LoRA
from adaptclip.types import Batch


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
    got = predict_new_classes(adapted.encoder, tiny_backbone, new)
    models = (adapted.merged_model(), tiny_backbone.model)
    for own, model in zip(got, models, strict=True):
        right, count = right_answers(model, tiny_backbone, new.prompt_names, base.card.templates, new.test)
        assert own.class_names == new.class_names
        assert own.ids == new.test.ids
        assert (len(own), int((own.pred == own.labels).sum())) == (count, right)
    assert len(got[0]) == 359
    assert (got[0].pred != got[1].pred).any()


def test_without_adaptation_both_are_alike(tiny_backbone, halves):
    small = replace(halves[1], test=halves[1].test.select(range(30)))
    adapted, frozen = predict_new_classes(tiny_backbone, tiny_backbone, small)
    assert len(adapted) == 30
    assert (adapted.probs == frozen.probs).all()
