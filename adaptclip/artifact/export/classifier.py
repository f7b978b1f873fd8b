# SPDX-License-Identifier: Apache-2.0
"""`classifier`: the image tower and a fixed head, for whoever has open_clip and safetensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch.nn import functional as F

from adaptclip.artifact.export.checking import Outputs, Reader
from adaptclip.artifact.export.decoding import write_decoder
from adaptclip.artifact.export.stock import (
    CHECK,
    CLASSES_FILE,
    check_stock_tower,
    head_of,
    load_stock,
    merged_model,
    probabilities,
    write_classes,
)
from adaptclip.clip.saving import CONFIG_FILE, WEIGHTS_FILE, open_clip_config
from adaptclip.files import read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from PIL import Image

    from adaptclip.artifact import AdaptedModel

HEAD_FILE = "classifier.safetensors"

PLACEHOLDER = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
"""open_clip builds no image tower alone; this text tower of a few hundred numbers stands in for the one left out."""

EXAMPLE = (
    """\
import hashlib, json, open_clip, torch
from safetensors.torch import load_file

folder = "."
"""
    + CHECK
    + """\
from read_image import read_image  # the file beside this one
model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
head = load_file(f"{folder}/classifier.safetensors")
classes = json.load(open(f"{folder}/classes.json", encoding="utf-8"))
model.eval()
with torch.no_grad():
    image = transform(read_image("image.jpg")).unsqueeze(0)
    features = model.encode_image(image, normalize=True)
    logits = features @ head["weight"].T + head["bias"]
    if "keys" in head:  # a cache model adds the votes of its keys
        near = features @ head["keys"].T
        logits += torch.exp(-head["sharpness"] * (1 - near)) @ head["votes"]
print(classes["class_names"][logits.softmax(dim=-1).argmax().item()])
"""
)
"""How the folder is used without adaptclip."""

EXAMPLE_SIGMOID = (
    EXAMPLE.partition('    if "keys"')[0]
    + """\
rows = zip(classes["class_names"], logits.sigmoid()[0].tolist(), classes["thresholds"])
print([name for name, probability, threshold in rows if probability >= threshold])
"""
)
"""The same where each class is named by itself."""


def example(model: AdaptedModel) -> str:
    """Returns how the folder of this artifact is used without adaptclip."""
    return EXAMPLE if model.thresholds is None else EXAMPLE_SIGMOID


def write(folder: Path, model: AdaptedModel) -> None:
    """Writes an open_clip folder whose text tower is a placeholder, classifier.safetensors and the names.

    Raises:
        ArtifactError: the method has no fixed head, or an image tower that open_clip does not build.
        BackboneError: the architecture's configuration cannot be had.
    """
    head = head_of(model)  # first, because it may be refused
    check_stock_tower(model)
    config = open_clip_config(model.backbone)
    model_cfg = image_only(config["model_cfg"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock: Any = open_clip.CLIP(**copy.deepcopy(model_cfg))
    stock.visual.load_state_dict(merged_model(model).visual.state_dict(), strict=True)
    write_json(folder / CONFIG_FILE, {**config, "model_cfg": model_cfg})
    write_tensors(folder / WEIGHTS_FILE, stock.state_dict())
    write_tensors(folder / HEAD_FILE, head.tensors())
    write_classes(folder, model)
    write_decoder(folder, model)


def image_only(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of an open_clip model with the same image tower and PLACEHOLDER for its text tower."""
    vision = copy.deepcopy(model_cfg["vision_cfg"]) | {"output_tokens": False}
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
    small = {"embed_dim": model_cfg["embed_dim"], "vision_cfg": vision, "text_cfg": dict(PLACEHOLDER)}
    return small | {"quick_gelu": bool(model_cfg.get("quick_gelu", False))}


def read(folder: Path) -> Reader:
    """Loads the folder with open_clip and safetensors alone."""
    model, transform = load_stock(folder)
    head, classes = read_tensors(folder / HEAD_FILE), read_json(folder / CLASSES_FILE)

    @torch.no_grad()
    def classify(pictures: Sequence[Image.Image]) -> Outputs:
        features = F.normalize(model.encode_image(torch.stack([transform(p) for p in pictures])), dim=-1)
        logits = features @ head["weight"].T + head["bias"]
        if "keys" in head:
            logits = logits + torch.exp(-head["sharpness"] * (1 - features @ head["keys"].T)) @ head["votes"]
        return Outputs(features, logits, probabilities(logits, classes))

    return classify
