"""`adaptclip report`: numbers with intervals from saved predictions."""

from __future__ import annotations

from pathlib import Path

from adaptclip.cli.judged import load_predictions


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

    judged, reference, _ = load_predictions(predictions, baseline)
    result = build_report(judged, reference)
    print_report(result)
    if out is not None:
        write_text(out.with_suffix(".md"), to_markdown(result))
        write_json(out.with_suffix(".json"), result)
    return 0
