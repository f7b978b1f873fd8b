# SPDX-License-Identifier: Apache-2.0
"""Folders of transformers: the same features, logits, tokens and pixels as transformers' own model gives."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from open_clip import factory
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_kinds import byte_level, gemma, sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adaptclip.clip import ClipBackbone, load_backbone
from adaptclip.clip.loading import architecture_of
from adaptclip.clip.saving import save_open_clip
from adaptclip.errors import BackboneError

TEXTS = ["a photo of a rose.", "a photo of a lily of the valley.", "fox", "a red fox and a hairy wombat"]


def clip_words() -> PreTrainedTokenizerFast:
    """CLIP's own layout as transformers writes it: <start> words <end>, filled with the end token, the highest id."""
    letters = sorted("abcdefghijklmnopqrstuvwxyz.")
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", end), ("<|startoftext|>", start), trim_offsets=False, add_prefix_space=False
    )
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<|endoftext|>", **special)


def clip_config(act: str = "quick_gelu", *, eos: int = 55, vocabulary: int = 56, **text: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": act}
    words = {"hidden_size": 32, "intermediate_size": 72, "max_position_embeddings": 40, "vocab_size": vocabulary}
    words |= {"eos_token_id": eos, "bos_token_id": 0, "pad_token_id": 1}
    image = {"hidden_size": 48, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
    return transformers.CLIPConfig(
        text_config={**sizes, **words, **text}, vision_config={**sizes, **image}, projection_dim=24
    )


def metaclip_2_config() -> Any:
    config = clip_config("gelu", eos=2, vocabulary=360).to_dict()
    towers = {name: config[name] for name in ("text_config", "vision_config")}
    return transformers.MetaClip2Config(**towers, projection_dim=24)


def siglip_config(text_act: str = "gelu_pytorch_tanh", image_act: str = "gelu_pytorch_tanh", **image: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"hidden_size": 48, "intermediate_size": 72, "max_position_embeddings": 40, "vocab_size": 160}
    words |= {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0, "projection_size": 48}
    vision = {"hidden_size": 48, "intermediate_size": 192, "image_size": 32, "patch_size": 16, **image}
    return transformers.SiglipConfig(
        text_config={**sizes, "hidden_act": text_act, **words},
        vision_config={**sizes, "hidden_act": image_act, **vision},
    )


def write(folder: Path, config: Any, tokenizer: Any, processor: Any = None, **save: Any) -> Any:
    """Writes a folder as transformers does, and returns its model."""
    kinds = {"clip": "CLIPModel", "siglip": "SiglipModel", "metaclip_2": "MetaClip2Model"}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(transformers, kinds[config.model_type])(config).eval()
        for name, parameter in model.named_parameters():
            # As large as trained ones, so that activation, pooling and mask can be seen in the features.
            parameter.add_(torch.randn_like(parameter) * (0.1 if "logit" not in name else 0.5))
    model.save_pretrained(folder, **save)
    tokenizer.save_pretrained(folder)
    if processor is None:
        side = config.vision_config.image_size
        clip = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        processor = (
            transformers.SiglipImageProcessorPil(size={"height": side, "width": side})
            if config.model_type == "siglip"
            else transformers.CLIPImageProcessorPil(**clip)
        )
    processor.save_pretrained(folder)
    return model


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same(ours: ClipBackbone, theirs: Any, folder: Path) -> None:
    """Tokens, features and logits of our model are those of transformers'."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = words(TEXTS, padding="max_length", max_length=ours.context_length, return_tensors="pt").input_ids
    assert torch.equal(ours.tokenize(TEXTS), tokens)
    out = theirs(input_ids=tokens, pixel_values=pixels())
    image, text = ours.encode_image(pixels()), ours.encode_text(tokens)
    torch.testing.assert_close(image, out.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, out.text_embeds, atol=1e-5, rtol=0)
    logits = ours.logit_scale * image @ text.T + (0 if ours.logit_bias is None else ours.logit_bias)
    torch.testing.assert_close(logits, out.logits_per_image, atol=1e-4, rtol=1e-5)
    # The features differ between images and texts, or all of this would hold for any tower.
    assert (image[0] - image[1]).abs().max() > 0.05
    assert (text[0] - text[1]).abs().max() > 0.05


CASES: dict[str, tuple[Any, Any]] = {
    "OpenAI's CLIP": (clip_config, clip_words),
    "with the end token of early versions": (lambda: clip_config(eos=2), clip_words),
    "with GELU": (lambda: clip_config("gelu"), clip_words),
    "with GELU by tanh": (lambda: clip_config("gelu_pytorch_tanh"), clip_words),
    "pooled at an end token that is not the highest": (lambda: clip_config(eos=1, vocabulary=160), gemma),
    "MetaCLIP 2": (lambda: metaclip_2_config(), byte_level),
    "SigLIP": (siglip_config, lambda: sentencepiece(pad="</s>")),
    "SigLIP with exact GELU": (lambda: siglip_config("gelu", "gelu"), lambda: sentencepiece(pad="</s>")),
    "SigLIP 2 of a fixed size": (siglip_config, gemma),
}


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers(case, tmp_path):
    make, tokenizer = CASES[case]
    config = make()
    theirs = write(tmp_path, config, tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = load_backbone(f"local-dir:{tmp_path}")
    assert_same(ours, theirs, tmp_path)


@pytest.mark.parametrize("case", ["OpenAI's CLIP", "SigLIP", "MetaCLIP 2"])
def test_prompts_can_be_learnt(case, tmp_path):
    """The text tower taken apart gives what it gives as a whole, so that CoOp and its kin apply."""
    make, tokenizer = CASES[case]
    write(tmp_path, make(), tokenizer())
    ours = load_backbone(f"local-dir:{tmp_path}")
    tokens = ours.tokenize(TEXTS)
    tower = ours.text
    features = tower.encode_embeddings(tower.embed_tokens(tokens), tower.pooled_position(tokens))
    torch.testing.assert_close(
        torch.nn.functional.normalize(features, dim=-1), ours.encode_text(tokens), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("case", ["OpenAI's CLIP", "SigLIP"])
def test_saved_as_an_open_clip_folder_it_is_the_same_model(case, tmp_path):
    make, tokenizer = CASES[case]
    theirs = write(tmp_path / "theirs", make(), tokenizer())
    ours = load_backbone(f"local-dir:{tmp_path / 'theirs'}")
    save_open_clip(tmp_path / "saved", ours.model.state_dict(), ours)
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    assert again.digest == ours.digest
    assert again.transform_spec == ours.transform_spec
    assert_same(again, theirs, tmp_path / "theirs")


@pytest.mark.parametrize("save", [{"max_shard_size": "20KB"}, {}])
@pytest.mark.parametrize("pickled", [False, True])
def test_in_shards_and_as_a_pickle(save, pickled, tmp_path):
    theirs = write(tmp_path, clip_config(), clip_words(), **save)
    if pickled:
        for file in tmp_path.glob("*.safetensors"):
            torch.save(load_file(file), file.with_name(file.name.replace(".safetensors", ".bin")))
            file.unlink()
        for index in tmp_path.glob("*.index.json"):
            text = index.read_text().replace(".safetensors", ".bin")
            index.unlink()
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    assert len(list(tmp_path.glob("*-of-*"))) == (0 if not save else len(list(tmp_path.glob("model-*"))))
    assert bool(list(tmp_path.glob("*.index.json"))) == bool(save)
    assert_same(load_backbone(f"local-dir:{tmp_path}"), theirs, tmp_path)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 7, 3), (9, 4, 3), (6, 6, 3))]
    sizes = [(101, 67), (40, 56), (64, 64)]
    return [Image.fromarray(a).resize(size, Image.Resampling.BICUBIC) for a, size in zip(small, sizes, strict=True)]


PROCESSORS = {
    "clip": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "bilinear": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
    "own mean": {
        "size": {"height": 32, "width": 32}, "do_center_crop": False, "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    },
    "not normalised": {"size": {"height": 32, "width": 32}, "do_center_crop": False, "do_normalize": False},
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_folders_processor(case, tmp_path):
    """Where an odd number of rows or columns is cropped, torchvision and transformers begin one pixel apart."""
    processor = transformers.CLIPImageProcessorPil(**PROCESSORS[case])
    write(tmp_path, clip_config(), clip_words(), processor)
    ours = load_backbone(f"local-dir:{tmp_path}")
    for picture in pictures():
        theirs = processor(picture, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(ours.transform(picture), theirs, atol=1e-5, rtol=0)


def edit(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for path, value in entries.items():
        *parents, last = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "chinese_clip"}, r"of the kind 'chinese_clip'.*clip, metaclip_2, siglip"),
        ({"model_type": "siglip2"}, r"NaFlex kind.*fixed size"),
        ({"model_type": "clip_vision_model"}, r"one tower of a CLIP alone; take the whole model"),
        ({"text_config__hidden_act": "gelu"}, r"activations gelu and quick_gelu together"),
        ({"vision_config__hidden_act": "swish", "text_config__hidden_act": "swish"}, r"activations swish together"),
        ({"text_config__num_attention_heads": 5}, r"5 attention heads do not divide|not a configuration"),
        ({"vision_config__image_size": 10**6}, r"image_size = 1000000, more than any real model"),
        ({"vision_config__hidden_size": 8192, "vision_config__num_hidden_layers": 100}, r"describes at least"),
        ({"vision_config__patch_size": "x"}, r"not a configuration of transformers"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, r"asks for code of its own"),
        ({"text_config__num_hidden_layers": 3}, r"does not fit the architecture.*Missing key"),
    ],
)
def test_what_is_refused(entries, message, tmp_path):
    write(tmp_path, clip_config(), clip_words())
    edit(tmp_path, **entries)
    with pytest.raises(BackboneError, match=message):
        load_backbone(f"local-dir:{tmp_path}")


def test_a_siglip_of_sizes_that_no_timm_tower_has(tmp_path):
    write(tmp_path, siglip_config(num_hidden_layers=3), gemma())
    with pytest.raises(BackboneError, match=r"3 layers of width 48 \(2 heads, patches of 16, images of 32\).*timm"):
        load_backbone(f"local-dir:{tmp_path}")


def test_a_folder_without_tokenizer_or_with_a_part_of_the_shards(tmp_path):
    write(tmp_path / "a", clip_config(), clip_words(), max_shard_size="20KB")
    next((tmp_path / "a").glob("model-00002-*")).unlink()
    with pytest.raises(BackboneError, match=r"shards of model.safetensors.index.json.*model-00002.*missing"):
        load_backbone(f"local-dir:{tmp_path / 'a'}")
    write(tmp_path / "b", clip_config(), clip_words())
    (tmp_path / "b" / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match=r"holds no tokenizer.*save_pretrained"):
        load_backbone(f"local-dir:{tmp_path / 'b'}")


def test_a_folder_without_a_processor_says_which_transform_is_used(tmp_path):
    write(tmp_path, siglip_config(), gemma())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="no preprocessor_config.json: the mean and standard deviation"):
        ours = load_backbone(f"local-dir:{tmp_path}")
    assert ours.transform_spec["mean"] == [0.5] * 3
    assert ours.transform_spec["resize_mode"] == "squash"


def test_a_processor_of_another_size_is_said(tmp_path):
    other = transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    write(tmp_path, clip_config(), clip_words(), other)
    with pytest.warns(UserWarning, match="resizes or crops to 32 and 40 pixels; images are resized to the 32 pixels"):
        load_backbone(f"local-dir:{tmp_path}")


def test_weights_alone_under_the_name_of_their_architecture(tmp_path, monkeypatch):
    theirs = write(tmp_path / "theirs", clip_config(), clip_words())
    config = load_backbone(f"local-dir:{tmp_path / 'theirs'}")
    made, _ = architecture_of(config.name)
    del made["text_cfg"]["hf_tokenizer_name"]
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny-transformers", made)
    wrapped = {f"clip.{name}": value.clone() for name, value in theirs.state_dict().items()}
    save_file(wrapped, tmp_path / "weights.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    ours = load_backbone("Tiny-transformers", str(tmp_path / "weights.safetensors"), preprocess=preprocess)
    assert ours.digest == config.digest
