# SPDX-License-Identifier: Apache-2.0
"""Small CLIP models with random weights, written as open_clip folders and loaded the way any other model is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from safetensors.torch import save_file

from adaptclip.clip import ClipBackbone, load_backbone

Kind = Literal["clip", "custom_text"]

ARCHITECTURE = "Tiny-T-8"
"""Name under which tests of tags and checkpoint files make `tiny_config` known to open_clip."""

OTHER_PREPROCESS = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5, 0.6, 0.7),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
"""An evaluation transform that differs in every entry from open_clip's default."""


def tiny_config(
    kind: Kind = "clip", *, context_length: int = 77, width: int = 64, embed_dim: int = 48, quick_gelu: bool = False
) -> dict[str, Any]:
    """The open_clip configuration of a tiny model: 32 px, the usual vocabulary, 2 layers on either side."""
    model_cfg: dict[str, Any] = {
        "embed_dim": embed_dim,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": 49408,
            "width": width,
            "heads": 2,
            "layers": 2,
        },
    }
    if kind == "custom_text":
        model_cfg["custom_text"] = True
    return model_cfg


def write_tiny_checkpoint(
    folder: Path,
    kind: Kind = "clip",
    *,
    seed: int = 0,
    preprocess_cfg: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Writes a `local-dir:` folder (open_clip_config.json + open_clip_model.safetensors) and returns it."""
    model_cfg = tiny_config(kind, **config)
    preprocess = preprocess_cfg or {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    arguments = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (open_clip.CustomTextCLIP if kind == "custom_text" else open_clip.CLIP)(**arguments)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def make_tiny_backbone(
    kind: Kind = "clip",
    *,
    folder: Path | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    **checkpoint: Any,
) -> ClipBackbone:
    """Writes and loads a tiny model. With `folder` the checkpoint stays there, so that its name can be loaded again.

    `checkpoint` goes to `write_tiny_checkpoint`: seed, context_length, width, embed_dim, quick_gelu, preprocess_cfg.
    """
    with tempfile.TemporaryDirectory() as temporary:
        written = write_tiny_checkpoint(folder or Path(temporary) / "tiny", kind, **checkpoint)
        return load_backbone(f"local-dir:{written}", device=device, precision=precision)
