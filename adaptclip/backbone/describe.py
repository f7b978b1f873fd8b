"""What a loaded model is made of, as plain values."""

from __future__ import annotations

from typing import Any

from torch import nn

from adaptclip.backbone import ClipBackbone
from adaptclip.backbone.lora_targets import count_blocks
from adaptclip.errors import BackboneError


def describe_backbone(backbone: ClipBackbone) -> dict[str, Any]:
    """Returns towers, sizes, transform, scale and bias of a model, JSON-able.

    Args:
        backbone: any loaded model.

    Returns:
        `name`, `pretrained`, `precision`, `digest`, `embed_dim`, `logit_scale` (exp() applied), `logit_bias` (None
        where the model has none), `objective` ("sigmoid" for models with a bias, else "softmax": what it was trained
        with), `transform`, and under `image` and `text` what each tower is: `kind`, `blocks`, `width` (None where it
        differs from layer to layer), `parameters`. The text tower also has `context_length`, `start_ids`, `end_ids`,
        and `prompts`: how prompts are computed when they are learnt, or why they cannot be.
    """
    model = backbone.model
    visual = model.visual
    trunk = getattr(visual, "trunk", visual)
    image = {
        "kind": f"timm {type(trunk).__name__}" if trunk is not visual else f"open_clip {type(visual).__name__}",
        "blocks": count_blocks(model, "image"),
        "width": _image_width(trunk),
        "image_size": backbone.image_size,
        "parameters": _count(visual),
    }
    bias = backbone.logit_bias
    return {
        "name": backbone.name,
        "pretrained": backbone.pretrained,
        "precision": backbone.precision,
        "digest": backbone.digest,
        "embed_dim": backbone.embed_dim,
        "logit_scale": float(backbone.logit_scale),
        "logit_bias": None if bias is None else float(bias),
        "objective": "softmax" if bias is None else "sigmoid",
        "transform": backbone.transform_spec,
        "image": image,
        "text": _describe_text(backbone),
    }


def _describe_text(backbone: ClipBackbone) -> dict[str, Any]:
    model = backbone.model
    text = getattr(model, "text", None)
    others = ("visual.", "text_decoder.", "logit_")
    encoder = getattr(text, "config", None)
    about: dict[str, Any] = {
        "kind": f"Hugging Face {encoder.model_type}" if encoder is not None else "open_clip TextTransformer",
        "blocks": count_blocks(model, "text"),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if not name.startswith(others)),
        "context_length": backbone.context_length,
    }
    try:
        tower = backbone.text
    except BackboneError as error:
        return {**about, "width": None, "prompts": str(error)}
    how = {
        "CausalTextTower": "up to the end token, with a shared prefix",
        "PaddedTextTower": "at the whole context, which every token sees",
        "ClassTokenTextTower": "up to the end token, with a class token behind it",
        "HuggingFaceTextTower": "up to the longest prompt, with a mask",
    }[type(tower).__name__]
    ids = {"start_ids": list(tower.start_ids), "end_ids": list(tower.end_ids)}
    return {**about, "width": tower.width, **ids, "prompts": how}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _image_width(trunk: Any) -> int | None:
    """Width of a transformer's tokens; None for a tower whose width grows from stage to stage."""
    embedding = getattr(trunk, "positional_embedding", None)
    if embedding is not None:
        return int(embedding.shape[-1])
    return int(trunk.embed_dim) if hasattr(trunk, "embed_dim") and hasattr(trunk, "blocks") else None
