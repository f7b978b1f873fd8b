# SPDX-License-Identifier: Apache-2.0
"""Folders that may be a stranger's: no file is followed out of them, and what they say of themselves has a digest.

    sealed JSON    an object whose key "digest" is the SHA-256 of everything else in it: a changed letter is seen
    files          name -> {"bytes", "sha256"} of the files beside it; `sha256sum` prints the same

A digest finds damage: what was cut, swapped, or changed by accident. It does not find forgery: whoever changes a file
on purpose can write its digest anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from adaptclip.errors import StorageError
from adaptclip.files import jsonable, read_json, write_json

SEAL = "digest"
"""Key of a sealed object under which its digest stands."""

REPORT_FILE = "report.json"
"""What ties the files of a run folder together: under "files" it has their digests, and it is sealed."""

CHECK_FILE = "check.json"
"""What stands beside a model that other libraries load: under "files" it has the digests of all other files."""

MOST_JSON_BYTES = 64 * 2**20
"""Largest JSON of a stranger's folder that is read; a manifest with 100,000 class names has about 10 MB."""

MOST_FILE_BYTES = 2**40
"""Largest file that is compared with its digest, where the caller knows no smaller bound."""


def own_file(folder: Path, name: str, *, most_bytes: int = MOST_FILE_BYTES) -> Path:
    """Returns the path of a file of a folder, having made sure that it is one and lies in it.

    A link may lead to another place in the folder, or from a snapshot of the hub's cache to the blobs beside it.

    Args:
        folder: whose files may be a stranger's. It may itself be a link: that one is the caller's.
        name: relative to the folder, with "/" between parts.
        most_bytes: the largest that is read.

    Raises:
        StorageError: the name leaves the folder, or the file does by a link, is missing, is no ordinary file (a folder,
            a device, or a pipe, which would wait for ever), or is too large.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name != "/".join(parts) or "\\" in name or "\0" in name:
        raise StorageError(f"{folder} names the file {name!r}, which is not one in this folder")
    file = folder / name
    try:
        if not stays_inside(folder, file):
            raise StorageError(f"{file} is a link that leaves the folder; put the file itself there")
        found = file.stat()
    except FileNotFoundError as error:
        raise StorageError(f"{file} is missing or changed: there is no such file") from error
    except (OSError, RuntimeError) as error:  # no permission; links that lead to each other
        raise StorageError(f"cannot read {file}: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        raise StorageError(f"{file} is {kind}, not a file")
    if found.st_size > most_bytes:
        raise StorageError(f"{file} has {found.st_size:,} bytes, more than {most_bytes:,}, and is not read")
    return file


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether a path below a folder still lies in it after every link, or in the hub's cache beside a snapshot."""
    target, own = path.resolve(), folder.resolve()
    if target.is_relative_to(own):
        return True
    snapshots = next((parent for parent in own.parents if parent.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.parent / "blobs"


def check_entries(folder: Path) -> None:
    """Raises StorageError when an entry of a folder, read or not, is one that `own_file` refuses; real folders are not.

    For folders that other libraries read by names of their own, which cannot be asked to look first.
    """
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not entry.is_dir():
            own_file(folder, entry.name)


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the object as it is read back from JSON, with its digest."""
    whole = jsonable({key: inner for key, inner in value.items() if key != SEAL})
    return {**whole, SEAL: _digest_of(whole)}


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON with its digest, atomically."""
    write_json(path, seal(value))


def check_seal(value: Any, where: str) -> bool:
    """Whether an object carries a digest of itself; what earlier versions wrote does not.

    Raises:
        StorageError: it has one, and it is another object's.
    """
    if not isinstance(value, Mapping) or SEAL not in value:
        return False
    if value[SEAL] != _digest_of({key: inner for key, inner in value.items() if key != SEAL}):
        raise StorageError(f"{where} was changed after it was written: its content does not have the digest in it")
    return True


def read_sealed(folder: Path, name: str, *, most_bytes: int = MOST_JSON_BYTES) -> tuple[Any, bool]:
    """Reads JSON of a folder, and whether it carries a digest of itself.

    Raises:
        StorageError: see `own_file` and `check_seal`, or it is not JSON.
    """
    value = read_json(own_file(folder, name, most_bytes=most_bytes))
    return value, check_seal(value, f"{folder / name}")


def _digest_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path, start: bytes = b"") -> str:
    """Returns the SHA-256 of `start` and the bytes of a file, of which a small part is in memory at a time."""
    sha = hashlib.sha256(start)
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Returns name -> {"bytes", "sha256"} of files of a folder; None is all of them, those of its folders included."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def check_file(folder: Path, name: str, info: Any, *, most_bytes: int = MOST_FILE_BYTES) -> Path:
    """Compares a file with what `describe_files` said of it, its size before its content, and returns its path.

    Raises:
        StorageError: see `own_file`, or the file was cut or changed.
    """
    if not isinstance(info, Mapping) or not isinstance(info.get("bytes"), int) or "sha256" not in info:
        raise StorageError(f"{folder} should tell bytes and sha256 of {name}, got {info!r:.80}")
    file = own_file(folder, name, most_bytes=most_bytes)
    size = file.stat().st_size
    if size != info["bytes"]:
        raise StorageError(f"{file} is missing or changed: it has {size:,} bytes and had {info['bytes']:,}")
    try:
        found = sha256_of(file)
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error}") from error
    if found != info["sha256"]:
        raise StorageError(f"{file} is missing or changed: its content has another digest than when it was written")
    return file


def check_bundle(folder: Path) -> None:
    """Compares a folder with its check.json, where it has one with digests; its README may have been edited.

    Raises:
        StorageError: a file is missing, was changed, or is a link that leaves the folder, whether it is told of or not.
    """
    check_entries(folder)
    if not os.path.lexists(folder / CHECK_FILE):
        return
    info, _ = read_sealed(folder, CHECK_FILE)
    files = info.get("files") if isinstance(info, Mapping) else None
    for name, expected in files.items() if isinstance(files, Mapping) else ():
        if name != "README.md":
            check_file(folder, name, expected)


def check_run(run: Path, names: Iterable[str]) -> None:
    """Compares files of a run folder, which are about to be read, with the digests that its report.json keeps of them.

    Args:
        run: the folder. That of an early version keeps none, which is said.
        names: of files that will be read if they are there.

    Raises:
        StorageError: a file was cut, changed, swapped or taken away since, or is none of the run's.
    """
    report = read_report(run)
    files = report.get("files")
    if not report and os.path.lexists(run / "run.json"):
        raise StorageError(
            f"{run} has no {REPORT_FILE}, which every finished run has, and with it nothing that tells whether its "
            "files are as they were written. Finish the run (its recipe with --resume, or with --overwrite where it "
            "has no --resume), or take a fresh copy."
        )
    if files is None:
        warnings.warn(
            f"{run} keeps no digests of its files, as runs of early versions do not: whether they are as they were "
            "written cannot be checked",
            stacklevel=2,
        )
    elif SEAL not in report or not isinstance(files, Mapping):
        raise StorageError(f"{run / REPORT_FILE} was changed after it was written: it has no digest of itself")
    for name in names:
        if files is not None and name in files:
            try:
                check_file(run, name, files[name])
            except StorageError as error:
                raise StorageError(
                    f"{error}. Finish the run again (its recipe with --resume, or with --overwrite where it has no "
                    "--resume), or take a fresh copy."
                ) from error
        elif os.path.lexists(run / name):
            own_file(run, name)
            if files is not None:
                raise StorageError(f"{run / name} is none of the files that this run wrote; take it away")


def run_file(run: Path, name: str) -> Path | None:
    """Returns a file of a run folder, compared with what the run wrote; None where it has none.

    Raises:
        StorageError: it, or the artifact that was judged with it, was changed, swapped or taken away since.
    """
    # With a file of the run comes the question whose it is: the artifact beside it must be the one that was judged.
    artifact = ("artifact/manifest.json",) if (run / "artifact").exists() else ()
    check_run(run, (name, *artifact))
    return run / name if (run / name).exists() else None


def read_report(run: Path) -> Mapping[str, Any]:
    """Returns the report.json of a run folder; {} where it has none. Raises StorageError when it was changed."""
    if not os.path.lexists(run / REPORT_FILE):
        return {}
    report, _ = read_sealed(run, REPORT_FILE)
    if not isinstance(report, Mapping):
        raise StorageError(f"{run / REPORT_FILE} should be an object, got {type(report).__name__}")
    return report
