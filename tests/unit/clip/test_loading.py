# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_clip import ARCHITECTURE, OTHER_PREPROCESS, tiny_config, write_tiny_checkpoint

from adaptclip.clip import load_backbone
from adaptclip.errors import BackboneError

# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B16", "openai", r"unknown backbone 'ViT-B16'.*Did you mean \"ViT-B-16\"\?"),
        ("startr", None, r"Did you mean \"starter\"\?"),
        ("imageomics/bioclip", None, "write hf-hub:imageomics/bioclip"),
        ("ViT-B-16", None, "needs weights.*Tags of ViT-B-16: openai, laion400m_e31"),
        ("ViT-B-16", "opnai", r"neither a file nor a tag of ViT-B-16.*Did you mean \"openai\"\?.*laion2b_s34b_b88k"),
        ("ViT-B-16", "missing.pt", "neither a file nor a tag"),
        ("hf-hub:nobody", None, "hf-hub:ORGANISATION/NAME"),
        ("hf-hub:a/b", "openai", "brings its own weights"),
        ("local-dir:/nowhere", None, "is not a folder"),
        ("starter", "openai", "brings its weights"),
    ],
)
def test_unknown_names_say_which_there_are(name, pretrained, message):
    with pytest.raises(BackboneError, match=message):
        load_backbone(name, pretrained)


def test_other_arguments_are_checked(folder, architecture, weights):
    with pytest.raises(BackboneError, match=r"unknown precision 'bf8'. Did you mean \"bf16\"\?"):
        load_backbone(f"local-dir:{folder}", precision="bf8")
    with pytest.raises(BackboneError, match="are for checkpoint files"):
        load_backbone(f"local-dir:{folder}", quick_gelu=True)
    with pytest.raises(BackboneError, match="are for checkpoint files"):
        load_backbone(ARCHITECTURE, "openai", preprocess={"mean": [0, 0, 0]})
    with pytest.raises(BackboneError, match=r"unknown preprocess entry 'maen'. Did you mean \"mean\"\?"):
        load_backbone(ARCHITECTURE, str(weights), preprocess={"maen": [0, 0, 0]})
    with pytest.raises(BackboneError, match="text_weights are for 'starter' only"):
        load_backbone(f"local-dir:{folder}", text_weights=weights)
    with pytest.raises(BackboneError, match=f"For that folder write local-dir:{folder}"):
        load_backbone(str(folder))
    with pytest.raises(BackboneError, match="not a checkpoint by its name"):
        load_backbone(ARCHITECTURE, __file__)


def _bare_folder(folder: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copy(folder / "open_clip_config.json", target)
    return target


def test_a_folder_with_several_weights_is_not_guessed(folder, weights, tmp_path):
    target = _bare_folder(folder, tmp_path / "several")
    with pytest.raises(BackboneError, match="holds no weights"):
        load_backbone(f"local-dir:{target}")
    shutil.copy(weights, target / "epoch_9.safetensors")
    alone = load_backbone(f"local-dir:{target}").digest
    save_file({"context": torch.zeros(4, 64)}, target / "adapter.safetensors")
    with pytest.raises(BackboneError, match=r"adapter.safetensors, epoch_9.safetensors.*Name the right one"):
        load_backbone(f"local-dir:{target}")
    (target / "epoch_9.safetensors").rename(target / "open_clip_model.safetensors")
    assert load_backbone(f"local-dir:{target}").digest == alone


def test_a_folder_with_only_an_adapter_is_refused(folder, tmp_path):
    target = _bare_folder(folder, tmp_path / "only")
    save_file({"context": torch.zeros(4, 64)}, target / "adapter_model.safetensors")
    with pytest.raises(BackboneError, match="is an adapter, not a backbone"):
        load_backbone(f"local-dir:{target}")
    (target / "adapter_model.safetensors").rename(target / "context.safetensors")
    with pytest.raises(BackboneError, match=r"does not fit the architecture.*Missing key.*adapter alone"):
        load_backbone(f"local-dir:{target}")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": {"embed_dim": 4}}'])
def test_a_damaged_configuration_is_named(tmp_path, text):
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(BackboneError, match=r"open_clip_config\.json"):
        load_backbone(f"local-dir:{tmp_path}")


def test_a_folder_without_preprocess_is_noted(folder, tmp_path):
    target = shutil.copytree(folder, tmp_path / "plain")
    config = json.loads((target / "open_clip_config.json").read_text())
    (target / "open_clip_config.json").write_text(json.dumps({"model_cfg": config["model_cfg"]}))
    with pytest.warns(UserWarning, match="no preprocess_cfg: OpenAI's"):
        assert load_backbone(f"local-dir:{target}").transform_spec["std"] == list(open_clip.OPENAI_DATASET_STD)


def test_pictures_that_are_not_square_are_refused(folder, tmp_path):
    target = write_tiny_checkpoint(tmp_path / "m")
    config = json.loads((target / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = [32, 64]
    (target / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="images of 32 x 64 pixels"):
        load_backbone(f"local-dir:{target}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.999])
def test_a_truncated_checkpoint_is_named(architecture, weights, tmp_path, suffix, keep):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        shutil.copy(weights, whole)
    else:
        torch.save(load_file(weights), whole, _use_new_zipfile_serialization=suffix == ".pt")
    content = whole.read_bytes()
    file = tmp_path / f"cut{suffix}"
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(BackboneError, match=f"cut{suffix} .*is damaged"):
        load_backbone(ARCHITECTURE, str(file), quick_gelu=True)


@pytest.mark.parametrize(
    ("change", "number", "first"),
    [({"width": 128}, "1", "width changed"), ({"embed_dim": 32}, "2", "size mismatch for .*projection")],
)
def test_weights_of_another_architecture_are_named(architecture, tmp_path, change, number, first):
    other = write_tiny_checkpoint(tmp_path / "wide", **change) / "open_clip_model.safetensors"
    with pytest.raises(BackboneError, match=rf"does not fit the architecture \({number} complaints; first: .*{first}"):
        load_backbone(ARCHITECTURE, str(other), quick_gelu=True)


def test_weights_that_are_not_finite_are_named(architecture, weights, tmp_path):
    state = load_file(weights)
    state["visual.ln_post.weight"][5] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(BackboneError, match=r"visual\.ln_post\.weight has values that are not finite"):
        load_backbone(ARCHITECTURE, str(tmp_path / "nan.safetensors"), quick_gelu=True)


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("name", ["evil.pt", "evil.ckpt"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_code_is_refused_and_nothing_runs(architecture, tmp_path, name, archive):
    file, witness = tmp_path / name, tmp_path / "executed"
    reason = r"would run code \(Unsupported global" if archive else "a pickle of more than weights"
    expected = f"{name} .*{reason}.*refused and nothing in it was run.*safetensors"
    if archive:
        torch.save({"state_dict": {"a": torch.zeros(1)}, "x": _Hostile(witness)}, file)
    else:
        file.write_bytes(pickle.dumps(_Hostile(witness)))
    with pytest.raises(BackboneError, match=expected) as caught:
        load_backbone(ARCHITECTURE, str(file), quick_gelu=True)
    assert "weights_only" not in str(caught.value)
    assert not witness.exists()
    torch.load(file, weights_only=False) if archive else pickle.loads(file.read_bytes())
    assert witness.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_program_of_something_else_is_refused(architecture, tmp_path):
    """Its weights are read and its program is not (test_checkpoints.py)."""
    file = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))
    with pytest.raises(BackboneError, match=r"does not fit the architecture.*Unexpected key.*\"weight\", \"bias\""):
        load_backbone(ARCHITECTURE, str(file), quick_gelu=True)


@pytest.fixture
def bert_folder(tmp_path) -> Path:
    """A tiny model with a Hugging Face text tower and a word tokenizer of its own, all in one folder."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "owl"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path)
    sizes = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64).save_pretrained(tmp_path)
    config: dict[str, Any] = {**tiny_config(), "text_cfg": {"hf_model_name": str(tmp_path), "context_length": 20}}
    config["text_cfg"] |= {"hf_tokenizer_name": str(tmp_path), "hf_model_pretrained": False}
    model = open_clip.CustomTextCLIP(**config)
    save_file(dict(model.state_dict()), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    return tmp_path


def test_a_hugging_face_tower_takes_its_context_from_the_tokenizer(bert_folder):
    backbone = load_backbone(f"local-dir:{bert_folder}")
    assert (backbone.context_length, backbone.model.context_length) == (20, 64)
    tokens = backbone.tokenize(["a photo of owl", "owl " * 18])
    assert tokens[0, :7].tolist() == [2, 4, 5, 6, 7, 3, 0]
    assert tokens[1].tolist() == [2, *[7] * 18, 3]
    assert backbone.encode_text(tokens).shape == (2, 48)
    with pytest.raises(BackboneError, match=r"has 21 tokens.*is 20"):
        backbone.tokenize(["owl " * 19])
    with pytest.raises(BackboneError, match=r"Hugging Face text tower.*fp32 only"):
        load_backbone(f"local-dir:{bert_folder}", precision="bf16")


def test_a_hugging_face_tower_that_is_not_here_is_an_error_at_once(bert_folder, hub_cache):
    file = bert_folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "museum/bert"
    file.write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(BackboneError, match=r"The text tower of .*not on this machine"):
        load_backbone(f"local-dir:{bert_folder}")
    assert time.monotonic() - start < 3


# -- hub and cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty hub cache, a hub that does not exist, and offline mode off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return tmp_path / "hub"


def _put_in_cache(cache: Path, repository: str, folder: Path) -> None:
    root, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


@pytest.mark.parametrize(("name", "pretrained"), [("ViT-B-16", "openai"), ("hf-hub:imageomics/bioclip", None)])
@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_comes_at_once(hub_cache, monkeypatch, name, pretrained, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(BackboneError, match=r"not on this machine.*local-dir:FOLDER.*--backbone starter") as caught:
        load_backbone(name, pretrained)
    assert time.monotonic() - start < 3
    assert ("offline mode is on" if offline else "hub.invalid:443 does not answer") in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_hub_model_loads_without_a_network(hub_cache, monkeypatch, folder, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    _put_in_cache(hub_cache, "museum/tiny", folder)
    start = time.monotonic()
    backbone = load_backbone("hf-hub:museum/tiny")
    assert time.monotonic() - start < 3
    assert backbone.digest == load_backbone(f"local-dir:{folder}").digest
    assert backbone.transform_spec["mean"] == [0.5, 0.4, 0.3]
    assert offline is constants.HF_HUB_OFFLINE


def test_a_cached_tag_loads_without_a_network(hub_cache, architecture, folder):
    architecture["cached"] = {"hf_hub": "museum/tiny/", **OTHER_PREPROCESS}
    with pytest.raises(BackboneError, match="'cached' of Tiny-T-8: not on this machine"):
        load_backbone(ARCHITECTURE, "cached")
    _put_in_cache(hub_cache, "museum/tiny", folder)
    backbone = load_backbone(ARCHITECTURE, "cached")
    assert backbone.digest == load_backbone(f"local-dir:{folder}").digest
    assert backbone.transform_spec["mean"] == [0.1, 0.2, 0.3]


def test_a_configuration_alone_in_the_cache_is_not_a_model(hub_cache, folder, tmp_path):
    _put_in_cache(hub_cache, "museum/tiny", _bare_folder(folder, tmp_path / "bare"))
    with pytest.raises(BackboneError, match=r"hf-hub:museum/tiny \(its weights\): not on this machine"):
        load_backbone("hf-hub:museum/tiny")
