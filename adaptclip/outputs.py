# SPDX-License-Identifier: Apache-2.0
"""What an output may replace, and folders written whole or not at all.

The rules, which every command, recipe and saving function shares:

- A folder is replaced only when it carries adaptclip's own marker of the same kind (`KINDS`), holds nothing but what
  adaptclip wrote there (`strangers`), and overwriting was asked for. A new path and an empty folder need no such word.
- Nothing is written through a link, and no folder in the place of a file or a file in the place of a folder.
- An output never is, holds or lies in what is read to make it; a cache may lie in it behind a hidden folder.
- Nothing is put into an artifact, index, export or saved model afterwards, and into a run only what is its own: its
  parts, and under the names of its files what judges it. Else it could not be replaced as a whole later.
- All of this is checked before anything is moved, and again before the one rename that replaces.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from adaptclip.errors import StorageError, agree
from adaptclip.files import check_plain, read_json, read_yaml

LEDGER = "judgements.jsonl"
"""The one file of a run folder that overwriting keeps: how often its test images were judged (`gates.verdicts`)."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder that adaptclip writes.

    Attributes:
        words: for messages, with article.
        marker: the file by which it is known.
        keys: what that file says at least.
        early: patterns of names that a killed process may leave without a marker, where files are written one by one.
        listing: the file whose "files" has the names of what was written.
        files: patterns of what may lie in it besides, as paths below it.
        parts: name of a folder in it -> the kind of that folder.
        judged: names of the files that may be put into it later, by what judges it.
        closed: nothing is put into it later but its parts and those files.
    """

    words: str
    marker: str
    keys: frozenset[str]
    early: tuple[str, ...] = ()
    listing: str = ""
    files: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    judged: tuple[str, ...] = ()
    closed: bool = True

    def made(self, folder: Path) -> bool:
        """Whether `folder` carries this kind's marker, as a file of its own."""
        file = folder / self.marker
        try:
            if file.is_symlink() or not file.is_file():
                return False
            content = read_yaml(file) if file.suffix == ".yaml" else read_json(file)
        except (OSError, StorageError):
            return False
        return isinstance(content, dict) and self.keys <= set(content)


_ARTIFACT = {"format_version", "method", "class_names", "verdicts"}
_INDEX = {"format_version", "transform", "count"}
_EXPORT = {"features", "cosines", "probabilities", "tolerance"}
_BENCH = {"cards", "protocol", "methods", "shots"}
_RUN = {"adaptclip", "num_processes", "config"}
_JUDGED = ("report.md", "report.html", "probe.json", "gates.xml", "compare.json", "compare.md")
_OF_A_RUN = (
    *("run.json", "run.lock", "run.lock.json", "config.yaml", "split.json", LEDGER, "metrics.jsonl", ".*.tmp"),
    *("*predictions.parquet", "gates.yaml", "report.json", *_JUDGED, "evaluation.json"),
    *("retrieval.json", "retrieval.md", "wise_ft.json", "wise_ft.md", "text_tower.safetensors"),
    *("checkpoints/step-*.safetensors", "checkpoints/.*.tmp", "adaptclip/*"),  # the last by trackers
)

KINDS = {
    "artifact": Kind(
        "an artifact", "manifest.json", frozenset(_ARTIFACT), listing="manifest.json",
        files=("manifest.json", "README.md"),
    ),
    "index": Kind(
        "an index", "manifest.json", frozenset(_INDEX), listing="manifest.json",
        files=("manifest.json", "vectors.safetensors", "names.json"),
    ),
    "export": Kind("an export", "check.json", frozenset(_EXPORT), listing="check.json", files=("check.json",)),
    "open_clip": Kind(
        "a saved model", "open_clip_config.json", frozenset({"adaptclip", "model_cfg"}), listing="check.json",
        files=("open_clip_config.json", "open_clip_model.safetensors", "check.json"),
    ),
    "bench": Kind(
        "a bench folder", "config.yaml", frozenset(_BENCH), early=(".*.tmp", "jobs"), files=("*",), closed=False,
    ),
    "run": Kind(
        "a run folder", "run.json", frozenset(_RUN), files=_OF_A_RUN, judged=_JUDGED,
        parts={"artifact": "artifact", "model": "open_clip", "head": "run"},
    ),
}  # fmt: skip
"""Name -> a kind of folder, how it is known, what adaptclip writes there; a bench that goes on removes nothing."""

_DEBRIS = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", "*.pyc", ".nfs*")
"""Patterns of names of what systems and Python leave in any folder, which is nobody's work."""

_NAMED = 5


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
    check_apart(path, inputs, roots, kind=kind)
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
    refuse_strangers(path, kind)
    return True


def runs_below(folder: Path) -> str:
    """Words which runs lie directly in a folder that is none itself, for a message; "" where there are none."""
    try:
        runs = sorted(path for path in folder.iterdir() if KINDS["run"].made(path))
    except OSError:
        return ""
    if not runs:
        return ""
    more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
    lie = agree(len(runs), "A run lies", f"{len(runs)} runs lie")
    return f" {lie} in it: {', '.join(map(str, runs[:_NAMED]))}{more}; name {agree(len(runs), 'it', 'those you mean')}."


def strangers(folder: Path, kind: str) -> list[str]:
    """Returns the files below a folder of a kind that adaptclip did not write there, as sorted paths below it.

    Known are what its listing names, and what always has its name. Links are not followed.

    Raises:
        OSError: a folder cannot be looked into.
    """
    known, found = KINDS[kind], []
    names = _listed(folder / known.listing) if known.listing else set()

    def stop(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=stop):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            path = (here / name).relative_to(folder).as_posix()
            ours = path in (*names, *known.parts) or any(fnmatch(path, pattern) for pattern in known.files)
            if not ours and not any(fnmatch(name, pattern) for pattern in _DEBRIS):
                found.append(path)
        parts = [name for name in folders if here == folder and name in known.parts and name not in links]
        folders[:] = [name for name in folders if name not in parts]
        for part in parts:
            found += [f"{part}/{path}" for path in strangers(folder / part, known.parts[part])]
    return sorted(found)


def _listed(listing: Path) -> set[str]:
    try:
        info = read_json(listing)
    except StorageError:
        return set()
    files = info.get("files") if isinstance(info, dict) else None
    return set(files) if isinstance(files, dict) else set()


def refuse_strangers(folder: Path, kind: str, parts: bool = False) -> None:
    """Raises StorageError where a folder that is to be replaced holds a file that adaptclip did not write there.

    Args:
        folder: of the kind.
        kind: a key of KINDS.
        parts: only its parts are to be replaced.
    """
    try:
        found = [path for path in strangers(folder, kind) if not parts or path.split("/")[0] in KINDS[kind].parts]
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error}") from error
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise StorageError(
            f"{folder} holds what adaptclip did not write there and is not replaced: {', '.join(found[:_NAMED])}{more}."
            " Move it elsewhere, or choose another folder."
        )


def check_file(
    path: Path, inputs: Iterable[Path] = (), *, judges_runs: bool = False, images: Iterable[Path] = ()
) -> None:
    """Refuses a file that may not be written: a link, a folder, a device, one of `inputs`, or in a folder of ours.

    Args:
        path: the output.
        inputs: what is read.
        judges_runs: it may lie in a run folder, under the name of one of the run's files.
        images: folders of images that are read, where a new file could be taken for a table of theirs.

    Raises:
        StorageError: the message says which rule.
    """
    check_plain(path)
    for given in inputs:
        if _identity(path) is not None and _identity(path) == _identity(given):
            raise StorageError(f"{path} is itself what is read; choose another name for the output")
    try:
        above = {_identity(folder) for folder in path.absolute().resolve().parents}
    except (OSError, RuntimeError, ValueError) as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    for given in images:
        if Path(given).is_dir() and _identity(given) in above:
            raise StorageError(f"{path} lies among the images that are read ({given}); choose a place outside it")
    _check_open(path, judges_runs=judges_runs)


def _check_open(path: Path, *, kind: str = "", judges_runs: bool = False) -> None:
    """Raises StorageError where an output would lie in a folder of ours that it is no part of.

    Args:
        path: the output.
        kind: of the output, if it is a folder of ours.
        judges_runs: see `check_file`.
    """
    try:
        real = path.absolute().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    for folder in reversed(real.parents):  # what is proposed lies beside the outermost
        for name, known in KINDS.items():
            if not known.closed or not known.made(folder):
                continue
            if _is_part(real.relative_to(folder), name, kind, judges_runs=judges_runs):
                continue
            beside = folder.with_name(f"{folder.name}-{real.name}")
            raise StorageError(
                f"{path} would lie in {known.words} ({folder}); choose a place outside it, like {beside}"
            )


def _is_part(below: Path, of: str, kind: str, *, judges_runs: bool) -> bool:
    """Whether an output is a part of a folder of a kind, or one of the files that are put into it later."""
    first, *rest = below.parts
    part = KINDS[of].parts.get(first)
    if rest:
        return part is not None and _is_part(Path(*rest), part, kind, judges_runs=judges_runs)
    return part == kind if kind else judges_runs and first in KINDS[of].judged


def check_cache(cache: Path | None, inputs: Iterable[Path] = (), roots: Iterable[Path] = ()) -> None:
    """Refuses a cache that is, holds or lies in an input, so that what is read now is what is read next time.

    It may lie in one behind a hidden folder, as `.cache/features` does where one works among one's images: no list of
    images goes there. It may be a link, to a disk with more room.

    Args:
        cache: the folder; None keeps nothing.
        inputs: files and folders that are read.
        roots: folders that it may lie in, but neither be nor hold.

    Raises:
        StorageError: the message says which rule.
    """
    if cache is None:
        return
    try:
        check_apart(cache.resolve(), inputs, roots, hidden=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise StorageError(f"cannot write the cache {cache}: {error}") from error
    except StorageError as error:
        raise StorageError(f"the cache cannot be there: {error} (--cache)") from error


def check_apart(
    path: Path, inputs: Iterable[Path] = (), roots: Iterable[Path] = (), *, hidden: bool = False, kind: str = ""
) -> None:
    """Refuses a folder that is a link, or is, holds or lies in an input, or lies in a folder of ours.

    Args:
        path: the output.
        inputs: see `check_folder`.
        roots: see `check_folder`.
        hidden: it may lie in an input where a folder between them is hidden.
        kind: a key of KINDS, for a folder that may be a part of another.

    Raises:
        StorageError: the message says which rule.
    """
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
                if not may_lie_in and _identity(read) in above and not (hidden and _is_hidden(real, read)):
                    raise StorageError(f"{path} lies in what is read ({given}); choose a folder outside it")
    except (OSError, RuntimeError, ValueError) as error:  # may not be looked into, links in a circle, NUL in the name
        raise StorageError(f"cannot write {path}: {error}") from error
    _check_open(path, kind=kind)


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether a folder between `folder` and `path`, or `path` itself, is hidden."""
    between = [path, *path.parents]
    ends = next((i for i, place in enumerate(between) if _identity(place) == _identity(folder)), 0)
    return any(place.name.startswith(".") for place in between[:ends])


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
