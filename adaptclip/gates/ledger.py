"""A run's ledger, `judgements.jsonl`: when its test images were judged, by what command and by which gates.

One line is added per judgement and none is ever taken away, not even when the run is replaced: who changes gates or
models until they pass has looked at the test images as often, and a reader should know.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptclip.errors import StorageError
from adaptclip.gate_rules import GateRule
from adaptclip.gates.belonging import gates_digest, images_digest
from adaptclip.outputs import LEDGER
from adaptclip.storage import check_plain, parse_json, read_text
from adaptclip.types import Predictions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """What was judged, and how often it was so far.

    Attributes:
        images: digest of the images.
        gates: digest of the gates of this judgement.
        num_images: how many images.
        times: judgements of these images in the run folder so far, this one included.
        gate_sets: different sets of gates among them.
        another_set: says so where these are not the images that the run was frozen with; otherwise "".
    """

    images: str
    gates: str
    num_images: int
    times: int = 1
    gate_sets: int = 1
    another_set: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict."""
        return asdict(self)


def note_judgement(
    run: Path | None, command: str, predictions: Predictions, rules: Sequence[GateRule], *, another_set: str = ""
) -> Judged:
    """Adds a line to a run's ledger, and counts what it holds of the same images.

    A folder that cannot be written is judged all the same, with a warning: runs may be mounted read-only.

    Args:
        run: the run folder; None where a file is judged, which has no ledger.
        command: what judged, for example "gate".
        predictions: what was judged.
        rules: by which gates.
        another_set: see `Judged`.
    """
    judged = Judged(images_digest(predictions), gates_digest(rules), len(predictions), another_set=another_set)
    if run is None:
        return judged
    path = run / LEDGER
    same = [entry for entry in _read(path) if entry.get("images", judged.images) == judged.images]
    sets = {entry["gates"] for entry in same if "gates" in entry} | {judged.gates}
    line = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": command, "gates": judged.gates,
        "images": judged.images, "num_images": judged.num_images,
    }  # fmt: skip
    try:
        check_plain(path)
        _append(path, line)
    except (OSError, StorageError) as error:
        _log.warning("%s cannot be written (%s): that the run was judged again is not noted", path, error)
    return Judged(judged.images, judged.gates, judged.num_images, len(same) + 1, len(sets), another_set)


def _append(path: Path, line: dict[str, Any]) -> None:
    # One write of one line: two processes that judge at once do not mix theirs.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, (json.dumps(line, sort_keys=True) + "\n").encode())
    finally:
        os.close(handle)


def _read(path: Path) -> list[dict[str, Any]]:
    """The judgements so far; a line that cannot be read was one too."""
    if not path.exists():
        return []
    try:
        lines = read_text(path).splitlines()
    except StorageError as error:
        _log.warning("%s: how often the run was judged before is not known", error)
        return []
    found: list[dict[str, Any]] = []
    for text in lines:
        try:
            entry = parse_json(text, where="a line")
        except StorageError:
            entry = None
        found.append(entry if isinstance(entry, dict) else {})
    return found
