"""Folders written whole or not at all, and what an output may replace."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adaptclip.errors import StorageError


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` when the block ends without an error.

    Raises:
        StorageError: `path` exists and `overwrite` is false, or the folder cannot be written.
    """
    if path.exists() and not overwrite:
        raise StorageError(f"{path} exists already; choose another folder or overwrite it on purpose")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            # Two renames instead of a removal: a kill in between leaves the old folder whole beside it.
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
