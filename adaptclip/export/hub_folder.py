"""`hf`: a folder ready for upload to a model hub, with the model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from adaptclip.artifact import AdaptedModel
from adaptclip.artifact_checks import MANIFEST_FILE, MOST_FILE_BYTES, README_FILE, as_damage
from adaptclip.data.card import parse_front_matter
from adaptclip.errors import StorageError
from adaptclip.export import classifier, stock
from adaptclip.export.checking import Reader
from adaptclip.seals import own_file
from adaptclip.storage import read_text, write_text

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
