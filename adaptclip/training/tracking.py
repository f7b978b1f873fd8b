"""The run folder: what was asked for, and the numbers of every logged step.

run.json         adaptclip's version, number of processes, settings; says that the folder is a run
config.yaml      the settings it was last gone on with, for `--config`
metrics.jsonl    one line per logged step; holds no clock times, so that equal runs write equal files
checkpoints/     the newest checkpoint
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, LoggerType
from torch import Tensor

from adaptclip import __version__
from adaptclip.errors import ConfigError, StorageError, TrainingError, did_you_mean
from adaptclip.storage import parse_json, read_json, write_json, write_text, write_yaml
from adaptclip.training.checkpoint import newest_checkpoint, step_of
from adaptclip.training.launcher import (
    MixedPrecision,
    check_launcher,
    launched_accumulation,
    launched_precision,
    settled,
)

MAY_CHANGE = ("resume", "overwrite", "out", "trackers", "workers", "cache", "gates")
"""Settings that do not touch the weights, so a resumed run may have others."""

_HOW_STARTED = ("resume", "overwrite")


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
            the launcher asks for something else or for what the recipes do not do (`launcher`).
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
    """

    path: Path
    start: int
    accelerator: Accelerator
    save_every: int = 100

    @property
    def metrics(self) -> Path:
        """The file of logged numbers."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder for `save_checkpoint` and `load_checkpoint`."""
        return self.path / "checkpoints"

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
        """Closes the trackers."""
        if self.accelerator.trackers:
            self.accelerator.end_training()


def start_run(
    out: Path | str,
    *,
    config: Mapping[str, Any],
    accelerator: Accelerator,
    resume: bool = False,
    overwrite: bool = False,
    may_change: Collection[str] = MAY_CHANGE,
    save_every: int = 100,
) -> Run:
    """Makes the run folder, or opens one to go on. Every process calls it.

    With `resume`, metrics.jsonl is cut back to the step of the newest checkpoint; where there is no run yet, a new one
    is started, so that the same command can be given again until the run is done.

    Args:
        out: the run folder.
        config: the settings; values must be JSON-able or paths.
        accelerator: from `make_accelerator`.
        resume: go on in an existing run folder.
        overwrite: empty an existing run folder first.
        may_change: settings that may differ from those the run was started with.
        save_every: optimizer steps between checkpoints; 0 writes one after the last step only.

    Raises:
        ConfigError: both `resume` and `overwrite`.
        TrainingError: the folder is occupied, or the run was started with other settings or another number of
            processes.
        StorageError: the folder cannot be written.
    """
    check_processes(accelerator)
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other; give one of them")
    path = Path(out)
    record = {
        "adaptclip": __version__,
        "num_processes": accelerator.num_processes,
        "config": parse_json(json.dumps(settled(config, accelerator), default=str), where="the settings", nan=True),
    }
    _check_folder(path, record, resume=resume, overwrite=overwrite, may_change=may_change)
    accelerator.wait_for_everyone()  # every process has looked before one of them writes
    newest = None if overwrite else newest_checkpoint(path / "checkpoints")
    run = Run(path, step_of(newest) if newest else 0, accelerator, save_every)
    if accelerator.is_main_process:
        _prepare_folder(run, record, overwrite=overwrite)
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in record["config"].items()}
        accelerator.init_trackers("adaptclip", config=flat)
    return run


def _check_folder(
    path: Path, record: dict[str, Any], *, resume: bool, overwrite: bool, may_change: Collection[str]
) -> None:
    """Raises TrainingError unless this run may write into `path`."""
    if not path.exists():
        return
    if not path.is_dir():
        raise TrainingError(f"the run folder {path} is a file; choose another --out")
    # A run killed while it wrote its first file leaves only a temporary one.
    if all(p.name.startswith(".") and p.suffix == ".tmp" for p in path.iterdir()):
        return
    marker = path / "run.json"
    if not marker.exists():
        raise TrainingError(f"{path} holds files and is not a run folder of adaptclip; choose another --out")
    if overwrite:
        return
    if not resume:
        raise TrainingError(
            f"{path} holds an earlier run. Go on with it (--resume), replace it (--overwrite) or choose another --out."
        )
    earlier = read_json(marker)
    if earlier["num_processes"] != record["num_processes"]:
        raise TrainingError(
            f"{path} was started with {earlier['num_processes']} processes and there are {record['num_processes']} "
            "now; resume with the same number, so that each step sees the same images."
        )
    before, now = earlier["config"], record["config"]
    changed = [
        f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
        for key in sorted({*before, *now} - set(may_change))
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise TrainingError(
            f"{path} was started with other settings: {', '.join(changed)}. Resume with the same settings "
            f"(--config {path / 'config.yaml'}), or choose another --out."
        )


def _prepare_folder(run: Run, record: dict[str, Any], *, overwrite: bool) -> None:
    """Writes what a run folder needs; called on the main process only."""
    try:
        if overwrite and run.path.exists():
            _empty(run.path)
        for remains in run.path.glob(".*.tmp"):  # what a killed run was writing
            _remove(remains)
    except OSError as error:
        raise StorageError(f"cannot empty the run folder {run.path}: {error}; choose another --out") from error
    # The marker comes first: what a killed run leaves must be known as a run folder when it is started again.
    if not (run.path / "run.json").exists():
        write_json(run.path / "run.json", record)
    # What a resumed run may change, for example how it is judged, belongs in the settings; how it was started does not.
    first = read_json(run.path / "run.json")["config"]
    write_yaml(run.path / "config.yaml", {**record["config"], **{k: first[k] for k in _HOW_STARTED if k in first}})
    _cut_metrics(run.metrics, run.start)


def _empty(path: Path) -> None:
    """Removes what a run folder holds; its marker goes last, so that a kill in between leaves a run folder."""
    for entry in sorted(path.iterdir(), key=lambda p: p.name == "run.json"):
        _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _cut_metrics(path: Path, last_step: int) -> None:
    """Keeps the whole lines up to `last_step`: a killed run may have logged more, the last line only in part."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    write_text(path, "".join(line for line in whole if parse_json(line, where=str(path))["step"] <= last_step))
