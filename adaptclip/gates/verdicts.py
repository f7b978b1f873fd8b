# SPDX-License-Identifier: Apache-2.0
"""What gates conclude, the exit code of it, what it belongs to, and the ledger in which every judgement is noted.

A verdict belongs to the images that were judged and the gates they were judged by, each as a digest. A run's ledger,
`judgements.jsonl`, gets one line per judgement, and none is ever taken away, not even when the run is replaced: who
changes gates or models until they pass has looked at the test images as often, and a reader should know.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adaptclip.errors import StorageError
from adaptclip.files import check_plain, digest, parse_json, read_text
from adaptclip.outputs import LEDGER

if TYPE_CHECKING:
    from adaptclip.gate_rules import GateRule
    from adaptclip.predictions import Predictions


def images_digest(predictions: Predictions) -> str:
    """Returns the digest of the judged images: their ids with the names of their true classes, in any order."""
    names = predictions.class_names
    if predictions.positive is None:
        pairs = sorted(zip(predictions.ids, (names[c] for c in predictions.labels.tolist()), strict=True))
        return digest(part for pair in pairs for part in pair)
    known = np.ones_like(predictions.positive) if predictions.known is None else predictions.known
    shown = np.where(known, predictions.positive, 2).astype(np.int8)[
        :, sorted(range(len(names)), key=names.__getitem__)
    ]
    rows = sorted(zip(predictions.ids, (row.tobytes().hex() for row in shown), strict=True))
    return digest(["several labels", *sorted(names), *(part for row in rows for part in row)])


def gates_digest(rules: Sequence[GateRule]) -> str:
    """Returns the digest of a set of rules, whatever their order and however their defaults are written."""
    return digest(sorted(json.dumps(_plain(rule), sort_keys=True, ensure_ascii=False) for rule in rules))


def _plain(rule: GateRule) -> dict[str, Any]:
    """The rule as it decides: lists in an order of their own where order says nothing."""
    found = rule.model_dump(mode="json", exclude={"metric", "reason"}) | {"metric": rule.measure.name}
    found |= {"margin": rule.slack, "positive": rule.positive and sorted(rule.positive)}
    return found | {"exclude": sorted(rule.exclude)}


Conclusion = Literal["pass", "fail", "inconclusive"]

SEVERITY: dict[str, int] = {"fail": 0, "inconclusive": 1, "pass": 2}
"""Conclusion -> rank, worst first."""


@dataclass(frozen=True)
class Verdict:
    """What the data say about one rule.

    Attributes:
        title: the rule in words.
        metric: name of the metric.
        attribute: the group attribute the rule is about, or None; an intersection reads "sex × age_group".
        group: the group that decides the verdict (the worst one), or None.
        verdict: "pass", "fail" or "inconclusive".
        value: the estimate: a rate, the paired change against a reference, or the gap (see `kind`); None where there is
            none.
        low: one-sided lower bound, or None.
        high: one-sided upper bound, or None.
        n: images behind the value.
        confidence: level of the rule.
        reason: the verdict's grounds in plain words.
        groups: the verdict on every group, worst first; empty for a rule on all images or on a gap.
        kind: what `value`, `low` and `high` are.
        limit: what the value is compared with: the declared limit, minus the margin for a change.
        more_images: about how many more images (of `group`) would settle an inconclusive rule, either way, with an
            even chance; None where it is settled, or ten times the images would not do.
        excluded: groups left out by declaration, each {"group", "n"}.
        more_clusters: `more_images` as clusters (patients) of the present size; None where images are independent.
        images: digest of the judged images (`images_digest`), to which the verdict belongs.
        gates: digest of the set of gates that it is part of.
        asks_little: a model that gives every image the same answer would keep the limit too (`gates.doubts`).
    """

    title: str
    metric: str
    attribute: str | None
    group: str | None
    verdict: Conclusion
    value: float | None
    low: float | None
    high: float | None
    n: int
    confidence: float
    reason: str
    groups: tuple[Verdict, ...] = ()
    kind: Literal["level", "change", "gap"] = "level"
    limit: float | None = None
    more_images: int | None = None
    excluded: tuple[dict[str, Any], ...] = ()
    more_clusters: int | None = None
    images: str = ""
    gates: str = ""
    asks_little: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict."""
        return asdict(self)


def overall_verdict(verdicts: Sequence[Verdict]) -> Literal["pass", "fail", "inconclusive", "none"]:
    """Returns the worst verdict, or "none" when there were no rules."""
    if not verdicts:
        return "none"
    return min((v.verdict for v in verdicts), key=lambda verdict: SEVERITY[verdict])


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Returns 0 when every rule passes, 2 when one fails, else 3 (inconclusive, or no rules: nothing was shown)."""
    return {"pass": 0, "fail": 2, "inconclusive": 3, "none": 3}[overall_verdict(verdicts)]


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
