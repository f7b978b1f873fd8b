"""`hf`: a folder ready for upload to a model hub, with the model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from adaptclip.artifact import AdaptedModel
from adaptclip.backbone.loading import HUB_PREFIX
from adaptclip.export import classifier, stock
from adaptclip.export.checking import Reader
from adaptclip.storage import write_text

ARTIFACT_FOLDER = "artifact"
"""Where the adaptclip artifact itself lies in the folder; `adaptclip.load(FOLDER)` finds it there."""


def kind(model: AdaptedModel) -> str:
    """What stands at the top of the folder: "open_clip" where the result is a CLIP, else "classifier"."""
    return "open_clip" if model.manifest["method"] in stock.IS_CLIP else "classifier"


def write(folder: Path, model: AdaptedModel) -> None:
    """Writes what open_clip loads by `hf-hub:` or `local-dir:`, and the artifact below `artifact/`.

    Raises:
        ArtifactError: the method has no fixed head.
        BackboneError: open_clip could not build this backbone again from a folder.
    """
    (stock if kind(model) == "open_clip" else classifier).write(folder, model)
    (folder / ARTIFACT_FOLDER).mkdir()
    for name in ("manifest.json", "README.md", *model.manifest["files"]):
        shutil.copyfile(model.folder / name, folder / ARTIFACT_FOLDER / name)


def write_card(folder: Path, model: AdaptedModel, use: Sequence[str], licence: str | None) -> None:
    """Writes README.md: the artifact's model card with the hub's metadata, and how the folder is used."""
    card = ModelCard.load(model.folder / "README.md")
    manifest, head = model.manifest, card.data.to_dict()
    name = manifest["backbone"]["name"]
    value = manifest["metrics"]["accuracy"]["model"]["value"]
    accuracy = EvalResult(
        task_type="image-classification", dataset_type=manifest["card"]["name"],
        dataset_name=f"{manifest['card']['name']} (test split)", metric_type="accuracy", metric_value=value,
    )  # fmt: skip
    front = ModelCardData(
        **{**head, "library_name": "open_clip", "license": licence},
        base_model=name.removeprefix(HUB_PREFIX) if name.startswith(HUB_PREFIX) else None,
        eval_results=[accuracy] if value is not None else None,
    )
    body = card.text.strip()
    start, mark, rest = body.partition("\n## Use\n")
    _, heading, after = rest.partition("\n## ")
    text = "\n\n".join([start.rstrip(), "## Use", *use]) + (f"\n\n## {after}" if heading and mark else "")
    write_text(folder / "README.md", f"---\n{front.to_yaml()}\n---\n\n{text.strip()}\n")


def read(folder: Path) -> Reader:
    """Loads the top of the folder with stock libraries alone."""
    return (classifier if (folder / classifier.HEAD_FILE).is_file() else stock).read(folder)
