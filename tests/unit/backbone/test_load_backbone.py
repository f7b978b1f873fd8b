from __future__ import annotations

import json
import pickle
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip import factory
from open_clip import pretrained as tag_table
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import make_tiny_backbone, tiny_config, write_tiny_checkpoint

from adaptclip.backbone import load_backbone, weights_digest
from adaptclip.backbone.loading import find_source
from adaptclip.errors import BackboneError

ARCHITECTURE = "Tiny-T-8"
OTHER_PREPROCESS = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5, 0.6, 0.7),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def weights(folder) -> Path:
    return folder / "open_clip_model.safetensors"


@pytest.fixture
def architecture(monkeypatch, weights):
    """An architecture that open_clip knows, with a tag of another activation and transform than its default."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, ARCHITECTURE, tiny_config())
    tags = {"openai": {"file": str(weights), "quick_gelu": True, **OTHER_PREPROCESS}}
    monkeypatch.setitem(tag_table._PRETRAINED, ARCHITECTURE, tags)
    return tags


def _pictures() -> list[Image.Image]:
    """Smooth pictures with edges, of odd and unequal sides, as photographs have."""
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
    with pytest.raises(BackboneError, match="8-bit RGB pictures of 32 x 32"):
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
    target = _edited(folder, tmp_path / "plain", preprocess_cfg={})
    with pytest.warns(UserWarning, match="no preprocess_cfg: OpenAI's"):
        assert load_backbone(f"local-dir:{target}").transform_spec["std"] == list(open_clip.OPENAI_DATASET_STD)


def test_pictures_that_are_not_square_are_refused(folder, tmp_path):
    target = write_tiny_checkpoint(tmp_path / "m")
    config = json.loads((target / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = [32, 64]
    (target / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="pictures of 32 x 64 pixels"):
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


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file", "ignore::FutureWarning")
def test_a_torchscript_program_is_refused(architecture, tmp_path):
    file = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))
    with pytest.raises(BackboneError, match=r"TorchScript program.*state_dict\(\)"):
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
    with pytest.raises(BackboneError, match="has 21 tokens.*is 20"):
        backbone.tokenize(["owl " * 19])
    with pytest.raises(BackboneError, match="Hugging Face text tower.*fp32 only"):
        load_backbone(f"local-dir:{bert_folder}", precision="bf16")


def test_a_hugging_face_tower_that_is_not_here_is_an_error_at_once(bert_folder, hub_cache):
    file = bert_folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "museum/bert"
    file.write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(BackboneError, match="The text tower of .*not on this machine"):
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
