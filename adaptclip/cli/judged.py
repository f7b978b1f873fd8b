"""What is judged: the predictions of a run folder or a file, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptclip.errors import DataError

_READ = ("config.yaml", "gates.yaml", "probe.json", "report.json", "run.json", "split.json")
"""Files of a run folder that say what it was and how it is judged."""

if TYPE_CHECKING:
    from adaptclip.types import Predictions


def load_predictions(
    path: Path, baseline: Path | None, classes: Sequence[str] = ()
) -> tuple[Predictions, Predictions | None]:
    """Reads predictions and what they are compared with, from a run folder or a file.

    The files of a run are compared with the digests in its report.json; a file by itself has none.

    Args:
        path: a run folder, or a file of any model's predictions.
        baseline: likewise, or None for the one that the run brings.
        classes: class names in the order of their ids, for a file that has numbers only.

    Raises:
        StorageError: a file was changed after its run wrote it, or cannot be read.
        DataError: the folder is not that of a finished run, or the file holds no predictions.
    """
    from adaptclip.types import Predictions

    names = None if path.is_dir() else classes or None
    judged = Predictions.load(_file(path), classes=names)
    reference = _file(baseline) if baseline else of_run(path, "zero_shot_predictions.parquet")
    return judged, Predictions.load(reference, classes=names) if reference else None


def of_run(path: Path, name: str) -> Path | None:
    """A file of a run folder, as the run wrote it; None where it has none, or `path` is a file.

    Raises:
        StorageError: it was changed, swapped or taken away since.
    """
    from adaptclip.seals import check_run

    if not path.is_dir():
        return None
    # With a file of the run comes the question whose it is: the artifact beside it must be the one that was judged.
    artifact = ("artifact/manifest.json",) if (path / "artifact").exists() else ()
    check_run(path, (name, *artifact))
    return path / name if (path / name).exists() else None


def files_read(*paths: Path | None) -> list[Path]:
    """Returns the files that `paths` stand for when they are judged, which no output may replace.

    Args:
        *paths: run folders, files, and None for what was not given.
    """
    found: list[Path] = []
    for path in paths:
        if path is not None:
            inside = [p for p in path.iterdir() if p.suffix == ".parquet" or p.name in _READ] if path.is_dir() else []
            found += [path, *inside]
    return found


def _file(path: Path) -> Path:
    """The predictions of a run folder, or the file itself."""
    if not path.is_dir():
        return path
    found = of_run(path, "predictions.parquet")
    if found is None:
        raise DataError(f"{path} is not a finished run: it has no predictions.parquet")
    return found
