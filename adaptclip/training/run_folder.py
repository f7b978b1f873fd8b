"""The folder of a run on disk: who may write to it, what it was started with, and what a killed run left.

run.json         adaptclip's version, number of processes, settings, digests of what the run is made from; says that
                 the folder is a run
run.lock         locked while a process writes to the folder; run.lock.json says which one
config.yaml      the settings it was last gone on with, for `--config`
split.json       the few-shot split; read and compared when a run goes on, never written again
judgements.jsonl one line for every time that its test images were judged; kept when the run is replaced
metrics.jsonl    one line per logged step; holds no clock times, so that equal runs write equal files
checkpoints/     the newest checkpoint
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from adaptclip.data.fewshot import FewShotSplit
from adaptclip.errors import SplitError, StorageError, TrainingError
from adaptclip.outputs import LEDGER, refuse_strangers
from adaptclip.storage import check_is_file, parse_json, read_json, write_json, write_text, write_yaml
from adaptclip.training.checkpoint import newest_checkpoint, step_of
from adaptclip.training.provenance import changes

_log = logging.getLogger(__name__)

MARKER, LOCK, HOLDER = "run.json", "run.lock", "run.lock.json"
_HOW_STARTED = ("resume", "overwrite")
_held: WeakValueDictionary[tuple[int, Path], FileLock] = WeakValueDictionary()
"""Locks of this process; one that nobody holds on to any more is given back."""


def lock_folder(path: Path) -> FileLock:
    """Makes the folder where it is missing, and locks it for this process until the lock is released or forgotten.

    The operating system takes the lock back when its process ends in whatever way. Where this process has the lock
    already, as after a run that failed in a notebook, it keeps it.

    Raises:
        TrainingError: another process holds it; the message names machine, process and since when.
        StorageError: the folder cannot be written.
    """
    key = (os.getpid(), path.resolve())
    held = _held.get(key)
    if held is not None and held.is_locked:
        return held
    lock = FileLock(path / LOCK, timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise TrainingError(_who_holds(path)) from None
    except NotImplementedError as error:
        # Refusing would leave people on such a cluster with no run at all.
        _log.warning("%s cannot be locked (%s): a second run in it would not be noticed", path, error)
    except OSError as error:
        raise StorageError(f"cannot write the run folder {path}: {error}; choose another --out") from error
    _held[key] = lock
    write_json(
        path / HOLDER,
        {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")},
    )
    return lock


def _who_holds(path: Path) -> str:
    try:
        found = read_json(path / HOLDER)
        here = found["host"] == socket.gethostname()
        who = f"process {found['pid']} on {'this machine' if here else found['host']}, since {found['since']}"
    except (StorageError, KeyError, TypeError):
        who, here = "another process", False
    gone = "" if here else (
        f" Should that machine be gone (a network file system may remember its lock), delete {path / LOCK}."
    )  # fmt: skip
    return f"another run is writing to {path}: {who}. Wait for it, end it, or choose another --out.{gone}"


def check_kind(path: Path) -> None:
    """Raises TrainingError unless the folder is missing, empty or a run's; changes nothing."""
    if not path.exists():
        return
    if not path.is_dir():
        raise TrainingError(f"the run folder {path} is a file; choose another --out")
    if not _is_empty(path) and ((path / MARKER).is_symlink() or not (path / MARKER).is_file()):
        raise TrainingError(f"{path} holds files and is not a run folder of adaptclip; choose another --out")
    if not _is_empty(path):
        _read_marker(path / MARKER)  # before the lock is put into what may be somebody else's folder


def _is_empty(path: Path) -> bool:
    """Whether there is nothing but what a run leaves that is killed at once: its lock and a temporary file."""
    return all(
        p.name in (LOCK, HOLDER, LEDGER) or (p.name.startswith(".") and p.suffix == ".tmp") for p in path.iterdir()
    )


def check_earlier(
    path: Path,
    record: dict[str, Any],
    split: FewShotSplit | None,
    *,
    resume: bool,
    overwrite: bool,
    may_change: Collection[str],
) -> None:
    """Raises an error unless this run may go on in the folder, or replace what is there; changes nothing.

    Args:
        path: the folder, locked.
        record: what `start_run` would write to run.json.
        split: the few-shot split drawn now.
        resume: an earlier run is to be gone on with.
        overwrite: an earlier run is to be replaced.
        may_change: settings that may differ.

    Raises:
        TrainingError: it may not.
        StorageError: what would be replaced holds somebody's own files.
    """
    if _is_empty(path):
        return
    earlier = _read_marker(path / MARKER)
    if overwrite or resume:
        refuse_strangers(path, "run", parts=resume)  # a run that is gone on with replaces its artifact, and no more
    if overwrite:
        return
    if not resume:
        # A recipe without a loop has nothing to go on with, and no such flag.
        goes_on = "resume" in record["config"] or "overwrite" not in record["config"]
        ways = "Go on with it (--resume), replace it" if goes_on else "Replace it"
        raise TrainingError(f"{path} holds an earlier run. {ways} (--overwrite) or choose another --out.")
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
    _check_inputs(path, earlier, record)
    if split is not None and (path / "split.json").exists():
        _check_split(path / "split.json", split)
    if (path / "checkpoints").exists() and not (path / "checkpoints").is_dir():
        raise TrainingError(f"{path / 'checkpoints'} is a file where the folder of checkpoints should be; move it away")


def _read_marker(path: Path) -> dict[str, Any]:
    """Returns what run.json says; what is not whole does not make a folder a run's, neither to go on nor to empty."""
    try:
        found = read_json(path)
    except StorageError as error:
        found, why = None, str(error)
    else:
        why = f"{path} does not say what the run was started with"
    if (
        isinstance(found, dict)
        and isinstance(found.get("adaptclip"), str)
        and isinstance(found.get("num_processes"), int)
        and isinstance(found.get("config"), dict)
    ):
        return found
    raise TrainingError(
        f"{why}: it is damaged, or no run's. Put back a good copy of it; to start anew, choose another --out or remove "
        f"{path.parent} yourself, which --overwrite does to whole run folders only."
    )


def _check_inputs(path: Path, earlier: dict[str, Any], record: dict[str, Any]) -> None:
    if not isinstance(earlier.get("made_from"), dict):
        raise TrainingError(
            f"{path / MARKER} does not say which images, card and weights the run was made from, as a run of this "
            "version does; whether they are still the same cannot be known. Start anew: choose another --out, or "
            "replace the run with --overwrite."
        )
    try:
        changed = changes(earlier["made_from"], record["made_from"])
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"what {path / MARKER} says the run was made from is damaged ({type(error).__name__}: {error}). Put back a "
            "good copy of it, or replace the run with --overwrite."
        ) from error
    if earlier["adaptclip"] != record["adaptclip"]:
        changed.append(f"adaptclip ({earlier['adaptclip']} -> {record['adaptclip']})")
    if changed:
        raise TrainingError(
            f"{path} was started from something else; what has changed since: {'; '.join(changed)}. Put it back as it "
            "was and resume, or start anew: choose another --out, or replace the run with --overwrite."
        )


def _check_split(path: Path, drawn: FewShotSplit) -> None:
    try:
        first = FewShotSplit.load(path)
    except (StorageError, SplitError) as error:
        raise TrainingError(
            f"{error}. It is read and never written again: put back a good copy, or remove the file, and the split "
            f"that {MARKER} has the digest of is drawn again."
        ) from error
    if first.digest != drawn.digest:
        others = len({*first.train} - {*drawn.train})
        raise TrainingError(
            f"{path} is not the split that the run was started with ({others} of its {len(first.train)} training "
            "images are others). Put back a good copy, or remove the file, and the split is drawn again."
        )


def prepare_folder(path: Path, record: dict[str, Any], split: FewShotSplit | None, *, overwrite: bool) -> int:
    """Writes what a run folder needs after all checks, and returns the steps of the checkpoint that is gone on from.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        if overwrite:
            _empty(path)
        for remains in path.glob(".*.tmp"):  # what a killed run was writing
            _remove(remains)
    except OSError as error:
        raise StorageError(f"cannot empty the run folder {path}: {error}; choose another --out") from error
    # The marker comes first: what a killed run leaves must be known as a run folder when it is started again.
    if not (path / MARKER).exists():
        write_json(path / MARKER, record)
    if split is not None and not (path / "split.json").exists():
        split.save(path / "split.json")
    # What a resumed run may change, for example how it is judged, belongs in the settings; how it was started does not.
    first = read_json(path / MARKER)["config"]
    write_yaml(path / "config.yaml", {**record["config"], **{k: first[k] for k in _HOW_STARTED if k in first}})
    newest = newest_checkpoint(path / "checkpoints")
    start = step_of(newest) if newest else 0
    _cut_metrics(path / "metrics.jsonl", start)
    return start


def _empty(path: Path) -> None:
    """Removes what a run folder holds but lock and ledger; the marker goes last, so that a kill leaves a run's."""
    for entry in sorted(path.iterdir(), key=lambda p: p.name == MARKER):
        if entry.name not in (LOCK, HOLDER, LEDGER):
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _cut_metrics(path: Path, last_step: int) -> None:
    """Keeps the lines up to `last_step`: a killed run may have logged more, the last line only in part.

    Lines that cannot be read, as a machine leaves them that lost its power, are left out, and that is said.
    """
    text = ""
    if path.exists():
        check_is_file(path)
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    *whole, _ = text.split("\n")  # a last line without its end was being written
    kept, damaged = [], 0
    for line in whole:
        step = _step_of_line(line)
        if step is None:
            damaged += 1
        elif step <= last_step:
            kept.append(line + "\n")
    if damaged:
        _log.warning(
            "%s: %d of %d lines cannot be read and are left out; the run itself is not touched by that", path, damaged,
            len(whole),
        )  # fmt: skip
    write_text(path, "".join(kept))


def _step_of_line(line: str) -> int | None:
    try:
        step = parse_json(line, where="a line")["step"]
    except (StorageError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def what_is_kept(out: Path) -> str:
    """Says in a sentence or two what a run that was stopped has left in its folder, and how to go on."""
    found = [newest_checkpoint(folder) for folder in (*sorted(out.glob("*/checkpoints")), out / "checkpoints")]
    newest = next((path for path in found if path is not None), None)
    if newest is not None:
        step = step_of(newest)
        return f"The checkpoint of step {step} is kept ({newest}); the same command with --resume goes on from there."
    if (out / MARKER).is_file():
        return f"{out} holds no checkpoint yet: the same command with --resume starts with the first step."
    return f"Nothing was written to {out} yet; the same command starts anew."
