"""The runs that gates compare with by name (`no_worse_than: runs/coop`), found on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaptclip.errors import AdaptclipError, GateError, did_you_mean
from adaptclip.gate_rules import ZERO_SHOT, GateRule
from adaptclip.seals import run_file
from adaptclip.types import Predictions

_FILES = (".parquet", ".csv", ".tsv")


def load_references(
    rules: Sequence[GateRule], places: Sequence[Path], *, classes: Sequence[str] | None = None
) -> dict[str, Predictions]:
    """Reads the predictions of every run that rules name; zero-shot is none of them.

    Args:
        rules: the gates.
        places: folders from which a relative name is looked up, in this order: that of the gates or the card first.
        classes: class names in the order of their ids, for a file that has numbers only.

    Returns:
        The name as the rule has it -> predictions.

    Raises:
        GateError: nothing is there by that name, it is no run and no file of predictions, or a file of the run was
            changed after it was written.
    """
    found: dict[str, Predictions] = {}
    for rule in rules:
        name = rule.no_worse_than
        if name is None or name == ZERO_SHOT or name in found:
            continue
        where = f'gate "{rule.title}"'
        path = _find(name, places, where)
        try:
            file = run_file(path, "predictions.parquet") if path.is_dir() else path
            if file is None:
                raise GateError(f"{path} is not a finished run: it has no predictions.parquet")
            found[name] = Predictions.load(file, classes=classes)
        except AdaptclipError as error:
            raise GateError(f"{where}: {error}") from error
    return found


def _find(name: str, places: Sequence[Path], where: str) -> Path:
    tried = list(dict.fromkeys((place / name).absolute() for place in map(Path, places)))
    for path in tried:
        if path.exists():
            return path
    near = [ZERO_SHOT]
    for path in tried:
        if path.parent.is_dir():
            beside = path.parent.iterdir()
            kept = [p.name for p in beside if (p / "predictions.parquet").is_file() or p.suffix in _FILES]
            near += [str(Path(name).with_name(found)) for found in sorted(kept)]
    raise GateError(
        f"{where} compares with {name!r}, and there is no such run folder or file of predictions; looked for "
        f"{', '.join(map(str, tried))}. {did_you_mean(name, near)}"
    )
