# SPDX-License-Identifier: Apache-2.0
"""Weights whose position embeddings have another length are refused: open_clip would resize them without a word."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import ARCHITECTURE, tiny_config, write_tiny_checkpoint

from adaptclip.clip import ClipBackbone, load_backbone
from adaptclip.clip.saving import save_open_clip
from adaptclip.errors import BackboneError

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def change_config(folder: Path, part: str, name: str, value: int) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"][part][name] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["clip", "custom_text"])
def folder(request, tmp_path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model", request.param, context_length=16)


@pytest.mark.parametrize("length", [12, 77])
def test_text_of_another_length(folder, length):
    change_config(folder, "text_cfg", "context_length", length)
    with pytest.raises(BackboneError, match=f"has 16 text positions and the architecture {length}"):
        load_backbone(f"local-dir:{folder}")
    with pytest.raises(BackboneError, match="has 16 text positions"):
        load_backbone(f"local-dir:{folder}", image_size=48)  # asks for other images, not for other texts


def test_pictures_of_another_size(folder):
    own = load_backbone(f"local-dir:{folder}")
    change_config(folder, "vision_cfg", "image_size", 64)
    with pytest.raises(BackboneError, match=r"image positions for 4 x 4 patches .* for 8 x 8.*--image-size"):
        load_backbone(f"local-dir:{folder}")
    with pytest.warns(UserWarning, match="resized from 4 x 4 to 8 x 8 patches, as images of 64 pixels were asked for"):
        asked = load_backbone(f"local-dir:{folder}", image_size=64)
    assert asked.image_size == 64
    assert asked.digest != own.digest
    again = load_backbone(f"local-dir:{folder}", image_size=32)  # the size of its weights, which its config forgot
    assert again.digest == own.digest


def test_the_own_size_asks_for_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_backbone(f"local-dir:{folder}", image_size=32).digest == load_backbone(f"local-dir:{folder}").digest


def test_sizes_that_cannot_be():
    for wrong in (-1, 1.5, True, "336"):
        with pytest.raises(BackboneError, match="image_size should be the side"):
            load_backbone(image_size=wrong)  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="starter cannot take images of 336 pixels, only of 128"):
        load_backbone(image_size=336)


def test_a_saved_model_keeps_the_size_that_was_asked_for(folder, tmp_path):
    with pytest.warns(UserWarning, match="resized"):
        backbone = load_backbone(f"local-dir:{folder}", image_size=48)
    assert backbone.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 48)
    save_open_clip(tmp_path / "saved", backbone.model.state_dict(), backbone)
    saved = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    assert (saved.image_size, saved.digest) == (48, backbone.digest)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_checkpoint_file(suffix, tmp_path, monkeypatch):
    """As safetensors, as a state_dict, and as training code nests it, of several devices."""
    config = tmp_path / "configs" / f"{ARCHITECTURE}.json"
    config.parent.mkdir()
    config.write_text(json.dumps(tiny_config(context_length=12)))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [config.parent])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {ARCHITECTURE: json.loads(config.read_text())})
    state = load_file(write_tiny_checkpoint(tmp_path / "model", context_length=16) / WEIGHTS)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        nested = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
        torch.save(nested if suffix == ".ckpt" else state, file)
    with pytest.raises(BackboneError, match="has 16 text positions and the architecture 12"):
        load_backbone(ARCHITECTURE, str(file), preprocess=PLAIN)
    open_clip.factory._MODEL_CONFIGS[ARCHITECTURE]["text_cfg"]["context_length"] = 16
    assert isinstance(load_backbone(ARCHITECTURE, str(file), preprocess=PLAIN), ClipBackbone)
