# SPDX-License-Identifier: Apache-2.0
"""PromptSRC: the published loss written anew on open_clip's own towers, and the epochs' average, killed or not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from deep_prompt_towers import four_blocks, image_features, text_features
from tiny_kinds import make_kind
from torch import Tensor
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.errors import ArtifactError, BackboneError, ConfigError
from adaptclip.methods import ZeroShotClassifier
from adaptclip.methods.prompt_src import TEACHER_TEMPLATES, PromptSRC
from adaptclip.training.checkpoint import load_checkpoint, save_checkpoint
from adaptclip.types import Batch

NAMES = ("red fox", "blue_whale", "daisy chain")
TEACHER = ("a photo of the {}.", "a drawing of a {}.")


@pytest.fixture(scope="module")
def backbone():
    return four_blocks(image_blocks=3)


def pictures(count: int = 5, seed: int = 0) -> Batch:
    labels = torch.arange(count) % len(NAMES)
    return Batch(labels, labels, images=torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


class Loader:
    """Images of a step's own."""

    steps_per_epoch = 2

    def batch(self, micro_step: int) -> Batch:
        return pictures(3, seed=micro_step)


class GivenSupport(ac.Support):
    """A support set that gives these images."""

    def loader(self, features: Any = None, *, batch_size: int, views: int = 0) -> Any:
        assert (features, batch_size, views) == (None, 4, 0)
        return Loader()


def given_support(backbone) -> GivenSupport:
    none: Any = None
    return GivenSupport(backbone, none, none, accelerator=ac.make_accelerator("no", 1, cpu=True), shots=2)


def make(backbone, **settings) -> PromptSRC:
    return PromptSRC(backbone, NAMES, teacher_templates=TEACHER, **settings)


def published_loss(adapter: PromptSRC, batch: Any) -> tuple[Tensor, Tensor]:
    """(B, C) logits and the whole loss."""
    backbone, scale = adapter.backbone, float(adapter.backbone.logit_scale)
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    blocks = min(adapter.depth, 3)
    text = text_features(backbone, texts, [adapter.context, *adapter.deep][:blocks])
    images = image_features(backbone, batch.images, list(adapter.image))
    with torch.no_grad():
        frozen_text = ZeroShotClassifier(backbone, NAMES, TEACHER).class_weights()
        frozen_images = F.normalize(backbone.model.encode_image(batch.images), dim=-1)
        taught = F.log_softmax(scale * frozen_images @ frozen_text.T, dim=1)
    logits = scale * images @ text.T
    apart = F.kl_div(F.log_softmax(logits, dim=1), taught, reduction="sum", log_target=True) / logits.numel()
    near = 25 * F.l1_loss(text, frozen_text) + 10 * F.l1_loss(images, frozen_images)
    return logits, F.cross_entropy(logits, batch.labels) + near + apart


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_the_loss_and_its_gradients_are_the_published_ones(backbone, depth):
    adapter = make(backbone, depth=depth).train()
    batch, learnt = pictures(), adapter.trainable_parameters()
    expected, whole = published_loss(adapter, batch)
    theirs = torch.autograd.grad(whole, learnt)
    logits = adapter(batch)
    loss = F.cross_entropy(logits, batch.labels) + adapter.penalty()
    own = torch.autograd.grad(loss, learnt)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, whole, atol=1e-4, rtol=0)
    for one, other in zip(own, theirs, strict=True):
        assert float(other.abs().sum()) > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_what_it_starts_from_and_the_published_settings(backbone):
    adapter = PromptSRC(backbone, NAMES)
    with torch.no_grad():
        words = backbone.model.token_embedding(backbone.tokenize(["a photo of a"]))[0, 1:5]
    assert torch.equal(adapter.context, words)
    assert (adapter.deep.shape, adapter.image.shape) == ((2, 4, 64), (3, 4, 64))  # of the image tower's three blocks
    assert len(TEACHER_TEMPLATES) == 80
    assert all(template.count("{}") == 1 for template in TEACHER_TEMPLATES)
    plan = adapter.schedule(16)
    assert (plan.epochs, plan.lr, plan.batch_size) == (50, 2.5e-3, 4)
    assert (plan.text_weight, plan.image_weight) == (25, 10)
    assert (plan.mean * plan.epochs, plan.std * plan.epochs) == (30, 30)


def test_the_average_is_that_of_the_epochs_and_survives_a_kill(backbone, tmp_path):
    epochs, kept = 4, {}
    plan: dict[str, Any] = {"epochs": epochs, "lr": 0.02, "mean": 0.5, "std": 0.25}

    def whole(training) -> None:
        take(training, 0, training.num_steps)

    def take(training, start: int, stop: int) -> None:
        for step in range(start, stop):
            batch = training.loader.batch(step)
            (F.cross_entropy(training.adapter(batch), batch.labels) + training.adapter.penalty()).backward()
            training.optimizer.step()
            training.scheduler.step()
            training.optimizer.zero_grad()
            if (step + 1) % 2 == 0:
                state = {n: p.detach().clone() for n, p in training.adapter.named_parameters() if p.requires_grad}
                kept[(step + 1) // 2] = state

    adapter = make(backbone).train()
    adapter.learn(given_support(backbone), adapter.schedule(2, **plan), whole)
    gauss = {e: math.exp(-0.5 * ((e - 2) / 1) ** 2) for e in kept}
    for name, value in adapter.adapter_state().items():
        expected: Any = sum(gauss[e] * kept[e][name] for e in kept) / sum(gauss.values())
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
        assert not torch.allclose(value, kept[epochs][name], atol=1e-6)

    class KilledError(Exception):
        pass

    accelerator = ac.make_accelerator("no", 1, cpu=True)

    def killed(training) -> None:
        take(training, 0, 5)  # in the middle of the third epoch
        save_checkpoint(tmp_path, 5, training.adapter, training.optimizer, training.scheduler, accelerator)
        raise KilledError

    def resumed(training) -> None:
        start = load_checkpoint(tmp_path, training.adapter, training.optimizer, training.scheduler, accelerator)
        assert start == 5
        training.adapter.train()
        take(training, start, training.num_steps)

    first, second = make(backbone).train(), make(backbone).train()
    with pytest.raises(KilledError):
        first.learn(given_support(backbone), first.schedule(2, **plan), killed)
    second.learn(given_support(backbone), second.schedule(2, **plan), resumed)
    for name, value in adapter.adapter_state().items():
        torch.testing.assert_close(second.adapter_state()[name], value, atol=1e-6, rtol=0)


def test_reloaded_and_live_are_the_same_and_the_backbone_stays(backbone):
    frozen = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    adapter = make(backbone, depth=2)
    adapter.learn(given_support(backbone), adapter.schedule(2, epochs=1, lr=0.05))
    assert set(adapter.adapter_state()) == {"context", "deep", "image"}
    assert float(adapter.penalty()) == 0
    live = adapter.train()(pictures())
    adapter.eval()
    with torch.no_grad():
        features = adapter.encoder.encode_image(pictures().images)  # pyright: ignore[reportArgumentType]
        batch = Batch(pictures().labels, pictures().index, features=features)
        torch.testing.assert_close(adapter(batch), live, atol=1e-4, rtol=0)
        again = PromptSRC(backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
        again.load_adapter_state({name: value.clone() for name, value in adapter.adapter_state().items()})
        assert torch.equal(again(batch), adapter(batch))
    assert again.encoder.digest == adapter.encoder.digest != backbone.digest
    moved = adapter.for_classes([*reversed(NAMES), "heron"])
    torch.testing.assert_close(moved.class_weights()[:3], adapter.class_weights().flip(0), atol=1e-5, rtol=0)
    assert all(torch.equal(frozen[name], value) for name, value in backbone.model.state_dict().items())
    with pytest.raises(ArtifactError, match="PromptSRC should hold"):
        again.load_adapter_state({"context": adapter.context})


def test_what_does_not_go(backbone):
    with pytest.raises(BackboneError, match=r"prompts in the blocks need .* the image tower of"):
        PromptSRC(make_kind("RN50"), NAMES)
    adapter = make(backbone)
    with pytest.raises(ConfigError, match="must be above 0, got 0"):
        adapter.learn(given_support(backbone), adapter.schedule(2, std=0))
