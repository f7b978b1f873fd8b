"""`open_clip`: the adapted model as a stock checkpoint, with the update merged into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch.nn import functional as F

from adaptclip.artifact import AdaptedModel
from adaptclip.backbone.loading import LOCAL_PREFIX
from adaptclip.backbone.saving import save_open_clip
from adaptclip.errors import ArtifactError
from adaptclip.export.checking import Outputs, Reader
from adaptclip.export.heads import merged_model
from adaptclip.prompts import clean_class_name
from adaptclip.storage import read_json, write_json

CLASSES_FILE = "classes.json"
"""Names of the classes, and what stands in for them in prompts."""

IS_CLIP = ("zero_shot", "lora")
"""Methods whose result is a CLIP: what they know is in the weights of the towers, and classes are named by prompts."""

EXAMPLE = """\
import json, open_clip, torch
from PIL import Image

folder = "."
model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
classes = json.load(open(f"{folder}/classes.json", encoding="utf-8"))
model.eval()
with torch.no_grad():
    rows = []
    for name in classes["prompt_names"]:
        prompts = [template.replace("{}", name) for template in classes["templates"]]
        rows.append(model.encode_text(tokenizer(prompts), normalize=True).mean(dim=0))
    weights = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    image = transform(Image.open("image.jpg").convert("RGB")).unsqueeze(0)
    logits = model.logit_scale.exp() * model.encode_image(image, normalize=True) @ weights.T
    label = logits.softmax(dim=-1).argmax().item()
print(classes["class_names"][label])
"""
"""How the folder is used without adaptclip."""


def write(folder: Path, model: AdaptedModel) -> None:
    """Writes open_clip_config.json, open_clip_model.safetensors and the names of the classes.

    Raises:
        ArtifactError: the method's result is not a CLIP.
        BackboneError: open_clip could not build this backbone again from a folder.
    """
    method = model.manifest["method"]
    if method not in IS_CLIP:
        raise ArtifactError(
            f"the result of {method!r} is a head on image features, not a CLIP: its text tower does not know what was "
            f"learnt. Export it with `--to classifier` (image tower and head) or `--to onnx`; `--to open_clip` is for "
            f"{' and '.join(IS_CLIP)}."
        )
    # The folder is a temporary one that is there already.
    save_open_clip(folder, merged_model(model).state_dict(), model.backbone, overwrite=True)
    write_classes(folder, model)


def write_classes(folder: Path, model: AdaptedModel) -> None:
    """Writes what the columns of the probabilities mean."""
    names = [clean_class_name(name) for name in model.manifest["prompt_names"]]
    templates = model.manifest["settings"].get("templates")
    known: dict[str, Any] = {"class_names": list(model.class_names), "prompt_names": names}
    write_json(folder / CLASSES_FILE, known | ({"templates": templates} if templates else {}))


def load_stock(folder: Path) -> tuple[Any, Any]:
    """Returns model and evaluation transform of a stock folder, loaded by open_clip alone."""
    # The arguments of the documented call; quiet about what it reads.
    model, _, transform = open_clip.create_model_and_transforms(
        f"{LOCAL_PREFIX}{folder}", require_pretrained=True, weights_only=True
    )
    return model.eval(), transform


@torch.no_grad()
def read(folder: Path) -> Reader:
    """Loads the folder with open_clip alone."""
    model, transform = load_stock(folder)
    tokenizer = open_clip.get_tokenizer(f"{LOCAL_PREFIX}{folder}")
    classes = read_json(folder / CLASSES_FILE)
    rows = []
    for name in classes["prompt_names"]:
        prompts = [template.replace("{}", name) for template in classes["templates"]]
        rows.append(F.normalize(model.encode_text(tokenizer(prompts)), dim=-1).mean(dim=0))
    weights = F.normalize(torch.stack(rows), dim=-1)

    @torch.no_grad()
    def classify(pictures: Sequence[Image.Image]) -> Outputs:
        features = F.normalize(model.encode_image(torch.stack([transform(p) for p in pictures])), dim=-1)
        logits = model.logit_scale.exp() * features @ weights.T
        return Outputs(features, logits, logits.softmax(dim=-1))

    return classify
