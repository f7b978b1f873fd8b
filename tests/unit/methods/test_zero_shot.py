# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import ArtifactError, BackboneError, DataError
from adaptclip.methods import ZeroShotClassifier
from adaptclip.methods.registry import methods
from adaptclip.types import Batch

NAMES = ("rose", "lily_of the valley", "dog")
TEMPLATES = ("a photo of a {}.", "art of the {}.")


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


@pytest.fixture
def batch(backbone):
    features = F.normalize(torch.randn(5, backbone.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    return Batch(labels=torch.zeros(5, dtype=torch.long), index=torch.arange(5), features=features)


def test_logits_are_scaled_cosines_with_the_mean_of_the_templates(backbone, batch):
    logits = ZeroShotClassifier(backbone, NAMES, TEMPLATES)(batch)
    for c, name in enumerate(["rose", "lily of the valley", "dog"]):
        features = backbone.encode_text(backbone.tokenize([t.format(name) for t in TEMPLATES]))
        expected = F.cosine_similarity(batch.features, features.mean(dim=0)[None]) * backbone.model.logit_scale.exp()
        torch.testing.assert_close(logits[:, c], expected, atol=1e-4, rtol=0)


def test_nothing_learns(backbone, batch):
    classifier = ZeroShotClassifier(backbone, NAMES, TEMPLATES)
    assert classifier.trainable_parameters() == []
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not classifier(batch).requires_grad
    assert classifier.penalty().item() == 0
    torch.testing.assert_close(classifier.class_weights().norm(dim=-1), torch.ones(3))


def test_state_and_settings_rebuild_it(backbone, batch):
    classifier = ZeroShotClassifier(backbone, NAMES, TEMPLATES)
    again = methods()["zero_shot"](backbone, NAMES, **json.loads(json.dumps(classifier.settings)))
    again.load_adapter_state({name: -tensor for name, tensor in classifier.adapter_state().items()})
    torch.testing.assert_close(again(batch), -classifier(batch))
    with pytest.raises(ArtifactError, match=r"'class_weights' .* shape \(2, \d+\), expected \(3, \d+\)"):
        again.load_adapter_state({"class_weights": classifier.weights[:2]})
    with pytest.raises(ArtifactError, match="should hold"):
        again.load_adapter_state({"weights": classifier.weights})


def test_half_precision_does_not_round_the_logits(backbone, batch):
    classifier = ZeroShotClassifier(backbone, NAMES, TEMPLATES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(batch)
    assert torch.equal(logits, classifier(batch))


def test_bad_input(backbone, batch):
    with pytest.raises(BackboneError, match="context"):
        ZeroShotClassifier(backbone, [*NAMES, "very " * 100], TEMPLATES)
    with pytest.raises(DataError, match="the batch has none"):
        ZeroShotClassifier(backbone, NAMES, TEMPLATES)(Batch(labels=batch.labels, index=batch.index))
