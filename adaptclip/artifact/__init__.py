# SPDX-License-Identifier: Apache-2.0
"""The artifact: a folder that explains itself, and the model that is loaded from it.

    manifest.json          format version, method and its settings, backbone and its weights digest, class names,
                           templates, transform, card and split digests, library versions, metrics, declared gates and
                           verdicts, size and digest of every file; under a digest of its own (`adaptclip.seals`)
    text_features.safetensors  where the card holds features: those of the classes
    adapter.safetensors    what was learnt; LoRA writes PEFT's adapter_config.json and adapter_model.safetensors
    README.md              a Hugging Face model card filled from the run

Nothing in it is a pickle, and nothing of the base model is copied.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import adaptclip
from adaptclip.artifact.adapted_model import AdaptedModel as AdaptedModel
from adaptclip.artifact.adapted_model import Prediction as Prediction
from adaptclip.artifact.adapted_model import Unreadable as Unreadable
from adaptclip.artifact.checks import (
    MANIFEST_FILE,
    README_FILE,
    SEALED_SINCE,
    as_damage,
    check_learnt,
    check_objective,
    check_prompts,
    check_sizes,
    check_verdicts,
    complete_settings,
    read_manifest,
)
from adaptclip.artifact.model_card import NO_CARD, model_card, unjudged_card
from adaptclip.clip import ClipBackbone, check_device, load_backbone
from adaptclip.clip.loading import local_folders
from adaptclip.errors import ArtifactError, ConfigError, DataError, did_you_mean
from adaptclip.feature_clip import FeatureClip
from adaptclip.files import read_tensors, write_json, write_tensors, write_text
from adaptclip.methods.base import objective_of
from adaptclip.methods.registry import methods
from adaptclip.outputs import atomic_folder, runs_below
from adaptclip.seals import check_file, describe_files, read_report, seal, stays_inside
from adaptclip.training.thresholds import Thresholds, even_thresholds

if TYPE_CHECKING:
    from adaptclip.data.dataset import DomainData
    from adaptclip.data.shots import FewShotSplit
    from adaptclip.gate_rules import GateRule
    from adaptclip.gates import Verdict
    from adaptclip.methods.method import Method

FORMAT_VERSION = 2
"""Raised when an older adaptclip could no longer read what a newer one writes. 1 is still read: no digest of itself."""

TEXT_FILE = "text_features.safetensors"
"""Text features of the classes, where no model is known that could make them again."""

_LIBRARIES = ("accelerate", "open_clip_torch", "peft", "timm", "torch", "torchvision")


def save_artifact(
    path: Path,
    adapter: Method,
    backbone: ClipBackbone | FeatureClip,
    data: DomainData,
    split: FewShotSplit | None,
    *,
    method: str,
    report: dict[str, Any],
    verdicts: Sequence[Verdict],
    rules: Sequence[GateRule] | None = None,
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
        method: a key of the registry (`methods.registry`).
        report: the report on the test split (`full_report`, or `build_report`).
        verdicts: the gates' verdicts; an artifact with a failed gate is loaded only on purpose.
        rules: the gates that were declared, one verdict each; None takes those that have a verdict.
        thresholds: of a method of the sigmoid objective; None is 0.5 for every class.
        overwrite: replace an earlier artifact.

    Raises:
        ArtifactError: a declared gate has no verdict.
        StorageError: the folder exists already, is no artifact, or cannot be written (see `adaptclip.outputs`).
    """
    card, judged = data.card, [verdict.title for verdict in verdicts]
    declared = judged if rules is None else [rule.title for rule in rules]
    if declared != judged:
        raise ArtifactError(f"each declared gate needs its verdict; declared are {declared}, verdicts are on {judged}")
    with atomic_folder(path, "artifact", overwrite=overwrite, inputs=local_folders(backbone.name)) as folder:
        manifest = {
            **_describe(folder, method, adapter, backbone, data.class_names, thresholds),
            "prompt_names": list(data.prompt_names),
            "window": card.window,
            "frames": card.frames,
            "card": {"name": card.name, "digest": card.digest},
            "split": split and {"shots": split.shots, "seed": split.seed, "rule": split.rule, "digest": split.digest},
            "metrics": report["overall"],
            "gates": declared,
            "verdicts": [verdict.to_dict() for verdict in verdicts],
        }
        write_json(folder / MANIFEST_FILE, seal(manifest))
        write_text(folder / README_FILE, model_card(manifest, card, report, verdicts))


def save_model(model: Method, path: Path | str, *, overwrite: bool = False) -> None:
    """Writes a method that learnt outside of a run as an artifact; no gate was declared, and its README says so.

    Args:
        model: fitted.
        path: the new folder.
        overwrite: replace an earlier artifact.

    Raises:
        ConfigError: it has not learnt yet.
        StorageError: the folder exists already, is no artifact, or cannot be written (see `adaptclip.outputs`).
    """
    if model.learns_from != "nothing" and not model.__sklearn_is_fitted__():
        raise ConfigError(f"{type(model).__name__} has not learnt anything yet; call fit(x, y) before save")
    backbone = model.backbone
    with atomic_folder(Path(path), "artifact", overwrite=overwrite, inputs=local_folders(backbone.name)) as folder:
        manifest = {
            **_describe(folder, model.name, model, backbone, model.class_names, model.thresholds_),
            "prompt_names": list(model.class_names), "window": None, "card": {"name": NO_CARD, "digest": ""},
            "split": None, "metrics": {}, "gates": [], "verdicts": [],
        }  # fmt: skip
        write_json(folder / MANIFEST_FILE, seal(manifest))
        write_text(folder / README_FILE, unjudged_card(manifest))


def _describe(
    folder: Path,
    method: str,
    adapter: Method,
    backbone: ClipBackbone | FeatureClip,
    class_names: Sequence[str],
    thresholds: Thresholds | None,
) -> dict[str, Any]:
    """Writes what was learnt into the folder, and returns what the manifest says of it and of the backbone."""
    info = {}
    if objective_of(adapter) == "sigmoid":
        info = {"objective": {"name": "sigmoid", "thresholds": (thresholds or even_thresholds(class_names)).to_dict()}}
    return {
        "format_version": FORMAT_VERSION,
        "method": method,
        "settings": adapter.settings,
        **info,
        "backbone": {
            "name": backbone.name,
            "pretrained": backbone.pretrained,
            "digest": backbone.digest,
            **({"image_size": backbone.asked_size} if backbone.asked_size else {}),
            **(_describe_features(backbone) if isinstance(backbone, FeatureClip) else {}),
        },
        "class_names": list(class_names),
        "transform": backbone.transform_spec,
        "libraries": {
            "adaptclip": adaptclip.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "files": describe_files(
            folder, [path.name for path in (*_write_adapter(folder, adapter), *_write_clip(folder, backbone))]
        ),
    }


def _describe_features(clip: FeatureClip) -> dict[str, Any]:
    bias = clip.logit_bias
    return {
        "names": list(clip.class_names), "source": clip.source, "logit_scale": float(clip.logit_scale),
        "logit_bias": None if bias is None else float(bias),
    }  # fmt: skip


def _write_clip(folder: Path, clip: ClipBackbone | FeatureClip) -> list[Path]:
    """Writes what no model can be loaded for: the text features of a CLIP of which only features are known."""
    if not isinstance(clip, FeatureClip):
        return []
    write_tensors(folder / TEXT_FILE, {"text_features": clip.text_features.cpu()})
    return [folder / TEXT_FILE]


def _read_clip(folder: Path, manifest: Mapping[str, Any]) -> FeatureClip:
    info = manifest["backbone"]
    with as_damage(folder):
        text = read_tensors(folder / TEXT_FILE)
    try:
        return FeatureClip(
            text["text_features"], info["names"], logit_scale=info["logit_scale"], logit_bias=info["logit_bias"],
            source=info["source"],
        )  # fmt: skip
    except (KeyError, TypeError, DataError) as error:
        raise ArtifactError(f"{folder} is damaged: its text features cannot be read ({error})") from error


@runtime_checkable
class _HasFiles(Protocol):
    """An adapter with files of its own: LoRA writes a PEFT folder."""

    def save_adapter(self, folder: Path) -> list[Path]: ...

    def load_adapter(self, folder: Path) -> None: ...


def _write_adapter(folder: Path, adapter: Method) -> list[Path]:
    """Writes what was learnt into an artifact folder and returns the files."""
    if isinstance(adapter, _HasFiles):
        return adapter.save_adapter(folder)
    weights = folder / "adapter.safetensors"
    write_tensors(weights, adapter.adapter_state())
    return [weights]


def _read_adapter(folder: Path, adapter: Method) -> None:
    """Gives an adapter what `_write_adapter` wrote."""
    if isinstance(adapter, _HasFiles):
        adapter.load_adapter(folder)
    else:
        adapter.load_adapter_state(read_tensors(folder / "adapter.safetensors"))


def load(
    path: Path | str,
    *,
    backbone: str | ClipBackbone | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    allow_failed_gates: bool = False,
    templates: Sequence[str] | None = None,
) -> AdaptedModel:
    """Loads an artifact and the backbone it was trained on.

    Args:
        path: the artifact folder, or a run folder that holds one.
        backbone: where to load the backbone from if not from the place it had in training (a moved `local-dir:`), or
            the backbone itself (of an artifact that was made with `wrap_clip`).
        pretrained: its weights tag or file, likewise.
        device: "cpu", "cuda", "cuda:1", …
        allow_failed_gates: load although a gate failed.
        templates: the prompts you expect; the artifact always uses those it was trained with.

    Raises:
        ArtifactError: the folder is missing, damaged, of a newer format, or was trained on other backbone weights or
            with other prompts; or a gate failed and `allow_failed_gates` is false.
        BackboneError: there is no such device here, or the backbone cannot be loaded.
    """
    check_device(device)
    folder = artifact_folder(path)
    manifest = _read_manifest(folder)
    check_verdicts(folder, manifest, allow_failed_gates)
    trained = manifest["backbone"]
    check_prompts(folder, manifest, templates)
    model: Any = backbone
    if trained["name"] == FeatureClip.name:
        model = _read_clip(folder, manifest)
    elif not isinstance(backbone, ClipBackbone):
        model = load_backbone(
            backbone or trained["name"], pretrained if backbone else trained["pretrained"], device=device,
            image_size=trained.get("image_size", 0),
        )  # fmt: skip
    early = manifest["format_version"] < SEALED_SINCE and isinstance(model, ClipBackbone)
    if model.digest != trained["digest"] and not (early and model.made(trained["digest"], early=True)):
        raise ArtifactError(
            f"{folder} was trained on other weights than {model.name} has here: digest {trained['digest'][:12]} in "
            f"training, {model.digest[:12]} now. Load the same checkpoint (backbone=…, pretrained=…), or train again."
        )
    if model.transform_spec != manifest["transform"]:
        raise ArtifactError(
            f"{folder} was trained with the transform {manifest['transform']}, {model.name} has {model.transform_spec}"
        )
    settings = complete_settings(manifest["method"], manifest["settings"])
    try:
        adapter = methods()[manifest["method"]](model, manifest["prompt_names"], **settings)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder} is damaged: {manifest['method']} cannot have its settings ({error})") from error
    with as_damage(folder):
        _read_adapter(folder, adapter)
    return AdaptedModel(adapter.to(device).eval(), model, manifest, folder=folder)


def artifact_folder(path: Path | str) -> Path:
    """Returns the artifact that a path stands for: itself, or the one in a run folder or an upload folder.

    Raises:
        ArtifactError: the artifact in a run folder is another one than the run wrote, or is a link out of it.
    """
    folder = Path(path)
    inner = folder / "artifact"
    if os.path.lexists(folder / MANIFEST_FILE) or not inner.is_dir():
        return folder
    if not stays_inside(folder, inner):
        raise ArtifactError(f"{inner} is a link that leaves the folder; name the artifact itself, or put it there")
    with as_damage(folder):
        files = read_report(folder).get("files") or {}
        if f"artifact/{MANIFEST_FILE}" in files:
            check_file(folder, f"artifact/{MANIFEST_FILE}", files[f"artifact/{MANIFEST_FILE}"])
    return inner


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks manifest.json and the files that it names."""
    if not os.path.lexists(folder / MANIFEST_FILE):
        raise ArtifactError(
            f"{folder} is not an artifact: it has no manifest.json. A run keeps it in RUN/artifact.{runs_below(folder)}"
        )
    manifest = read_manifest(folder, FORMAT_VERSION)
    if manifest["method"] not in methods():
        raise ArtifactError(
            f"{folder} holds the unknown method {manifest['method']!r}. {did_you_mean(manifest['method'], methods())}"
        )
    check_objective(folder, manifest)
    check_learnt(folder, manifest)
    check_sizes(folder, manifest)
    return manifest
