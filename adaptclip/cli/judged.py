"""What is judged: the predictions of a run folder or a file, and what they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adaptclip.errors import DataError

if TYPE_CHECKING:
    from adaptclip.types import Predictions


def load_predictions(path: Path, baseline: Path | None) -> tuple[Predictions, Predictions | None, Path | None]:
    """Reads predictions, what they are compared with, and where their gates are, from a run folder or a file."""
    from adaptclip.types import Predictions

    if not path.is_dir():
        return Predictions.load(path), Predictions.load(baseline) if baseline else None, None
    if not (path / "predictions.parquet").is_file():
        raise DataError(f"{path} is not a finished run: it has no predictions.parquet")
    reference = baseline or path / "zero_shot_predictions.parquet"
    gates = path / "gates.yaml"
    return (
        Predictions.load(path / "predictions.parquet"),
        Predictions.load(reference) if reference.is_file() else None,
        gates if gates.is_file() else None,
    )
