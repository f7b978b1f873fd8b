# SPDX-License-Identifier: Apache-2.0
"""The folder of a run on disk: who may write to it, what it was started with, and what a killed run left.

run.json         adaptclip's version, number of processes, settings, digests of what the run is made from; says that
                 the folder is a run
run.lock         locked while a process writes to the folder; run.lock.json says which one
config.yaml      the settings it was last gone on with, for `--config`
split.json       the few-shot split; read and compared when a run goes on, never written again
judgements.jsonl one line for every time that its test images were judged; kept when the run is replaced
metrics.jsonl    one line per logged step; holds no clock times, so that equal runs write equal files
checkpoints/     the newest checkpoint

What a run is made from is written in digests, and what of it has changed since is said in words.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from adaptclip import __version__
from adaptclip.data.card import load_card
from adaptclip.data.card_block import CardBlock
from adaptclip.data.readers import card_places
from adaptclip.data.shots import NONE, FewShotSplit
from adaptclip.errors import SplitError, StorageError, TrainingError
from adaptclip.files import check_is_file, digest, parse_json, read_json, write_json, write_text, write_yaml
from adaptclip.outputs import LEDGER, refuse_strangers
from adaptclip.training.checkpoint import newest_checkpoint, step_of

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import DomainData

_NUM_MARKS = 4
_MAX_NAMED = 5


def describe_inputs(
    data: DomainData | None,
    split: FewShotSplit | None,
    backbone: ClipBackbone | None,
    others: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the record of what a run is made from, JSON-able; what is None has no part in it.

    Args:
        data: the images. Of each class are kept how many images it has and its smallest content digests, by which it
            is known again under another name; of each part one digest of everything.
        split: the images that are learnt from.
        backbone: what is adapted.
        others: further inputs, name -> digest.
    """
    record: dict[str, Any] = {}
    if data is not None:
        block = data.card.model_dump(mode="json", include=set(CardBlock.model_fields))
        record["card"] = {
            key: digest(json.dumps(value, sort_keys=True, ensure_ascii=False))[:16] for key, value in block.items()
        }
        contents: dict[str, list[str]] = {name: [] for name in data.class_names}
        for part in data.parts.values():
            for kinds, content in zip(part.kinds(), part.contents, strict=True):
                for kind in kinds:
                    contents.setdefault((*data.class_names, NONE)[kind], []).append(content)
        record["classes"] = {
            name: {"images": len(found), "marks": [content[:16] for content in sorted(found)[:_NUM_MARKS]]}
            for name, found in contents.items()
        }
        record["parts"] = {name: {"images": len(part), "digest": part.digest} for name, part in data.parts.items()}
    if split is not None:
        record["split"] = split.digest
    if backbone is not None:
        record["backbone"] = {"name": backbone.name, "digest": backbone.digest}
    return record | ({"others": dict(others)} if others else {})


def places_read(config: Mapping[str, Any], data: DomainData | None) -> tuple[list[Path], list[Path]]:
    """Returns files and folders that a run reads, and folders that only hold some of those; see `outputs.check_apart`.

    Args:
        config: the run's settings; of use are `backbone`, `pretrained`, `zero_shot_card` and `data_root`.
        data: the images.
    """
    from adaptclip.clip.checkpoints import split_choice
    from adaptclip.clip.loading import local_folders  # open_clip, which no method on features needs

    root = Path(config["data_root"]) if config.get("data_root") else None
    read = local_folders(config.get("backbone"))
    if config.get("pretrained") and split_choice(config["pretrained"])[0].is_file():
        read.append(split_choice(config["pretrained"])[0])
    roots = [root] if root is not None else []
    cards = [data.card] if data is not None else []
    cards += [load_card(config["zero_shot_card"])] if config.get("zero_shot_card") else []
    for card in cards:
        own, around = card_places(card, root)
        read, roots = [*read, *own], [*roots, *around]
    return read, roots


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns in words what differs between two records of `describe_inputs`; empty when nothing does.

    Raises:
        KeyError, TypeError, AttributeError: `before` is no such record.
    """
    said = []
    cards = [record.get("card", {}) for record in (before, now)]
    keys = [key for key in sorted({*cards[0], *cards[1]}) if cards[0].get(key) != cards[1].get(key)]
    if keys:
        said.append(f"the card ({', '.join(keys)})")
    said += _data_changes(before, now)
    if not said and before.get("split") != now.get("split"):
        said.append("the few-shot split, which is drawn otherwise from the same images")
    weights = [record.get("backbone", {"name": "none", "digest": "none"}) for record in (before, now)]
    if weights[0]["digest"] != weights[1]["digest"]:
        shown = " -> ".join(f"{w['name']} {w['digest'][:12]}" for w in weights)
        said.append(f"the weights of the backbone ({shown})")
    others = [record.get("others", {}) for record in (before, now)]
    said += [name for name in sorted({*others[0], *others[1]}) if others[0].get(name) != others[1].get(name)]
    if not said and before != now:
        said.append("the record of what it was made from")
    return said


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before.get("classes", {}), now.get("classes", {})
    name_of = {name: name for name in old if name in new}
    come = [name for name in new if name not in old]
    for name in old:
        known = [other for other in come if other not in name_of.values()]
        same = [other for other in known if {*old[name]["marks"]} & {*new[other]["marks"]}]
        if name not in name_of and same:
            name_of[name] = same[0]
    renamed = [f"{name} -> {other}" for name, other in name_of.items() if name != other]
    added = sum(max(0, new[other]["images"] - old[name]["images"]) for name, other in name_of.items())
    lost = sum(max(0, old[name]["images"] - new[other]["images"]) for name, other in name_of.items())
    added += sum(new[name]["images"] for name in come if name not in name_of.values())
    lost += sum(old[name]["images"] for name in old if name not in name_of)
    said = [
        *_listed("class", "renamed", renamed),
        *_listed("class", "removed", [name for name in old if name not in name_of]),
        *_listed("class", "added", [name for name in come if name not in name_of.values()]),
        *([f"{added} images were added"] if added else []),
        *([f"{lost} images were removed"] if lost else []),
    ]
    if not said and list(old) != list(new):
        said.append("the order of the classes")
    parts = [record.get("parts", {}) for record in (before, now)]
    other = [name for name in sorted({*parts[0], *parts[1]}) if parts[0].get(name) != parts[1].get(name)]
    if not said and other:
        said.append(f"what is in the images, names, labels, groups or captions of {' and '.join(other)}")
    return said


def _listed(what: str, how: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f", … ({len(names)} in all)" if len(names) > _MAX_NAMED else ""
    count = f"1 {what} was" if len(names) == 1 else f"{len(names)} {what}es were"
    return [f"{count} {how}: {', '.join(names[:_MAX_NAMED])}{more}"]


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


def check_start(path: Path, *, resume: bool, overwrite: bool, can_resume: bool = True) -> None:
    """Refuses a folder of which the marker alone says that no run can start there; changes nothing.

    Recipes are asked before they read a card or a model, so that nobody waits to be refused.

    Args:
        path: the run folder.
        resume: an earlier run is to be gone on with.
        overwrite: an earlier run is to be replaced.
        can_resume: whether the recipe has anything to go on with.

    Raises:
        TrainingError: it is no run folder, holds a run that is neither to be gone on with nor replaced, or one that is
            to be gone on with and that another version began.
    """
    check_kind(path)
    if not path.exists() or _is_empty(path) or overwrite:
        return
    if not resume:
        ways = "Go on with it (--resume), replace it" if can_resume else "Replace it"
        raise TrainingError(f"{path} holds an earlier run. {ways} (--overwrite) or choose another --out.")
    began = _read_marker(path / MARKER)["adaptclip"]
    if began != __version__:
        raise TrainingError(
            f"{path} was begun with adaptclip {began}, and this is {__version__}: a run is finished with the version "
            f"that began it. Install that one to go on (pip install adaptclip=={began}), or start again with this one: "
            "choose another --out, or replace the run (--overwrite)."
        )


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
    # A recipe without a loop has nothing to go on with, and no such flag.
    can_resume = "resume" in record["config"] or "overwrite" not in record["config"]
    check_start(path, resume=resume, overwrite=overwrite, can_resume=can_resume)
    refuse_strangers(path, "run", parts=resume)  # a run that is gone on with replaces its artifact, and no more
    if overwrite:
        return
    earlier = _read_marker(path / MARKER)
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
