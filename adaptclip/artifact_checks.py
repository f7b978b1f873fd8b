"""What an artifact says of itself is read as a stranger's: kinds, paths and sizes are checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from adaptclip.errors import ArtifactError
from adaptclip.storage import digest

MOST_MANIFEST_BYTES = 64 * 2**20
"""Largest manifest.json; one with 100,000 class names has about 10 MB."""

MOST_FILE_BYTES = 8 * 2**30
"""Largest file of what was learnt; the update of the largest CLIP at full rank is smaller."""

_KINDS: dict[str, type] = {
    "format_version": int,
    "method": str,
    "settings": dict,
    "backbone": dict,
    "class_names": list,
    "prompt_names": list,
    "transform": dict,
    "files": dict,
    "verdicts": list,
}
"""Key of a manifest -> its kind."""

_NOT_A_SIZE = ("seed",)
"""Whole numbers in settings that nothing is made as large as."""


def check_manifest_bytes(folder: Path) -> None:
    """Raises ArtifactError when manifest.json is too large to be one."""
    size = (folder / "manifest.json").stat().st_size
    if size > MOST_MANIFEST_BYTES:
        raise ArtifactError(f"{folder}/manifest.json has {size:,} bytes; at most {MOST_MANIFEST_BYTES:,} are read")


def check_kinds(folder: Path, manifest: Any) -> None:
    """Raises ArtifactError unless the manifest has its keys, each of its kind."""
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{folder}/manifest.json should be an object, got {type(manifest).__name__}")
    missing = [key for key in _KINDS if key not in manifest]
    if missing:
        raise ArtifactError(f"{folder}/manifest.json lacks {', '.join(missing)}")
    for key, kind in _KINDS.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            got = type(manifest[key]).__name__
            raise ArtifactError(f"{folder}/manifest.json: {key} should be {kind.__name__}, got {got}")
    names = (manifest["class_names"], manifest["prompt_names"])
    if not all(isinstance(name, str) for listed in names for name in listed) or len(names[0]) != len(names[1]):
        raise ArtifactError(f"{folder}/manifest.json: class_names and prompt_names should be equally many texts")
    trained = manifest["backbone"]
    if not isinstance(trained.get("name"), str) or not isinstance(trained.get("digest"), str):
        raise ArtifactError(f"{folder}/manifest.json: backbone should have a name and a digest")
    if not isinstance(trained.get("pretrained"), str | None):
        raise ArtifactError(f"{folder}/manifest.json: pretrained of the backbone should be text or null")
    wrong = [v for v in manifest["verdicts"] if not isinstance(v, dict) or not {"verdict", "title", "reason"} <= set(v)]
    if wrong:
        raise ArtifactError(
            f"{folder}/manifest.json: a verdict should have verdict, title and reason, got {wrong[0]!r}"
        )


def check_objective(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses thresholds that do not fit the classes, or an objective that is not the adapter's.

    Raises:
        ArtifactError: "objective" is missing where the settings say sigmoid, or the other way round, or its thresholds
            are not one number from 0 to 1 for each class, with what is told of them.
    """
    where, told = f"{folder}/manifest.json", manifest.get("objective")
    wanted, names = manifest["settings"].get("objective", "softmax"), manifest["class_names"]
    if told is None and wanted == "softmax":
        return
    if not isinstance(told, dict) or told.get("name") != wanted or wanted != "sigmoid":
        raise ArtifactError(f"{where}: objective should be that of the settings, {wanted!r}, with its thresholds")
    thresholds = told.get("thresholds")
    keys = {"rule": str, "values": list, "num_images": int, "positives": list, "fallbacks": list}
    if not isinstance(thresholds, dict) or set(thresholds) != set(keys):
        raise ArtifactError(f"{where}: thresholds should have {', '.join(keys)}")
    for key, kind in keys.items():
        if not isinstance(thresholds[key], kind) or isinstance(thresholds[key], bool):
            got = type(thresholds[key]).__name__
            raise ArtifactError(f"{where}: {key} of the thresholds should be {kind.__name__}, got {got}")
    for key, kind, most in (("values", int | float, 1), ("positives", int, thresholds["num_images"])):
        listed = thresholds[key]
        fine = all(isinstance(v, kind) and not isinstance(v, bool) and 0 <= v <= most for v in listed)
        if not fine or len(listed) != len(names):
            raise ArtifactError(f"{where}: {key} of the thresholds should be {len(names)} numbers from 0 to {most}")
    if not all(name in names for name in thresholds["fallbacks"]):
        raise ArtifactError(f"{where}: fallbacks of the thresholds should be names of classes")


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compares the files that the manifest names with their digests.

    A name is that of a file directly in the folder. A link may lead to where the hub's cache keeps the contents of its
    snapshots, and nowhere else.

    Raises:
        ArtifactError: a file is missing, changed, too large, or not in the folder.
    """
    for name, expected in manifest["files"].items():
        file = folder / name
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ArtifactError(f"{folder}: its manifest names the file {name!r}, which is not one in this folder")
        if file.is_symlink() and not _is_cached(folder, file):
            raise ArtifactError(f"{folder}: {name} is a link that leaves the folder; put the file itself there")
        if file.is_file() and file.stat().st_size > MOST_FILE_BYTES:
            raise ArtifactError(f"{folder}: {name} has {file.stat().st_size:,} bytes, more than {MOST_FILE_BYTES:,}")
        if not file.is_file() or digest(file.read_bytes()) != expected:
            raise ArtifactError(f"{folder} is damaged: {name} is missing or changed. Take a fresh copy or train again.")


def _is_cached(folder: Path, file: Path) -> bool:
    """Whether a link stays in the folder, or leads from a snapshot of the hub's cache to the blobs beside it."""
    target, own = file.resolve(), folder.resolve()
    if target.parent == own:
        return True
    snapshots = next((parent for parent in own.parents if parent.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.parent / "blobs"


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses settings that would make something larger than what the artifact has.

    Every size among the settings (rank, number of keys or of context vectors) is one of the sides of a stored tensor,
    so a few bytes of JSON cannot ask for more memory than the files had to be large for.

    Raises:
        ArtifactError: a whole number among the settings is larger than every side.
    """
    sides = [1]
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            sides += _sides(folder, name)
    for key, value in manifest["settings"].items():
        if isinstance(value, int) and not isinstance(value, bool) and key not in _NOT_A_SIZE and value > max(sides):
            raise ArtifactError(
                f"{folder} is damaged: the setting {key} is {value:,}, but no tensor in it is larger than "
                f"{max(sides):,}"
            )


def _sides(folder: Path, name: str) -> list[int]:
    """Sides of the tensors of a file, from its header alone."""
    try:
        with safetensors.safe_open(folder / name, "pt") as file:
            return [side for key in file.keys() for side in file.get_slice(key).get_shape()]  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(
            f"{folder} is damaged: {name} is not safetensors ({error}); nothing in it was run"
        ) from error
