# SPDX-License-Identifier: Apache-2.0
"""`open_clip`: the adapted model as a stock checkpoint, with the update merged into its weights.

Every export starts from what an adapter comes to once it is trained: an image tower whose weights are settled, and a
fixed head.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.artifact.export.checking import Outputs, Reader
from adaptclip.artifact.export.decoding import write_decoder
from adaptclip.clip.loading import LOCAL_PREFIX
from adaptclip.clip.saving import CONFIG_FILE, save_open_clip
from adaptclip.errors import ArtifactError, ConfigError
from adaptclip.files import read_json, write_json
from adaptclip.methods.registry import methods
from adaptclip.prompts import clean_class_name

if TYPE_CHECKING:
    from PIL import Image

    from adaptclip.artifact import AdaptedModel
    from adaptclip.methods.base import Head


class ImageClassifier(nn.Module):
    """Images to features, logits and probabilities, in one graph without any text tower.

    Args:
        visual: image tower: (B, 3, H, W) to (B, D).
        head: on its unit-norm features.
    """

    weight: Tensor
    bias: Tensor
    keys: Tensor
    votes: Tensor
    sharpness: Tensor

    def __init__(self, visual: nn.Module, head: Head) -> None:
        super().__init__()
        self.visual: Any = visual
        self.has_keys, self.sigmoid = head.keys is not None, head.sigmoid
        for name, tensor in head.tensors().items():
            self.register_buffer(name, tensor)
        self.requires_grad_(False).train(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (B, D) unit-norm features, (B, C) logits and (B, C) probabilities of (B, 3, H, W) pixels."""
        features = self.visual(pixels)
        # Captioning models give their tokens as well.
        features = F.normalize(features[0] if isinstance(features, tuple) else features, dim=-1)
        logits = features @ self.weight.T + self.bias
        if self.has_keys:
            logits = logits + torch.exp(-self.sharpness * (1 - features @ self.keys.T)) @ self.votes
        return features, logits, logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)


@torch.no_grad()
def head_of(model: AdaptedModel) -> Head:
    """Returns the fixed head of a loaded artifact.

    Raises:
        ArtifactError: the method has none.
    """
    try:
        return model.adapter.head()
    except ConfigError as error:
        method = model.manifest["method"]
        raise ArtifactError(
            f"{method!r} cannot be exported as a classifier: {error}. Use the artifact itself: "
            "adaptclip.load(FOLDER).predict(images)."
        ) from error


def check_stock_tower(model: AdaptedModel) -> None:
    """Raises ArtifactError for a method whose image tower open_clip does not build."""
    if not model.adapter.stock_image_tower:
        raise ArtifactError(
            f"{model.manifest['method']!r} leaves as `--to onnx` alone: its image tower carries prompts in its blocks, "
            "and open_clip builds none that does"
        )


def merged_model(model: AdaptedModel) -> Any:
    """Returns a stock open_clip model whose towers are those that a loaded artifact predicts with."""
    return model.adapter.merged_model()


CLASSES_FILE = "classes.json"
"""Names of the classes, and what stands in for them in prompts."""

CHECK = """\
for name, told in json.load(open(f"{folder}/check.json", encoding="utf-8"))["files"].items():
    found = hashlib.sha256(open(f"{folder}/{name}", "rb").read()).hexdigest()
    if found != told["sha256"] and name != "README.md":
        raise SystemExit(f"{name} is damaged")
"""
"""The first lines of every example: nothing is loaded that is not as it was written."""

EXAMPLE = (
    """\
import hashlib, json, open_clip, torch

folder = "."
"""
    + CHECK
    + """\
from read_image import read_image  # the file beside this one
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
    image = transform(read_image("image.jpg")).unsqueeze(0)
    logits = model.logit_scale.exp() * model.encode_image(image, normalize=True) @ weights.T
    label = logits.softmax(dim=-1).argmax().item()
print(classes["class_names"][label])
"""
)
"""How the folder is used without adaptclip."""

EXAMPLE_SIGMOID = (
    EXAMPLE.partition("    label = ")[0]
    + """\
    probabilities = (logits + torch.tensor(classes["bias"])).sigmoid()[0].tolist()
rows = zip(classes["class_names"], probabilities, classes["thresholds"])
print([name for name, probability, threshold in rows if probability >= threshold])
"""
)
"""The same where each class is named by itself."""


def example(model: AdaptedModel) -> str:
    """Returns how the folder of this artifact is used without adaptclip."""
    return EXAMPLE if model.thresholds is None else EXAMPLE_SIGMOID


def write(folder: Path, model: AdaptedModel) -> None:
    """Writes open_clip_config.json, open_clip_model.safetensors and the names of the classes.

    Raises:
        ArtifactError: the method's result is not a CLIP.
        BackboneError: open_clip could not build this backbone again from a folder.
    """
    method = model.manifest["method"]
    check_stock_tower(model)
    if not model.adapter.is_clip:
        raise ArtifactError(
            f"the result of {method!r} is a head on image features, not a CLIP: its text tower does not know what was "
            f"learnt. Export it with `--to classifier` (image tower and head) or `--to onnx`; `--to open_clip` is for "
            f"{', '.join(sorted(key for key, own in methods().items() if own.is_clip))}."
        )
    # The folder is a temporary one that is there already.
    save_open_clip(folder, merged_model(model).state_dict(), model.backbone, overwrite=True)
    # An open_clip model has one bias for all texts at most, and here each class has its own.
    bias = {} if model.thresholds is None else {"bias": head_of(model).bias.tolist()}
    write_classes(folder, model, **bias)
    write_decoder(folder, model)


def write_classes(folder: Path, model: AdaptedModel, **more: Any) -> None:
    """Writes what the columns of the probabilities mean, and from which probability on a class is named by itself."""
    names = [clean_class_name(name) for name in model.manifest["prompt_names"]]
    templates = model.manifest["settings"].get("templates")
    known: dict[str, Any] = {"class_names": list(model.class_names), "prompt_names": names}
    if model.thresholds is not None:
        known |= {"objective": "sigmoid", "thresholds": model.thresholds.values.tolist()}
    write_json(folder / CLASSES_FILE, known | ({"templates": templates} if templates else {}) | more)


def probabilities(logits: Tensor, classes: Mapping[str, Any]) -> Tensor:
    """What logits mean by the classes.json beside them: (B, C) probabilities of one class, or of each by itself."""
    return logits.sigmoid() if classes.get("objective") == "sigmoid" else logits.softmax(dim=-1)


def load_stock(folder: Path) -> tuple[Any, Any]:
    """Returns model and evaluation transform of a stock folder, loaded by open_clip alone.

    Raises:
        ArtifactError: open_clip cannot build its Hugging Face text encoder.
    """
    encoder = text_encoder(folder)
    # open_clip asks transformers for the encoder by its name, which is that of a folder here first.
    with _working_in(folder) if encoder else contextlib.nullcontext():
        try:
            # The arguments of the documented call; quiet about what it reads.
            model, _, transform = open_clip.create_model_and_transforms(
                f"{LOCAL_PREFIX}{folder.resolve()}", require_pretrained=True, weights_only=True
            )
        except (OSError, ValueError) as error:
            if not encoder:
                raise
            raise ArtifactError(
                f"stock open_clip cannot build the text encoder {encoder!r} of this model ({error}), so the export "
                "could not be checked. `--to classifier` and `--to onnx` need no text tower."
            ) from error
    return model.eval(), transform


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def text_encoder(folder: Path) -> str | None:
    """Returns the name of the Hugging Face text encoder that a stock folder names, or None where it has none."""
    return read_json(folder / CONFIG_FILE)["model_cfg"]["text_cfg"].get("hf_model_name")


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
        logits = model.logit_scale.exp() * features @ weights.T + torch.tensor(classes.get("bias", 0.0))
        return Outputs(features, logits, probabilities(logits, classes))

    return classify
