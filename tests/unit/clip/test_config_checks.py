# SPDX-License-Identifier: Apache-2.0
"""Bundles that come from anywhere: they load without a network, and cannot reach out, run code or fill the memory."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from tiny_kinds import KINDS, write_kind

from adaptclip.clip import load_backbone
from adaptclip.clip.config_checks import MAX_CONFIG_BYTES, check_archive, check_config, check_preprocess
from adaptclip.clip.saving import save_open_clip
from adaptclip.errors import BackboneError


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_kind(tmp_path_factory.mktemp("bert") / "model", KINDS["BiomedCLIP"])


@pytest.fixture
def bundle(bert, tmp_path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "bundle"))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_model(bundle: Path, **entries: Any) -> None:
    """Sets dotted entries of the bundle's model_cfg."""

    def change(config: dict[str, Any]) -> None:
        for path, value in entries.items():
            *parents, last = path.split("__")
            target = config["model_cfg"]
            for parent in parents:
                target = target[parent]
            target[last] = value

    edit(bundle / "open_clip_config.json", change)


def test_a_bundle_brings_its_text_encoder(bundle, tmp_path, monkeypatch):
    before = load_backbone(f"local-dir:{bundle}")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("local-dir:bundle").digest == before.digest
    # A bundle that is moved still finds it.
    moved = bundle.rename(tmp_path / "moved")
    assert load_backbone(f"local-dir:{moved}").digest == before.digest


def test_saving_keeps_the_text_encoder(bundle, tmp_path):
    backbone = load_backbone(f"local-dir:{bundle}")
    save_open_clip(tmp_path / "saved", backbone.model.state_dict(), backbone)
    shutil.rmtree(bundle)
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    assert again.digest == backbone.digest
    tokens = again.tokenize(["a rose"])
    assert torch.equal(again.encode_text(tokens), backbone.encode_text(tokens))


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "text_encoder/../../elsewhere"])
def test_a_text_encoder_outside_of_the_bundle_is_refused(bundle, name):
    shutil.copytree(bundle / "text_encoder", bundle.parent / "elsewhere")
    edit_model(bundle, text_cfg__hf_model_name=name)
    with pytest.raises(BackboneError, match="which leaves the folder"):
        load_backbone(f"local-dir:{bundle}")


def test_a_link_out_of_the_bundle_is_refused(bundle):
    (bundle / "text_encoder").rename(bundle.parent / "elsewhere")
    (bundle / "text_encoder").symlink_to(bundle.parent / "elsewhere")
    with pytest.raises(BackboneError, match="text_encoder is a link that leaves the folder"):
        load_backbone(f"local-dir:{bundle}")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"embed_dim": 10**9}, r"states embed_dim = 1000000000, more than any real model .*16,384"),
        ({"vision_cfg__image_size": 10**6}, r"states vision_cfg.image_size = 1000000"),
        ({"text_cfg__context_length": float("inf")}, r"states text_cfg.context_length = inf"),
        ({"vision_cfg__layers": [1] * 5000}, r"states vision_cfg.layers.length = inf"),
        ({"vision_cfg__timm_model_name": "vit_base_patch61_224"}, r"timm model 'vit_base_patch61_224'.*Did you mean"),
        ({"vision_cfg__timm_model_name": "hf-hub:a/b"}, r"timm model 'hf-hub:a/b', which this timm does not have"),
        ({"text_cfg__hf_model_name": "a/b/c"}, r"text encoder 'a/b/c', which is not a repository"),
        ({"vision_cfg": "large"}, r"is not a model configuration of open_clip"),
    ],
)
def test_an_absurd_configuration_is_named(bundle, entries, message):
    edit_model(bundle, **entries)
    with pytest.raises(BackboneError, match=message):
        load_backbone(f"local-dir:{bundle}")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "gpt9"}, r"of the kind 'gpt9', which open_clip cannot build"),
        ({"hidden_size": 10**6}, r"states 2 layers .*of width 1000000"),
        ({"num_hidden_layers": 10**5}, r"states 100000 layers"),
        ({"num_decoder_layers": 200}, r"200 in its decoder"),
        ({"max_position_embeddings": 10**12}, r"max_position_embeddings = 1000000000000"),
        ({"hidden_size": 8192, "num_hidden_layers": 24}, r"describes at least \d+,.* but open_clip_model"),
    ],
)  # fmt: skip
def test_an_absurd_text_encoder_is_named(bundle, entries, message):
    edit(bundle / "text_encoder" / "config.json", lambda config: config.update(entries))
    with pytest.raises(BackboneError, match=message):
        load_backbone(f"local-dir:{bundle}")


def test_sizes_that_the_weights_cannot_fill(bundle):
    edit_model(bundle, vision_cfg={"image_size": 32, "patch_size": 16, "width": 8192, "layers": 48})
    with pytest.raises(BackboneError, match="the file is cut off, or they do not belong together"):
        load_backbone(f"local-dir:{bundle}")


def test_every_published_configuration_passes():
    names = open_clip.list_models()
    refused = []
    for name in names:
        config = open_clip.get_model_config(name) or {}
        if {"audio_cfg", "genlip_cfg", "genlap_cfg"} & set(config) or "naflex" in str(config["vision_cfg"]):
            with pytest.raises(BackboneError, match=rf"^{name} (is a (model of sounds|generative)|has the .*NaFlex)"):
                check_config(config, where=name)
            refused.append(name)
        else:
            check_config(config, where=name)
    assert len(names) - len(refused) > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_cfg": {}}, "mine is a model of sounds"),
        ({"genlip_cfg": {}}, "mine is a generative model"),
        ({"vision_cfg": {"timm_model_name": "naflexvit_base_patch16_gap"}}, "mine has the image tower .*NaFlex"),
    ],
)
def test_other_models_of_open_clip_4_are_refused_by_name(changes, message):
    config = {"embed_dim": 32, "vision_cfg": {}, "text_cfg": {}, **changes}
    with pytest.raises(BackboneError, match=message):
        check_config(config, where="mine")


def test_files_of_absurd_size_are_not_read(bundle):
    file = bundle / "open_clip_config.json"
    file.write_text(file.read_text() + " " * MAX_CONFIG_BYTES)
    with pytest.raises(BackboneError, match="a configuration has at most"):
        load_backbone(f"local-dir:{bundle}")


def test_nested_without_end_is_not_followed(bundle):
    (bundle / "open_clip_config.json").write_text("[" * 200_000)
    with pytest.raises(BackboneError, match="should be a JSON configuration"):
        load_backbone(f"local-dir:{bundle}")


def test_a_tokenizer_with_code_is_refused(bundle):
    edit(bundle / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}))
    (bundle / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(BackboneError, match="asks for code of its own"):
        load_backbone(f"local-dir:{bundle}")


def test_a_safetensors_header_of_absurd_length(bundle):
    weights = bundle / "open_clip_model.safetensors"
    weights.write_bytes((2**60).to_bytes(8, "little") + weights.read_bytes()[8:])
    with pytest.raises(BackboneError, match="is damaged"):
        load_backbone(f"local-dir:{bundle}")


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("archive", [True, False])
def test_hostile_weights_in_a_bundle_are_not_run(bundle, tmp_path, archive):
    witness, file = tmp_path / "executed", bundle / "open_clip_pytorch_model.bin"
    (bundle / "open_clip_model.safetensors").unlink()
    hostile = {"state_dict": {"a": torch.zeros(1)}, "x": _Hostile(witness)}
    if archive:
        torch.save(hostile, file)
    else:
        file.write_bytes(pickle.dumps(hostile))
    with pytest.raises(BackboneError, match="nothing in it was run"):
        load_backbone(f"local-dir:{bundle}")
    assert not witness.exists()


def test_weights_beside_the_text_encoder_are_not_even_read(bundle, tmp_path):
    witness = tmp_path / "executed"
    (bundle / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(_Hostile(witness)))
    assert load_backbone(f"local-dir:{bundle}").embed_dim == 96
    assert not witness.exists()


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path):
    bomb, plain = tmp_path / "bomb.pt", tmp_path / "plain.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 2**24)
    with pytest.raises(BackboneError, match=r"unpacks to 16,777,216 bytes from"):
        check_archive(bomb)
    torch.save({"a": torch.zeros(1000)}, plain)
    check_archive(plain)


def test_a_torch_archive_loads_as_safetensors_do(bundle):
    digest = load_backbone(f"local-dir:{bundle}").digest
    weights = bundle / "open_clip_model.safetensors"
    torch.save(load_file(weights), bundle / "open_clip_pytorch_model.bin")
    weights.unlink()
    assert load_backbone(f"local-dir:{bundle}").digest == digest


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (
            "interpolation",
            "bicubjc",
            "interpolation of preprocess_cfg should be bicubic, .*, got 'bicubjc'",
        ),
        ("resize_mode", "x", "shortest, longest or squash"),
        ("mean", 7.25, "mean of preprocess_cfg should be three numbers, got 7.25"),
        ("mean", [0.5], "three numbers"),
        ("mean", ["a", "b", "c"], "three numbers"),
        ("std", None, "three numbers above 0"),  # open_clip would take OpenAI's without a word
        ("std", [0, 1, 1], "three numbers above 0"),
        ("std", [0.5, 0.5, -0.5], "three numbers above 0"),
        ("mode", "CMYK", "should be RGB"),
        ("fill_color", "x", "a whole number or three of them"),
        ("size", [224, 0], "one or two whole numbers of pixels"),
        ("size", True, "one or two whole numbers of pixels"),
    ],
)
def test_preprocessing_that_no_model_has_is_refused(entry, value, message):
    check_preprocess({"mean": [0.5, 0.4, 0.3], "std": [1, 0.5, 0.5], "size": [224, 224], "fill_color": 0}, where="x")
    with pytest.raises(BackboneError, match=message):
        check_preprocess({entry: value}, where="x")


def test_preprocessing_that_is_passed_over_is_said():
    with pytest.warns(UserWarning, match="'stx' of preprocess_cfg is passed over. Did you mean \"std\""):
        check_preprocess({"stx": [1, 1, 1]}, where="x")
    with pytest.raises(BackboneError, match="should be an object, got list"):
        check_preprocess([1], where="x")
