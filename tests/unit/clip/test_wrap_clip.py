# SPDX-License-Identifier: Apache-2.0
"""A model that is loaded already is as good as one that is loaded by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import transforms

import adaptclip as ac
from adaptclip.errors import ArtifactError, BackboneError


@pytest.fixture(scope="module")
def parts(tiny_backbone):
    return tiny_backbone.model, tiny_backbone.tokenizer, tiny_backbone.transform


def test_a_wrapped_model_is_the_loaded_one(parts, tiny_backbone):
    model, tokenizer, transform = parts
    for own in (None, transform):
        clip = ac.wrap_clip(model, tokenizer, own)
        assert clip.digest == tiny_backbone.digest
        image = Image.effect_noise((70, 50), 80).convert("RGB")
        torch.testing.assert_close(clip.transform(image), tiny_backbone.transform(image))
        assert clip.name == "wrapped"


def test_a_transform_of_its_own_is_taken_and_told(parts):
    model, tokenizer, _ = parts
    side = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    own = transforms.Compose(
        [transforms.Resize((side, side)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    )
    clip = ac.wrap_clip(model, tokenizer, own)
    white = clip.transform(Image.new("RGB", (40, 90), "white"))
    torch.testing.assert_close(white, torch.full((3, side, side), 2.0))
    torch.testing.assert_close(clip.normalize(Image.new("RGB", (side, side))), torch.full((3, side, side), -2.0))
    assert clip.transform_spec["mean"] == [0.5] * 3
    assert clip.transform_spec != ac.wrap_clip(model, tokenizer).transform_spec


def test_a_transform_that_does_not_fit_is_refused(parts):
    model, tokenizer, _ = parts
    with pytest.raises(BackboneError, match="ends in ToTensor and Normalize"):
        ac.wrap_clip(model, tokenizer, lambda image: image)
    wrong = transforms.Compose(
        [transforms.Resize((7, 7)), transforms.ToTensor(), transforms.Normalize([0] * 3, [1] * 3)]
    )
    with pytest.raises(BackboneError, match=r"\(3, 7, 7\)"):
        ac.wrap_clip(model, tokenizer, wrong)


def test_what_is_no_model_or_tokenizer_is_refused(parts, tiny_backbone):
    model, tokenizer, _ = parts
    wrong: list[Any] = [(None, None), (torch.nn.Linear(2, 2), tokenizer), (model, None), (model, str)]
    for given in wrong:
        with pytest.raises(BackboneError, match="takes an open_clip model and its tokenizer"):
            ac.wrap_clip(*given)
    with pytest.raises(BackboneError, match="wrapped already"):
        ac.wrap_clip(tiny_backbone, tokenizer)


def test_load_clip_and_load_backbone_are_one():
    assert ac.load_clip.__qualname__ == "load_backbone"
    with pytest.raises(BackboneError, match="Did you mean"):
        ac.load_clip("ViT-B-61", "openai")


@pytest.mark.parametrize(("device", "message"), [("cuda", "on this machine"), ("gpu", "devices are called cpu")])
def test_a_device_that_is_not_there_is_refused_in_words(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackboneError, match=message):
        ac.load_clip("starter", device=device)


def test_an_artifact_of_a_wrapped_model_loads_with_that_model(parts, tmp_path):
    from adaptclip.reports.full import build_report

    model, tokenizer, _ = parts
    clip = ac.wrap_clip(model, tokenizer)
    data = ac.open_data(ac.load_card("digits"))
    zero_shot = ac.ZeroShotClassifier(clip, data.prompt_names)
    some = data.test.select(range(20))
    predictions = ac.predict(zero_shot, ac.FeatureCache(None).get(clip, some), some)
    report = build_report(predictions)
    ac.save_artifact(tmp_path / "a", zero_shot, clip, data, None, method="zero_shot", report=report, verdicts=[])
    loaded = ac.load(tmp_path / "a", backbone=clip)
    assert loaded.predict([some.image(0)])[0].label == data.class_names[int(predictions.pred[0])]
    with pytest.raises((BackboneError, ArtifactError), match="wrapped"):
        ac.load(tmp_path / "a")
