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
) -> tuple[Predictions, Predictions | None, Path | None]:
    """Reads predictions, what they are compared with, and where their gates are, from a run folder or a file.

    Args:
        path: a run folder, or a file of any model's predictions.
        baseline: likewise, or None for the one that the run brings.
        classes: class names in the order of their ids, for a file that has numbers only.
    """
    from adaptclip.types import Predictions

    if not path.is_dir():
        names = classes or None
        reference = Predictions.load(_file(baseline), classes=names) if baseline else None
        return Predictions.load(path, classes=names), reference, None
    if not (path / "predictions.parquet").is_file():
        raise DataError(f"{path} is not a finished run: it has no predictions.parquet")
    reference = _file(baseline) if baseline else path / "zero_shot_predictions.parquet"
    gates = path / "gates.yaml"
    return (
        Predictions.load(path / "predictions.parquet"),
        Predictions.load(reference) if reference.is_file() else None,
        gates if gates.is_file() else None,
    )


def files_read(*paths: Path | None) -> list[Path]:
    """Returns the files that `paths` stand for when they are judged, which no output may replace.

    Args:
        *paths: run folders, files, and None for what was not given.
    """
    found: list[Path] = []
    for path in paths:
        if path is not None:
            of_run = [p for p in path.iterdir() if p.suffix == ".parquet" or p.name in _READ] if path.is_dir() else []
            found += [path, *of_run]
    return found


def _file(path: Path) -> Path:
    """The predictions of a run folder, or the file itself."""
    return path / "predictions.parquet" if path.is_dir() else path
