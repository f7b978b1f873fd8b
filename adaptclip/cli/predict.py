"""`adaptclip predict`: labels and probabilities of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adaptclip.cli.answers import Answers, Format
from adaptclip.data.image_files import find_images
from adaptclip.errors import DataError
from adaptclip.terminal import json_line, say

if TYPE_CHECKING:
    from adaptclip.artifact import Prediction


def predict(
    artifact: Path,
    images: list[Path],
    /,
    *,
    format: Format | None = None,
    out: Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    top_k: int = 3,
    batch_size: int = 64,
    device: str = "cpu",
    raw_csv: bool = False,
    allow_failed_gates: bool = False,
) -> int:
    """Predict images with an adapted model.

    Args:
        artifact: the artifact folder, or a run folder that holds one.
        images: images, or folders that are searched for them.
        format: table, csv or jsonl; without, a table, or what the ending of --out says.
        out: a new file for the predictions, called NAME.partial until it is complete.
        on_bad_image: stop at an unreadable image with exit code 1 (the rows before it are written), or name it on
            standard error and go on.
        top_k: classes per image.
        batch_size: images per forward pass.
        device: cpu, cuda, cuda:1 ...
        raw_csv: leave text in CSV as it is; without, what a spreadsheet would run gets a ' before it.
        allow_failed_gates: use a model although one of its gates failed.
    """
    from tqdm import tqdm

    from adaptclip.artifact import Unreadable, load

    answers = Answers(form=format, out=out, raw_csv=raw_csv, images=images)
    paths, passed = find_images(images)
    if passed:
        say(f"passed over: {passed}", to=sys.stderr)
    model = load(artifact, device=device, allow_failed_gates=allow_failed_gates)
    top_k, several = min(top_k, len(model.class_names)), model.thresholds is not None
    columns = [f"{what}_{k}" for k in range(1, top_k + 1) for what in ("label", "probability")]
    headings = ["image", *["labels"] * several, *(f"top {k}" for k in range(1, top_k + 1))]
    skipped = 0
    with (
        answers.start(["image", *["labels"] * several, *columns], headings),
        tqdm(total=len(paths), unit="image", disable=None, leave=False) as bar,
    ):
        for found in model.stream(paths, batch_size=batch_size):
            bar.update()
            if not isinstance(found, Unreadable):
                answers.add(*_row(found, top_k, several=several))
            elif on_bad_image == "skip":
                skipped += 1
                say(f"skipped: {found.reason}", to=sys.stderr)
            else:
                raise DataError(_stopped_at(found.reason, answers.count, len(paths)))
        if skipped == len(paths):
            raise DataError(f"none of {len(paths)} images could be predicted; each is named above")
    if skipped:
        say(f"{answers.count} of {len(paths)} images were predicted, {skipped} skipped", to=sys.stderr)
    return 0


def _stopped_at(reason: str, done: int, number: int) -> str:
    more = "" if "--on-bad-image" in reason else " Leave such images out with `--on-bad-image skip`."
    return (
        f"{reason.rstrip('.')}.{more}\n{done} of {number} images were predicted before it, and their rows are written."
    )


def _row(p: Prediction, top_k: int, *, several: bool) -> tuple[dict[str, Any], list[str], list[str]]:
    """A prediction for JSON, for CSV and for the table; `several`: with all labels that are named.

    In CSV these are a JSON list, because a class may have any character in its name.
    """
    ranked = list(p.probabilities.items())[:top_k]
    values: dict[str, Any] = {"image": p.source, "label": p.label, "confidence": round(p.confidence, 6)}
    values["top"] = [{"label": name, "probability": round(value, 6)} for name, value in ranked]
    values |= {"labels": list(p.labels)} if several else {}
    named = [json_line(p.labels)] if several else []
    cells = [p.source, *named, *(cell for name, value in ranked for cell in (name, f"{value:.6f}"))]
    named = [", ".join(p.labels) or "–"] if several else []
    return values, cells, [p.source, *named, *(f"{name} {value:.1%}" for name, value in ranked)]
