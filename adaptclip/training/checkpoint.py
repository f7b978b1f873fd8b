# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what a killed run needs to go on exactly where it was, in one safetensors file and nothing else.

A checkpoint holds the adapter, the optimizer, the schedule, what a mitigation has learnt, the loss scaler and the
random generators of every process; never the backbone, and no position in the data, because `FeatureLoader` needs none.
Its name ends in the digest of its bytes, so that one rename makes it exist whole and every later damage is seen.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from accelerate.utils import gather_object
from torch import Tensor

from adaptclip.errors import ArtifactError, StorageError, TrainingError
from adaptclip.files import check_is_file, digest, parse_json, write_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.safetensors")
_PARTS = {"step", "adapter", "optimizer", "scheduler", "mitigation", "scaler", "random"}
_WAY_ON = "Put back a good copy, or start the run anew with --overwrite."


class Stateful(Protocol):
    """More that training changes beside the weights, for example `Mitigation`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state, the same on every process."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` returned; raises ValueError or KeyError when it does not fit."""
        ...


def save_checkpoint(
    folder: Path,
    step: int,
    adapter: Any,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
    mitigation: Stateful | None = None,
) -> None:
    """Writes the state after optimizer step `step`, then removes older checkpoints. Every process calls it.

    Args:
        folder: where checkpoints of this run lie.
        step: optimizer steps taken.
        adapter: an Adapter, prepared by the accelerator or not.
        optimizer: its optimizer, prepared or not.
        scheduler: its schedule.
        accelerator: knows the processes and the loss scaler.
        mitigation: has state of its own (group DRO); None where there is none.

    Raises:
        StorageError: the folder is full or read-only; the previous checkpoint is untouched.
    """
    random_states = gather_object([_random_state()])
    if accelerator.is_main_process:
        state = {
            "step": step,
            "adapter": accelerator.unwrap_model(adapter).adapter_state(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "mitigation": mitigation.state_dict() if mitigation is not None else {},
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "random": random_states,
        }
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_pack(state, "", tensors))
        content = safetensors.torch.save(tensors, {"state": text})
        path = folder / f"step-{step:08d}-{digest(content)[:16]}.safetensors"
        write_bytes(path, content)
        _remove_all_but(path)
    # Loading at once after saving must not find another process's half of the work.
    accelerator.wait_for_everyone()


def load_checkpoint(
    folder: Path,
    adapter: Any,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
    mitigation: Stateful | None = None,
) -> int:
    """Puts the newest checkpoint into adapter, optimizer, schedule, mitigation, loss scaler and random generators.

    Returns:
        The number of optimizer steps taken; 0 when there is no checkpoint, with nothing changed.

    Raises:
        TrainingError: the checkpoint is damaged, or is of another adapter, mitigation or number of processes.
    """
    path = newest_checkpoint(folder)
    if path is None:
        return 0
    state = _read(path)
    if len(state["random"]) != accelerator.num_processes:
        raise TrainingError(
            f"{path} was written by {len(state['random'])} processes and there are {accelerator.num_processes} now; "
            "the images would be divided differently. Resume with the same number of processes."
        )
    try:
        accelerator.unwrap_model(adapter).load_adapter_state(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if mitigation is not None:
            mitigation.load_state_dict(state.get("mitigation", {}))
    except (ArtifactError, KeyError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"{path} does not fit this adapter: {error}. Resume with the settings the run was started with, or start "
            "anew with --overwrite."
        ) from error
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    _set_random_state(state["random"][accelerator.process_index])
    return state["step"]


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint with the highest step in `folder`, or None."""
    found = [p for p in folder.glob("step-*.safetensors") if _NAME.fullmatch(p.name)]
    return max(found, key=step_of, default=None)


def step_of(path: Path) -> int:
    """Returns the step that a checkpoint's file name states."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise TrainingError(f"{path} is not named like a checkpoint (step-<number>-<digest>.safetensors)")
    return int(match[1])


def _remove_all_but(newest: Path) -> None:
    """Removes older checkpoints and what a killed run left of one it was writing."""
    for path in [*newest.parent.glob("step-*.safetensors"), *newest.parent.glob(".step-*.tmp")]:
        if path != newest:
            with contextlib.suppress(OSError):  # one checkpoint too many does no harm
                path.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        check_is_file(path)
        content = path.read_bytes()
    except (OSError, StorageError) as error:
        raise TrainingError(f"cannot read the checkpoint {path}: {error}") from error
    if digest(content)[:16] != path.name.removesuffix(".safetensors")[-16:]:
        raise TrainingError(
            f"the checkpoint {path} is damaged: its bytes do not match the digest in its name. {_WAY_ON}"
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = file.metadata()["state"]
        state = _unpack(parse_json(text, where="its state", nan=True), safetensors.torch.load(content))
        fits = state["step"] == step_of(path) and state.keys() >= _PARTS
    except (safetensors.SafetensorError, StorageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} is no checkpoint of adaptclip ({error}). {_WAY_ON}") from error
    if not fits:
        raise TrainingError(f"{path} does not hold what its name says. {_WAY_ON}")
    return state


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turns nested containers into JSON, moving tensors and arrays to `tensors` under the path that leads to them.

    Dictionaries become lists of pairs, because JSON would turn the optimizer's integer keys into text.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.astype(np.int64) if value.dtype.kind == "u" else value)
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undoes `_pack`; arrays come back as tensors."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _random_state() -> dict[str, Any]:
    """Returns the state of this process's global generators (dropout and other third-party code draw from them)."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
