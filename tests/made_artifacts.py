# SPDX-License-Identifier: Apache-2.0
"""Artifacts of every method on small models with random weights, saved as a recipe saves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from adaptclip.artifact import save_artifact
from adaptclip.clip import ClipBackbone
from adaptclip.files import digest
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.methods.registry import methods
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report
from adaptclip.seals import SEAL, describe_files, seal
from adaptclip.training.thresholds import Thresholds
from adaptclip.types import Features

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_TIMM = {"timm_model_pretrained": False}

IMAGE_TOWERS: dict[str, dict[str, Any]] = {
    "vit": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    },
    "resnet": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "patch_size": None},
    },
    "convnext": {
        "embed_dim": 48,
        "vision_cfg": _TIMM
        | {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    },
    "siglip": {
        "embed_dim": 192,
        "custom_text": True,
        "vision_cfg": _TIMM
        | {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 224},
    },
    "eva02": {
        "embed_dim": 192,
        "custom_text": True,
        "vision_cfg": _TIMM
        | {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None, "image_size": 224},
    },
    "mobileclip": {
        "embed_dim": 48,
        "custom_text": True,
        "vision_cfg": _TIMM
        | {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    },
    "coca": {
        "embed_dim": 48,
        "custom_text": True,
        "multimodal_cfg": {"context_length": 32, "width": 32, "heads": 2, "layers": 1},
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2, "attentional_pool": True,
            "attn_pooler_heads": 4, "output_tokens": True,
        },
    },
}  # fmt: skip
"""Kind of image tower -> configuration of a small open_clip model that has one."""


def write_checkpoint(folder: Path, kind: str, *, resize_mode: str = "shortest") -> Path:
    """Writes a `local-dir:` folder of a small model with random weights and returns it."""
    config: dict[str, Any] = {**IMAGE_TOWERS[kind], "text_cfg": dict(TEXT)}
    if "multimodal_cfg" in config:
        config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    cls = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CLIP
    cls = open_clip.CustomTextCLIP if cls is open_clip.CLIP and config.get("custom_text") else cls
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(**json.loads(json.dumps(arguments)))
    # A captioning decoder leaves one of its tensors as the memory was.
    state = {key: value.nan_to_num(0, 0, 0).contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess | {"resize_mode": resize_mode}})
    (folder / "open_clip_config.json").write_text(text)
    return folder


def edit_manifest(folder: Path, *, new_files: bool = False, **changes: Any) -> None:
    """What someone does who changes a manifest and means it: its digest is made anew, and its files' if asked."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    if new_files:
        manifest["files"] = describe_files(folder, manifest["files"])
    # Written by hand, so that what is no JSON (NaN) can be put into it.
    (folder / "manifest.json").write_text(json.dumps({**manifest, SEAL: seal(manifest)[SEAL]}))


def make_early(folder: Path, **changes: Any) -> None:
    """Rewrites an artifact as the first format had it: digests of its files alone."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), "format_version": 1, **changes}
    manifest["files"] = {name: digest((folder / name).read_bytes()) for name in manifest["files"]}
    for key in (SEAL, "gates"):
        manifest.pop(key)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def leaves(value: Any, path: tuple = ()) -> list[tuple[tuple, Any]]:
    """Where every text, number and null of a JSON value stands, with empty lists and objects among them."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, own in inner for leaf in leaves(own, (*path, key))]
    return found or [(path, value)]


def changed(value: Any, path: tuple) -> Any:
    """A copy of a JSON value with one leaf changed a little."""
    if path:
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[path[0]] = changed(value[path[0]], path[1:])
        return copy
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return not value
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 1) if value else "x"
    return value + 1 if isinstance(value, int) else float(np.nextafter(value, np.inf))


def train_a_little(adapter: Any, method: str, backbone: ClipBackbone, num_classes: int) -> None:
    """Moves an adapter away from where it starts, so that an export of the start would be seen."""
    draw = torch.Generator().manual_seed(5)
    labels = torch.arange(num_classes).repeat(3)
    rows = torch.nn.functional.normalize(torch.randn(1, len(labels), backbone.embed_dim, generator=draw), dim=-1)
    features = Features(rows, labels, tuple(map(str, range(len(labels)))), backbone.image_digest)
    if method == "linear_probe" and adapter.kind == "logistic":
        adapter.fit_features(features, c=10.0)
    elif method == "linear_probe":
        adapter.fit_features(features, **({} if adapter.kind == "lp_plus_plus" else {"lr": 0.1}), epochs=3)
    elif hasattr(adapter, "fit_features"):
        adapter.fit_features(features)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters() if method != "linear_probe" else []:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


def save(
    folder: Path,
    method: str,
    backbone: ClipBackbone,
    data: Any,
    *,
    max_ece: float = 0.0,
    thresholds: Thresholds | None = None,
    **settings: Any,
) -> Any:
    """Saves an artifact of a slightly trained adapter and returns the adapter; `max_ece` is its only gate."""
    adapter = methods()[method](backbone, data.prompt_names, **settings)
    train_a_little(adapter, method, backbone, len(data.class_names))
    n, classes = 200, len(data.class_names)
    labels = np.arange(n) % classes
    probs = np.full((n, classes), 0.05 / (classes - 1), np.float32)
    probs[np.arange(n), labels] = 0.95
    predictions = Predictions(tuple(map(str, range(n))), labels, probs, data.class_names)
    rules: Sequence[GateRule] = [GateRule(metric="ece", at_most=max_ece)] if max_ece else []
    save_artifact(
        folder, adapter, backbone, data, None, method=method, report=build_report(predictions),
        verdicts=check_gates(predictions, None, rules), thresholds=thresholds,
    )  # fmt: skip
    return adapter.eval()
