"""`adaptclip predict`: labels and probabilities of images."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adaptclip.cli.images import find_images

if TYPE_CHECKING:
    from adaptclip.artifact import Prediction


def predict(
    artifact: Path,
    images: list[Path],
    /,
    *,
    format: Literal["table", "csv", "jsonl"] = "table",
    top_k: int = 3,
    batch_size: int = 64,
    device: str = "cpu",
    allow_failed_gates: bool = False,
) -> int:
    """Predict images with an adapted model.

    Args:
        artifact: the artifact folder, or a run folder that holds one.
        images: images, or folders that are searched for them.
        format: how the predictions are printed.
        top_k: classes per image.
        batch_size: images per forward pass.
        device: cpu, cuda, cuda:1 ...
        allow_failed_gates: use a model although one of its gates failed.
    """
    from adaptclip.artifact import load

    paths = find_images(images)
    model = load(artifact, device=device, allow_failed_gates=allow_failed_gates)
    predictions = model.predict(paths, batch_size=batch_size, progress=True)
    several = model.thresholds is not None
    _print_predictions(predictions, format, min(top_k, len(model.class_names)), several=several)
    return 0


def _print_predictions(predictions: Sequence[Prediction], form: str, top_k: int, *, several: bool) -> None:
    """Prints predictions to standard output, where another program can read them; `several`: with all that are named.

    In CSV these are a JSON list, because a class may have any character in its name.
    """
    if form == "jsonl":
        for p in predictions:
            ranked = [{"label": k, "probability": round(v, 6)} for k, v in list(p.probabilities.items())[:top_k]]
            row = {"image": p.source, "label": p.label, "confidence": round(p.confidence, 6), "top": ranked}
            row |= {"labels": list(p.labels)} if several else {}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        columns = [f"{what}_{k}" for k in range(1, top_k + 1) for what in ("label", "probability")]
        writer.writerow(["image", *["labels"] * several, *columns])
        for p in predictions:
            ranked = list(p.probabilities.items())[:top_k]
            named = [json.dumps(p.labels, ensure_ascii=False)] if several else []
            writer.writerow([p.source, *named, *(cell for name, value in ranked for cell in (name, f"{value:.6f}"))])
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table("image", *["labels"] * several, *(f"top {k}" for k in range(1, top_k + 1)))
        for p in predictions:
            ranked = list(p.probabilities.items())[:top_k]
            named = [escape(", ".join(p.labels)) or "–"] if several else []
            table.add_row(escape(p.source), *named, *(f"{escape(name)} {value:.1%}" for name, value in ranked))
        Console().print(table)
