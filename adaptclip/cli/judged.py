"""What is judged: the predictions of a run folder or a file, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptclip.errors import DataError
from adaptclip.outputs import KINDS, runs_below

_READ = ("config.yaml", "gates.yaml", "judgements.jsonl", "probe.json", "report.json", "run.json", "split.json")
"""Files of a run folder that say what it was and how it is judged."""

if TYPE_CHECKING:
    from adaptclip.gates import Verdict
    from adaptclip.gates.ledger import Judged
    from adaptclip.types import Predictions


@dataclass(frozen=True)
class Given:
    """What is judged.

    Attributes:
        path: the run folder or file.
        predictions: of the model.
        baseline: what it is compared with, or None.
        bound: the run's own zero-shot predictions, where another baseline is given in their place; otherwise None.
        another_set: says so where the file lies in a run folder and is of other images than the run; otherwise "".
    """

    path: Path
    predictions: Predictions
    baseline: Predictions | None
    bound: Predictions | None = None
    another_set: str = ""

    def judge(self, source: Path, command: str, classes: Sequence[str] = ()) -> tuple[list[Verdict], Judged]:
        """Judges by the gates of a file, and notes in the ledger of a run that it was judged."""
        from adaptclip.gates import check_gates, load_gates
        from adaptclip.gates.ledger import note_judgement
        from adaptclip.gates.references import load_references

        rules = load_gates(source)
        run = self.path if self.path.is_dir() else None
        # A run's gates came from a card; what they name lies beside the run, or where the command is given.
        places = [source.parent, *([run.parent] if run is not None else []), Path()]
        references = load_references(rules, places, classes=classes or None)
        verdicts = check_gates(self.predictions, self.baseline, rules, references=references, bound=self.bound)
        return verdicts, note_judgement(run, command, self.predictions, rules, another_set=self.another_set)


def load_predictions(path: Path, baseline: Path | None, classes: Sequence[str] = ()) -> Given:
    """Reads predictions and what they are compared with, from a run folder or a file.

    The files of a run are compared with the digests in its report.json; a file by itself has none.

    Args:
        path: a run folder, or a file of any model's predictions.
        baseline: likewise, or None for the one that the run brings.
        classes: class names in the order of their ids, for a file that has numbers only.

    Raises:
        StorageError: a file was changed after its run wrote it, or cannot be read.
        DataError: the folder is not that of a finished run, the file holds no predictions, or a run's are of other
            images than it was frozen with.
    """
    from adaptclip.types import Predictions

    for folder in (path, baseline):
        if folder is not None and folder.is_dir() and not KINDS["run"].made(folder) and (below := runs_below(folder)):
            raise DataError(f"{folder} is no run folder.{below}")
    names = None if path.is_dir() else classes or None
    predictions = Predictions.load(_file(path), classes=names)
    own = of_run(path, "zero_shot_predictions.parquet")
    reference = _file(baseline) if baseline else own
    differs = _differs(path if path.is_dir() else path.parent, predictions)
    if differs and path.is_dir():
        raise DataError(
            f"{path / 'predictions.parquet'} {differs}. Put back the run's own predictions, or judge the file by its "
            "path, which calls it another set"
        )
    return Given(
        path, predictions, Predictions.load(reference, classes=names) if reference else None,
        Predictions.load(own) if baseline and own else None,
        f"Another set: the file {differs}" if differs else "",
    )  # fmt: skip


def of_run(path: Path, name: str) -> Path | None:
    """A file of a run folder, as the run wrote it; None where it has none, or `path` is a file.

    Raises:
        StorageError: it was changed, swapped or taken away since.
    """
    from adaptclip.seals import run_file

    return run_file(path, name) if path.is_dir() else None


def _differs(run: Path, predictions: Predictions) -> str:
    """Says how predictions differ from the test images that a run was frozen with; "" where they do not, or no run is.

    The digest is kept in the run's report.json; runs of earlier versions have none.
    """
    from adaptclip.gates.belonging import images_digest
    from adaptclip.storage import read_json

    file = run / "report.json"
    known = read_json(file) if file.is_file() else None
    frozen = known.get("judged") if isinstance(known, dict) else None
    if not isinstance(frozen, dict) or frozen.get("images") == images_digest(predictions):
        return ""
    return (
        f"holds {len(predictions):,} rows whose ids and labels are not those of the {frozen.get('num_images', 0):,} "
        f"test images that the run {run} was judged on"
    )


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
