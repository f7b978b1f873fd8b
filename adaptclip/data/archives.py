# SPDX-License-Identifier: Apache-2.0
"""ZIP and TAR archives as folders, read where they lie: nothing is unpacked, and no name in one can lead out of it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from adaptclip.data.fingerprints import cache_root, file_stamp
from adaptclip.data.trees import TreePath, as_path
from adaptclip.errors import DataError, ResourceError, shown

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Endings (lower case) of what is looked into as a folder."""

MAX_MEMBERS = 5_000_000
MAX_MEMBER = 2**30
"""Most bytes of a file in an archive."""

MAX_RATIO, FREE_RATIO = 200, 64 * 2**20
"""Largest ratio of a file to its packed bytes, where it is larger than FREE_RATIO bytes."""


@dataclass(eq=False)
class Archive:
    """An archive whose list of files was read.

    Attributes:
        label: its path.
        file: what is read; beside a compressed TAR, its plain copy in the cache.
        members: name -> (offset, packed bytes, bytes, method, checksum); a method of 0 is not packed.
        passed_over: reason -> number of entries that are left out.
    """

    label: str
    file: Path
    members: dict[str, tuple[int, int, int, int, int | None]]
    passed_over: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        status = self.file.stat()
        self._version = (status.st_mtime_ns, status.st_ctime_ns)
        self._sizes = {name: member[2] for name, member in self.members.items()}

    def sizes(self) -> Mapping[str, int]:
        """Name -> bytes."""
        return self._sizes

    def version(self, name: str) -> tuple[int, int]:
        """The times of change of the archive."""
        return self._version

    def read(self, name: str) -> bytes:
        """Returns a file; each call opens the archive, so that threads and processes do not disturb each other."""
        offset, packed, size, method, checksum = self.members[name]
        if size > MAX_MEMBER or (size > FREE_RATIO and size > MAX_RATIO * max(packed, 1)):
            raise DataError(f"it unpacks from {packed:,} to {size:,} bytes, more than is allowed; unpack it by hand")
        try:
            with self.file.open("rb") as file:
                file.seek(offset)
                data = file.read(packed)
        except OSError as error:
            raise ResourceError(f"cannot read {shown(self.label)}: {error.strerror or error}") from error
        try:
            content = data if method == 0 else zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise DataError(f"its packed bytes are damaged ({error}); fetch the archive again") from error
        if len(content) != size or (checksum is not None and zlib.crc32(content) != checksum):
            raise DataError("its bytes are not those that the archive lists: it is damaged; fetch the archive again")
        return content

    def words(self) -> tuple[str, ...]:
        """Sentences about what was left out."""
        return tuple(f"{shown(self.label)}: {number} left out, {why}" for why, number in self.passed_over.items())


def is_archive(path: Path) -> bool:
    """Whether a path is that of an archive, by its ending."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def open_archive(path: Path, *, label: str = "") -> Archive:
    """Reads an archive's list of files; the same one is read once.

    Args:
        path: the file.
        label: what it is called; by default its path.

    Raises:
        DataError: it is damaged, encrypted as a whole, of an unknown kind, or holds too many files.
    """
    return _listed(path.resolve(), file_stamp(path), label or str(path.resolve()))


@lru_cache(maxsize=1024)
def _listed(path: Path, stamp: str, label: str) -> Archive:
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise DataError(f"cannot read {shown(label)}: {error.strerror or error}") from error
    read = next((read for fits, read in _KINDS if fits(start)), None)
    if read is None:
        raise DataError(f"{shown(label)} is no ZIP or TAR archive (it starts with {start[:8]!r})")
    try:
        return read(path, stamp, label)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"the archive {shown(label)} is damaged or cut off ({error}); fetch it again") from error


def _safe(name: str) -> str | None:
    """Returns a name that stays in the archive, as it can be looked up; None for any other."""
    name = name.replace("\\", "/")
    parts = PurePosixPath(name).parts
    if "\0" in name or name.startswith("/") or PureWindowsPath(name).drive or ".." in parts or not parts:
        return None
    return "/".join(parts)


_UNSAFE, _LINK = "names that lead out of the archive", "links and devices"


def _zip(path: Path, stamp: str, label: str) -> Archive:
    members: dict[str, tuple[int, int, int, int, int | None]] = {}
    passed: Counter[str] = Counter()
    with zipfile.ZipFile(path) as file, path.open("rb") as raw:
        for info in file.infolist():
            name = _safe(info.filename)
            if info.is_dir():
                continue
            if name is None:
                passed[_UNSAFE] += 1
            elif stat.S_ISLNK(info.external_attr >> 16):
                passed[_LINK] += 1
            elif info.flag_bits & 1:
                passed["encrypted: unpack them with their password"] += 1
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                passed["packed by a method that is not read: pack them by Deflate"] += 1
            else:
                raw.seek(info.header_offset)
                head = raw.read(30)
                if len(head) < 30 or head[:4] != b"PK\3\4":
                    raise zipfile.BadZipFile(f"no entry where {info.filename!r} should be")
                offset = info.header_offset + 30 + int.from_bytes(head[26:28], "little")
                offset += int.from_bytes(head[28:30], "little")
                method = 0 if info.compress_type == zipfile.ZIP_STORED else 8
                passed["written twice: the last one counts"] += name in members
                members[name] = (offset, info.compress_size, info.file_size, method, info.CRC)
            _check_number(len(members), label)
    return Archive(label, path, members, +passed)


def _tar(path: Path, stamp: str, label: str) -> Archive:
    members: dict[str, tuple[int, int, int, int, int | None]] = {}
    passed: Counter[str] = Counter()
    with tarfile.open(path, "r:") as file:
        for info in file:
            file.members = []  # pyright: ignore[reportAttributeAccessIssue] - or it would keep all
            name = _safe(info.name)
            if info.isdir():
                continue
            if name is None:
                passed[_UNSAFE] += 1
            elif not info.isreg() or info.issparse():
                passed[_LINK] += 1
            else:
                passed["written twice: the last one counts"] += name in members
                members[name] = (info.offset_data, info.size, info.size, 0, None)
            _check_number(len(members), label)
    return Archive(label, path, members, +passed)


def _packed_tar(opened: Callable[..., Any]) -> Callable[[Path, str, str], Archive]:
    """Reads a compressed TAR by way of a plain copy in the cache, as no file in it can be found without all before."""

    def read(path: Path, stamp: str, label: str) -> Archive:
        plain = cache_root() / "archives" / f"{stamp}.tar"
        if not plain.is_file():
            plain.parent.mkdir(parents=True, exist_ok=True)
            most = min(MAX_RATIO * path.stat().st_size + FREE_RATIO, shutil.disk_usage(plain.parent).free // 2)
            part = plain.with_suffix(".part")
            try:
                with opened(path, "rb") as packed, part.open("wb") as out:
                    while block := packed.read(2**20):
                        if out.tell() + len(block) > most:
                            raise DataError(f"the archive {shown(label)} unpacks to more than {most:,} bytes")
                        out.write(block)
                part.replace(plain)
            finally:
                part.unlink(missing_ok=True)
        return _tar(plain, stamp, label)

    return read


_KINDS: tuple[tuple[Callable[[bytes], bool], Callable[[Path, str, str], Archive]], ...] = (
    (lambda b: b.startswith((b"PK\3\4", b"PK\5\6")), _zip),
    (lambda b: b[257:262] == b"ustar", _tar),
    (lambda b: b.startswith(b"\x1f\x8b"), _packed_tar(gzip.open)),
    (lambda b: b.startswith(b"BZh"), _packed_tar(bz2.open)),
    (lambda b: b.startswith(b"\xfd7zXZ\0"), _packed_tar(lzma.open)),
)
"""How the first bytes of an archive look, and what reads it."""


def _check_number(number: int, label: str) -> None:
    if number > MAX_MEMBERS:
        raise DataError(f"the archive {shown(label)} holds more than {MAX_MEMBERS:,} files")


def in_archive(folder: Path, name: str) -> Path | None:
    """Returns the path of `name` where a part of it is an archive below `folder`; None where none is.

    It answers as a `Path` does, see `TreePath`.

    Raises:
        DataError: the archive cannot be read, or the name leads out of it.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    for number, part in enumerate(parts):
        path = folder.joinpath(*parts[: number + 1])
        if part.lower().endswith(ARCHIVE_SUFFIXES) and path.is_file():
            rest = parts[number + 1 :]
            if ".." in rest:
                raise DataError(f"the path {name!r} leads out of the archive")
            return as_path(TreePath(open_archive(path), "/".join(rest)))
    return None
