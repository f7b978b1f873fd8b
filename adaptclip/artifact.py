"""The artifact: a folder that explains itself, and the model that is loaded from it.

    manifest.json          format version, method and its settings, backbone and its weights digest, class names,
                           templates, transform, card and split digests, library versions, metrics, verdicts
    adapter.safetensors    what was learnt; LoRA writes PEFT's adapter_config.json and adapter_model.safetensors
    README.md              a Hugging Face model card filled from the run

Nothing in it is a pickle, and nothing of the base model is copied.
"""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import adaptclip
from adaptclip.adapted_model import AdaptedModel as AdaptedModel
from adaptclip.adapted_model import Prediction as Prediction
from adaptclip.adapted_model import Unreadable as Unreadable
from adaptclip.adapters import ADAPTERS, Adapter
from adaptclip.adapters.objective import objective_of
from adaptclip.artifact_checks import check_files, check_kinds, check_manifest_bytes, check_objective, check_sizes
from adaptclip.backbone import ClipBackbone, load_backbone
from adaptclip.backbone.loading import local_folders
from adaptclip.data.dataset import DomainData
from adaptclip.data.fewshot import FewShotSplit
from adaptclip.errors import ArtifactError, StorageError, did_you_mean
from adaptclip.evaluation.thresholds import Thresholds, even_thresholds
from adaptclip.gates import Verdict
from adaptclip.model_card import model_card
from adaptclip.outputs import atomic_folder
from adaptclip.storage import digest, read_json, read_tensors, write_json, write_tensors, write_text

FORMAT_VERSION = 1
"""Raised when an older adaptclip could no longer read what a newer one writes."""

_LIBRARIES = ("accelerate", "open_clip_torch", "peft", "timm", "torch", "torchvision")


def save_artifact(
    path: Path,
    adapter: Adapter,
    backbone: ClipBackbone,
    data: DomainData,
    split: FewShotSplit | None,
    *,
    method: str,
    report: dict[str, Any],
    verdicts: Sequence[Verdict],
    thresholds: Thresholds | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the artifact folder whole or not at all.

    Args:
        path: the new folder.
        adapter: the trained adapter.
        backbone: the model it was trained on; only its names and digests are written.
        data: the data set it was trained on.
        split: the images it was trained on; None where nothing was.
        method: a key of ADAPTERS.
        report: the report on the test split (`full_report`, or `build_report`).
        verdicts: the gates' verdicts; an artifact with a failed gate is loaded only on purpose.
        thresholds: of an adapter of the sigmoid objective; None is 0.5 for every class.
        overwrite: replace an earlier artifact.

    Raises:
        StorageError: the folder exists already, is no artifact, or cannot be written (see `adaptclip.outputs`).
    """
    card = data.card
    told = {}
    if objective_of(adapter) == "sigmoid":
        used = thresholds or even_thresholds(data.class_names)
        told = {"objective": {"name": "sigmoid", "thresholds": used.to_dict()}}
    with atomic_folder(path, "artifact", overwrite=overwrite, inputs=local_folders(backbone.name)) as folder:
        manifest = {
            "format_version": FORMAT_VERSION,
            "method": method,
            "settings": adapter.settings,
            **told,
            "backbone": {"name": backbone.name, "pretrained": backbone.pretrained, "digest": backbone.digest},
            "class_names": list(data.class_names),
            "prompt_names": list(data.prompt_names),
            "prompts_digest": _prompts_digest(adapter.settings, data.prompt_names),
            "transform": backbone.transform_spec,
            "window": card.window,
            "card": {"name": card.name, "digest": card.digest},
            "split": split and {"shots": split.shots, "seed": split.seed, "rule": split.rule, "digest": split.digest},
            "libraries": {
                "adaptclip": adaptclip.__version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            },
            "metrics": report["overall"],
            "verdicts": [verdict.to_dict() for verdict in verdicts],
            "files": {
                path.relative_to(folder).as_posix(): digest(path.read_bytes())
                for path in _write_adapter(folder, adapter)
            },
        }
        write_json(folder / "manifest.json", manifest)
        write_text(folder / "README.md", model_card(manifest, card, report, verdicts))


@runtime_checkable
class _HasFiles(Protocol):
    """An adapter with files of its own: LoRA writes a PEFT folder."""

    def save_adapter(self, folder: Path) -> list[Path]: ...

    def load_adapter(self, folder: Path) -> None: ...


def _write_adapter(folder: Path, adapter: Adapter) -> list[Path]:
    """Writes what was learnt into an artifact folder and returns the files."""
    if isinstance(adapter, _HasFiles):
        return adapter.save_adapter(folder)
    weights = folder / "adapter.safetensors"
    write_tensors(weights, adapter.adapter_state())
    return [weights]


def _read_adapter(folder: Path, adapter: Adapter) -> None:
    """Gives an adapter what `_write_adapter` wrote."""
    if isinstance(adapter, _HasFiles):
        adapter.load_adapter(folder)
    else:
        adapter.load_adapter_state(read_tensors(folder / "adapter.safetensors"))


def _prompts_digest(settings: Mapping[str, Any], prompt_names: Sequence[str]) -> str:
    """SHA-256 of what the text tower is asked: templates (or learnt context settings) and class names, in order."""
    return digest([*map(str, settings.get("templates", ())), "for", *prompt_names])


def load(
    path: Path | str,
    *,
    backbone: str | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    allow_failed_gates: bool = False,
    templates: Sequence[str] | None = None,
) -> AdaptedModel:
    """Loads an artifact and the backbone it was trained on.

    Args:
        path: the artifact folder, or a run folder that holds one.
        backbone: where to load the backbone from if not from the place it had in training (a moved `local-dir:`).
        pretrained: its weights tag or file, likewise.
        device: "cpu", "cuda", "cuda:1", …
        allow_failed_gates: load although a gate failed.
        templates: the prompts you expect; the artifact always uses those it was trained with.

    Raises:
        ArtifactError: the folder is missing, damaged, of a newer format, or was trained on other backbone weights or
            with other prompts; or a gate failed and `allow_failed_gates` is false.
    """
    folder = artifact_folder(path)
    manifest = _read_manifest(folder)
    _check_verdicts(folder, manifest, allow_failed_gates)
    trained = manifest["backbone"]
    _check_prompts(folder, manifest, templates)
    model = load_backbone(backbone or trained["name"], pretrained if backbone else trained["pretrained"], device=device)
    if model.digest != trained["digest"]:
        raise ArtifactError(
            f"{folder} was trained on other weights than {model.name} has here: digest {trained['digest'][:12]} in "
            f"training, {model.digest[:12]} now. Load the same checkpoint (backbone=…, pretrained=…), or train again."
        )
    if model.transform_spec != manifest["transform"]:
        raise ArtifactError(
            f"{folder} was trained with the transform {manifest['transform']}, {model.name} has {model.transform_spec}"
        )
    adapter = ADAPTERS[manifest["method"]](model, manifest["prompt_names"], **manifest["settings"])
    try:
        _read_adapter(folder, adapter)
    except StorageError as error:
        raise ArtifactError(f"{folder} is damaged: {error}") from error
    return AdaptedModel(adapter.to(device).eval(), model, manifest, folder=folder)


def artifact_folder(path: Path | str) -> Path:
    """Returns the artifact that a path stands for: itself, or the one in a run folder or an upload folder."""
    folder = Path(path)
    holds_one = not (folder / "manifest.json").is_file() and (folder / "artifact").is_dir()
    return folder / "artifact" if holds_one else folder


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks manifest.json and the digests of the files that it names."""
    if not (folder / "manifest.json").is_file():
        raise ArtifactError(f"{folder} is not an artifact: it has no manifest.json. A run keeps it in RUN/artifact.")
    try:
        check_manifest_bytes(folder)
        manifest = read_json(folder / "manifest.json")
    except StorageError as error:
        raise ArtifactError(f"{folder} is damaged: {error}. Take a fresh copy, or train again.") from error
    check_kinds(folder, manifest)
    if manifest["format_version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format {manifest['format_version']}; this adaptclip {adaptclip.__version__} reads up to "
            f"{FORMAT_VERSION}. Install a newer adaptclip."
        )
    if manifest["method"] not in ADAPTERS:
        raise ArtifactError(
            f"{folder} holds the unknown method {manifest['method']!r}. {did_you_mean(manifest['method'], ADAPTERS)}"
        )
    check_objective(folder, manifest)
    check_files(folder, manifest)
    check_sizes(folder, manifest)
    return manifest


def _check_prompts(folder: Path, manifest: Mapping[str, Any], templates: Sequence[str] | None) -> None:
    """Refuses prompts other than those trained with: expected ones, or ones changed in the manifest by hand."""
    own = manifest["settings"].get("templates")
    if templates is not None and list(templates) != own:
        said = "learns its prompts itself" if own is None else f"was trained with the templates {own}"
        raise ArtifactError(f"{folder} {said}, not with {list(templates)}; leave templates out, or train with these")
    stated = manifest.get("prompts_digest")
    if stated is None:
        warnings.warn(
            f"{folder}/manifest.json has no prompts_digest, as those of early versions do not: whether its templates "
            "and prompt names are the ones it was trained with cannot be checked. Train again to have it.",
            stacklevel=3,
        )
    elif stated != _prompts_digest(manifest["settings"], manifest["prompt_names"]):
        raise ArtifactError(
            f"the templates or prompt names in {folder}/manifest.json are not those it was trained with: they were "
            "changed afterwards. Take a fresh copy, or train with the new ones."
        )


def _check_verdicts(folder: Path, manifest: Mapping[str, Any], allow_failed_gates: bool) -> None:
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
        warnings.warn(
            f"{folder}: the data could not decide these gates, which is not a pass: "
            + "; ".join(by_verdict["inconclusive"]),
            stacklevel=3,
        )
