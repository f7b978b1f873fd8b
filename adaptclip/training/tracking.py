# SPDX-License-Identifier: Apache-2.0
"""A run: the processes it takes, its folder, the numbers of every logged step, and when to save.

What `accelerate launch` and `accelerate config` ask for is honoured where a recipe's flag says nothing. Both reach a
recipe as environment variables, which an `Accelerator` that is told a value ignores without a word. The launcher writes
"no" and 1 when it was asked for nothing, so these never contradict a flag.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    LoggerType,
    broadcast_object_list,
)
from torch import Tensor

from adaptclip import __version__
from adaptclip.errors import AdaptclipError, ConfigError, StorageError, TrainingError, did_you_mean
from adaptclip.files import parse_json
from adaptclip.outputs import check_apart, check_cache
from adaptclip.training.interruption import Pace
from adaptclip.training.run_folder import (
    check_earlier,
    check_kind,
    describe_inputs,
    lock_folder,
    places_read,
    prepare_folder,
)
from adaptclip.training.steps import is_due

if TYPE_CHECKING:
    from filelock import FileLock

    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import DomainData
    from adaptclip.data.shots import FewShotSplit

MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
"""A recipe's `--mixed-precision`; "auto" is what the launcher asks for, and no autocast where it asks for nothing."""

_PRECISIONS = ("auto", "no", "fp16", "bf16")

_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context or sharded parallelism)",
}
"""Ways to split a model over processes. A frozen CLIP with few learnt numbers fits on each of them."""

_HOW = "`accelerate launch --mixed_precision no`, or answer so in `accelerate config`"


def launched_precision(wanted: str) -> str:
    """Returns the mixed precision of a run: "no", "fp16" or "bf16".

    Args:
        wanted: the flag, one of `MixedPrecision`.

    Raises:
        ConfigError: an unknown value, the launcher asks for one that the recipes cannot compute in (fp8), or for
            another one than the flag.
    """
    if wanted not in _PRECISIONS:
        raise ConfigError(f"unknown mixed_precision {wanted!r}. {did_you_mean(wanted, _PRECISIONS)}")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    if asked not in _PRECISIONS[1:]:
        raise ConfigError(
            f"the launcher asks for mixed precision {asked!r} (ACCELERATE_MIXED_PRECISION), which the recipes do not "
            f"compute in; allowed: no, fp16, bf16. Take {_HOW}"
        )
    if asked != "no" and wanted not in ("auto", asked):
        raise ConfigError(
            f"the launcher asks for mixed precision {asked!r} (accelerate launch or accelerate config), but this run "
            f"is to use {wanted!r} (--mixed-precision, or the only one of this recipe). Give both the same, leave the "
            f"flag out, or take {_HOW}"
        )
    return asked if wanted == "auto" else wanted


def launched_accumulation(wanted: int) -> int:
    """Returns the micro-batches per optimizer step, 1 or more.

    Args:
        wanted: the flag; 0 takes what the launcher asks for, and 1 where it asks for nothing.

    Raises:
        ConfigError: a number below 0, or the launcher asks for another one, or for no number.
    """
    if wanted < 0:
        raise ConfigError(f"accumulate must be 1 or more, or 0 for what the launcher asks for; got {wanted}")
    text = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"the launcher asks for {text!r} gradient accumulation steps (ACCELERATE_GRADIENT_ACCUMULATION_STEPS); it "
            "must be a whole number from 1 up"
        )
    asked = int(text)
    if asked != 1 and wanted not in (0, asked):
        raise ConfigError(
            f"the launcher asks for {asked} gradient accumulation steps (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) and "
            f"--accumulate for {wanted}; give both the same, or leave one out"
        )
    return asked if wanted == 0 else wanted


def check_launcher() -> None:
    """Refuses what the launcher may ask for and the recipes do not do.

    Raises:
        ConfigError: it asks for DeepSpeed, FSDP, Megatron-LM or another way to split a model, or for torch.compile.
    """
    for variable, name in _OTHER_WAYS.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise ConfigError(
                f"the launcher asks for {name} ({variable}), which the recipes do not use: the frozen model fits on "
                "each device, and data are shared out over processes. Launch without it, or run `accelerate config` "
                "again"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").lower() or "no"
    if backend != "no":
        raise ConfigError(
            f"the launcher asks for torch.compile with {backend!r} (ACCELERATE_DYNAMO_BACKEND), which would compile "
            "whole methods; launch without --dynamo_backend. lora.py compiles its image tower by --compute compile"
        )


def settled(config: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Returns a recipe's settings with what the launcher decided in place of "auto" and 0, for the run's record."""
    decided: dict[str, Any] = {}
    if config.get("mixed_precision") == "auto":
        decided["mixed_precision"] = accelerator.mixed_precision
    if config.get("accumulate") == 0:
        decided["accumulate"] = accelerator.gradient_accumulation_steps
    return {**config, **decided}


T = TypeVar("T")

MAY_CHANGE = ("resume", "overwrite", "out", "trackers", "workers", "cache", "gates", "save_every")
"""Settings that do not touch the weights, so a resumed run may have others."""

SAVE_MINUTES = 5.0
"""Time after which a checkpoint is due whatever the number of steps."""


def make_accelerator(
    mixed_precision: MixedPrecision = "auto",
    accumulate: int = 0,
    *,
    trackers: str = "",
    out: Path | str | None = None,
    cpu: bool = False,
) -> Accelerator:
    """Builds the Accelerator of a recipe and checks that it sees the processes that were started.

    Args:
        mixed_precision: "no", "fp16" (GPU only), "bf16", or "auto" for what `accelerate launch` asks for.
        accumulate: micro-batches per optimizer step, 1 or more, or 0 for what the launcher asks for.
        trackers: names of Accelerate's trackers, separated by commas, for example "tensorboard,wandb".
        out: run folder, where trackers that write files put them.
        cpu: stay on the CPU even where there is a GPU.

    Raises:
        ConfigError: a value out of range, fp16 without a GPU, an unknown tracker or one whose package is missing, or
            the launcher asks for something else or for what the recipes do not do.
        TrainingError: several processes were started and Accelerate sees one.
    """
    check_launcher()
    precision, num_steps = launched_precision(mixed_precision), launched_accumulation(accumulate)
    if precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise ConfigError('mixed_precision "fp16" needs a GPU, and none is used here; take "bf16" or "no"')
    names = _tracker_names(trackers)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=False),
        log_with=names or None,
        project_dir=out,
        cpu=cpu,
        # The backbone is frozen and in eval mode: its buffers never change, so they need not be sent every step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_processes(accelerator)
    return accelerator


def _tracker_names(trackers: str) -> list[Any]:
    known = [kind.value for kind in LoggerType if kind != LoggerType.ALL]
    installed = [str(kind) for kind in get_available_trackers()]
    names = [name.strip() for name in trackers.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown tracker {name!r}. {did_you_mean(name, known)}")
        if name not in installed:
            raise ConfigError(
                f"tracker {name!r} needs its package, which is not installed; install it (for example `pip install "
                f"{name.replace('_', '-')}`) or leave the tracker out: metrics.jsonl is always written"
            )
    return names


def check_processes(accelerator: Accelerator) -> None:
    """Refuses to start when the launcher started more processes than Accelerate sees.

    Without a GPU, torchrun alone gives Accelerate no hint to join its processes, and each would train for itself and
    write the same files.

    Raises:
        TrainingError: WORLD_SIZE and the accelerator disagree.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != accelerator.num_processes:
        raise TrainingError(
            f"the launcher started {world_size} processes (WORLD_SIZE) but Accelerate joined "
            f"{accelerator.num_processes}. On a CPU, launch with "
            f"`ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {world_size} ...`."
        )


@dataclass(frozen=True)
class Run:
    """A run folder that is ready to be written to.

    Attributes:
        path: the folder.
        start: optimizer steps of the checkpoint that is gone on from; 0 for a new run.
        accelerator: the one the run belongs to.
        save_every: optimizer steps between checkpoints.
        pace: of checkpoints by the clock, and of stopping when a signal asks for it.
        config: the settings.
        resume: whether it is gone on with.
        lock: of the folder; None except on the main process.
    """

    path: Path
    start: int
    accelerator: Accelerator
    save_every: int
    pace: Pace
    config: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    lock: FileLock | None = None

    def stage(self, name: str) -> Run:
        """Returns the run itself for "", or the run of a stage in a folder inside. Every process calls it."""
        if not name:
            return self
        return start_run(
            self.path / name, config=dict(self.config), accelerator=self.accelerator, resume=self.resume,
            save_every=self.save_every,
        )  # fmt: skip

    @property
    def metrics(self) -> Path:
        """The file of logged numbers."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder for `save_checkpoint` and `load_checkpoint`."""
        return self.path / "checkpoints"

    def save_is_due(self, step: int, total: int) -> bool:
        """Says whether to save a checkpoint after step `step`; every process calls it, after `backward_and_step`.

        One is due every `save_every` steps, after the last one, when the last one is minutes old, and when the process
        was asked to end: `train_steps` then stops.

        Args:
            step: number of the optimizer step, from 1.
            total: number of the last step.
        """
        asked = self.pace.asks_to_save() and is_due(step, 1, total)
        due = asked or is_due(step, self.save_every, total)
        if due:
            self.pace.saved()
        return due

    def log(self, step: int, **scalars: float | int | Tensor | None) -> None:
        """Appends one line to metrics.jsonl and tells the trackers. Every process calls it.

        Log what belongs to a step before saving its checkpoint: on resume, lines after the checkpoint's step are
        removed and written again.

        Args:
            step: optimizer step.
            **scalars: numbers; a tensor is averaged over the processes, None is left out. What is not finite becomes
                null, which JSON does have.

        Raises:
            StorageError: the file cannot be written.
        """
        values = {name: self._number(value) for name, value in scalars.items() if value is not None}
        if not self.accelerator.is_main_process:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.metrics}: {error}. The newest checkpoint is untouched.") from error
        self.accelerator.log(values, step=step)

    def _number(self, value: float | int | Tensor) -> float | int:
        if not isinstance(value, Tensor):
            return value
        mean: Any = self.accelerator.reduce(value.detach().float(), reduction="mean")
        return mean.item()

    def finish(self) -> None:
        """Closes the trackers and gives back the folder."""
        if self.accelerator.trackers:
            self.accelerator.end_training()
        if self.lock is not None:
            self.lock.release(force=True)


def start_run(
    out: Path | str,
    *,
    config: Mapping[str, Any],
    accelerator: Accelerator,
    data: DomainData | None = None,
    split: FewShotSplit | None = None,
    backbone: ClipBackbone | None = None,
    others: Mapping[str, str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    may_change: Collection[str] = MAY_CHANGE,
    save_every: int = 100,
    save_minutes: float = SAVE_MINUTES,
) -> Run:
    """Makes the run folder, or opens one to go on, and locks it until `finish`. Every process calls it.

    With `resume`, what the run is made from is compared with what it was started from, before anything is written;
    metrics.jsonl is cut back to the step of the newest checkpoint; where there is no run yet, a new one is started, so
    that the same command can be given again until the run is done.

    Args:
        out: the run folder.
        config: the settings; values must be JSON-able or paths.
        accelerator: from `make_accelerator`.
        data: the images; their digests, and those of the next three, are written to run.json.
        split: the images that are learnt from; written to split.json.
        backbone: what is adapted.
        others: name -> digest of whatever else the result depends on.
        resume: go on in an existing run folder.
        overwrite: empty an existing run folder first.
        may_change: settings that may differ from those the run was started with.
        save_every: optimizer steps between checkpoints; 0 writes them by the clock and after the last step only.
        save_minutes: minutes between checkpoints, whichever comes first; 0 writes none by the clock.

    Raises:
        ConfigError: both `resume` and `overwrite`.
        TrainingError: the folder is occupied or locked by another process, or the run was started with other settings,
            another number of processes, or from other images, weights or another version of adaptclip.
        StorageError: the folder cannot be written, is a link, or holds or lies in what is read (`adaptclip.outputs`).
    """
    check_processes(accelerator)
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other; give one of them")
    path = Path(out)
    record = {
        "adaptclip": __version__,
        "num_processes": accelerator.num_processes,
        "config": parse_json(json.dumps(settled(config, accelerator), default=str), where="the settings", nan=True),
        "made_from": describe_inputs(data, split, backbone, others or {}),
    }
    locks: list[FileLock] = []

    def open_folder() -> int:
        cache = Path(config["cache"]) if config.get("cache") else None
        read, roots = places_read(config, data)
        check_apart(path, [*read, cache] if cache else read, roots, kind="run")
        check_cache(cache, read, roots)
        check_kind(path)
        locks.append(lock_folder(path))
        check_earlier(path, record, split, resume=resume, overwrite=overwrite, may_change=may_change)
        return prepare_folder(path, record, split, overwrite=overwrite)

    start = _on_main(accelerator, open_folder)
    pace = Pace(is_main=accelerator.is_main_process, num_processes=accelerator.num_processes, minutes=save_minutes)
    run = Run(path, start, accelerator, save_every, pace, config, resume, *locks)
    if accelerator.log_with:
        flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in record["config"].items()}
        accelerator.init_trackers("adaptclip", config=flat)
    return run


def _on_main(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """Calls on the main process and returns its answer, or raises its error, on all of them."""
    if accelerator.num_processes == 1:
        return call()
    info: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            info[0] = call()
        except AdaptclipError as error:
            info[1] = error
    broadcast_object_list(info)
    if info[1] is not None:
        raise info[1]
    return info[0]
