# SPDX-License-Identifier: Apache-2.0
"""Files at addresses (https, s3, gs) by fsspec, copied into a cache folder once and looked up again at each start."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from adaptclip.data.archives import ARCHIVE_SUFFIXES, open_archive
from adaptclip.data.fingerprints import cache_root
from adaptclip.data.read_values import needs
from adaptclip.data.trees import TreePath, as_path
from adaptclip.errors import DataError, ResourceError, did_you_mean, shown
from adaptclip.files import digest, read_json, write_json
from adaptclip.hub import is_offline

EXTRAS = {"https": ("fsspec", "remote"), "http": ("fsspec", "remote"), "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""Beginning of an address that is read -> what reads it, and the extra that installs it. `file://` is none of them, as
it would lead out of a table's folder."""

MAX_BYTES = 20 * 2**30
"""Most bytes of a file that is copied."""

CONNECT_S, SILENCE_S = 10, 60
"""Longest waits for a web server, in seconds."""

_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")


def is_address(name: str) -> bool:
    """Whether a name is an address rather than a path."""
    return _ADDRESS.match(name) is not None


def plain_address(url: str) -> str:
    """Returns an address as it can be printed: without a password and what follows a question mark."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def at_address(url: str) -> Path:
    """Returns the file or folder at an address, which answers as a `Path` does (`TreePath`); an archive as a folder.

    Raises:
        DataError: the kind of address is not read, or there is nothing at it.
        ResourceError: a package is missing, or the network cannot be used now.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in EXTRAS:
        raise DataError(
            f"addresses of {scheme}:// are not read: {shown(plain_address(url))}. {did_you_mean(scheme, EXTRAS)}"
        )
    if urlsplit(url).path.lower().endswith(ARCHIVE_SUFFIXES):
        return as_path(TreePath(open_archive(local_copy(url), label=plain_address(url))))
    if urlsplit(url).path.endswith("/"):
        return as_path(TreePath(_folder_at(url.rstrip("/"))))
    folder, _, name = url.partition("?")[0].rpartition("/")
    return as_path(TreePath(_File(plain_address(folder), url, name), name))


@dataclass(eq=False)
class _File:
    """One file at an address."""

    label: str
    url: str
    name: str

    def sizes(self) -> Mapping[str, int]:
        """Its name; how large it is, is known when it is copied."""
        return {self.name: 0}

    def version(self, name: str) -> tuple[int, int]:
        """Numbers that change with its length or the server's tag."""
        return _numbers(self.url)

    def read(self, name: str) -> bytes:
        """Returns its bytes, from the copy."""
        return local_copy(self.url).read_bytes()


@dataclass(eq=False)
class _Folder:
    """A folder at an address whose server lists it."""

    label: str
    url: str
    found: dict[str, int]

    def sizes(self) -> Mapping[str, int]:
        """Name -> bytes."""
        return self.found

    def version(self, name: str) -> tuple[int, int]:
        """Numbers that change with a file's length or the server's tag."""
        return _numbers(f"{self.url}/{name}")

    def read(self, name: str) -> bytes:
        """Returns a file's bytes, from its copy."""
        return local_copy(f"{self.url}/{name}").read_bytes()


@lru_cache(maxsize=64)
def _folder_at(url: str) -> _Folder:
    if url.startswith("http"):
        raise DataError(
            f"{shown(plain_address(url))}: a web server does not list its files; name an archive, or a table"
        )
    found = _asked(url, lambda system, path: system.find(path, detail=True))
    start = _asked(url, lambda system, path: path).rstrip("/") + "/"
    names = {name.removeprefix(start): int(about.get("size") or 0) for name, about in found.items()}
    safe = {name: size for name, size in names.items() if ".." not in name.split("/") and not name.startswith("/")}
    return _Folder(plain_address(url), url, safe)


def _numbers(url: str) -> tuple[int, int]:
    try:
        about = _about(url)
    except DataError:  # reading it says why
        return 0, 0
    return int(digest(str(about.get("size")), str(about.get("tag")))[:15], 16), 0


def _asked(url: str, ask: Any) -> Any:
    """Asks fsspec, and words what its file systems raise."""
    scheme = url.partition("://")[0].lower()
    try:
        import fsspec

        return ask(*fsspec.core.url_to_fs(url, **_patience(scheme)))
    except ImportError as error:
        raise ResourceError(needs(*EXTRAS[scheme], f"an address of {scheme}://")) from error
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec says so too of a server that does not answer
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in range(400, 500):
            raise DataError(f"there is nothing at {shown(plain_address(url))}") from error
        raise ResourceError(f"{shown(plain_address(url))} cannot be reached now ({type(cause).__name__})") from error
    except PermissionError as error:
        raise DataError(
            f"{shown(plain_address(url))} may not be read with the credentials that are set here"
        ) from error
    except (DataError, ResourceError, MemoryError):
        raise
    except Exception as error:  # whatever the libraries of servers raise; their texts may hold the address
        raise ResourceError(f"{shown(plain_address(url))} cannot be reached now ({type(error).__name__})") from error


def _patience(scheme: str) -> dict[str, Any]:
    """How long a web server may be silent; a large file may take as long as it takes."""
    if not scheme.startswith("http"):
        return {}
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)}}


@lru_cache(maxsize=1_000_000)
def _about(url: str) -> Mapping[str, Any]:
    """Length and tag of a file by its server, asked once a run; offline, those of the copy."""
    known = _known(url)
    if is_offline():
        if known is None:
            raise ResourceError(
                f"{shown(plain_address(url))} is not on this machine, and HF_HUB_OFFLINE=1 forbids to fetch it: run "
                f"once with a network; copies are kept in {shown(cache_root() / 'remote')}"
            )
        return known
    info = _asked(url, lambda system, path: system.info(path))
    tag = next(
        (str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created") if info.get(key)), ""
    )
    return {"size": info.get("size"), "tag": tag}


def _place(url: str) -> Path:
    return cache_root() / "remote" / digest(url)[:32]


def _known(url: str) -> dict[str, Any] | None:
    """What was noted of a copy; None where there is no copy, or one of another length."""
    place = _place(url)
    try:
        about = read_json(place / "about.json")
        whole = (place / "content").stat().st_size == about["copied"]
    except Exception:  # damaged, or half written: it is fetched again
        return None
    return about if whole else None


def local_copy(url: str) -> Path:
    """Returns the copy of a file at an address, fetched where there is none or the server's is another by now.

    Raises:
        DataError: there is no such file, or it is too large.
        ResourceError: the network cannot be used now, or a package is missing.
    """
    about, known, place = _about(url), _known(url), _place(url)
    if known is not None and all(known.get(key) == about.get(key) for key in ("size", "tag")):
        return place / "content"
    size = about.get("size")
    if size is not None and size > MAX_BYTES:
        raise DataError(f"{shown(plain_address(url))} has {size:,} bytes, more than {MAX_BYTES:,}; copy it by hand")
    place.mkdir(parents=True, exist_ok=True)
    part = place / f"{secrets.token_hex(4)}.part"
    try:
        copied = _asked(url, lambda system, path: _copy(system, path, part, url))
        if size is not None and copied != size:
            raise ResourceError(
                f"{shown(plain_address(url))} was cut off after {copied:,} of {size:,} bytes; try again"
            )
        part.replace(place / "content")
        write_json(place / "about.json", {**about, "copied": copied})
    finally:
        part.unlink(missing_ok=True)
    return place / "content"


def _copy(system: Any, path: str, part: Path, url: str) -> int:
    copied = 0
    with system.open(path, "rb") as source, part.open("wb") as out:
        while block := source.read(2**20):
            copied += len(block)
            if copied > MAX_BYTES:
                raise DataError(f"{shown(plain_address(url))} has more than {MAX_BYTES:,} bytes; copy it by hand")
            out.write(block)
    return copied
