# SPDX-License-Identifier: Apache-2.0
"""`hf`: a folder ready for upload to a model hub, and the README.md of every export."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from adaptclip.artifact.checks import MANIFEST_FILE, MOST_FILE_BYTES, README_FILE, as_damage
from adaptclip.artifact.export import classifier, hub_folder, onnx_graph, stock
from adaptclip.artifact.export.decoding import DECODER_FILE, frames_of, window_of
from adaptclip.data.card import parse_front_matter
from adaptclip.errors import StorageError
from adaptclip.files import read_text, write_text
from adaptclip.reports.multi_label import how_chosen
from adaptclip.reports.render import escape_markdown
from adaptclip.seals import CHECK_FILE, own_file

if TYPE_CHECKING:
    from adaptclip.artifact import AdaptedModel
    from adaptclip.artifact.export.checking import Difference, Reader
    from adaptclip.training.thresholds import Thresholds

_LOADING, _WITHOUT = "## How to load it", "## How to use it without adaptclip"
"""Heading of the artifact's model card, and the one that is put before it."""

MOST_README_BYTES = 16 * 2**20
"""Largest model card that is read."""

ARTIFACT_FOLDER = "artifact"
"""Where the adaptclip artifact itself lies in the folder; `adaptclip.load(FOLDER)` finds it there."""


def kind(model: AdaptedModel) -> str:
    """What stands at the top of the folder: "open_clip" where the result is a CLIP, else "classifier"."""
    return "open_clip" if model.adapter.is_clip else "classifier"


def write(folder: Path, model: AdaptedModel) -> None:
    """Writes what open_clip loads by `hf-hub:` or `local-dir:`, and the artifact below `artifact/`.

    Raises:
        ArtifactError: the method has no fixed head.
        BackboneError: open_clip could not build this backbone again from a folder.
    """
    (stock if kind(model) == "open_clip" else classifier).write(folder, model)
    (folder / ARTIFACT_FOLDER).mkdir()
    with as_damage(model.folder):
        most = {README_FILE: MOST_README_BYTES}
        for name in (MANIFEST_FILE, README_FILE, *model.manifest["files"]):
            own = own_file(model.folder, name, most_bytes=most.get(name, MOST_FILE_BYTES))
            shutil.copyfile(own, folder / ARTIFACT_FOLDER / name)


def write_card(folder: Path, model: AdaptedModel, use: Sequence[str], licence: str | None) -> None:
    """Writes README.md: the artifact's model card, with how the folder is used without adaptclip put in.

    Args:
        folder: the export.
        model: what was exported.
        use: paragraphs of Markdown.
        licence: for the front matter; None leaves what the artifact's card says.
    """
    with as_damage(model.folder):
        path = own_file(model.folder, README_FILE, most_bytes=MOST_README_BYTES)
        about, prose = parse_front_matter(read_text(path), where=str(path))
        try:
            about = ModelCardData(**{**about, "library_name": "open_clip"})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"{path} is not a model card ({error!r})") from error
    if licence is not None:
        about["license"] = licence
    before, heading, after = prose.strip().partition(f"\n{_LOADING}\n")
    text = "\n\n".join([before.rstrip(), _WITHOUT, *use]) + (f"\n\n{_LOADING}\n{after}" if heading else "")
    write_text(folder / README_FILE, f"---\n{about.to_yaml()}\n---\n\n{text.strip()}\n")


def read(folder: Path) -> Reader:
    """Loads the top of the folder with stock libraries alone."""
    return (classifier if (folder / classifier.HEAD_FILE).is_file() else stock).read(folder)


KNOWS_ONLY_ITS_CLASSES = (
    "It knows only its own classes and gives each image one of them, whatever the image shows. Assess it on images of "
    "the place where it is to be used before relying on it."
)

KNOWS_NOTHING_ELSE = (
    "It knows only its own classes, and may name several of them for an image, or none. Assess it on images of the "
    "place where it is to be used before relying on it."
)

_ABOUT = {
    "open_clip": "A stock open_clip checkpoint: what was learnt is merged into its weights. Classes are named by "
    "prompts; `classes.json` has the names and the templates it was trained with.",
    "classifier": "An image tower and a fixed head. `open_clip_model.safetensors` has the tower; open_clip builds "
    "none alone, so a tiny untrained text tower stands beside it: encode no text with this model. "
    "`classifier.safetensors` has the head (the logit scale is in its weights), `classes.json` the names of its rows.",
    "onnx": "`model.onnx` is the image tower with its head: input `pixels` (batch, 3, {size}, {size}) float32, outputs "
    "`features` (batch, {width}) of unit norm, `logits` and `probabilities` (batch, {classes}); any batch size. "
    "`preprocessing.json` and the graph's metadata say how an image becomes pixels.",
}


def how_to_use(folder: Path, to: str, model: AdaptedModel) -> list[str]:
    """Returns paragraphs of Markdown: what is in the folder, and an example of at most 24 lines.

    Args:
        folder: the written export.
        to: a key of `FORMATS`.
        model: what was exported.
    """
    kind = hub_folder.kind(model) if to == "hf" else to
    code = {
        "open_clip": lambda: stock.example(model),
        "classifier": lambda: classifier.example(model),
        "onnx": lambda: onnx_graph.example(folder),
    }[kind]()
    about = _ABOUT[kind].format(
        size=model.backbone.image_size, width=model.backbone.embed_dim, classes=len(model.class_names)
    )
    needs = {"onnx": "onnxruntime, Pillow and numpy"}.get(kind, "open_clip_torch and safetensors")
    paragraphs = [about, f"It needs {needs}:", f"```python\n{code}```"]
    paragraphs.append(
        f"`{CHECK_FILE}` has the SHA-256 of every file, and the example compares them first. That finds damage, not "
        "forgery: whoever changes a file on purpose can change that one too."
    )
    if to == "hf":
        paragraphs.append(
            "From a hub, write `hf-hub:ORGANISATION/NAME` for `local-dir:` and download the other files. With "
            "adaptclip, which also checks the gates: `adaptclip.load(FOLDER).predict(images)` on the downloaded folder."
        )
    if kind == "open_clip" and (encoder := stock.text_encoder(folder)):
        paragraphs.append(
            f"open_clip asks for the configuration of the text encoder `{encoder}` by that name. It lies in the folder "
            "of this name here and is found by a program that was started in this folder, as the example is; started "
            "elsewhere, open_clip asks the hub for it, which needs a network and a name that the hub has."
        )
    if model.thresholds is not None:
        paragraphs.append(_named_by_themselves(kind, model.thresholds))
    paragraphs.append(KNOWS_ONLY_ITS_CLASSES if model.thresholds is None else KNOWS_NOTHING_ELSE)
    window = window_of(model)
    deep = (
        "refuses images of more than 8 bits, as no window was declared in training"
        if window is None
        else f"scales images of more than 8 bits so that {window[0]:g} is black and {window[1]:g} white"
    )
    frames = {
        "first": "takes the first frame of an animation or a stack",
        "middle": "takes the middle frame of an animation or a stack",
        "all": "refuses animations and stacks, as the model learnt from their single frames: give it one frame",
        None: "refuses animations and stacks",
    }[frames_of(model)]
    paragraphs.append(
        f"`{DECODER_FILE}` decodes images as they were decoded in training, with Pillow and numpy (and opencv-"
        "python-headless for colour of more than 8 bits): it turns them upright by their EXIF orientation, lays "
        f"transparent ones over white, {deep}, and {frames}. DICOM needs pydicom (a window declared in training goes "
        "before the file's own), HEIC pi_heif and rare layouts of TIFF tifffile; clips, archives and addresses are "
        "opened by adaptclip and not by this file. Another decoder may give other labels."
    )
    return paragraphs


def _named_by_themselves(kind: str, thresholds: Thresholds) -> str:
    has = (
        "the thresholds, and the biases, which are not in the model itself" if kind == "open_clip" else "the thresholds"
    )
    return (
        "Each probability is the sigmoid of a logit and says whether the image is of that class, whatever the others "
        "are: they do not sum to 1. A class is named where its probability reaches its threshold. "
        f"`{stock.CLASSES_FILE}` has {has}. {how_chosen(thresholds.to_dict())}"
    )


def write_readme(folder: Path, to: str, model: AdaptedModel, use: Sequence[str], found: Difference) -> None:
    """Writes README.md beside an export.

    Args:
        folder: the export.
        to: a key of `FORMATS`.
        model: what was exported.
        use: what `how_to_use` returned.
        found: how far it is from the adapter.
    """
    manifest = model.manifest
    backbone = manifest["backbone"]
    failed = [v["title"] for v in manifest["verdicts"] if v["verdict"] == "fail"]
    gates = f"It failed the gates: {'; '.join(map(escape_markdown, failed))}." if failed else ""
    lines = [
        f"# {manifest['method']} on {escape_markdown(manifest['card']['name'])}, exported to {to}",
        f"Made by adaptclip from `{backbone['name']}`"
        + (f" with the weights `{backbone['pretrained']}`" if backbone["pretrained"] else "")
        + f" for {len(model.class_names)} classes. The terms of those weights and of the training images hold for it.",
        *([gates] if gates else []),
        *use,
        f"Checked when it was made: {found}.",
    ]
    write_text(folder / "README.md", "\n\n".join(lines) + "\n")
