# SPDX-License-Identifier: Apache-2.0
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import ArtifactError, BackboneError, ConfigError, DataError
from adaptclip.methods import TipAdapter, ZeroShotClassifier
from adaptclip.methods.cache_model import ALPHAS, BETAS
from adaptclip.methods.choosing import choose_by_accuracy
from adaptclip.methods.registry import methods
from adaptclip.seeding import generator
from adaptclip.types import Batch, Features

NAMES = ("rose", "lily_of the valley", "dog")
TEMPLATES = ("a photo of a {}.", "art of the {}.")


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


def make_features(backbone, labels, *, views=1, purpose="train", spread=0.3) -> Features:
    """Unit-norm features around one direction per class, as CLIP's are."""
    labels = torch.tensor(labels)
    centres = torch.randn(len(NAMES), backbone.embed_dim, generator=generator(0, "centres"))
    noise = torch.randn(views, len(labels), backbone.embed_dim, generator=generator(0, purpose))
    values = F.normalize(centres[labels] + spread * noise * math.sqrt(len(NAMES)), dim=-1)
    return Features(values, labels, tuple(f"{purpose}-{i}" for i in range(len(labels))), backbone.image_digest)


@pytest.fixture
def support(backbone):
    return make_features(backbone, [0, 0, 1, 2, 2], views=4)


@pytest.fixture
def fitted(backbone, support):
    adapter = TipAdapter(backbone, NAMES, templates=TEMPLATES, alpha=1.7, beta=4.2)
    adapter.fit_features(support)
    return adapter


@pytest.fixture
def batch(backbone):
    features = make_features(backbone, [0, 1, 2, 1, 0, 2], purpose="test")
    return Batch(labels=features.labels, index=torch.arange(6), features=features.values[0])


def by_hand(adapter, support, rows, alpha, beta):
    """The formula of the paper, image by image and key by key, in double precision."""
    keys = support.values.double().numpy().mean(axis=0)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    scale = math.exp(adapter.backbone.model.logit_scale.item())
    text = ZeroShotClassifier(adapter.backbone, NAMES, TEMPLATES).weights.double().numpy()
    logits = np.zeros((len(rows), len(NAMES)))
    for i, row in enumerate(rows.double().numpy()):
        for c in range(len(NAMES)):
            logits[i, c] = scale * row @ text[c]
            for key, label in zip(keys, support.labels.tolist(), strict=True):
                logits[i, c] += alpha * math.exp(-beta * (1 - row @ key)) * (label == c)
    return logits


def test_logits_follow_the_paper(fitted, support, batch):
    expected = by_hand(fitted, support, batch.features, 1.7, 4.2)
    np.testing.assert_allclose(fitted(batch).numpy(), expected, atol=1e-4, rtol=0)
    shift = expected - by_hand(fitted, support, batch.features, 0.0, 4.2)
    assert shift.max() > 1  # the cache has a part in it


def test_keys_are_the_renormalised_means_of_the_views(fitted, support):
    state = fitted.adapter_state()
    mean = support.values.mean(dim=0)
    torch.testing.assert_close(state["keys"], mean / mean.norm(dim=-1, keepdim=True))
    assert torch.equal(state["key_labels"], support.labels)
    again = TipAdapter(fitted.backbone, NAMES, templates=TEMPLATES)
    again.fit_features(support)
    assert torch.equal(again.adapter_state()["keys"], state["keys"])


def test_without_keys_or_weight_it_is_the_zero_shot_classifier(backbone, support, batch):
    zero_shot = ZeroShotClassifier(backbone, NAMES, TEMPLATES)(batch)
    for adapter in (TipAdapter(backbone, NAMES, templates=TEMPLATES, num_keys=n) for n in (0, 7)):
        assert torch.equal(adapter(batch), zero_shot)
    silent = TipAdapter(backbone, NAMES, templates=TEMPLATES, alpha=0.0, learn_keys=True)
    silent.fit_features(support)
    assert torch.equal(silent(batch), zero_shot)


def test_before_training_tip_f_is_tip(fitted, backbone, support, batch):
    learnt = TipAdapter(backbone, NAMES, templates=TEMPLATES, alpha=1.7, beta=4.2, learn_keys=True)
    learnt.fit_features(support)
    assert torch.equal(learnt(batch), fitted(batch))
    assert fitted.trainable_parameters() == []
    assert not fitted(batch).requires_grad
    assert [p.shape for p in learnt.trainable_parameters()] == [support.values.shape[1:]]
    assert [n for n, p in learnt.named_parameters() if p.requires_grad] == ["keys"]
    assert learnt.penalty().item() == 0


def test_gradient_of_the_keys_by_finite_differences(backbone, support, batch):
    adapter = TipAdapter(backbone, NAMES, templates=TEMPLATES, alpha=2.0, beta=3.0, learn_keys=True)
    adapter.fit_features(support)
    F.cross_entropy(adapter(batch), batch.labels).backward()
    assert adapter.keys.grad is not None
    keys = F.normalize(support.values.double().mean(dim=0), dim=-1)

    def loss(changed):
        logits = backbone.logit_scale.double() * batch.features.double() @ adapter.text.double().T
        for j, label in enumerate(support.labels.tolist()):
            logits[:, label] += 2.0 * torch.exp(-3.0 * (1 - batch.features.double() @ changed[j]))
        return F.cross_entropy(logits, batch.labels).item()

    direction = torch.randn(keys.shape, generator=generator(0, "direction"), dtype=torch.float64)
    slope = (loss(keys + 1e-5 * direction) - loss(keys - 1e-5 * direction)) / 2e-5
    assert (adapter.keys.grad.double() * direction).sum().item() == pytest.approx(slope, rel=1e-3)
    assert abs(slope) > 1e-4


def test_a_class_without_images_keeps_its_zero_shot_logit(backbone, batch):
    adapter = TipAdapter(backbone, NAMES, templates=TEMPLATES)
    adapter.fit_features(make_features(backbone, [0, 2]))
    zero_shot = ZeroShotClassifier(backbone, NAMES, TEMPLATES)(batch)
    assert torch.equal(adapter(batch)[:, 1], zero_shot[:, 1])
    assert (adapter(batch)[:, [0, 2]] > zero_shot[:, [0, 2]]).all()


def test_choice_is_the_best_of_an_exhaustive_search(fitted, support, backbone):
    validation = make_features(backbone, [0, 1, 2] * 8, purpose="validation", spread=1.5)
    alphas, betas = (0.1, 1.0, 10.0), (0.5, 2.0, 5.5, 20.0)
    table = {}
    for alpha in alphas:
        for beta in betas:
            logits = by_hand(fitted, support, validation.values[0], alpha, beta)
            right = (logits.argmax(axis=1) == validation.labels.numpy()).mean()
            log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            table[alpha, beta] = (right, -log_probs[range(24), validation.labels.numpy()].mean())
    best = min(table, key=lambda pair: (-table[pair][0], table[pair][1]))
    choice = fitted.choose(validation, alphas=alphas, betas=betas)
    assert (choice.values["alpha"], choice.values["beta"]) == best == (fitted.alpha, fitted.beta)
    assert choice.accuracy == pytest.approx(table[best][0])
    assert choice.loss == pytest.approx(table[best][1], rel=1e-5)
    assert choice.num_tied == sum(right == table[best][0] for right, _ in table.values())
    assert (choice.num_images, choice.num_tried) == (24, 12)
    assert len({right for right, _ in table.values()}) > 2  # the candidates differ, so there was something to choose
    assert fitted.settings["alpha"] == best[0]
    assert "alpha 0.1 to 10 (3) × beta 0.5 to 20 (4): the highest accuracy on 24 images" in choice.describe()


def test_choice_uses_the_learnt_keys_and_the_declared_grid(backbone, support):
    adapter = TipAdapter(backbone, NAMES, templates=TEMPLATES, learn_keys=True)
    adapter.fit_features(support)
    validation = make_features(backbone, [0, 1, 2] * 4, purpose="validation")
    before = adapter.choose(validation)
    assert before.num_tried == 1000
    assert before.grid == {"alpha": (0.1, 50.0, 20), "beta": (0.1, 50.0, 50)}
    for grid in (ALPHAS, BETAS):
        ratios = np.divide(grid[1:], grid[:-1])
        assert ratios == pytest.approx([ratios[-1]] * len(ratios), rel=2e-3)
    with torch.no_grad():
        adapter.keys.copy_(-adapter.keys)
    assert adapter.choose(validation).loss > before.loss


def test_ties_go_to_the_lower_cross_entropy_then_the_first():
    labels = torch.tensor([0, 1])

    def logits(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    right_but_unsure = logits([0.1, 0.0], [0.0, 0.1])
    right = logits([1.0, 0.0], [0.0, 1.0])
    wrong_once_but_sure = logits([9.0, 0.0], [0.1, 0.0])
    tables = (wrong_once_but_sure, right_but_unsure, right, right.clone(), wrong_once_but_sure)
    choice = choose_by_accuracy(((({"a": float(i)}), table) for i, table in enumerate(tables)), labels)
    assert choice.values == {"a": 2.0}
    assert (choice.accuracy, choice.num_tried, choice.num_tied) == (1.0, 5, 3)
    assert choice.loss == pytest.approx(math.log(1 + math.exp(-1)))
    assert choice.grid == {"a": (0.0, 4.0, 5)}
    with pytest.raises(ConfigError, match="grid of candidates is empty"):
        choose_by_accuracy([], labels)


def test_state_and_settings_rebuild_it(fitted, batch):
    again = methods()["tip_adapter"](fitted.backbone, NAMES, **json.loads(json.dumps(fitted.settings)))
    assert not torch.equal(again(batch), fitted(batch))
    again.load_adapter_state({name: tensor.clone() for name, tensor in fitted.adapter_state().items()})
    assert torch.equal(again(batch), fitted(batch))
    assert again.settings == fitted.settings
    assert torch.equal(again.class_weights(), ZeroShotClassifier(fitted.backbone, NAMES, TEMPLATES).weights)


def test_loading_keeps_the_parameter_an_optimizer_holds(backbone, support):
    adapter = TipAdapter(backbone, NAMES, templates=TEMPLATES, learn_keys=True)
    adapter.fit_features(support)
    (held,) = adapter.trainable_parameters()
    state = {**adapter.adapter_state(), "keys": torch.ones_like(held)}
    adapter.load_adapter_state(state)
    assert adapter.trainable_parameters()[0] is held
    assert (held == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(5, 7)}, r"'keys' .* shape \(5, 7\), expected \(5, 48\)"),
        ({"keys": torch.zeros(4, 48)}, r"a Tip-Adapter with 5 keys has shape \(4, 48\)"),
        ({"keys": torch.full((5, 48), float("nan"))}, "not finite"),
        ({"key_labels": torch.tensor([0, 1, 2, 3, 0])}, "class ids from 0 to 2"),
        ({"key_labels": torch.tensor([0, 1, 2, -2, 0])}, "class ids from 0 to 2"),
        ({"key_labels": torch.zeros(5)}, "class ids from 0 to 2"),
        ({"values": torch.zeros(5)}, "should hold"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(fitted, batch, changes, message):
    before = fitted(batch)
    with pytest.raises(ArtifactError, match=message):
        fitted.load_adapter_state({**fitted.adapter_state(), **changes})
    assert torch.equal(fitted(batch), before)


def test_half_precision_does_not_round_the_logits(fitted, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = fitted(batch)
    assert torch.equal(logits, fitted(batch))


def test_bad_settings(backbone):
    settings: list[dict[str, Any]] = [{"alpha": -1.0}, {"alpha": float("nan")}, {"beta": math.inf}, {"num_keys": -1}]
    for setting in settings:
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be"):
            TipAdapter(backbone, NAMES, **setting)
    with pytest.raises(BackboneError, match="context"):
        TipAdapter(backbone, [*NAMES, "very " * 100])


def test_bad_features(fitted, support, batch, backbone):
    foreign = replace(support, weights="0" * 64)
    narrow = replace(support, values=support.values[..., :40])
    empty = Features(support.values[:, :0], support.labels[:0], (), backbone.image_digest)
    outside = replace(support, labels=torch.tensor([0, 1, 2, 3, 0]))
    for call in (fitted.fit_features, fitted.choose):
        with pytest.raises(DataError, match="another backbone"):
            call(foreign)
        with pytest.raises(DataError, match=r"48 wide .* got 40"):
            call(narrow)
        with pytest.raises(DataError, match=r"labels run from 0 to 3; .*0\.\.2"):
            call(outside)
    with pytest.raises(DataError, match="no training images"):
        fitted.fit_features(empty)
    with pytest.raises(DataError, match=r"no validation images.*fixed values"):
        fitted.choose(empty)
    with pytest.raises(DataError, match="one view per image; got 4"):
        fitted.choose(support)
    with pytest.raises(ConfigError, match="alpha must be"):
        fitted.choose(make_features(backbone, [0]), alphas=(-1.0,))
    with pytest.raises(ConfigError, match="empty"):
        fitted.choose(make_features(backbone, [0]), betas=())
    with pytest.raises(DataError, match="the batch has none"):
        fitted(Batch(labels=batch.labels, index=batch.index))
