# SPDX-License-Identifier: Apache-2.0
"""Tuned weights as a stock open_clip folder, which any open_clip program loads by `local-dir:FOLDER`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import QuickGELU

from adaptclip import __version__
from adaptclip.clip import ClipBackbone
from adaptclip.clip.loading import STARTER, architecture_of, local_folders
from adaptclip.clip.starter import FOLDER
from adaptclip.errors import BackboneError
from adaptclip.files import read_json, write_json, write_tensors, write_text
from adaptclip.outputs import atomic_folder
from adaptclip.seals import CHECK_FILE, describe_files, write_sealed

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
"""What a stock open_clip folder holds; open_clip finds both by these names."""


def open_clip_config(backbone: ClipBackbone) -> dict[str, Any]:
    """Returns what `open_clip_config.json` must say for open_clip to build this model again.

    Args:
        backbone: loaded by any spelling.

    Returns:
        `model_cfg` (architecture, with the activation the weights were loaded with) and `preprocess_cfg` (evaluation
        transform). A Hugging Face text tower keeps its name. `image_gelu` stands beside them where a SigLIP of
        transformers has an activation for which open_clip has no entry; open_clip itself passes it over.

    Raises:
        BackboneError: the architecture's configuration cannot be had, or open_clip could not load its tokenizer again.
    """
    more: dict[str, Any] = {}
    name, remedy = backbone.name, "Name the model by its architecture, hf-hub:ORG/NAME or local-dir:FOLDER."
    if name == STARTER:
        model_cfg = read_json(FOLDER / CONFIG_FILE)["model_cfg"]
    else:
        try:
            model_cfg, more = architecture_of(name)
        except Exception as error:  # a file, the hub or its cache, each with errors of its own
            raise BackboneError(f"the configuration of {name} cannot be read ({error}). {remedy}") from error
    if not isinstance(model_cfg, dict) or "embed_dim" not in model_cfg:
        raise BackboneError(f"open_clip has no configuration of {name}, so tuned weights could not be saved. {remedy}")
    if not isinstance(backbone.tokenizer, open_clip.SimpleTokenizer | HFTokenizer):
        kind = type(backbone.tokenizer).__name__
        raise BackboneError(f"the tokenizer of {name} ({kind}) cannot be kept in an open_clip folder. {remedy}")
    model_cfg = copy.deepcopy(model_cfg)
    encoder = model_cfg["text_cfg"].get("hf_model_name")
    if encoder and Path(encoder).is_absolute():
        model_cfg["text_cfg"]["hf_model_name"] = "text_encoder"
    if model_cfg["vision_cfg"].get("image_size", 224) not in (backbone.image_size, [backbone.image_size] * 2):
        model_cfg["vision_cfg"]["image_size"] = backbone.image_size
    if any(isinstance(module, QuickGELU) for module in backbone.model.modules()):
        model_cfg["quick_gelu"] = True  # weights do not show it, and the architecture's name may not say it
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    preprocess = open_clip.get_model_preprocess_cfg(backbone.model)
    known = {key: preprocess[key] for key in keys if key in preprocess}
    return {"model_cfg": model_cfg, "preprocess_cfg": known, **more}


def save_open_clip(
    folder: Path,
    state: Mapping[str, Tensor],
    backbone: ClipBackbone,
    *,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes weights as a stock open_clip folder, whole or not at all; `load_backbone("local-dir:FOLDER")` reads it.

    check.json has the digests of all files, which `load_backbone` compares and open_clip passes over.

    The configuration of a Hugging Face text tower goes into a folder of its name, where `load_backbone` finds it
    without a network; open_clip itself asks the hub for it.

    Args:
        folder: the new folder.
        state: all weights, by the names and shapes of `backbone.model`.
        backbone: the model they were tuned from.
        config: what `open_clip_config` returned; None asks it.
        overwrite: replace an earlier folder of this kind.

    Raises:
        BackboneError: the state does not fit the model, or see `open_clip_config`.
        StorageError: the folder exists already, may not be replaced (see `adaptclip.outputs`), or cannot be written.
    """
    check_fits(state, backbone)
    written = config or open_clip_config(backbone)
    with atomic_folder(folder, "open_clip", overwrite=overwrite, inputs=local_folders(backbone.name)) as new:
        write_json(new / CONFIG_FILE, {**written, "adaptclip": __version__})  # by this the folder is known as ours
        write_tensors(new / WEIGHTS_FILE, state)
        if isinstance(backbone.tokenizer, HFTokenizer):
            backbone.tokenizer.tokenizer.save_pretrained(new)
        encoder = written["model_cfg"]["text_cfg"].get("hf_model_name")
        if encoder:
            write_text(new / encoder / "config.json", backbone.model.text.config.to_json_string(use_diff=False))
        write_sealed(new / CHECK_FILE, {"files": describe_files(new)})


def with_weights(backbone: ClipBackbone, state: Mapping[str, Tensor]) -> ClipBackbone:
    """Returns the same architecture, tokenizer and transform with other weights; the given backbone is not changed.

    Raises:
        BackboneError: the state does not fit the model, or has weights that are not finite.
    """
    check_fits(state, backbone)
    model = copy.deepcopy(backbone.model)
    model.load_state_dict(state, strict=True)
    return ClipBackbone(
        model,
        backbone.tokenizer,
        name=backbone.name,
        pretrained=backbone.pretrained,
        precision=backbone.precision,
        asked_size=backbone.asked_size,
    )


def check_fits(state: Mapping[str, Tensor], backbone: ClipBackbone) -> None:
    """Raises BackboneError unless `state` has the names and shapes of the backbone's weights."""
    own = backbone.model.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise BackboneError(
            f"these weights do not fit {backbone.name}: {len(wrong)} tensors are missing, not expected or of another "
            f"shape, for example {wrong[0]!r}; give the whole state_dict of the same architecture"
        )
