# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import torch
from open_clip import pretrained as tag_table
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import ARCHITECTURE, OTHER_PREPROCESS, make_tiny_backbone

from adaptclip.clip import image_weights_digest, load_backbone, weights_digest
from adaptclip.clip.loading import find_source
from adaptclip.errors import BackboneError


def _pictures() -> list[Image.Image]:
    """Smooth images with edges, of odd and unequal sides, as photographs have."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 7, 3), (9, 4, 3), (6, 6, 3))]
    sizes = [(101, 67), (33, 90), (64, 64)]
    return [Image.fromarray(a).resize(size, Image.Resampling.BICUBIC) for a, size in zip(small, sizes, strict=True)]


def _raw(*arguments: Any, **settings: Any) -> Any:
    """The model and evaluation transform as open_clip itself gives them."""
    return open_clip.create_model_from_pretrained(*arguments, **settings)


def _edited(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint folder with entries of open_clip_config.json replaced."""
    shutil.copytree(folder, target)
    file = target / "open_clip_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return target


# -- equal to open_clip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "resize_mode"), [("clip", "shortest"), ("custom_text", "longest"), ("clip", "squash")]
)
def test_transform_and_features_are_those_of_open_clip(tmp_path, kind, resize_mode):
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "fill_color": 7}
    ours = make_tiny_backbone(
        kind, folder=tmp_path / "m", preprocess_cfg={**preprocess, "resize_mode": resize_mode}, context_length=20
    )
    model, transform = _raw(ours.name)
    images = torch.stack([ours.transform(picture) for picture in _pictures()])
    assert torch.equal(images, torch.stack([transform(picture) for picture in _pictures()]))
    texts = ["a photo of a red fox.", "owl"]
    tokens = open_clip.get_tokenizer(ours.name)(texts)
    assert torch.equal(ours.tokenize(texts), tokens)
    with torch.no_grad():
        image_features, text_features, scale = model.eval()(images, tokens)
        torch.testing.assert_close(ours.encode_image(images), image_features, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.encode_text(tokens), text_features, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.logit_scale, scale)
    assert ours.logit_scale.shape == ()
    assert (ours.embed_dim, ours.image_size, ours.context_length) == (48, 32, 20)
    assert ours.transform_spec == {"size": 32, **{k: v for k, v in preprocess.items() if k != "fill_color"}} | {
        "resize_mode": resize_mode,
        "fill": 7,
    }
    assert json.loads(json.dumps(ours.transform_spec)) == ours.transform_spec


def test_a_tag_brings_its_own_activation_and_transform(architecture):
    ours = load_backbone(ARCHITECTURE, "openai")
    theirs, transform = _raw(ARCHITECTURE, "openai", force_quick_gelu=True)
    assert any(isinstance(module, QuickGELU) for module in ours.model.modules())
    images = torch.stack([ours.transform(picture) for picture in _pictures()])
    assert torch.equal(images, torch.stack([transform(picture) for picture in _pictures()]))
    with torch.no_grad():
        assert torch.equal(ours.encode_image(images), theirs.eval().encode_image(images, normalize=True))
    assert (ours.name, ours.pretrained) == (ARCHITECTURE, "openai")


def test_every_tag_of_open_clip_gets_the_activation_it_was_trained_with(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: "somewhere.safetensors")
    table = open_clip.list_pretrained()
    quick = 0
    for architecture, tag in table:
        wanted = bool(tag_table.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
        if "audio_cfg" in (open_clip.get_model_config(architecture) or {}):  # in open_clip 4
            with pytest.raises(BackboneError, match="is a model of sounds"):
                find_source(architecture, tag)
            continue
        if "naflex" in architecture:
            with pytest.raises(BackboneError, match="NaFlex"):
                find_source(architecture, tag)
            continue
        source = find_source(architecture, tag)
        by_name = bool((open_clip.get_model_config(architecture) or {}).get("quick_gelu"))
        assert source.quick_gelu or by_name or not wanted
        assert wanted or not source.quick_gelu
        quick += wanted
    assert find_source("ViT-B-16", "openai").quick_gelu
    assert not find_source("ViT-B-16", "laion2b_s34b_b88k").quick_gelu
    assert len(table) > 100
    assert quick > 20


def test_a_slash_in_the_architecture_is_open_clips_dash(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: "somewhere.safetensors")
    assert find_source("ViT-B/16", "openai") == find_source("ViT-B-16", "openai")


# -- checkpoint files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_checkpoint_file_takes_what_all_tags_agree_on(architecture, weights, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    state = load_file(weights)
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, file)
    with pytest.warns(UserWarning, match=f"GELU is used.*{ARCHITECTURE}-quickgelu"):
        backbone = load_backbone(ARCHITECTURE, str(file))
    assert backbone.transform_spec["mean"] == [0.1, 0.2, 0.3]
    assert backbone.transform_spec["resize_mode"] == "squash"
    assert not any(isinstance(module, QuickGELU) for module in backbone.model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick = load_backbone(ARCHITECTURE, str(file), quick_gelu=True)
    assert any(isinstance(module, QuickGELU) for module in quick.model.modules())
    assert quick.digest == load_backbone(ARCHITECTURE, "openai").digest != backbone.digest


def test_where_tags_differ_openais_transform_is_used_with_a_note(architecture, weights):
    architecture["other"] = {"file": str(weights), **OTHER_PREPROCESS, "mean": (0.9, 0.9, 0.9)}
    with pytest.warns(UserWarning, match="differ in them: OpenAI's are used") as notes:
        backbone = load_backbone(ARCHITECTURE, str(weights), quick_gelu=False)
    assert notes[0].filename == __file__
    assert backbone.transform_spec["mean"] == list(open_clip.OPENAI_DATASET_MEAN)


def test_stated_preprocess_wins(architecture, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stated = {"mean": [0.25, 0.25, 0.25], "interpolation": "bilinear"}
        backbone = load_backbone(ARCHITECTURE, str(weights), quick_gelu=False, preprocess=stated)
    assert backbone.transform_spec["mean"] == [0.25, 0.25, 0.25]
    assert backbone.transform_spec["interpolation"] == "bilinear"


# -- digest, precision, frozen -----------------------------------------------------------------------------------------


def test_digest_changes_with_one_weight_the_activation_and_the_precision(folder, tmp_path):
    digest = load_backbone(f"local-dir:{folder}").digest
    assert len(digest) == 64
    assert load_backbone(f"local-dir:{folder}").digest == digest
    config = json.loads((folder / "open_clip_config.json").read_text())
    quick = _edited(folder, tmp_path / "quick", model_cfg={**config["model_cfg"], "quick_gelu": True})
    changed = _edited(folder, tmp_path / "changed")
    state = load_file(changed / "open_clip_model.safetensors")
    state["ln_final.bias"][3] += 1e-6
    save_file(state, changed / "open_clip_model.safetensors")
    others = {load_backbone(f"local-dir:{other}").digest for other in (quick, changed)}
    others |= {load_backbone(f"local-dir:{folder}", precision=precision).digest for precision in ("bf16", "fp16")}
    assert len(others | {digest}) == 5


def test_digest_covers_batch_statistics():
    layer = torch.nn.BatchNorm1d(3)
    before = weights_digest(layer)
    assert layer.running_mean is not None
    layer.running_mean[1] = 0.5
    assert weights_digest(layer) != before


@pytest.mark.parametrize(
    ("kind", "precision", "dtype"), [("clip", "bf16", torch.bfloat16), ("custom_text", "fp16", torch.float16)]
)
def test_low_precision_weights_give_float32_features_close_to_the_full_ones(kind, precision, dtype):
    full, low = make_tiny_backbone(kind), make_tiny_backbone(kind, precision=precision)
    assert low.model.visual.conv1.weight.dtype == dtype
    images = torch.stack([full.transform(picture) for picture in _pictures()])
    tokens = full.tokenize(["a photo of a red fox.", "owl"])
    for ours, exact in (
        (low.encode_image(images), full.encode_image(images)),
        (low.encode_text(tokens), full.encode_text(tokens)),
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(len(ours)))
        assert (ours * exact).sum(-1).min() > 0.999


def test_frozen_whatever_train_is_asked(tiny_backbone):
    assert not any(parameter.requires_grad for parameter in tiny_backbone.parameters())
    assert tiny_backbone.train() is tiny_backbone
    assert not any(module.training for module in tiny_backbone.modules())


def test_normalize_is_the_end_of_the_transform(tiny_backbone):
    picture = _pictures()[0].resize((32, 32))
    expected = tiny_backbone.transform(picture)
    assert torch.equal(tiny_backbone.normalize(picture), expected)
    assert torch.equal(tiny_backbone.normalize(np.array(picture)), expected)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (32, 33)),
        Image.new("L", (32, 32)),
        np.zeros((32, 32, 3), np.float32),
        np.zeros((3, 32, 32), np.uint8),
    ],
)
def test_normalize_refuses_what_is_not_cropped_rgb(tiny_backbone, picture):
    with pytest.raises(BackboneError, match="8-bit RGB images of 32 x 32"):
        tiny_backbone.normalize(picture)


def test_the_text_tower_reproduces_encode_text(tiny_backbone):
    tokens = tiny_backbone.tokenize(["a photo of an owl."])
    features = tiny_backbone.text.encode_embeddings(tiny_backbone.text.embed_tokens(tokens), tokens.argmax(-1))
    ours = torch.nn.functional.normalize(features, dim=-1)
    torch.testing.assert_close(ours, tiny_backbone.encode_text(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_words", "fits"), [(75, True), (76, False)])
def test_tokenize_takes_the_whole_context_and_cuts_nothing(tiny_backbone, num_words, fits):
    prompt = " ".join(["owl"] * num_words)
    if fits:
        assert tiny_backbone.tokenize([prompt])[0, -1] == 49407
    else:
        with pytest.raises(BackboneError, match=r"'owl owl.*has 78 tokens.*is 77\. Shorten"):
            tiny_backbone.tokenize(["fine", prompt])


# -- whose image features these are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "custom_text"])
def test_image_digest_knows_the_image_tower_and_nothing_else(tmp_path, kind):
    backbone = make_tiny_backbone(kind, folder=tmp_path / "m")
    weights = load_file(tmp_path / "m" / "open_clip_model.safetensors")
    looked_at = 0
    for name, value in weights.items():
        with torch.no_grad():
            part = backbone.model.state_dict()[name]
            part.view(-1)[0] += 1
            changed = image_weights_digest(backbone.model) != backbone.image_digest
            part.copy_(value)
        assert changed == name.startswith("visual."), name
        looked_at += 1
    assert looked_at >= 50
    assert image_weights_digest(backbone.model) == backbone.image_digest
    low = load_backbone(backbone.name, precision="bf16")
    quick = make_tiny_backbone(kind, quick_gelu=True)
    assert len({backbone.image_digest, backbone.digest, low.image_digest, quick.image_digest}) == 4


def test_a_model_with_its_own_way_to_encode_images_counts_as_a_whole():
    model = make_tiny_backbone().model
    known, whole = image_weights_digest(model), weights_digest(model)
    assert known != whole

    class Prompted(open_clip.CLIP):
        def encode_image(self, image, normalize=False):
            own = cast(Any, self)
            return own.visual(image) + own.positional_embedding.mean()

    model.__class__ = Prompted
    assert image_weights_digest(model) == whole
    model.__class__ = open_clip.CLIP
    model.encode_image = lambda image, normalize=False: image
    assert image_weights_digest(model) == whole


@pytest.mark.parametrize(
    ("side", "setting", "value"),
    [
        ("text_cfg", "heads", 4),
        ("vision_cfg", "head_width", 16),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "act_kwargs", {"approximate": "tanh"}),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-3}),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "no_causal_mask", True),
    ],
)
def test_settings_that_leave_no_trace_in_the_weights_are_in_the_digest(tmp_path, side, setting, value):
    """The same weights under another configuration: features differ, so an artifact must not take it for its model."""
    from tiny_clip import write_tiny_checkpoint

    folder = write_tiny_checkpoint(tmp_path / "tiny", context_length=16, width=32)
    plain = load_backbone(f"local-dir:{folder}")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][side][setting] = value
    file.write_text(json.dumps(config))
    other = load_backbone(f"local-dir:{folder}")
    own = (plain.model.state_dict(), other.model.state_dict())
    assert all(torch.equal(tensor, own[1][name]) for name, tensor in own[0].items())
    assert other.digest != plain.digest
    assert (other.image_digest != plain.image_digest) == (side == "vision_cfg")
