# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every kind: the configurations of published ones, shrunk in width and depth alone.

Each is written as a `local-dir:` bundle with a tokenizer of its own kind, trained here on a few sentences, since the
published ones are on the hub.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.efficientnet import _gen_efficientnet_lite
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, M2M100Config, MT5Config, PreTrainedTokenizerFast, RobertaConfig

from adaptclip.clip import ClipBackbone, load_backbone

SENTENCES = [
    "a photo of a rose.",
    "a photo of a lily of the valley.",
    "a drawing of the blue whale, a type of animal.",
    "a photo of a red fox and of a hairy wombat.",
    "a satellite photo of permanent crop land, 2.",
    "the quick brown fox jumps over the lazy dog, big zebras vex.",
]
"""What the tokenizers are trained on: every letter, and the class names and templates of the tests."""

PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
"""An evaluation transform that differs from open_clip's default, so that a lost one is noticed."""


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        config: open_clip's name of the published one.
        image: entries of its vision_cfg that are changed.
        text: entries of its text_cfg that are changed.
        tokenizer: writes one of Hugging Face's; None is CLIP's own vocabulary.
        encoder: configuration of a Hugging Face text encoder, or None.
        changes: other entries of the configuration.
    """

    config: str
    image: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], PreTrainedTokenizerFast] | None = None
    encoder: Any = None
    changes: dict[str, Any] = field(default_factory=dict)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's: [CLS] words [SEP] [PAD]…, in lower case."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Written out and not trained: training breaks ties by chance.
    letters = sorted({letter for sentence in SENTENCES for letter in sentence} - {" "})
    words = sorted({word.strip(".,") for sentence in SENTENCES for word in sentence.split()} - set(letters))
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    inner = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _fast(inner, pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]")


def sentencepiece(*, pad: str) -> PreTrainedTokenizerFast:
    """T5's: words </s> fill…; the fill is <pad> (T5) or </s> once more (SigLIP)."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    inner.train_from_iterator(SENTENCES, trainer)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _fast(inner, pad=pad, unk="<unk>", eos="</s>")


def gemma() -> PreTrainedTokenizerFast:
    """SigLIP 2's: words <eos> <pad>…, spaces kept as ▁ and none put before the first word."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    # Without a pre-tokenizer a whole sentence would become one token; Gemma's merges never cross a space either.
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=160, special_tokens=special))
    inner.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return _fast(inner, pad="<pad>", unk="<unk>", eos="<eos>", bos="<bos>")


def byte_level(*, start: str = "<s>") -> PreTrainedTokenizerFast:
    """RoBERTa's: <s> words </s> <pad>…, with the space inside a word's first token; NLLB's with a language as start."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [start, "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator(SENTENCES, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{start} $A </s>", special_tokens=[(start, 0), ("</s>", 2)]
    )
    return _fast(inner, pad="<pad>", unk="<unk>", eos="</s>", bos=start)


def _fast(inner: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    named = {f"{name}_token": AddedToken(text, special=True) for name, text in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="right", **named)


# -- image towers ------------------------------------------------------------------------------------------------------


@register_model
def tiny_siglip_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_base_patch16_siglip_256", pretrained=pretrained, **sizes, **kwargs)


@register_model
def tiny_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_base_patch16_224", pretrained=pretrained, **sizes, **kwargs)


@register_model
def tiny_eva02(pretrained: bool = False, **kwargs: Any) -> Any:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return timm.create_model("eva02_base_patch16_clip_224", pretrained=pretrained, **sizes, **kwargs)


@register_model
def tiny_eva01(pretrained: bool = False, **kwargs: Any) -> Any:
    sizes = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return timm.create_model("eva_giant_patch14_clip_224", pretrained=pretrained, **sizes, **kwargs)


@register_model
def tiny_fastvit(pretrained: bool = False, **kwargs: Any) -> Any:
    sizes = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}
    return timm.create_model("fastvit_mci1", pretrained=pretrained, **sizes, **kwargs)


@register_model
def tiny_convnext(pretrained: bool = False, **kwargs: Any) -> Any:
    sizes = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}
    return timm.create_model("convnext_base", pretrained=pretrained, **sizes, **kwargs)


@register_model
def tiny_efficientnet(pretrained: bool = False, **kwargs: Any) -> Any:
    return _gen_efficientnet_lite(
        "tf_efficientnet_lite0", channel_multiplier=0.25, depth_multiplier=0.5, pretrained=pretrained, **kwargs
    )


_TEXT = {"width": 32, "heads": 2, "layers": 2}
_VIT = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
_SIGLIP_VIT = {"timm_model_name": "tiny_siglip_vit", "image_size": 32}
_BERT = BertConfig(
    vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
_ROBERTA = RobertaConfig(
    vocab_size=360, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
    initializer_range=0.2,
)  # fmt: skip
_MT5 = MT5Config(
    vocab_size=160, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=2, pad_token_id=0,
    eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
_NLLB = M2M100Config(
    vocab_size=360, d_model=32, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
    encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, pad_token_id=1, bos_token_id=0,
    eos_token_id=2, decoder_start_token_id=2, init_std=0.2,
)  # fmt: skip

KINDS: dict[str, Kind] = {
    "ViT-B-16": Kind("ViT-B-16", _VIT, _TEXT),
    "ViT-B-16-SigLIP": Kind(
        "ViT-B-16-SigLIP", _SIGLIP_VIT, {**_TEXT, "vocab_size": 160}, lambda: sentencepiece(pad="</s>"),
        changes={"embed_dim": 48},
    ),
    "ViT-B-16-SigLIP2-256": Kind(
        "ViT-B-16-SigLIP2-256", _SIGLIP_VIT, {**_TEXT, "vocab_size": 160}, gemma, changes={"embed_dim": 48}
    ),
    "coca_ViT-B-32": Kind(
        "coca_ViT-B-32", {**_VIT, "attn_pooler_heads": 2}, _TEXT,
        changes={"multimodal_cfg": {"context_length": 76, "vocab_size": 64, "attn_pooler_heads": 2, **_TEXT}},
    ),
    "BiomedCLIP": Kind(
        "ViT-B-16", {"timm_model_name": "tiny_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
        {"context_length": 48, "hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "mlp"},
        wordpiece, _BERT,
    ),
    "EVA02-B-16": Kind("EVA02-B-16", {"timm_model_name": "tiny_eva02", "image_size": 32}, _TEXT),
    "MobileCLIP-S1": Kind("MobileCLIP-S1", {"timm_model_name": "tiny_fastvit", "image_size": 64}, _TEXT),
    "RN50": Kind("RN50", {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, _TEXT),
    "convnext_base": Kind("convnext_base", {"timm_model_name": "tiny_convnext", "image_size": 32}, _TEXT),
    "efficientnet": Kind(
        "convnext_base", {"timm_model_name": "tiny_efficientnet", "timm_pool": "avg", "image_size": 64}, _TEXT
    ),
    "roberta-ViT-B-32": Kind(
        "roberta-ViT-B-32", _VIT, {"hf_proj_type": "mlp", "context_length": 40}, byte_level, _ROBERTA
    ),
    "mt5-base-ViT-B-32": Kind(
        "mt5-base-ViT-B-32", _VIT, {"hf_proj_type": "linear", "context_length": 64}, lambda: sentencepiece(pad="<pad>"),
        _MT5,
    ),
}  # fmt: skip
"""The kinds that every method is tried on."""

MORE_KINDS: dict[str, Kind] = {
    "ViT-H-14-CLIPA": Kind("ViT-H-14-CLIPA", _VIT, {**_TEXT, "vocab_size": 160}, wordpiece),
    "ViT-H-14-worldwide": Kind("ViT-H-14-worldwide", _VIT, {**_TEXT, "vocab_size": 360}, byte_level),
    "nllb-clip-base": Kind("nllb-clip-base", _VIT, {"context_length": 40}, lambda: byte_level(start="eng_Latn"), _NLLB),
    "coca_roberta": Kind(
        "coca_roberta-ViT-B-32", {**_VIT, "attn_pooler_heads": 2}, {"context_length": 40}, byte_level, _ROBERTA,
        changes={"multimodal_cfg": {"context_length": 76, "vocab_size": 64, "attn_pooler_heads": 2, **_TEXT}},
    ),
    "EVA01-g-14": Kind("EVA01-g-14", {"timm_model_name": "tiny_eva01", "image_size": 28}, _TEXT),
}  # fmt: skip
"""Further kinds of text tower, and the one image tower whose query, key and value share a bias."""


def kind_config(kind: Kind) -> dict[str, Any]:
    """The shrunk `model_cfg` of a kind."""
    config = copy.deepcopy(open_clip.get_model_config(kind.config)) or {}
    config["embed_dim"] = 96
    config["vision_cfg"].update(kind.image)
    config["text_cfg"].update(kind.text)
    config.update(copy.deepcopy(kind.changes))
    if kind.tokenizer is not None:
        config["text_cfg"]["hf_tokenizer_name"] = "."
    if kind.encoder is not None:
        config["text_cfg"] |= {"hf_model_name": "text_encoder", "hf_model_pretrained": False}
    return config


def write_kind(folder: Path, kind: Kind, *, seed: int = 0) -> Path:
    """Writes a bundle that `local-dir:` loads, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = kind_config(kind)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    if kind.tokenizer is not None:
        kind.tokenizer().save_pretrained(folder)
    built = copy.deepcopy(config)
    if kind.encoder is not None:
        kind.encoder.save_pretrained(folder / "text_encoder")
        built["text_cfg"]["hf_model_name"] = str(folder / "text_encoder")
    custom = built.pop("custom_text", False) or kind.encoder is not None
    classes = {"multimodal_cfg" in built: open_clip.CoCa, "multimodal_cfg" not in built: open_clip.CustomTextCLIP}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = (classes[True] if custom else open_clip.CLIP)(**built)
        if custom and "multimodal_cfg" in built:
            model.text_decoder.text_projection.zero_()  # open_clip leaves it as the memory was
        for parameter in model.parameters():
            # Biases start at 0, gains at 1 and residual branches near 0, which would hide a mistake in them.
            parameter.add_(torch.randn_like(parameter) * 0.02)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def make_kind(name: str, folder: Path | None = None) -> ClipBackbone:
    """Writes and loads a tiny model of a kind; with `folder` the bundle stays there."""
    kind = {**KINDS, **MORE_KINDS}[name]
    with tempfile.TemporaryDirectory() as temporary:
        return load_backbone(f"local-dir:{write_kind(folder or Path(temporary) / 'model', kind)}")
