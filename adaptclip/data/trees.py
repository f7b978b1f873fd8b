# SPDX-License-Identifier: Apache-2.0
"""Files that lie in something else than a folder of this machine (an archive, an address), and answer as paths do."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, Protocol, cast


class Tree(Protocol):
    """Files by their names in something; reading never changes it, and several threads and processes may read."""

    label: str
    """What it is called in messages."""

    def sizes(self) -> Mapping[str, int]:
        """Returns the name of each file, with `/` between folders -> its bytes."""
        ...

    def read(self, name: str) -> bytes:
        """Returns a file's bytes; raises DataError or ResourceError when it cannot be read."""
        ...

    def version(self, name: str) -> tuple[int, int]:
        """Returns two numbers that change with a file's bytes."""
        ...


class Folders:
    """The folders that the names of files make."""

    def __init__(self, names: Mapping[str, int]) -> None:
        self.below: dict[str, set[str]] = {"": set()}
        for name in names:
            while name:
                folder = name.rpartition("/")[0]
                known = folder in self.below
                self.below.setdefault(folder, set()).add(name)
                if known:
                    break
                name = folder


@dataclass(frozen=True)
class TreePath:
    """A file or folder of a tree; as far as images are looked for and read, it answers as `pathlib.Path` does.

    Attributes:
        tree: what it lies in.
        inner: its name there; "" for all of it.
    """

    tree: Any
    inner: str = ""

    def __str__(self) -> str:
        return f"{self.tree.label}/{self.inner}" if self.inner else self.tree.label

    def __truediv__(self, name: str | PurePath) -> TreePath:
        parts = PurePosixPath(str(name)).parts
        return TreePath(self.tree, "/".join([*([self.inner] if self.inner else []), *(p for p in parts if p != ".")]))

    def __lt__(self, other: object) -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(str(self)).name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the last part."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> TreePath:
        """The folder above."""
        return TreePath(self.tree, self.inner.rpartition("/")[0])

    @cached_property
    def _below(self) -> dict[str, set[str]]:
        if not hasattr(self.tree, "folders"):
            self.tree.folders = Folders(self.tree.sizes())
        return self.tree.folders.below

    def is_dir(self) -> bool:
        """Whether there are files below it."""
        return self.inner in self._below

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.inner in self.tree.sizes()

    def exists(self) -> bool:
        """Whether it is there."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Never: links are left out."""
        return False

    def resolve(self) -> TreePath:
        """Returns itself."""
        return self

    def iterdir(self) -> Iterator[TreePath]:
        """Yields what lies directly in the folder."""
        return (TreePath(self.tree, name) for name in sorted(self._below.get(self.inner, ())))

    def walk(self) -> Iterator[tuple[TreePath, list[str], list[str]]]:
        """Yields each folder with the names of its folders and files, as `os.walk` does."""
        inside = list(self.iterdir())
        folders = [path.name for path in inside if path.is_dir()]
        yield self, folders, [path.name for path in inside if not path.is_dir()]
        for name in folders:
            yield from (self / name).walk()

    def is_relative_to(self, other: object) -> bool:
        """Whether it lies below another path."""
        return str(self).startswith(f"{other}/") or str(self) == str(other)

    def relative_to(self, other: object) -> PurePosixPath:
        """Returns its name below another path."""
        if not self.is_relative_to(other):
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(str(self)[len(str(other)) :].lstrip("/") or ".")

    def stat(self) -> Any:
        """Returns size and version, as `Path.stat` does."""
        if self.is_dir():
            return SimpleNamespace(st_mode=stat.S_IFDIR | 0o755, st_size=0, st_mtime_ns=0, st_ctime_ns=0)
        if not self.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(self))
        first, second = self.tree.version(self.inner)
        size = self.tree.sizes()[self.inner]
        return SimpleNamespace(st_mode=stat.S_IFREG | 0o644, st_size=size, st_mtime_ns=first, st_ctime_ns=second)

    def read_bytes(self) -> bytes:
        """Returns the file's bytes."""
        if not self.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return self.tree.read(self.inner)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens the file for reading."""
        return io.BytesIO(self.read_bytes())


def as_path(path: TreePath) -> Path:
    """Returns the same object, for what asks for a `Path` and does with it what a `TreePath` can."""
    return cast("Path", path)
