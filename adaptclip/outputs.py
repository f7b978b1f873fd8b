"""What an output may replace, and folders written whole or not at all.

The rules, which every command, recipe and saving function shares:

- A folder is replaced only when it carries adaptclip's own marker of the same kind (`KINDS`) and overwriting was asked
  for. A new path and an empty folder need no such word.
- Nothing is written through a link, and no folder in the place of a file or a file in the place of a folder.
- An output never is, holds or lies in what is read to make it.
- All of this is checked before anything is moved, and again before the one rename that replaces.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from adaptclip.errors import StorageError
from adaptclip.storage import check_plain, read_json, read_yaml

LEDGER = "judgements.jsonl"
"""The one file of a run folder that overwriting keeps: how often its test images were judged (`gates.ledger`)."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder that adaptclip writes.

    Attributes:
        words: for messages, with article.
        marker: the file by which it is known.
        keys: what that file says at least.
        early: patterns of names that a killed process may leave without a marker, where files are written one by one.
    """

    words: str
    marker: str
    keys: frozenset[str]
    early: tuple[str, ...] = ()

    def made(self, folder: Path) -> bool:
        """Whether `folder` carries this kind's marker, as a file of its own."""
        file = folder / self.marker
        if file.is_symlink() or not file.is_file():
            return False
        try:
            content = read_yaml(file) if file.suffix == ".yaml" else read_json(file)
        except StorageError:
            return False
        return isinstance(content, dict) and self.keys <= set(content)


_ARTIFACT = {"format_version", "method", "class_names", "verdicts"}
_INDEX = {"format_version", "transform", "count"}
_EXPORT = {"features", "cosines", "probabilities", "tolerance"}
_BENCH = {"cards", "protocol", "methods", "shots"}

KINDS = {
    "artifact": Kind("an artifact", "manifest.json", frozenset(_ARTIFACT)),
    "index": Kind("an index", "manifest.json", frozenset(_INDEX)),
    "export": Kind("an export", "check.json", frozenset(_EXPORT)),
    "open_clip": Kind("a saved model", "open_clip_config.json", frozenset({"adaptclip", "model_cfg"})),
    "bench": Kind("a bench folder", "config.yaml", frozenset(_BENCH), early=(".*.tmp", "jobs")),
}
"""Name -> a kind of folder, and what says that adaptclip wrote it; a run folder is known by `training.run_folder`."""


def check_folder(
    path: Path, kind: str, *, overwrite: bool = False, inputs: Iterable[Path] = (), roots: Iterable[Path] = ()
) -> bool:
    """Refuses a folder that may not be written, before anything is read, computed or moved.

    Args:
        path: the output.
        kind: a key of KINDS.
        overwrite: an earlier folder of this kind may be replaced.
        inputs: files and folders that are read: the output may neither be, hold, nor lie in them.
        roots: folders that the output may lie in, but neither be nor hold.

    Returns:
        Whether an earlier folder of this kind is there.

    Raises:
        StorageError: see the head of this module; the message says which rule.
    """
    check_apart(path, inputs, roots)
    known = KINDS[kind]
    try:
        if not path.exists():
            above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
            if not above.is_dir():
                raise StorageError(f"cannot write {path}: {above} is no folder")
            return False
        if not path.is_dir():
            raise StorageError(f"{path} is a file, and {known.words} is a folder; choose another one")
        left = [p for p in path.iterdir() if not any(fnmatch(p.name, pattern) for pattern in known.early)]
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    if not left:
        return False
    if not known.made(path):
        raise StorageError(
            f"{path} exists already, holds files and is not {known.words} of adaptclip (its {known.marker} is missing "
            "or something else's): it is never replaced. Choose another folder, or remove it yourself."
        )
    if not overwrite:
        raise StorageError(f"{path} exists already; choose another folder, or overwrite it on purpose")
    return True


def check_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuses a file that may not be written: a link, a folder, a device, or one of `inputs`. Raises StorageError."""
    check_plain(path)
    for given in inputs:
        if _identity(path) is not None and _identity(path) == _identity(given):
            raise StorageError(f"{path} is itself what is read; choose another name for the output")


def check_apart(path: Path, inputs: Iterable[Path] = (), roots: Iterable[Path] = ()) -> None:
    """Refuses a folder that is a link, or is, holds or lies in an input. Raises StorageError; see `check_folder`."""
    try:
        if path.is_symlink():
            raise StorageError(f"{path} is a link, and nothing is written through one; name the folder that is meant")
        real, own = path.absolute().resolve(), _identity(path)
        above = {_identity(folder) for folder in (real, *real.parents)}
        for may_lie_in, places in ((False, inputs), (True, roots)):
            for given in places:
                if _identity(given) is None:
                    continue  # nothing is there, as whoever reads it will say
                read = Path(given).absolute().resolve()
                if own is not None and own in {_identity(folder) for folder in (read, *read.parents)}:
                    what = "is" if own == _identity(read) else "holds"
                    raise StorageError(f"{path} {what} what is read ({given}); choose another folder, which is not")
                if not may_lie_in and _identity(read) in above:
                    raise StorageError(f"{path} lies in what is read ({given}); choose a folder outside it")
    except (OSError, RuntimeError, ValueError) as error:  # may not be looked into, links in a circle, NUL in the name
        raise StorageError(f"cannot write {path}: {error}") from error


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or folder from all others, whatever its spelling; None where there is none."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def atomic_folder(
    path: Path, kind: str, *, overwrite: bool = False, inputs: Iterable[Path] = (), roots: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` when the block ends without an error.

    A kill at any moment leaves the old folder or the new one whole. Between the two renames the old one lies beside
    its place as `.NAME.….old`, and is put back by the next call.

    Args:
        path: the output; see `check_folder` for it and the rest.
        kind: a key of KINDS.
        overwrite: an earlier folder of this kind may be replaced.
        inputs: what is read.
        roots: folders that the output may lie in.

    Raises:
        StorageError: `path` may not be replaced, or cannot be written.
    """
    places = {"inputs": list(inputs), "roots": list(roots)}
    _put_back(path, kind)
    check_folder(path, kind, overwrite=overwrite, **places)
    path = path.absolute() if path.name not in ("", "..") else path.resolve()
    # Not mkdtemp: the folder should have the permissions that the user's umask gives it.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    try:
        yield temporary
        check_folder(path, kind, overwrite=overwrite, **places)
        _swap(temporary, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Moves `new` to `path`; what is there is moved aside first, and removed when all is done."""
    if not path.exists():
        new.rename(path)
        return
    old = new.with_suffix(".old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(path: Path, kind: str) -> None:
    """Undoes the first rename of a process that was killed before the second."""
    if path.name in ("", "..") or os.path.lexists(path):
        return
    aside = [p for p in path.parent.glob(f".{glob.escape(path.name)}.*.old") if KINDS[kind].made(p)]
    if len(aside) == 1:
        with contextlib.suppress(OSError):
            aside[0].rename(path)
