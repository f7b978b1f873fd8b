# SPDX-License-Identifier: Apache-2.0
"""What is checked of a model's files before anything is built from them: they may come from anywhere.

A configuration must not make the loader read outside of its folder, run code, ask the hub under another name, or
allocate more than the weights beside it could fill. Weights are read as safetensors or with `weights_only`, which runs
no code.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adaptclip.clip.checkpoints import weight_files
from adaptclip.errors import BackboneError, StorageError, did_you_mean
from adaptclip.files import read_json
from adaptclip.seals import check_entries

MAX_CONFIG_BYTES = 2**20
"""Largest configuration file; published ones have a few kilobytes."""

MAX_TOKENIZER_BYTES = 2**28
"""Largest tokenizer file; the largest published ones have some 35 megabytes."""

LIMITS = {
    "embed_dim": 2**14,
    "width": 2**14,
    "layers": 2**8,
    "heads": 2**10,
    "context_length": 2**16,
    "vocab_size": 2**22,
    "image_size": 2**13,
    "mlp_ratio": 2**6,
    "n_queries": 2**14,
}
"""Largest sizes that a configuration may state, some times those of the largest published models."""

ALWAYS_ALLOWED = 2**27
"""Parameters that a configuration may describe whatever the size of the weights: half a gigabyte is no danger."""

_OTHER_MODELS = {
    "audio_cfg": "a model of sounds (CLAP)",
    "genlip_cfg": "a generative model (GenLIP)",
    "genlap_cfg": "a generative model of sounds (GenLAP)",
}
"""What a configuration of open_clip 4 may describe beside a CLIP of images and texts, by the entry that says so."""

_ANY_NUMBER = 2**22
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HF_WIDTHS, _HF_LAYERS = ("hidden_size", "d_model"), ("num_hidden_layers", "num_layers", "encoder_layers")


def read_config(file: Path) -> Any:
    """Reads a JSON configuration of bounded size.

    Raises:
        BackboneError: it is missing, damaged or too large.
    """
    try:
        return read_json(file, nan=True, max_bytes=MAX_CONFIG_BYTES)  # check_config names what is not finite
    except StorageError as error:
        raise BackboneError(
            f"{error}. It should be a JSON configuration; a configuration has at most {MAX_CONFIG_BYTES:,} bytes."
        ) from error


def check_config(model_cfg: Mapping[str, Any], *, where: str, weights: Path | None = None) -> None:
    """Refuses a `model_cfg` whose names or sizes no real model has.

    Args:
        model_cfg: embed_dim, vision_cfg, text_cfg, ….
        where: the file or name it comes from, for messages.
        weights: the checkpoint beside it, which must be able to hold the parameters that are described.

    Raises:
        BackboneError: naming the entry.
    """
    import timm

    other = next((kind for entry, kind in _OTHER_MODELS.items() if entry in model_cfg), None)
    if other is not None:
        raise BackboneError(f"{where} is {other}, not a CLIP of images and texts; name one of those")
    for path, value in _numbers(model_cfg):
        limit = LIMITS.get(path.rpartition(".")[2], _ANY_NUMBER)
        if not abs(value) <= limit:
            raise BackboneError(f"{where} states {path} = {value}, more than any real model has (at most {limit:,})")
    try:
        name, parameters = model_cfg["vision_cfg"].get("timm_model_name"), _at_least(model_cfg)
        encoder = model_cfg["text_cfg"].get("hf_model_name")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackboneError(f"{where} is not a model configuration of open_clip ({error!r})") from error
    if "naflex" in str(name):
        raise BackboneError(
            f"{where} has the image tower {name!r} (NaFlex), which takes images of any shape; adaptclip gives square "
            "ones only. Name the model of a fixed size instead"
        )
    if name and (":" in str(name) or not timm.is_model(str(name))):
        near = did_you_mean(str(name), timm.list_models(), limit=5)
        raise BackboneError(f"{where} names the timm model {name!r}, which this timm does not have. {near}")
    if encoder and not _REPOSITORY.fullmatch(str(encoder)):
        raise BackboneError(f"{where} names the text encoder {encoder!r}, which is not a repository of the hub")
    if weights is not None:
        _check_fill(parameters, weights, where)


def check_preprocess(preprocess: Any, *, where: str) -> None:
    """Refuses a `preprocess_cfg` that open_clip would stumble over, or take for another one without a word.

    Raises:
        BackboneError: naming the entry.
    """
    if not isinstance(preprocess, Mapping):
        raise BackboneError(f"{where}: preprocess_cfg should be an object, got {type(preprocess).__name__}")
    for name, value in preprocess.items():
        if name not in _PREPROCESS:
            warnings.warn(
                f"{where}: the entry {name!r} of preprocess_cfg is passed over. {did_you_mean(str(name), _PREPROCESS)}",
                stacklevel=5,
            )
            continue
        allowed, fits = _PREPROCESS[name]
        if not fits(value):
            raise BackboneError(f"{where}: {name} of preprocess_cfg should be {allowed}, got {value!r:.80}")


def _three(value: Any, least: float) -> bool:
    numbers = value if isinstance(value, list) else []
    return len(numbers) == 3 and all(type(v) in (int, float) and least < v < float("inf") for v in numbers)


def _side(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and 0 < side <= LIMITS["image_size"] for side in sides)


_PREPROCESS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "mean": ("three numbers", lambda value: _three(value, -float("inf"))),
    "std": ("three numbers above 0", lambda value: _three(value, 0)),
    "interpolation": ("bicubic, bilinear or random", lambda value: value in ("bicubic", "bilinear", "random")),
    "resize_mode": ("shortest, longest or squash", lambda value: value in ("shortest", "longest", "squash")),
    "mode": ("RGB", lambda value: value == "RGB"),
    "fill_color": ("a whole number or three of them", lambda value: type(value) is int or _three(value, -1)),
    "size": ("one or two whole numbers of pixels", _side),
}
"""Entry of a preprocess_cfg -> what it should be, in words, and whether a value is that."""


def resolve_text_encoder(folder: Path, text_cfg: Mapping[str, Any], weights: Path) -> dict[str, Any] | None:
    """Finds the Hugging Face text encoder of a bundle inside the bundle, so that nothing is asked of the hub.

    Args:
        folder: the bundle.
        text_cfg: whose `hf_model_name` may be a folder relative to the bundle, with the encoder's config.json.
        weights: the bundle's checkpoint.

    Returns:
        The `text_cfg` with an absolute path; None where it names no folder in the bundle (a hub repository, or no
        Hugging Face encoder at all).

    Raises:
        BackboneError: the path leaves the bundle, or the encoder's configuration is not one that can be built.
    """
    name = text_cfg.get("hf_model_name")
    if not name:
        return None
    root = folder.resolve()
    target = (root / str(name)).resolve()
    if not target.is_relative_to(root):
        raise BackboneError(
            f"{folder / 'open_clip_config.json'} names the text encoder {str(name)!r}, which leaves the folder; put "
            "the encoder's config.json into the folder, and name it relative to that"
        )
    if not target.is_dir():
        return None
    try:
        check_entries(target)
    except StorageError as error:
        raise BackboneError(str(error)) from error
    _check_encoder(target / "config.json", weights)
    return {**text_cfg, "hf_model_name": str(target), "hf_model_pretrained": False}


def _check_encoder(file: Path, weights: Path) -> None:
    """Refuses the config.json of a Hugging Face encoder that open_clip cannot build or that no real one has."""
    from open_clip.hf_configs import arch_dict

    config = read_config(file)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in arch_dict:
        near = did_you_mean(str(kind), arch_dict)
        raise BackboneError(f"{file} is of the kind {kind!r}, which open_clip cannot build. {near}")
    sizes = {name: value for name, value in config.items() if isinstance(value, int) and name != "max_length"}
    width, layers = (next((sizes[n] for n in names if n in sizes), 0) for names in (_HF_WIDTHS, _HF_LAYERS))
    decoder = sizes.get("num_decoder_layers", sizes.get("decoder_layers", 0))
    # The decoder of an encoder-decoder is built too, and thrown away.
    real = decoder <= 4 * layers + 4 and width <= LIMITS["width"] and layers <= LIMITS["layers"]
    absurd = next((f"{name} = {value}" for name, value in sizes.items() if abs(value) > 2 * _ANY_NUMBER), None)
    if not real or absurd:
        stated = absurd or f"{layers} layers ({decoder} in its decoder) of width {width}"
        raise BackboneError(f"{file} states {stated}, more than any real model has")
    _check_fill(sizes.get("vocab_size", 0) * width + layers * 4 * width**2, weights, str(file))


def check_tokenizer(folder: Path) -> None:
    """Refuses tokenizer files of a bundle that are too large or ask for code of their own.

    Raises:
        BackboneError: naming the file.
    """
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".txt", ".model") and file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise BackboneError(f"{file} has {file.stat().st_size:,} bytes, more than any tokenizer")
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file() and "auto_map" in (read_config(folder / name) or {}):
            raise BackboneError(
                f"{folder / name} asks for code of its own (auto_map), and code is not run; remove the entry"
            )


def check_archive(weights: Path) -> None:
    """Refuses a torch archive that unpacks to more than it holds: torch stores tensors uncompressed.

    Raises:
        BackboneError: it is compressed to a small part of its size.
    """
    for file in weight_files(weights):
        if file.suffix == ".safetensors" or not zipfile.is_zipfile(file):
            continue
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 2 * file.stat().st_size + 2**20:
            raise BackboneError(
                f"{file} unpacks to {unpacked:,} bytes from {file.stat().st_size:,}; torch does not compress"
            )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested configuration, with its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        if len(value) > 2**10:
            yield f"{path}.length", float("inf")
        for inner in value[: 2**10]:
            yield from _numbers(inner, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def _at_least(config: Mapping[str, Any]) -> int:
    """Fewest parameters that a configuration describes, of the parts that open_clip builds itself."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    count = 0.0
    for own in (text, config.get("multimodal_cfg", {})):
        if own and not own.get("hf_model_name"):
            count += _blocks(own, width=512) + own.get("context_length", 77) * own.get("width", 512)
    if not text.get("hf_model_name"):
        count += text.get("vocab_size", 49408) * text.get("width", 512)
    if not vision.get("timm_model_name"):
        width, layers = vision.get("width", 768), vision.get("layers", 12)
        # A residual network ends in a convolution from 8 to 32 times its width.
        count += 256 * width**2 if isinstance(layers, list | tuple) else _blocks(vision, width=768)
        size, patch = vision.get("image_size", 224), vision.get("patch_size") or 32
        if isinstance(size, int) and isinstance(patch, int) and patch > 0:
            count += (size // patch) ** 2 * width
    return int(count)


def _blocks(config: Mapping[str, Any], *, width: int) -> float:
    own = config.get("width", width)
    return config.get("layers", 12) * (4 + 2 * config.get("mlp_ratio", 4)) * own**2


def _check_fill(parameters: int, weights: Path, where: str) -> None:
    held = sum(file.stat().st_size for file in weight_files(weights))
    if parameters > max(held, ALWAYS_ALLOWED):
        raise BackboneError(
            f"{where} describes at least {parameters:,} parameters, but {weights.name} has {held:,} bytes: "
            "the file is cut off, or they do not belong together"
        )
