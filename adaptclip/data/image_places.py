# SPDX-License-Identifier: Apache-2.0
"""Where the images are that a table names: as written, without an ending, in a folder below, in another spelling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from adaptclip.data.archives import in_archive
from adaptclip.data.card_block import normalise_text
from adaptclip.data.dataset import inside
from adaptclip.data.image_files import IMAGE_SUFFIXES, list_images
from adaptclip.data.remote import at_address, is_address
from adaptclip.errors import DataError, agree, shown
from adaptclip.words import plain


class ImagePlaces:
    """Finds the images that a table names, relative to the table's own folder.

    A name is taken as it is written. Where there is no such file, it may lack its ending or the folders before it, or
    be written in another Unicode form or case, as long as a single image fits.

    Args:
        table: the table's file.
    """

    def __init__(self, table: Path) -> None:
        self._table = table
        self._found: list[tuple[str, Path]] = []

    def path(self, name: Any, *, column: str, line: int) -> Path:
        """Returns the path of an image; one that is nowhere is returned as it is written.

        Raises:
            DataError: the cell holds no path, one that cannot be one below the table's folder, or one that several
                images fit.
        """
        where = f"{shown(self._table)}, line {line}: the column {column!r}"
        if isinstance(name, int) and not isinstance(name, bool):  # Parquet and JSONL hold numbers of images as such
            name = str(name)
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where} should hold a path, got {name!r}")
        name = name.strip()
        if is_address(name):
            try:
                return at_address(name)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        self._refuse_foreign(name, where)
        if (found := in_archive(self._folder, name)) is not None:
            inside(self._folder, name)
            return found
        if "\\" in name and not (self._folder / name).exists():
            name = name.replace("\\", "/")
        path = inside(self._folder, name)
        if path.exists() or path.is_symlink():
            return path
        return self._elsewhere(name, where) or path

    def notes(self) -> tuple[str, ...]:
        """Returns a sentence about names that were found otherwise than written; () without any."""
        if not self._found:
            return ()
        name, path = self._found[0]
        number = len(self._found)
        return (
            f"{number} {agree(number, 'name', 'names')} of {shown(self._table.name)} {agree(number, 'is', 'are')} "
            f"written otherwise than the {agree(number, 'file', 'files')}, and a single image fits each: "
            f"{shown(name)!r} is {shown(path.relative_to(self._folder.resolve()).as_posix())!r}",
        )

    @property
    def _folder(self) -> Path:
        return self._table.parent

    def _refuse_foreign(self, name: str, where: str) -> None:
        """Raises DataError for what is no path on this machine."""
        if "\0" in name:
            raise DataError(f"{where} holds a NUL character: {name!r}; the table is damaged")
        if PureWindowsPath(name).drive or name.startswith("\\"):
            last = PureWindowsPath(name).name
            there = f"; {last} is there, so that the last part of each path would do" * (self._folder / last).is_file()
            raise DataError(
                f"{where} holds paths of a Windows machine, {name!r}. Paths are relative to the table's own folder, "
                f"{shown(self._folder)}: put the images there, or in folders below it, and take "
                f"{name.removesuffix(last)!r} away from each path{there}"
            )

    def _elsewhere(self, name: str, where: str) -> Path | None:
        """Returns the one image that fits a name; None without any."""
        written = PurePosixPath(_folded(name))
        ends = [written] if written.suffix in IMAGE_SUFFIXES else [written, written.with_name(f"{written.name}.*")]
        fitting = [path for end in ends for path in self._index.get(end.name, ()) if _fits(path, end, self._root)]
        if len(ends) > 1 and not fitting:
            self._refuse_lost_zeros(written, where)
        folder, exact = (self._root / name).parent, {normalise_text(PurePosixPath(name).name)}
        fitting = [path for path in fitting if path.parent == folder] or fitting
        fitting = [path for path in fitting if exact & {*map(normalise_text, (path.name, path.stem))}] or fitting
        if len(fitting) > 1:
            names = ", ".join(shown(path.relative_to(self._root).as_posix()) for path in fitting[:3])
            more = f" and {len(fitting) - 3} more" if len(fitting) > 3 else ""
            how = "without an ending" if len(ends) > 1 else "without its folder"
            raise DataError(
                f"{where} holds {name!r} {how}, and several images fit: {names}{more}. Write which one is meant, with "
                "folder and ending"
            )
        if fitting:
            self._found.append((name, fitting[0]))
        return fitting[0] if fitting else None

    def _refuse_lost_zeros(self, written: PurePosixPath, where: str) -> None:
        if not written.name.isdecimal():
            return
        same = self._by_number.get(plain(written.name), [])
        if same:
            raise DataError(
                f"{where} holds {written.name!r}, and there is {shown(same[0].name)!r}: the zeros before the number "
                "were lost, as they are where a spreadsheet takes ids for numbers, and cannot be had back from the "
                "table. Export it again with that column as text"
            )

    @cached_property
    def _root(self) -> Path:
        return self._folder.resolve()

    @cached_property
    def _index(self) -> dict[str, list[Path]]:
        """Folded name of a file, and folded name with `.*` for its ending -> images below the table's folder."""
        index: defaultdict[str, list[Path]] = defaultdict(list)
        for path in list_images(self._root).images:
            name = PurePosixPath(_folded(path.name))
            for key in {name.name, f"{name.stem}.*"}:
                index[key].append(path)
        return index

    @cached_property
    def _by_number(self) -> dict[str, list[Path]]:
        images: Iterable[Path] = {path for paths in self._index.values() for path in paths}
        found: defaultdict[str, list[Path]] = defaultdict(list)
        for path in sorted(images):
            if path.stem.isdecimal():
                found[plain(path.stem)].append(path)
        return found


def _folded(name: str) -> str:
    """A path as all its spellings write it: NFC, no case, no `./` before it."""
    return normalise_text(name).casefold().removeprefix("./")


def _fits(path: Path, end: PurePosixPath, root: Path) -> bool:
    """Whether the folders before a name are the last ones before the image."""
    folders = tuple(map(_folded, path.relative_to(root).parts[:-1]))
    asked = tuple(part for part in end.parts[:-1] if part != ".")
    return folders[len(folders) - len(asked) :] == asked if len(asked) <= len(folders) else False
