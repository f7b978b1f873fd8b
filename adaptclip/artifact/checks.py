# SPDX-License-Identifier: Apache-2.0
"""What an artifact says of itself is read as a stranger's: kinds, digests, paths and sizes are checked first.

Since format 2 the manifest is sealed (`adaptclip.seals`): its digest covers all of it, and so everything that decides
an answer. That finds damage, not forgery. Settings that an older artifact lacks are given the values it was made with.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors

from adaptclip.errors import ArtifactError, StorageError, agree
from adaptclip.files import digest, read_json
from adaptclip.gates.verdicts import SEVERITY
from adaptclip.methods.registry import current_name
from adaptclip.seals import MOST_JSON_BYTES, check_file, check_seal, own_file, sha256_of


def complete_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an artifact's settings with what was fixed, and so not written, when it was made.

    A method writes all settings that decide what it is. Where one is missing, the artifact is older than the setting,
    and was made with what the method then did:

    - linear_probe: text_init and clap started at unit norm, and lp_plus_plus was the paper's reading, without a bias;
    - ss_text: a weight of the text per class, and no repulsion ("adaptive"), which is neither published mode;
    - two_stage: LoRA in the first stage.

    Args:
        method: a key of the registry.
        settings: of the manifest.
    """
    head = settings.get("head") and current_name(str(settings["head"]))
    settings = {**settings, "head": head} if head else settings
    fixed: dict[str, Any] = {}
    if method == "linear_probe" and head in ("text_init", "clap"):
        fixed = {"start_norm": 1.0}
    elif method == "linear_probe" and head == "lp_plus_plus":
        fixed = {"reading": "paper"}
    elif method == "ss_text":
        fixed = {"mode": "adaptive"}
    elif method == "two_stage":
        fixed = {"tune": "lora"}
    return {**fixed, **settings}


MANIFEST_FILE, README_FILE = "manifest.json", "README.md"

SEALED_SINCE = 2
"""Format from which on a manifest without its digest is refused."""

MOST_MANIFEST_BYTES = MOST_JSON_BYTES
"""Largest manifest.json; one with 100,000 class names has about 10 MB."""

MOST_FILE_BYTES = 8 * 2**30
"""Largest file of what was learnt; the update of the largest CLIP at full rank is smaller."""

_KINDS: dict[str, type] = {
    "format_version": int,
    "method": str,
    "settings": dict,
    "backbone": dict,
    "card": dict,
    "class_names": list,
    "prompt_names": list,
    "transform": dict,
    "files": dict,
    "verdicts": list,
}
"""Key of a manifest -> its kind."""

_NOT_A_SIZE = ("seed",)
"""Whole numbers in settings that nothing is made as large as."""


@contextlib.contextmanager
def as_damage(folder: Path) -> Iterator[None]:
    """Turns a StorageError inside the block into an ArtifactError that says how to mend it."""
    try:
        yield
    except StorageError as error:
        raise ArtifactError(f"{folder} is damaged: {error}. Take a fresh copy, or train again.") from error


def read_manifest(folder: Path, newest: int) -> dict[str, Any]:
    """Reads manifest.json and checks its digest, its format and the kinds of what is in it.

    Args:
        folder: the artifact.
        newest: the newest format that can be read.

    Raises:
        ArtifactError: it is missing, damaged or of a newer format. What cannot be checked of an early one is warned of.
    """
    where = f"{folder}/{MANIFEST_FILE}"
    with as_damage(folder):
        manifest = read_json(own_file(folder, MANIFEST_FILE, most_bytes=MOST_MANIFEST_BYTES))
    check_kinds(folder, manifest)
    version = manifest["format_version"]
    if version > newest:
        raise ArtifactError(
            f"{folder} has format {version}; this adaptclip reads up to {newest}. Install a newer adaptclip."
        )
    if version < 1:
        raise ArtifactError(f"{folder} is damaged: format_version is {version}, and formats are counted from 1")
    with as_damage(folder):
        sealed = check_seal(manifest, where)
    if version >= SEALED_SINCE and not sealed:
        raise ArtifactError(f"{folder} is damaged: {where} has no digest of itself, and format {version} has one")
    if not sealed:
        prompts = "" if "prompts_digest" in manifest else " and no prompts_digest"
        also = ", templates and prompt names" if prompts else ""
        warnings.warn(
            f"{folder} is of an early version: its manifest has no digest of itself{prompts}. Whether its class names, "
            f"settings{also}, thresholds, window and verdicts are those it was saved with cannot be checked. Train "
            "again to have it.",
            stacklevel=4,
        )
    check_gates(folder, manifest)
    return manifest


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
    trained, window = manifest["backbone"], manifest.get("window")
    if not isinstance(trained.get("name"), str) or not isinstance(trained.get("digest"), str):
        raise ArtifactError(f"{folder}/manifest.json: backbone should have a name and a digest")
    if not isinstance(trained.get("pretrained"), str | None):
        raise ArtifactError(f"{folder}/manifest.json: pretrained of the backbone should be text or null")
    templates = manifest["settings"].get("templates", [])
    if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
        raise ArtifactError(f"{folder}/manifest.json: templates of the settings should be texts, got {templates!r:.80}")
    if not isinstance(manifest["card"].get("name"), str):
        raise ArtifactError(f"{folder}/manifest.json: card should have a name")
    if window is not None and not (isinstance(window, list) and len(window) == 2 and all(map(_is_number, window))):
        raise ArtifactError(f"{folder}/manifest.json: window should be two numbers or null, got {window!r:.80}")
    if (frames := manifest.get("frames")) not in (None, "first", "middle", "all"):
        raise ArtifactError(f"{folder}/manifest.json: frames should be first, middle, all or null, got {frames!r:.80}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_gates(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses verdicts that are none, or that are not those of the gates that were declared.

    Raises:
        ArtifactError: an unknown verdict, or a declared gate without one.
    """
    where, verdicts = f"{folder}/{MANIFEST_FILE}", manifest["verdicts"]
    info = ("verdict", "title", "reason")
    for verdict in verdicts:
        if not isinstance(verdict, dict) or not all(isinstance(verdict.get(key), str) for key in info):
            raise ArtifactError(f"{where}: a verdict should have verdict, title and reason, got {verdict!r:.200}")
        if verdict["verdict"] not in SEVERITY:
            raise ArtifactError(
                f"{where}: {verdict['verdict']!r} is no verdict on the gate {verdict['title']!r}; allowed: "
                f"{', '.join(SEVERITY)}"
            )
    if manifest["format_version"] < SEALED_SINCE:
        return  # early ones do not say which gates were declared
    declared, judged = manifest.get("gates"), [verdict["title"] for verdict in verdicts]
    if declared != judged:
        raise ArtifactError(
            f"{where} has verdicts on {judged or 'nothing'}, but the gates that were declared for this model are "
            f"{declared or 'none'}. Take a fresh copy, or train again."
        )


def check_objective(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses thresholds that do not fit the classes, or an objective that is not the adapter's.

    Raises:
        ArtifactError: "objective" is missing where the settings say sigmoid, or the other way round, or its thresholds
            are not one number from 0 to 1 for each class, with what is told of them.
    """
    where, info = f"{folder}/manifest.json", manifest.get("objective")
    wanted, names = manifest["settings"].get("objective", "softmax"), manifest["class_names"]
    if info is None and wanted == "softmax":
        return
    if not isinstance(info, dict) or info.get("name") != wanted or wanted != "sigmoid":
        raise ArtifactError(f"{where}: objective should be that of the settings, {wanted!r}, with its thresholds")
    thresholds = info.get("thresholds")
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


def check_learnt(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compares the files of what was learnt with the manifest.

    A name is that of a file directly in the folder. A link may lead to where the hub's cache keeps the contents of its
    snapshots, and nowhere else.

    Raises:
        ArtifactError: a file is missing, changed, too large, not in the folder, or not in the manifest.
    """
    for name, info in manifest["files"].items():
        if "/" in name:
            raise ArtifactError(f"{folder}: its manifest names the file {name!r}, which is not one in this folder")
        with as_damage(folder):
            if manifest["format_version"] >= SEALED_SINCE:
                check_file(folder, name, info, most_bytes=MOST_FILE_BYTES)
                continue
            file = own_file(folder, name, most_bytes=MOST_FILE_BYTES)
            if sha256_of(file, start=file.stat().st_size.to_bytes(8, "big")) != info:
                raise StorageError(f"{file} is missing or changed")
    # What a method reads by a name of its own must be among them, or nothing would have looked at it.
    unlisted = [path.name for path in folder.glob("*.safetensors") if path.name not in manifest["files"]]
    if unlisted:
        raise ArtifactError(f"{folder} holds {unlisted[0]}, which is not among the files of its manifest; take it away")


def check_prompts(folder: Path, manifest: Mapping[str, Any], templates: Sequence[str] | None) -> None:
    """Refuses prompts other than those trained with: expected ones, or ones changed in the manifest by hand."""
    own = manifest["settings"].get("templates")
    if templates is not None and list(templates) != own:
        said = "learns its prompts itself" if own is None else f"was trained with the templates {own}"
        raise ArtifactError(f"{folder} {said}, not with {list(templates)}; leave templates out, or train with these")
    stated = manifest.get("prompts_digest")  # of format 1; later manifests have a digest of the whole
    if stated is not None and stated != _prompts_digest(manifest["settings"], manifest["prompt_names"]):
        raise ArtifactError(
            f"the templates or prompt names in {folder}/manifest.json are not those it was trained with: they were "
            "changed afterwards. Take a fresh copy, or train with the new ones."
        )


def _prompts_digest(settings: Mapping[str, Any], prompt_names: Sequence[str]) -> str:
    """SHA-256 of what the text tower is asked, which manifests of format 1 may have: templates and class names."""
    return digest([*map(str, settings.get("templates", ())), "for", *prompt_names])


def check_verdicts(folder: Path, manifest: Mapping[str, Any], allow_failed_gates: bool) -> None:
    """Refuses a model with a failed gate, and says so of one whose gates could not be decided."""
    by_verdict: dict[str, list[str]] = {}
    for verdict in manifest["verdicts"]:
        by_verdict.setdefault(verdict["verdict"], []).append(f"{verdict['title']}: {verdict['reason']}")
    if by_verdict.get("fail") and not allow_failed_gates:
        raise ArtifactError(
            f"{folder} failed {len(by_verdict['fail'])} of {len(manifest['verdicts'])} gates and is not released:\n  - "
            + "\n  - ".join(by_verdict["fail"])
            + "\nTo load it all the same, for study: allow_failed_gates=True (--allow-failed-gates)."
        )
    if by_verdict.get("inconclusive"):
        count, total = len(by_verdict["inconclusive"]), len(manifest["verdicts"])
        warnings.warn(
            f"{folder}: {count} of {total} gates {agree(count, 'is', 'are')} inconclusive, which is not a pass; its "
            "README.md says why",
            stacklevel=3,
        )


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
