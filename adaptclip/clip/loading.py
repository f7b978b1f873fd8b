# SPDX-License-Identifier: Apache-2.0
"""Turns every open_clip spelling of a model into that model with its weights, or into one clear error.

open_clip resizes position embeddings without a word where a checkpoint has more or fewer than its model, and the
features become others: with text weights of 248 positions under an architecture of 77, the cosine to the true features
is 0.71. They are compared here.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from adaptclip.errors import BackboneError, StorageError, did_you_mean
from adaptclip.seals import CHECK_FILE, check_bundle

# How torch words that a pickle names a function or class beyond those that make tensors.
_CODE = ("Unsupported global", "Unsupported class", "reduce for unrecognized function")

# An empty pickle ends in StopIteration, the head of a torch archive in OSError.
_UNREADABLE = (SafetensorError, OSError, EOFError, StopIteration)


def explain(error: Exception, what: str) -> str:
    """Words what went wrong while weights were loaded, and what to do about it."""
    text = str(error)
    if "TorchScript" in text:
        return (
            f"{what} is a TorchScript program, not a file of weights, and programs are not run. Load it with "
            "torch.jit.load where you trust it, and save its state_dict() as safetensors."
        )
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text is not repeated: it advises to load the file again without the protection.
        code = next((line.strip() for line in text.splitlines() if any(word in line for word in _CODE)), "")
        code = code.removeprefix("WeightsUnpickler error: ").partition(" was not an allowed")[0]
        found = f"a pickle that would run code ({code})" if code else "damaged, or a pickle of more than weights"
        return f"{what} is {found}; it was refused and nothing in it was run. Copy it again, or ask for safetensors."
    # open_clip asserts the widths of position embeddings before it compares the rest.
    if "Error(s) in loading state_dict" in text or isinstance(error, AssertionError):
        lines = [line.strip() for line in text.splitlines() if line.strip() and "loading state_dict" not in line]
        shown = "; ".join(line if len(line) < 200 else line[:200] + " …" for line in lines[:3])
        return (
            f"{what} does not fit the architecture ({len(lines)} complaints; first: {shown}). Name the architecture "
            "it was trained with; an adapter alone is not a backbone."
        )
    if isinstance(error, _UNREADABLE) or "PytorchStreamReader" in text or "EOF" in text:
        return f"{what} is damaged, unreadable or not a checkpoint ({first_line(error)}). Copy or download it again."
    return f"{what} cannot be loaded: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its text, cut to 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no details'}"


_TEXT = ("positional_embedding", "text.positional_embedding", "text_encoder.positional_embedding.pos_embed.pos_embed")
_IMAGE = "visual.positional_embedding"


def check_positions(model: Any, weights: Path, *, what: str, image_size: int) -> None:
    """Refuses a model whose position embeddings are not the checkpoint's own.

    Args:
        model: as open_clip built it.
        weights: the checkpoint that it was built from.
        what: the checkpoint, for messages.
        image_size: the side of the images that was asked for by name, which allows the image tower's to be resized
            and says so; 0 where nobody asked.

    Raises:
        BackboneError: there are more or fewer of them in the checkpoint.
    """
    shapes = _shapes(weights)
    text = getattr(model, "positional_embedding", getattr(getattr(model, "text", None), "positional_embedding", None))
    held = next((shapes[name] for name in _TEXT if name in shapes), None)
    if isinstance(text, nn.Parameter) and held is not None and held[-2] != text.shape[0]:
        raise BackboneError(
            f"{what} has {held[-2]} text positions and the architecture {text.shape[0]}; open_clip would resize them, "
            "and the features would be others. Name the architecture it was trained with, or put it into a local-dir: "
            f"folder whose open_clip_config.json has the right context_length ({held[-2]} where no class token counts)."
        )
    image, held = getattr(model.visual, "positional_embedding", None), shapes.get(_IMAGE)
    if not isinstance(image, nn.Parameter) or held is None or held[0] == image.shape[0]:
        return
    if len(set(getattr(model.visual, "image_size", ()))) > 1:
        return  # not square: refused elsewhere, whatever its positions
    old, new = (f"{math.isqrt(count - 1)} x {math.isqrt(count - 1)}" for count in (held[0], image.shape[0]))
    if not image_size:
        raise BackboneError(
            f"{what} has image positions for {old} patches and the architecture for {new}; open_clip would resize "
            "them, and the features would be others. Name the architecture it was trained with, or ask for images of "
            "that size by name: --image-size (image_size=)."
        )
    warnings.warn(
        f"the image positions of {what} were resized from {old} to {new} patches, as images of {image_size} pixels "
        "were asked for; the features are not those that the weights were trained for",
        stacklevel=4,
    )


def _shapes(weights: Path) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors; its numbers are not read."""
    from safetensors import safe_open

    if weights.suffix == ".safetensors":
        with safe_open(weights, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    elif weights.suffix in (".npz", ".npy"):  # of big_vision; open_clip reads those in its own way
        found = {}
    else:
        state = torch.load(weights, map_location="meta", weights_only=True)
        state = state.get("state_dict", state)
        found = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name.removeprefix("module."): shape for name, shape in found.items()}


LOCAL_PREFIX, HUB_PREFIX, STARTER = "local-dir:", "hf-hub:", "starter"

PRECISIONS = ("fp32", "bf16", "fp16")
"""Allowed precisions of the frozen weights; features leave the towers as float32 in all of them."""

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""What a checkpoint file does not say about its own evaluation transform; the size comes from the image tower."""

_KNOWN_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
"""File names that open_clip takes for the weights of a folder whatever else lies there, the first one first."""


@dataclass(frozen=True)
class Source:
    """Where one model comes from, after every question has been answered and every file is on this machine.

    Attributes:
        spelling: what open_clip calls the model: an architecture, `local-dir:...` or `hf-hub:...`.
        what: the same for messages.
        checkpoint: weights file, or None where the spelling names it.
        quick_gelu: force the QuickGELU activation.
        preprocess: entries of the evaluation transform that the spelling does not give.
        text_cfg: the text side of the configuration where it must differ from what the spelling says.
        needs_hub: open_clip may ask the hub (or its cache) while it builds the model.
        weights: the checkpoint, whoever names it.
    """

    spelling: str
    what: str
    checkpoint: Path | None = None
    quick_gelu: bool = False
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    text_cfg: Mapping[str, Any] | None = None
    needs_hub: bool = False
    weights: Path | None = None


def find_source(
    name: str,
    pretrained: str | None,
    *,
    quick_gelu: bool | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> Source:
    """Finds the files of a model, downloading them if they are neither here nor in the cache.

    Args:
        name: architecture, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        pretrained: tag or checkpoint file of an architecture; None with the two prefixes.
        quick_gelu: activation of a checkpoint file; None takes the architecture's.
        preprocess: PREPROCESS_KEYS of a checkpoint file; None takes what all tags of the architecture agree on.

    Raises:
        BackboneError: unknown name or tag, missing or unfit file, or a download that is not possible.
    """
    import open_clip

    prefixed = name.startswith((LOCAL_PREFIX, HUB_PREFIX))
    if prefixed and pretrained is not None:
        raise BackboneError(f"{name} brings its own weights, got pretrained={pretrained!r} as well; leave that out")
    is_file = not prefixed and pretrained is not None and not open_clip.is_pretrained_cfg(_clean(name), pretrained)
    if (quick_gelu is not None or preprocess is not None) and not is_file:
        raise BackboneError(
            f"quick_gelu and preprocess are for checkpoint files, which do not state them; {name} with "
            f"pretrained={pretrained!r} does. Leave them out, or edit open_clip_config.json of a local-dir: folder."
        )
    if name.startswith(LOCAL_PREFIX):
        return _local_source(name)
    if name.startswith(HUB_PREFIX):
        return _hub_source(name)
    architecture = _check_architecture(name)
    if pretrained is None:
        raise BackboneError(f"{name} needs weights: give pretrained=TAG or a checkpoint file. {_tags(architecture)}")
    if is_file:
        return _file_source(architecture, pretrained, quick_gelu, preprocess)
    return _tag_source(architecture, pretrained)


def create(source: Source, *, device: str | torch.device, precision: str, image_size: int = 0) -> tuple[nn.Module, Any]:
    """Builds the model of a source with its weights, and its tokenizer.

    Args:
        source: what `find_source` returned.
        device: where the weights go.
        precision: one of PRECISIONS.
        image_size: side of the images in pixels; 0 is the architecture's own.

    Returns:
        The open_clip model and its tokenizer.

    Raises:
        BackboneError: the weights are damaged, of another architecture, or hold code; or the tokenizer is missing.
    """
    import open_clip
    from open_clip.hf_model import HFTextEncoder

    from adaptclip.hub import cache_if_unreachable, require_hub

    with cache_if_unreachable() if source.needs_hub else contextlib.nullcontext():
        try:
            tokenizer = open_clip.get_tokenizer(source.spelling)
        except Exception as error:
            if source.needs_hub:
                require_hub(f"The tokenizer of {source.what}")
            raise BackboneError(f"the tokenizer of {source.what} cannot be loaded: {first_line(error)}") from error
        text: dict[str, Any] = {} if source.text_cfg is None else {"text_cfg": dict(source.text_cfg)}
        try:
            model = open_clip.create_model(
                source.spelling,
                pretrained=str(source.checkpoint) if source.checkpoint else None,
                device=device,
                precision=precision,
                force_quick_gelu=source.quick_gelu,
                force_preprocess_cfg=dict(source.preprocess),
                require_pretrained=True,
                weights_only=True,
                force_image_size=_other_size(source, image_size),
                **text,
            )
            if source.weights is not None:
                check_positions(model, source.weights, what=source.what, image_size=image_size)
        except BackboneError:
            raise
        except Exception as error:
            # transformers reports what it cannot get from the hub as an OSError without a number.
            if source.needs_hub and isinstance(error, OSError) and error.errno is None:
                require_hub(f"The text tower of {source.what}")
            raise BackboneError(explain(error, source.what)) from error
    if precision != "fp32" and isinstance(getattr(model, "text", None), HFTextEncoder):
        raise BackboneError(f"{source.what} has a Hugging Face text tower, which open_clip runs in fp32 only")
    return model, tokenizer


def local_folders(*names: str | None) -> list[Path]:
    """Returns the folders that those of `names` stand for which are spelt `local-dir:FOLDER`."""
    info = [name.removeprefix(LOCAL_PREFIX) for name in names if name is not None and name.startswith(LOCAL_PREFIX)]
    return [Path(folder).expanduser() for folder in info]


def _other_size(source: Source, image_size: int) -> int | None:
    """The size that was asked for where it is not the architecture's own."""
    import open_clip

    config = open_clip.get_model_config(source.spelling) if image_size else None
    return None if config is None or config["vision_cfg"].get("image_size", 224) == image_size else image_size


def _clean(name: str) -> str:
    return name.replace("/", "-")


def _check_architecture(name: str) -> str:
    import open_clip

    from adaptclip.clip.config_checks import check_config

    architecture = _clean(name)
    if architecture in open_clip.list_models():
        check_config(open_clip.get_model_config(architecture) or {}, where=architecture)
        return architecture
    hint = ""
    if Path(name).expanduser().is_dir():
        hint = f" For that folder write {LOCAL_PREFIX}{name}."
    elif name.count("/") == 1:
        hint = f" For a model on the Hugging Face hub write {HUB_PREFIX}{name}."
    raise BackboneError(
        f"unknown backbone {name!r}.{hint} {did_you_mean(architecture, [*open_clip.list_models(), STARTER])} "
        f"Also {HUB_PREFIX}ORG/NAME and {LOCAL_PREFIX}FOLDER. open_clip.list_models() has the whole list."
    )


def _tags(architecture: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return f"Tags of {architecture}: {', '.join(tags) or 'none, so give a checkpoint file'}."


def _tag_source(architecture: str, tag: str) -> Source:
    import open_clip

    config = open_clip.get_pretrained_cfg(architecture, tag)
    what = f"The weights {tag!r} of {architecture}"
    path = _fetch(what, lambda: open_clip.download_pretrained(config))
    return Source(
        spelling=architecture,
        what=f"{what} ({path})",
        checkpoint=Path(path),
        weights=Path(path),
        # A tag that says nothing leaves the activation to the architecture: some state it there only.
        quick_gelu=bool(config.get("quick_gelu")),
        preprocess={key: config[key] for key in PREPROCESS_KEYS if config.get(key) is not None},
        needs_hub=_asks_hub(open_clip.get_model_config(architecture)),
    )


def _file_source(architecture: str, file: str, quick_gelu: bool | None, preprocess: Mapping[str, Any] | None) -> Source:
    import open_clip

    from adaptclip.clip.config_checks import check_archive

    path = Path(file).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not path.is_file():
        near = did_you_mean(file, tags, limit=100)
        raise BackboneError(f"{file!r} is neither a file nor a tag of {architecture}. {near}")
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise BackboneError(f"{path} is not a checkpoint by its name; allowed: {', '.join(CHECKPOINT_SUFFIXES)}")
    check_archive(path)
    unknown = [key for key in preprocess or {} if key not in PREPROCESS_KEYS]
    if unknown:
        raise BackboneError(f"unknown preprocess entry {unknown[0]!r}. {did_you_mean(unknown[0], PREPROCESS_KEYS)}")
    settings = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    config = open_clip.get_model_config(architecture) or {}
    if quick_gelu is False and config.get("quick_gelu"):
        raise BackboneError(f"{architecture} is a QuickGELU architecture by its name; name the plain one instead")
    if quick_gelu is None and not config.get("quick_gelu") and any(s.get("quick_gelu") for s in settings):
        warnings.warn(
            f"{path.name} does not say its activation: GELU is used, as the name {architecture} has it. For weights "
            f"of OpenAI and their descendants name {architecture}-quickgelu, or pass quick_gelu=True.",
            stacklevel=4,
        )
    return Source(
        spelling=architecture,
        what=f"The checkpoint {path} for {architecture}",
        checkpoint=path,
        weights=path,
        quick_gelu=bool(quick_gelu),
        preprocess=_agreed_preprocess(architecture, settings) if preprocess is None else preprocess,
        needs_hub=_asks_hub(config),
    )


def _agreed_preprocess(architecture: str, settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what all tags of an architecture have in common; warns and leaves open_clip's default if they differ."""
    stated = [{key: s[key] for key in PREPROCESS_KEYS if s.get(key) is not None} for s in settings]
    if stated and all(s == stated[0] for s in stated):
        return stated[0]
    warnings.warn(
        f"a checkpoint file does not state its mean and standard deviation, and the published weights of "
        f"{architecture} {'differ in them' if stated else 'are none'}: OpenAI's are used. To set others pass "
        f"preprocess={{'mean': ..., 'std': ...}}, or put the file into a {LOCAL_PREFIX} folder whose "
        "open_clip_config.json has a preprocess_cfg.",
        stacklevel=5,
    )
    return {}


def _hub_source(name: str) -> Source:
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    from adaptclip.clip.config_checks import check_archive, check_config

    repository = name.removeprefix(HUB_PREFIX)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise BackboneError(f"{name!r} should be {HUB_PREFIX}ORGANISATION/NAME")
    what = f"The model {name}"
    config = _fetch(f"{what} (its open_clip_config.json)", lambda: open_clip.get_model_config(name))
    weights = Path(_fetch(f"{what} (its weights)", lambda: download_pretrained_from_hf(repository)))
    check_config(config, where=name, weights=weights)
    check_archive(weights)
    return Source(spelling=name, what=what, needs_hub=True, weights=weights)


def _local_source(name: str) -> Source:
    from adaptclip.clip.config_checks import (
        check_archive,
        check_config,
        check_preprocess,
        check_tokenizer,
        read_config,
        resolve_text_encoder,
    )

    folder = Path(name.removeprefix(LOCAL_PREFIX)).expanduser()
    file = folder / "open_clip_config.json"
    if not file.is_file():
        reason = "has no open_clip_config.json" if folder.is_dir() else "is not a folder"
        raise BackboneError(
            f"{folder} {reason}. A {LOCAL_PREFIX} folder holds open_clip_config.json with model_cfg and "
            f"preprocess_cfg, and the weights as {_KNOWN_WEIGHTS[0]}."
        )
    try:
        check_bundle(folder)
    except StorageError as error:
        raise BackboneError(
            f"{error}. Take a fresh copy; what was changed on purpose is read when {CHECK_FILE} is taken away."
        ) from error
    config = read_config(file)
    info = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(info, dict) or not all(isinstance(info.get(part), dict) for part in ("vision_cfg", "text_cfg")):
        raise BackboneError(
            f"{file} is not a model configuration of open_clip: it needs a model_cfg with embed_dim, vision_cfg and "
            "text_cfg"
        )
    if type(info.get("embed_dim")) is not int:
        raise BackboneError(f"{file}: embed_dim of model_cfg should be a whole number, got {info.get('embed_dim')!r}")
    if not config.get("preprocess_cfg"):
        warnings.warn(f"{file} has no preprocess_cfg: OpenAI's mean and standard deviation are used", stacklevel=4)
    else:
        check_preprocess(config["preprocess_cfg"], where=str(file))
    weights, model_cfg = _find_weights(folder), config["model_cfg"]
    text_cfg = resolve_text_encoder(folder, model_cfg["text_cfg"], weights)
    hidden = {"text_cfg": {**model_cfg["text_cfg"], "hf_model_name": None}} if text_cfg else {}
    check_config({**model_cfg, **hidden}, where=str(file), weights=weights)
    check_tokenizer(folder)
    check_archive(weights)
    return Source(
        spelling=f"{LOCAL_PREFIX}{folder}",
        what=f"The checkpoint {weights}",
        text_cfg=text_cfg,
        weights=weights,
        # The tokenizer of a folder is always the folder's own.
        needs_hub=text_cfg is None and bool(model_cfg["text_cfg"].get("hf_model_name")),
    )


def _find_weights(folder: Path) -> Path:
    """Returns the weights that open_clip will take from a folder, and refuses where its choice would be a guess."""
    for known in _KNOWN_WEIGHTS:
        if (folder / known).is_file():
            return folder / known
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))
    if not found:
        raise BackboneError(f"{folder} holds no weights; save them there as {_KNOWN_WEIGHTS[0]}")
    if len({path.stem for path in found}) > 1:
        raise BackboneError(
            f"{folder} holds several files that could be the weights: {', '.join(path.name for path in found)}. "
            f"Name the right one {_KNOWN_WEIGHTS[0]}, or move the others away."
        )
    if "adapter" in found[0].stem:
        raise BackboneError(f"{found[0]} is an adapter, not a backbone; put the backbone's weights beside it")
    return found[-1] if found[-1].suffix == ".safetensors" else found[0]


def _asks_hub(config: Mapping[str, Any] | None) -> bool:
    """Whether the text side of a configuration names something that transformers looks up on the hub."""
    text = (config or {}).get("text_cfg", {})
    names = [text.get("hf_model_name"), text.get("hf_tokenizer_name")]
    return any(name and not Path(name).is_dir() for name in names)


def _fetch(what: str, download: Callable[[], Any]) -> Any:
    """Runs a download that reads the cache first; fails at once where the hub is wanted and cannot be reached."""
    from adaptclip.hub import cache_if_unreachable, require_hub

    with cache_if_unreachable():
        try:
            return download()
        except Exception as error:
            reason = error
    require_hub(what)
    raise BackboneError(f"{what} cannot be downloaded: {first_line(reason)}") from reason
