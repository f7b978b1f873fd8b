# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptclip.clip.starter_training import learn_words
from adaptclip.errors import ConfigError

NUM_CLASSES, WIDTH = 3, 8
TOKENS = torch.tensor([2, 3, 4])
"""One per class; 0, 1 and 5 to 9 are the other words."""


class World:
    """A text tower that adds up its words, and images around one direction per class."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(10, WIDTH, generator=generator))
        self.labels = torch.arange(60) % NUM_CLASSES
        centres = torch.randn(NUM_CLASSES, WIDTH, generator=generator)
        noise = torch.randn(60, WIDTH, generator=generator)
        self.images = F.normalize(centres[self.labels] + 0.2 * noise, dim=-1)
        self.prompts = torch.tensor([[[first, int(token)] for token in TOKENS] for first in (0, 1)])
        self.others = F.normalize(torch.randn(5, WIDTH, generator=generator), dim=-1)
        self.kept = torch.tensor([[5, 2], [6, 3], [7, 8]])

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.embedding(ids).sum(dim=1), dim=-1)

    def learn(self, **changed: Any) -> float:
        settings: dict[str, Any] = {
            "prompts": self.prompts, "images": self.images, "labels": self.labels, "others": self.others,
            "kept": self.kept, "scale": 20.0, "steps": 60, "lr": 0.1, "keep_weight": 5.0,
        }  # fmt: skip
        return learn_words(self.embedding, self.encode, TOKENS, **settings | changed)

    @torch.no_grad()
    def accuracy(self, template: int) -> float:
        texts = torch.cat([self.encode(self.prompts[template]), self.others])
        return float(((self.images @ texts.T).argmax(dim=1) == self.labels).float().mean())


def test_words_name_their_pictures_and_no_other_embedding_moves():
    world = World()
    before = world.embedding.weight.detach().clone()
    assert max(world.accuracy(0), world.accuracy(1)) < 0.7
    world.learn(keep_weight=0.5, steps=100)
    assert min(world.accuracy(0), world.accuracy(1)) > 0.95
    others = [row for row in range(10) if row not in TOKENS]
    assert torch.equal(world.embedding.weight[others], before[others])
    assert not torch.isclose(world.embedding.weight[TOKENS], before[TOKENS]).any()
    assert not world.embedding.weight.requires_grad


def test_the_answer_is_how_far_kept_texts_moved_and_a_weight_holds_them():
    found = {}
    for weight in (0.0, 5.0, 500.0):
        world = World()
        before = world.encode(world.kept).detach()
        answer = world.learn(keep_weight=weight)
        cosines = (world.encode(world.kept).detach() * before).sum(dim=1)
        # The third text holds no learnt token and is not counted.
        assert answer == pytest.approx(float(cosines[:2].mean()), abs=1e-6)
        assert cosines[2] == pytest.approx(1, abs=1e-6)
        found[weight] = answer
    assert found[0.0] < found[5.0] < found[500.0]
    assert found[500.0] > 0.95
    assert World().learn(kept=torch.tensor([[7, 8]])) == 1


def test_it_depends_on_the_seed_alone():
    worlds = [World() for _ in range(3)]
    # More images than are drawn at a time, so that draws differ.
    for world, seed in zip(worlds, (1, 1, 2), strict=True):
        world.learn(images=world.images.repeat(10, 1), labels=world.labels.repeat(10), steps=5, seed=seed)
    first, again, other = (world.embedding.weight for world in worlds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "change", [{"labels": torch.arange(59) % 3}, {"labels": torch.arange(60) % 4}, {"images": torch.ones(0, WIDTH)}]
)
def test_labels_that_do_not_fit_are_refused(change):
    with pytest.raises(ConfigError, match="each image needs a label from 0 to 2, one per class of the prompts; got"):
        World().learn(**change)
