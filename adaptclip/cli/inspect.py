"""`adaptclip inspect`: what a model is made of, and which methods apply to it."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptclip.errors import shown
from adaptclip.terminal import console

if TYPE_CHECKING:
    from adaptclip.methods.applicability import Applicability


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
    from adaptclip.backbone import load_backbone
    from adaptclip.backbone.describe import describe_backbone
    from adaptclip.errors import ConfigError
    from adaptclip.methods.applicability import methods_for

    if classes < 1:
        raise ConfigError(f"classes must be at least 1, got {classes}")
    if Path(backbone).is_dir():
        backbone = f"local-dir:{backbone}"
    model = load_backbone(backbone, pretrained)
    about, methods = describe_backbone(model), methods_for(model, num_classes=classes)
    if json:
        told = {**about, "classes": classes, "methods": [asdict(method) for method in methods]}
        sys.stdout.write(json_format.dumps(told, indent=2) + "\n")
    else:
        _print(about, methods, classes)
    return 0


def _print(about: dict[str, Any], methods: list[Applicability], classes: int) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console()
    weights = f", weights {about['pretrained']}" if about["pretrained"] else ""
    told = f"{weights}, {about['precision']}, digest {about['digest'][:12]}"
    screen.print(Text.assemble((shown(about["name"]), "bold"), shown(told)))
    towers = Table("tower", "kind", "blocks", "width", "parameters", "input")
    image, text, transform = about["image"], about["text"], about["transform"]
    for name, tower, takes in (
        ("image", image, f"{image['image_size']} x {image['image_size']} pixels"),
        ("text", text, f"{text['context_length']} tokens"),
    ):
        width = "varies" if tower["width"] is None else str(tower["width"])
        towers.add_row(name, tower["kind"], str(tower["blocks"]), width, f"{tower['parameters']:,}", takes)
    screen.print(towers)
    bias = "" if about["logit_bias"] is None else f", bias {about['logit_bias']:.3g}"
    lines = (
        f"joint space {about['embed_dim']}, logit scale {about['logit_scale']:.4g}{bias} ({about['objective']})",
        f"transform: {transform['interpolation']}, {transform['resize_mode']}, mean {transform['mean']}, "
        f"std {transform['std']}",
        f"learnt prompts: {text['prompts']}",
    )
    for line in lines:
        screen.print(line)
    table = Table("method", "learns from", f"parameters it learns for {classes} classes", "numbers its artifact holds")
    for method in methods:
        if method.learnt is None:
            table.add_row(method.method, "does not apply", method.reason, "")
        else:
            table.add_row(method.method, method.consumes, f"{method.learnt:,}", f"{method.stored:,}")
    screen.print(table)
