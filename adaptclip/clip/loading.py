# SPDX-License-Identifier: Apache-2.0
"""Turns every open_clip spelling of a model into that model with its weights, or into one clear error.

open_clip builds the model; the tensors that it gets are those of `read_weights`, which knows more ways to keep them.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptclip.clip.checkpoints import CHECKPOINT_SUFFIXES, INDEX_SUFFIX, read_weights, split_choice
from adaptclip.clip.fitting import check_parts, check_positions, explain, first_line
from adaptclip.clip.transformers_models import (
    is_transformers_folder,
    open_clip_names,
    read_model_config,
    read_transform,
)
from adaptclip.errors import BackboneError, StorageError, did_you_mean
from adaptclip.seals import CHECK_FILE, check_bundle, check_entries

LOCAL_PREFIX, HUB_PREFIX, STARTER = "local-dir:", "hf-hub:", "starter"

PRECISIONS = ("fp32", "bf16", "fp16")
"""Allowed precisions of the frozen weights; features leave the towers as float32 in all of them."""

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
        weights: the checkpoint, whoever names it, or the index of its shards.
        choice: which model of the checkpoint is meant, where it holds several.
        model_cfg: the architecture where `spelling` is a folder that has it in the words of another library.
        image_gelu: "tanh" or "none" where GELU of the image tower is to be computed otherwise than timm's tower of
            its name does; open_clip has no entry for it.
    """

    spelling: str
    what: str
    checkpoint: Path | None = None
    quick_gelu: bool = False
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    text_cfg: Mapping[str, Any] | None = None
    needs_hub: bool = False
    weights: Path | None = None
    choice: str = ""
    model_cfg: Mapping[str, Any] | None = None
    image_gelu: str = ""


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
    from open_clip.hf_model import HFTextEncoder

    from adaptclip.hub import cache_if_unreachable, require_hub

    with cache_if_unreachable() if source.needs_hub else contextlib.nullcontext():
        tokenizer = _tokenizer(source)
        state: dict[str, Tensor] | None = None
        try:
            if source.weights is not None and source.weights.suffix not in _OF_BIG_VISION:
                state = read_weights(source.weights, what=source.what, choice=source.choice)
                state = open_clip_names(state)
                check_parts(state, _config_of(source), what=source.what)
            model = _build(source, state, device=device, precision=precision, image_size=image_size)
        except BackboneError:
            raise
        except Exception as error:
            # transformers reports what it cannot get from the hub as an OSError without a number.
            if source.needs_hub and isinstance(error, OSError) and error.errno is None:
                require_hub(f"The text tower of {source.what}")
            raise BackboneError(explain(error, source.what, state)) from error
    if state is not None:
        check_positions(model, state, what=source.what, image_size=image_size)
    for module in model.visual.modules() if source.image_gelu else ():
        if isinstance(module, nn.GELU):
            module.approximate = source.image_gelu
    if precision != "fp32" and isinstance(getattr(model, "text", None), HFTextEncoder):
        raise BackboneError(f"{source.what} has a Hugging Face text tower, which open_clip runs in fp32 only")
    return model, tokenizer


_OF_BIG_VISION = (".npz", ".npy")
"""Files of Google's own format, which open_clip reads and converts by itself."""

_ONE_AT_A_TIME = threading.RLock()


def _tokenizer(source: Source) -> Any:
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    from adaptclip.hub import require_hub

    try:
        if source.model_cfg is None:
            return open_clip.get_tokenizer(source.spelling)
        folder = source.spelling.removeprefix(LOCAL_PREFIX)
        return HFTokenizer(folder, context_length=source.model_cfg["text_cfg"]["context_length"])
    except Exception as error:
        if source.needs_hub:
            require_hub(f"The tokenizer of {source.what}")
        raise BackboneError(f"the tokenizer of {source.what} cannot be loaded: {first_line(error)}") from error


def _build(
    source: Source, state: Mapping[str, Tensor] | None, *, device: str | torch.device, precision: str, image_size: int
) -> Any:
    """The model of a source, built by open_clip and filled with these tensors (None: those that open_clip reads)."""
    import open_clip

    text: dict[str, Any] = {} if source.text_cfg is None else {"text_cfg": dict(source.text_cfg)}
    with contextlib.ExitStack() as stack:
        spelling, checkpoint = source.spelling, str(source.checkpoint) if source.checkpoint else None
        if source.model_cfg is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = {"model_cfg": dict(source.model_cfg), "preprocess_cfg": dict(source.preprocess)}
            (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
            spelling = f"{LOCAL_PREFIX}{folder}"
        if state is not None:
            stack.enter_context(_reads(state))
        return open_clip.create_model(
            spelling,
            pretrained=checkpoint,
            device=device,
            precision=precision,
            force_quick_gelu=source.quick_gelu,
            force_preprocess_cfg=dict(source.preprocess),
            require_pretrained=True,
            weights_only=True,
            force_image_size=_other_size(source, image_size),
            **text,
        )


@contextlib.contextmanager
def _reads(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, open_clip finds these tensors in the one checkpoint that this thread's model is made of."""
    from open_clip import factory

    mine, find, read = threading.get_ident(), factory._find_checkpoint_in_dir, factory.load_state_dict
    taken = []

    def given(checkpoint_path: str, *arguments: Any, **settings: Any) -> Any:
        if threading.get_ident() != mine:
            return read(checkpoint_path, *arguments, **settings)
        taken.append(checkpoint_path)
        return dict(state)

    def named(folder: Path) -> str | None:
        return find(folder) if threading.get_ident() != mine else "read already"

    with _ONE_AT_A_TIME:
        factory.load_state_dict, factory._find_checkpoint_in_dir = given, named
        try:
            yield
        finally:
            factory.load_state_dict, factory._find_checkpoint_in_dir = read, find
    if len(taken) != 1:
        raise BackboneError("this open_clip reads checkpoints in another way than its versions that adaptclip knows")


def local_folders(*names: str | None) -> list[Path]:
    """Returns the folders that those of `names` stand for which are spelt `local-dir:FOLDER`."""
    info = [name.removeprefix(LOCAL_PREFIX) for name in names if name is not None and name.startswith(LOCAL_PREFIX)]
    return [Path(folder).expanduser() for folder in info]


def _other_size(source: Source, image_size: int) -> int | None:
    """The size that was asked for where it is not the architecture's own."""
    config = _config_of(source) if image_size else None
    return None if config is None or config["vision_cfg"].get("image_size", 224) == image_size else image_size


def _config_of(source: Source) -> Mapping[str, Any]:
    import open_clip

    return source.model_cfg or open_clip.get_model_config(source.spelling) or {}


def architecture_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the model_cfg of a model by its spelling, and what else of open_clip_config.json it needs.

    Raises:
        Exception: a file, the hub or its cache, each with errors of its own.
    """
    import open_clip

    if name.startswith(LOCAL_PREFIX):
        folder = Path(name.removeprefix(LOCAL_PREFIX)).expanduser()
        if is_transformers_folder(folder):
            model_cfg, image_gelu = read_model_config(folder)
            return model_cfg, {"image_gelu": image_gelu} if image_gelu else {}
        from adaptclip.clip.config_checks import read_config

        config = read_config(folder / "open_clip_config.json")
        return config["model_cfg"], {key: config[key] for key in ("image_gelu",) if config.get(key)}
    found = open_clip.get_model_config(name if name.startswith(HUB_PREFIX) else _clean(name))
    return found or {}, {}


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

    path, choice = split_choice(file)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not path.is_file():
        near = did_you_mean(file, tags, limit=100, lead="Its tags are")
        raise BackboneError(f"{file!r} is neither a file nor a tag of {architecture}. {near}")
    if path.suffix not in CHECKPOINT_SUFFIXES and not path.name.endswith(INDEX_SUFFIX):
        allowed = ", ".join([*CHECKPOINT_SUFFIXES, INDEX_SUFFIX])
        raise BackboneError(f"{path} is not a checkpoint by its name; allowed: {allowed}")
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
        choice=choice,
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
    try:
        config = _fetch(f"{what} (its open_clip_config.json)", lambda: open_clip.get_model_config(name))
    except BackboneError as error:
        raise BackboneError(
            f"{error} A repository of transformers (CLIPModel, SiglipModel) is read from a folder: "
            f"`hf download {repository} --local-dir FOLDER`, then `--backbone {LOCAL_PREFIX}FOLDER`."
        ) from error
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
    if is_transformers_folder(folder):
        return _transformers_source(folder)
    if not file.is_file():
        reason = "has no open_clip_config.json" if folder.is_dir() else "is not a folder"
        raise BackboneError(
            f"{folder} {reason}. A {LOCAL_PREFIX} folder holds open_clip_config.json with model_cfg and "
            f"preprocess_cfg, and the weights as {_KNOWN_WEIGHTS[0]}; or it is one of transformers, with config.json."
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
        image_gelu=_image_gelu(config.get("image_gelu", ""), file),
    )


def _image_gelu(stated: Any, file: Path) -> str:
    if stated not in ("", "tanh", "none"):
        raise BackboneError(f"{file}: image_gelu should be tanh or none, got {stated!r:.80}")
    return stated


def _transformers_source(folder: Path) -> Source:
    from adaptclip.clip.config_checks import check_archive, check_config, check_preprocess, check_tokenizer

    try:
        check_entries(folder)
    except StorageError as error:
        raise BackboneError(str(error)) from error
    model_cfg, image_gelu = read_model_config(folder)
    weights = _find_weights(folder)
    check_config(model_cfg, where=str(folder / "config.json"), weights=weights)
    preprocess = read_transform(folder, model_cfg)
    check_preprocess(preprocess, where=str(folder))
    check_tokenizer(folder)
    check_archive(weights)
    return Source(
        spelling=f"{LOCAL_PREFIX}{folder}",
        what=f"The checkpoint {weights}",
        preprocess=preprocess,
        weights=weights,
        model_cfg=model_cfg,
        image_gelu=image_gelu,
    )


def _find_weights(folder: Path) -> Path:
    """Returns the weights that open_clip will take from a folder, and refuses where its choice would be a guess."""
    for known in _KNOWN_WEIGHTS:
        if (folder / known).is_file():
            return folder / known
    indices = sorted(path for path in folder.iterdir() if path.name.endswith(INDEX_SUFFIX))
    if indices:
        # Both kinds of one model are downloaded together often: the one without pickles first.
        return next((path for path in indices if ".safetensors." in path.name), indices[0])
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
