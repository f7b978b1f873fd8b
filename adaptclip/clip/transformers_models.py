# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP as transformers keeps them, told in open_clip's words: configuration, transform and tensors.

open_clip converts weights of Google's and Apple's own formats and none of transformers', so that it is done here. What
comes out is the same function: `tests/unit/clip/test_transformers_models.py` compares the features with transformers'
own. What open_clip cannot express is refused with the entry that says so.

    clip, metaclip_2   → CLIP with open_clip's own towers
    siglip             → CustomTextCLIP with timm's image tower; SigLIP 2 of a fixed image size is of this kind too
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptclip.clip.config_checks import LIMITS, read_config
from adaptclip.errors import BackboneError

KINDS: Mapping[str, str] = {"clip": "CLIPConfig", "metaclip_2": "MetaClip2Config", "siglip": "SiglipConfig"}
"""model_type of a config.json -> the class of transformers that knows what it leaves out."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_GELU: Mapping[str, str] = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
"""hidden_act -> how nn.GELU computes it."""

_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_MEAN_STD = {
    "siglip": ([0.5] * 3, [0.5] * 3),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder is one of transformers' and has no configuration of open_clip's beside it."""
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def read_model_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Reads config.json of a folder.

    Returns:
        open_clip's model_cfg, and how the image tower computes GELU ("tanh" or "none") where timm's tower of that size
        does it in the other way; "" where it fits.

    Raises:
        BackboneError: another kind of model, a damaged configuration, no tokenizer, or one that open_clip cannot build.
    """
    file = folder / "config.json"
    raw = read_config(file)
    kind = str(raw.get("model_type")) if isinstance(raw, dict) else ""
    if kind == "siglip2":
        raise BackboneError(
            f"{file} is a SigLIP 2 of the NaFlex kind, which takes images of any shape; adaptclip gives square ones "
            "only. Name a SigLIP 2 of a fixed size instead (`hf-hub:timm/ViT-B-16-SigLIP2-256`, for example)"
        )
    if kind not in KINDS:
        alone = " It is one tower of a CLIP alone; take the whole model." if "_model" in kind else ""
        raise BackboneError(
            f"{file} is of the kind {kind!r}.{alone} Folders of transformers are read where their model_type is "
            f"{', '.join(KINDS)}; any other model goes as an open_clip folder, with open_clip_config.json in it."
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BackboneError(
            f"{folder} holds no tokenizer ({_TOKENIZER_FILES[0]}); save it there too: "
            "`AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER)`"
        )
    config = _complete(raw, kind, file)
    return (_siglip if kind == "siglip" else _clip)(config, kind, file)


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors of transformers' CLIP or SigLIP the names and shapes of open_clip's; others stay as they are."""
    if not any(name.startswith("vision_model.embeddings.") for name in state):
        return dict(state)
    siglip = "vision_model.head.probe" in state
    made: dict[str, Tensor] = {}
    for name, tensor in _fused(state).items():
        if name.endswith("position_ids"):  # written by older versions, and no weight
            continue
        new = _renamed(name, _SIGLIP if siglip else _CLIP)
        if siglip and name == "vision_model.embeddings.position_embedding.weight":
            tensor = tensor[None]
        elif not siglip and name in ("text_projection.weight", "visual_projection.weight"):
            tensor = tensor.T.contiguous()
        elif name in ("logit_scale", "logit_bias"):
            tensor = tensor.reshape(())
        elif name == "vision_model.head.attention.in_proj_weight" or name == "vision_model.head.attention.in_proj_bias":
            part, width = name.rpartition("_")[2], len(tensor) // 3
            made[f"visual.trunk.attn_pool.q.{part}"], tensor = tensor[:width].clone(), tensor[width:].clone()
        made[new] = tensor
    return made


# -- tensors -----------------------------------------------------------------------------------------------------------

_BLOCK = (
    (r"\.self_attn\.in_proj_(\w+)$", r".attn.in_proj_\1"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_CLIP = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight", "visual.proj"),
)
"""Patterns of transformers' names -> open_clip's, tried in this order, each on what the ones before it made."""

_SIGLIP = (
    (r"^text_model\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "text.positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "text.transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "text.ln_final."),
    (r"^text_model\.head\.", "text.text_projection."),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.trunk.pos_embed"),
    (r"^vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"^vision_model\.head\.probe", "visual.trunk.attn_pool.latent"),
    (r"^vision_model\.head\.attention\.in_proj_", "visual.trunk.attn_pool.kv."),
    (r"^vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"^vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"^vision_model\.head\.mlp\.", "visual.trunk.attn_pool.mlp."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.in_proj_", r"visual.trunk.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"visual.trunk.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual.trunk.blocks.\1.norm"),
    (r"^vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
)


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    for pattern, replacement in _BLOCK if "transformer.resblocks." in name else ():
        name = re.sub(pattern, replacement, name)
    return name


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the query, key and value of each block in one tensor, as open_clip and timm have them."""
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, part, rest = name.partition(".self_attn.q_proj.")
        if part:
            found = [state.get(f"{stem}.self_attn.{which}_proj.{rest}") for which in "qkv"]
            made[f"{stem}.self_attn.in_proj_{rest}"] = torch.cat([t for t in found if t is not None])
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            made[name] = tensor
    return made


# -- configurations ----------------------------------------------------------------------------------------------------


def _complete(raw: Mapping[str, Any], kind: str, file: Path) -> Any:
    """The configuration with the defaults of transformers, of bounded numbers."""
    import transformers

    if "auto_map" in raw:
        raise BackboneError(f"{file} asks for code of its own (auto_map), and code is not run; remove the entry")
    try:
        return getattr(transformers, KINDS[kind]).from_dict(dict(raw))
    except Exception as error:  # of its own validation, in many kinds
        raise BackboneError(f"{file} is not a configuration of transformers ({error})") from error


def _number(part: Any, entry: str, file: Path) -> int:
    value = getattr(part, entry, None)
    value = value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value
    if type(value) is not int or not 0 < value <= LIMITS["vocab_size"]:
        raise BackboneError(f"{file}: {entry} should be a whole number above 0, got {value!r:.80}")
    return value


def _tower(part: Any, file: Path) -> dict[str, Any]:
    """width, layers and mlp_ratio of one tower, and its number of heads."""
    width, hidden = _number(part, "hidden_size", file), _number(part, "intermediate_size", file)
    heads = _number(part, "num_attention_heads", file)
    if width % heads:
        raise BackboneError(f"{file}: {heads} attention heads do not divide a width of {width}")
    # open_clip cuts width * mlp_ratio off to a whole number.
    ratio = hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
    return {"width": width, "layers": _number(part, "num_hidden_layers", file), "mlp_ratio": ratio, "heads": heads}


def _clip(config: Any, kind: str, file: Path) -> tuple[dict[str, Any], str]:
    """open_clip's configuration of a CLIP or MetaCLIP 2."""
    text, vision = config.text_config, config.vision_config
    acts = {text.hidden_act, vision.hidden_act}
    if acts != {"quick_gelu"} and not acts <= set(_GELU):
        raise BackboneError(
            f"{file}: the activations {' and '.join(sorted(acts))} together are none that open_clip can build; known "
            f"are quick_gelu in both towers, or {', '.join(_GELU)}"
        )
    image, words = _tower(vision, file), _tower(text, file)
    image["head_width"] = image["width"] // image.pop("heads")
    image |= {"image_size": _number(vision, "image_size", file), "patch_size": _number(vision, "patch_size", file)}
    words |= {"context_length": _number(text, "max_position_embeddings", file), "hf_tokenizer_name": "."}
    words["vocab_size"] = _number(text, "vocab_size", file)
    end = text.eos_token_id
    # transformers takes the highest id where a configuration has the end token of its earliest versions.
    if not (kind == "clip" and end == 2) and end != words["vocab_size"] - 1:
        words |= {"pool_type": "eos", "eos_id": _number(text, "eos_token_id", file)}
    for part, own in ((image, vision), (words, text)):
        part["norm_kwargs"] = {"eps": float(own.layer_norm_eps)}
        if _GELU.get(own.hidden_act) == "tanh":
            part["act_kwargs"] = {"approximate": "tanh"}
    made = {"embed_dim": _number(config, "projection_dim", file), "vision_cfg": image, "text_cfg": words}
    return {**made, "quick_gelu": acts == {"quick_gelu"}}, ""


def _siglip(config: Any, kind: str, file: Path) -> tuple[dict[str, Any], str]:
    """open_clip's configuration of a SigLIP, and how its image tower computes GELU where timm's does not."""
    text, vision = config.text_config, config.vision_config
    if not getattr(vision, "vision_use_head", True):
        raise BackboneError(f"{file}: vision_use_head is off, so that the image tower gives no feature of an image")
    unknown = next((own.hidden_act for own in (text, vision) if own.hidden_act not in _GELU), None)
    if unknown is not None:
        raise BackboneError(f"{file}: open_clip cannot build the activation {unknown!r}; known are {', '.join(_GELU)}")
    words, image = _tower(text, file), _tower(vision, file)
    words |= {
        "context_length": _number(text, "max_position_embeddings", file),
        "vocab_size": _number(text, "vocab_size", file),
        "hf_tokenizer_name": ".", "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": float(text.layer_norm_eps)}, "act_kwargs": {"approximate": _GELU[text.hidden_act]},
    }  # fmt: skip
    embed_dim = text.projection_size if text.projection_size is not None else words["width"]
    if embed_dim != image["width"]:
        raise BackboneError(
            f"{file}: images have {image['width']} numbers and texts {embed_dim}; they cannot be compared"
        )
    name, gelu = _timm_tower(vision, image, file)
    made = {"embed_dim": embed_dim, "init_logit_bias": -10, "custom_text": True, "text_cfg": words}
    tower = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    return {**made, "vision_cfg": {"image_size": _number(vision, "image_size", file), **tower}}, gelu


def _timm_tower(vision: Any, sizes: Mapping[str, Any], file: Path) -> tuple[str, str]:
    """The image tower of timm that has these sizes, and its GELU where that is another one than is asked for."""
    import timm
    from torch import nn

    side, patch, wanted = (
        _number(vision, "image_size", file),
        _number(vision, "patch_size", file),
        _GELU[vision.hidden_act],
    )
    found: dict[str, str] = {}
    for name in timm.list_models("*siglip*"):
        stated = re.search(r"patch(\d+)_siglip_(\d+)", name)
        if "gap" in name or "naflex" in name or (stated and stated.groups() != (str(patch), str(side))):
            continue
        with torch.device("meta"):
            tower: Any = timm.create_model(name, num_classes=0)
        own = {
            "width": tower.embed_dim, "layers": len(tower.blocks), "heads": tower.blocks[0].attn.num_heads,
            "hidden": tower.blocks[0].mlp.fc1.out_features, "grid": tower.patch_embed.grid_size[0],
            "patch": tower.patch_embed.patch_size[0], "eps": tower.norm.eps,
        }  # fmt: skip
        asked = {
            "width": sizes["width"], "layers": sizes["layers"], "heads": sizes["heads"],
            "hidden": vision.intermediate_size, "grid": side // patch, "patch": patch, "eps": vision.layer_norm_eps,
        }  # fmt: skip
        if own == asked:
            act = tower.blocks[0].mlp.act
            found[name] = getattr(act, "approximate", "") if isinstance(act, nn.GELU) else "tanh"
            # A GELU of torch can be told how to compute; timm's own approximation cannot.
            if found[name] != wanted and not isinstance(act, nn.GELU):
                del found[name]
    for name, own in sorted(found.items(), key=lambda item: item[1] != wanted):
        return name, "" if own == wanted else wanted
    raise BackboneError(
        f"{file} has an image tower of {sizes['layers']} layers of width {sizes['width']} ({sizes['heads']} heads, "
        f"patches of {patch}, images of {side}), which timm does not have as a SigLIP; open_clip could not build it"
    )


# -- transform ---------------------------------------------------------------------------------------------------------


def read_transform(folder: Path, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the evaluation transform that the configuration of the image processor describes, as a preprocess_cfg.

    Raises:
        BackboneError: a damaged configuration, or an interpolation that open_clip does not have.
    """
    siglip, side = model_cfg.get("init_logit_bias") is not None, model_cfg["vision_cfg"]["image_size"]
    mean, std = _MEAN_STD["siglip" if siglip else "clip"]
    mode = "squash" if siglip else "shortest"
    file = next((folder / name for name in _PROCESSOR_FILES if (folder / name).is_file()), None)
    stated = read_config(file) if file else None
    stated = stated.get("image_processor", stated) if isinstance(stated, dict) else None
    if file is None or not isinstance(stated, dict) or not {"image_mean", "image_std", "size"} & set(stated):
        warnings.warn(
            f"{folder} has no {_PROCESSOR_FILES[0]}: the mean and standard deviation that models of this kind are "
            "published with are used",
            stacklevel=5,
        )
        return {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": mode}
    size, resample = stated.get("size"), stated.get("resample", 3)
    if resample not in _INTERPOLATIONS:
        raise BackboneError(f"{file}: resample {resample!r} is not known; known are 2 (bilinear) and 3 (bicubic)")
    crop = stated.get("crop_size", side) if stated.get("do_center_crop", not siglip) else None
    sides = {_side(crop), *([] if stated.get("do_resize") is False else [_side(size)])} - {None}
    if sides - {side}:
        warnings.warn(
            f"{file} resizes or crops to {' and '.join(map(str, sorted(sides, key=str)))} pixels; images are resized "
            f"to the {side} pixels that the image tower takes, so that features are a little different",
            stacklevel=5,
        )
    if isinstance(size, Mapping):
        mode = "shortest" if "shortest_edge" in size else "squash"
    elif size is not None:
        mode = "shortest" if crop is not None else "squash"
    plain = stated.get("do_normalize", True) is False
    return {
        "mean": [0.0] * 3 if plain else stated.get("image_mean", mean),
        "std": [1.0] * 3 if plain else stated.get("image_std", std),
        "interpolation": _INTERPOLATIONS[resample],
        "resize_mode": mode,
    }


def _side(size: Any) -> Any:
    """The side of a square size in pixels, or the size as it was read where it is not square."""
    if not isinstance(size, Mapping):
        return size
    values = {value for value in size.values() if value is not None}
    return values.pop() if len(values) == 1 else str(dict(size))
