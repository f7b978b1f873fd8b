"""`adaptclip gate`: three verdicts and an exit code."""

from __future__ import annotations

from pathlib import Path

from adaptclip.cli.judged import load_predictions
from adaptclip.errors import GateError


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

    judged, reference, saved_gates = load_predictions(predictions, baseline)
    source = gates or saved_gates
    if source is None:
        raise GateError(f"{predictions} names no gates; give a YAML file: --gates gates.yaml")
    verdicts = check_gates(judged, reference, load_gates(source))
    print_report(build_report(judged, reference), verdicts)
    return exit_code(verdicts)
