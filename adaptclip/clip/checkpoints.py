# SPDX-License-Identifier: Apache-2.0
"""Weights as people have them on disk, brought down to the bare tensors of one model.

    files       safetensors, torch archives and pickles of tensors, either of them in shards with an index, and the
                TorchScript archives in which OpenAI published CLIP
    nesting     {"state_dict": …}, {"model": …}, {"ema": …}, as training code and Lightning write them
    prefixes    `module.`, `_orig_mod.`, `model.`, `clip_model.`, …, in any order and depth

Nothing is run: pickles are read with `weights_only`, and of a TorchScript archive only the tensors are looked at. Where
a file holds more than one model it is not guessed which one is meant: the caller names it, as `weights.pt#ema`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptclip.errors import BackboneError, StorageError, did_you_mean
from adaptclip.files import read_json
from adaptclip.seals import own_file

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
"""How the list of a checkpoint in shards ends: `model.safetensors.index.json`, `pytorch_model.bin.index.json`."""

_WRAPPERS = frozenset({"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a tensor's name that DDP, torch.compile, FSDP and activation checkpointing put in, wherever they stand."""

_IMAGE_TOWERS = frozenset({"visual", "vision_model", "image_encoder"})
"""What the image tower of a CLIP is called: by open_clip and OpenAI, by transformers, by Apple."""

_NOT_WEIGHTS = frozenset({"n_averaged", "input_resolution", "context_length", "vocab_size", "attn_mask"})
"""What lies beside the weights of torch's averaged models and in traced archives, and follows from the architecture."""

_MOST_DEPTH, _MOST_INDEX_BYTES, _MOST_PROGRAM_BYTES, _MOST_PARTS = 3, 2**26, 2**24, 2**16


def split_choice(file: Path | str) -> tuple[Path, str]:
    """Returns the path of a checkpoint and the model in it that is meant: `weights.pt#ema`; "" where none is named."""
    path, mark, choice = str(file).rpartition("#")
    if not mark or Path(file).expanduser().is_file():
        return Path(file).expanduser(), ""
    return Path(path).expanduser(), choice


def weight_files(path: Path) -> list[Path]:
    """Returns the files that hold the weights: the path itself, or the shards that an index lists.

    Raises:
        BackboneError: the index is damaged, names a file outside of its folder, or shards are missing.
    """
    return sorted(set(_shards(path).values())) if path.name.endswith(INDEX_SUFFIX) else [path]


def read_weights(path: Path, *, what: str, choice: str = "") -> dict[str, Tensor]:
    """Reads the tensors of one model, without wrappers and prefixes, on the CPU.

    Args:
        path: a file, or the index of shards.
        what: the checkpoint, for messages.
        choice: which one is meant where the file holds several.

    Returns:
        Name -> tensor, by the names of the library that trained it.

    Raises:
        BackboneError: there are several and none is named, or adapters that were not merged.
        OSError, SafetensorError, pickle.UnpicklingError, RuntimeError: as the reading library raises them.
    """
    if path.name.endswith(INDEX_SUFFIX):
        shards = _shards(path)
        content: Any = {}
        for file in weight_files(path):
            shard = _read(file)
            lacking = next((name for name, own in shards.items() if own == file and name not in shard), None)
            if lacking is not None:
                raise BackboneError(f"{file} lacks {lacking}, which {path.name} says is in it. Copy it again.")
            content |= {name: shard[name] for name, own in shards.items() if own == file}
    else:
        content = _read(path)
    models = {
        ".".join(filter(None, (place, prefix))): own
        for place, tensors in _nested(content)
        for prefix, own in _models(tensors, what).items()
    }
    if not models:
        return {}
    # What is no CLIP (an optimizer's moments, a loss with weights of its own) is no choice where there is one.
    clips = {label: own for label, own in models.items() if any(_image_tower(name) is not None for name in own)}
    return _choose(clips or models, choice, what, path)


def _choose(models: Mapping[str, dict[str, Tensor]], choice: str, what: str, path: Path) -> dict[str, Tensor]:
    """The model that is meant, of those in one file."""
    if choice:
        if choice not in models:
            raise BackboneError(
                f"{what} holds no model {choice!r}. {did_you_mean(choice, [k or '(all)' for k in models])}"
            )
        return models[choice]
    if len(models) == 1:
        return next(iter(models.values()))
    labels = [label or "(its own)" for label in models]
    first = next(label for label in models if label)
    raise BackboneError(
        f"{what} holds {len(models)} models: {', '.join(labels)}. Say which: `--pretrained {path.name}#{first}` with "
        "the name of its architecture as --backbone (averaged weights, as an ema is, mostly serve better than the "
        "last ones)."
    )


def _nested(
    content: Any, place: str = "", seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of names to tensors in what was read, with the keys under which it stands."""
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if any(value.ndim for value in tensors.values()):
        yield place, tensors
    # Of mappings that a pickle shares between keys, each is looked at once.
    inner = {id(value): key for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)}
    for key in inner.values() if len(seen) < _MOST_DEPTH else ():
        yield from _nested(content[key], f"{place}.{key}" if place else key, seen | {id(content)})


def _models(tensors: Mapping[str, Tensor], what: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by the prefix of the model that they belong to, and without it; names without wrappers."""
    bare: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if any(part.startswith("lora_") for part in parts):
            raise BackboneError(
                f"{what} holds a model with LoRA adapters that are not merged ({name}); merge them first "
                "(PEFT: `model.merge_and_unload()`) and save its state_dict() as safetensors"
            )
        if parts and parts[-1] not in _NOT_WEIGHTS and bare.setdefault(".".join(parts), value) is not value:
            raise BackboneError(
                f"{what} has {'.'.join(parts)} twice, once as {name}; save the bare model's state_dict()"
            )
    prefixes = {prefix for prefix in map(_image_tower, bare) if prefix is not None}
    if not prefixes:
        return {"": bare}
    leads = {prefix: f"{prefix}." if prefix else "" for prefix in sorted(prefixes)}
    others = [name for name in bare if not name.startswith(tuple(leads.values()))]
    if others:
        warnings.warn(
            f"{len(others)} tensors of {what} that are outside of the CLIP in it ({', '.join(leads.values())}*) were "
            f"left out, for example {others[0]}",
            stacklevel=5,
        )
    return {
        prefix: {name[len(lead) :]: value for name, value in bare.items() if name.startswith(lead)}
        for prefix, lead in leads.items()
    }


def _image_tower(name: str) -> str | None:
    """What stands before the image tower in a tensor's name; None where it is not in one."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts[:-1]) if part in _IMAGE_TOWERS), None)
    return None if place is None else ".".join(parts[:place])


def _shards(index: Path) -> dict[str, Path]:
    """Name of each tensor -> the shard that holds it, all of them files of the index's folder."""
    try:
        content = read_json(index, max_bytes=_MOST_INDEX_BYTES)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not names or not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise BackboneError(f"{index} should be a JSON object with a weight_map of tensors to files")
        files = {name: own_file(index.parent, name) for name in sorted(set(names.values()))}
    except StorageError as error:
        raise BackboneError(
            f"the shards of {index.name} cannot be read: {error}. Copy or download them all."
        ) from error
    return {name: files[file] for name, file in names.items()}


def _read(path: Path) -> Any:
    """What one file holds, as the library that reads its kind gives it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device="cpu")
    if _is_program(path):
        return _program_weights(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# -- TorchScript -------------------------------------------------------------------------------------------------------

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def _is_program(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _program_weights(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive by their names; its program is neither read nor run."""
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            if archive.getinfo(entry).file_size > _MOST_PROGRAM_BYTES:
                raise pickle.UnpicklingError("a list of modules of absurd size")
            with archive.open(entry) as file:
                root = _ProgramReader(file, archive, entry.partition("/")[0]).load()
        return _tensors_of(root)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # of zipfile, zlib, pickle and torch, whatever damage makes them raise
        raise pickle.UnpicklingError(f"not a TorchScript archive as torch writes it: {error}") from error


class _Part:
    """A module of a TorchScript program: its attributes, and nothing that can be called."""

    def __setstate__(self, state: Any) -> None:
        self.held = state if isinstance(state, dict) else {}


class _Storage:
    """The numbers of a TorchScript archive that tensors are views of."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class _ProgramReader(pickle.Unpickler):
    """Reads modules and tensors, and takes every name of the program for an empty part; no other name is resolved."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Part
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return _no_hooks
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return _as_it_is
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name} was not an allowed global")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, count = pid
        if key not in self._storages:
            info = self._archive.getinfo(f"{self._folder}/data/{key}")
            if info.file_size < count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {info.file_size} bytes, too few for {count} numbers")
            content = bytearray(self._archive.read(info))
            values = torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            self._storages[key] = _Storage(values)
        return self._storages[key]


def _view(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any) -> Tensor:
    view = storage.values.as_strided(size, stride, offset)
    if view.numel() > storage.values.numel():
        raise pickle.UnpicklingError("a tensor has more numbers than its storage")
    return view


def _no_hooks() -> None:
    """Stands for the empty mapping of hooks that each tensor of an archive has."""


def _as_it_is(values: Any) -> Any:
    return values


def _tensors_of(root: Any) -> dict[str, Tensor]:
    """Tensors of a part and of all parts in it, by their dotted names."""
    found: dict[str, Tensor] = {}
    waiting = [("", root)]
    # Parts may be shared, or hold each other: without a bound a small file would have names without end.
    for _ in range(_MOST_PARTS):
        if not waiting:
            return found
        prefix, part = waiting.pop()
        found |= {f"{prefix}{name}": value for name, value in part.held.items() if isinstance(value, Tensor)}
        waiting += [(f"{prefix}{name}.", value) for name, value in part.held.items() if isinstance(value, _Part)]
        if len(waiting) > _MOST_PARTS or len(prefix) > 2**10:
            break
    raise pickle.UnpicklingError("more modules than any model has")
