"""The `adaptclip` command."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adaptclip.config import parse_command
from adaptclip.entrypoint import run_and_exit
from adaptclip.errors import DataError, GateError

if TYPE_CHECKING:
    from adaptclip.artifact import Prediction
    from adaptclip.types import Predictions

# Heavy modules are imported inside the commands: `adaptclip --help` should not wait for torch.

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Files that `predict` takes from a folder."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; leaves with 0, 1 (usage or data error), or a gate's 2 (failed) or 3 (inconclusive)."""
    commands = {
        "predict": predict,
        "report": report,
        "gate": gate,
        "card": {"check": card_check, "list": card_list, "new": card_new},
    }
    run_and_exit(
        lambda: parse_command(
            commands, argv, prog="adaptclip", description="Adapt a pretrained CLIP to a custom domain, and judge it."
        )
    )


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
    _print_predictions(predictions, format, min(top_k, len(model.class_names)))
    return 0


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Returns the image files among `paths` and, in sorted order, below the folders among them.

    Raises:
        DataError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image or folder {path}")
    if not found:
        raise DataError(f"no images below {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def _print_predictions(predictions: Sequence[Prediction], form: str, top_k: int) -> None:
    """Prints predictions to standard output, where another program can read them."""
    if form == "jsonl":
        for p in predictions:
            ranked = [{"label": k, "probability": round(v, 6)} for k, v in list(p.probabilities.items())[:top_k]]
            row = {"image": p.source, "label": p.label, "confidence": round(p.confidence, 6), "top": ranked}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["image", *(f"{what}_{k}" for k in range(1, top_k + 1) for what in ("label", "probability"))])
        for p in predictions:
            ranked = list(p.probabilities.items())[:top_k]
            writer.writerow([p.source, *(cell for name, value in ranked for cell in (name, f"{value:.6f}"))])
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table("image", *(f"top {k}" for k in range(1, top_k + 1)))
        for p in predictions:
            ranked = list(p.probabilities.items())[:top_k]
            table.add_row(escape(p.source), *(f"{escape(name)} {value:.1%}" for name, value in ranked))
        Console().print(table)


def report(predictions: Path, /, *, baseline: Path | None = None, out: Path | None = None) -> int:
    """Report on the predictions of a run or of any model.

    Args:
        predictions: a run folder, or a Parquet file of predictions.
        baseline: predictions to compare with, on the same images; a run folder brings its zero-shot ones.
        out: where the report is written as Markdown, and as JSON beside it.
    """
    from adaptclip.reports.render import print_report, to_markdown
    from adaptclip.reports.summary import build_report
    from adaptclip.storage import write_json, write_text

    judged, reference, _ = _load_predictions(predictions, baseline)
    result = build_report(judged, reference)
    print_report(result)
    if out is not None:
        write_text(out.with_suffix(".md"), to_markdown(result))
        write_json(out.with_suffix(".json"), result)
    return 0


def gate(predictions: Path, /, *, gates: Path | None = None, baseline: Path | None = None) -> int:
    """Judge predictions by gates: exit code 0 all pass, 2 one failed, 3 one is inconclusive.

    Args:
        predictions: a run folder, or a Parquet file of predictions.
        gates: YAML file with a list of gates; a run folder brings those it was judged by.
        baseline: predictions that "no_worse_than" compares with; a run folder brings its zero-shot ones.
    """
    from adaptclip.gates import check_gates, exit_code, load_gates
    from adaptclip.reports.render import print_report
    from adaptclip.reports.summary import build_report

    judged, reference, saved_gates = _load_predictions(predictions, baseline)
    source = gates or saved_gates
    if source is None:
        raise GateError(f"{predictions} names no gates; give a YAML file: --gates gates.yaml")
    verdicts = check_gates(judged, reference, load_gates(source))
    print_report(build_report(judged, reference), verdicts)
    return exit_code(verdicts)


def _load_predictions(path: Path, baseline: Path | None) -> tuple[Predictions, Predictions | None, Path | None]:
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


def card_list() -> int:
    """List the data cards by name."""
    from adaptclip.data.card import list_cards

    for name in list_cards():
        sys.stdout.write(name + "\n")
    return 0


def card_check(
    card: str,
    /,
    *,
    data_root: Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
) -> int:
    """Check a data card and the images behind it: columns, classes, leaks between splits, unreadable images.

    Args:
        card: name in data_cards/, path of a card, or path of an image folder.
        data_root: folder that holds the card's files.
        on_bad_image: stop at the first unreadable image, or list what was skipped.
    """
    from adaptclip.data.card import load_card
    from adaptclip.data.sources import open_data

    data = open_data(load_card(card), data_root=data_root, on_bad_image=on_bad_image)
    write = sys.stdout.write
    write(f"{data.card.name}: {len(data.class_names)} classes\n")
    for part in ("train", "validation", "test"):
        split = getattr(data, part)
        write(f"  {part:<11}{len(split):>8} images\n")
    for name in data.test.groups:
        values = sorted(set(data.test.groups[name]))
        counts = ", ".join(f"{v} {data.test.groups[name].count(v)}" for v in values)
        write(f"  test by {name}: {counts}\n")
    for row in data.skipped:
        write(f"  skipped unreadable image {row}\n")
    for note in data.notes:
        write(f"  allowed by the card: {note}\n")
    for issue in data.card.known_issues:
        write(f"  known issue: {issue}\n")
    write("no problem found that the card does not allow\n")
    return 0


def card_new(folder: Path, /, *, out: Path = Path("card.md")) -> int:
    """Write a data card for a folder of images or a table of image paths, to be filled in.

    Args:
        folder: class folders, train/test folders of class folders, or a folder with a CSV or JSONL table.
        out: the card to write; an existing file is never overwritten.
    """
    from adaptclip.data.scaffold import new_card

    path = new_card(folder, out)
    sys.stdout.write(f"wrote {path}. Fill in what it asks for, then: adaptclip card check {path}\n")
    return 0


if __name__ == "__main__":
    main()
