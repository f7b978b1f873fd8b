# SPDX-License-Identifier: Apache-2.0
"""`adaptclip inspect`: what a model is made of, and which methods apply to it."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptclip.errors import BackboneError, shown
from adaptclip.terminal import console, table

if TYPE_CHECKING:
    from torch import nn

    from adaptclip.clip import ClipBackbone
    from adaptclip.methods.registry import Applicability


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
    from adaptclip.clip.lora_targets import count_blocks

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
    from adaptclip.clip.lora_targets import count_blocks

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


def inspect(
    backbone: str = "starter", /, *, pretrained: str | None = None, classes: int = 10, json: bool = False
) -> int:
    """Show a model's towers, sizes and transform, which methods apply to it, and how many parameters each learns.

    Args:
        backbone: starter, an architecture, hf-hub:ORG/NAME or local-dir:FOLDER.
        pretrained: tag or checkpoint file of an architecture.
        classes: how many classes the parameters are counted for.
        json: print everything as JSON.
    """
    from adaptclip.clip import load_backbone
    from adaptclip.errors import ConfigError
    from adaptclip.methods.registry import methods_for

    if classes < 1:
        raise ConfigError(f"classes must be at least 1, got {classes}")
    if Path(backbone).is_dir():
        backbone = f"local-dir:{backbone}"
    model = load_backbone(backbone, pretrained)
    about, methods = describe_backbone(model), methods_for(model, num_classes=classes)
    if json:
        info = {**about, "classes": classes, "methods": [asdict(method) for method in methods]}
        sys.stdout.write(json_format.dumps(info, indent=2) + "\n")
    else:
        _print(about, methods, classes)
    return 0


def _print(about: dict[str, Any], methods: list[Applicability], classes: int) -> None:
    from rich.text import Text

    screen = console()
    weights = f", weights {about['pretrained']}" if about["pretrained"] else ""
    info = f"{weights}, {about['precision']}, digest {about['digest'][:12]}"
    screen.print(Text.assemble((shown(about["name"]), "bold"), shown(info)))
    image, text, transform = about["image"], about["text"], about["transform"]
    bias = "" if about["logit_bias"] is None else f", bias {about['logit_bias']:.3g}"
    lines = (
        f"joint space {about['embed_dim']}, logit scale {about['logit_scale']:.4g}{bias} ({about['objective']})",
        f"transform: {transform['interpolation']}, {transform['resize_mode']}, mean {transform['mean']}, "
        f"std {transform['std']}",
        f"learnt prompts: {text['prompts']}",
    )
    for line in lines:
        screen.print(line)
    towers = table("tower", "kind", "blocks", "width", "parameters", "input")
    for name, tower, takes in (
        ("image", image, f"{image['image_size']} x {image['image_size']} pixels"),
        ("text", text, f"{text['context_length']} tokens"),
    ):
        width = "varies" if tower["width"] is None else str(tower["width"])
        towers.add_row(name, tower["kind"], str(tower["blocks"]), width, f"{tower['parameters']:,}", takes)
    screen.print(towers)
    title = f"methods that apply, cheap before dear; numbers for {classes} classes"
    found = table("method", "learns from", "learns", "stores", title=title, title_justify="left")
    for column in found.columns[2:]:
        column.justify = "right"
    for method in (method for method in methods if method.applies):
        found.add_row(method.method, method.learns_from, f"{method.learnt:,}", f"{method.stored:,}")
    screen.print(found)
    for method in (method for method in methods if not method.applies):
        screen.print(f"{method.method} does not apply: {method.reason}")
