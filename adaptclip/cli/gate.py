"""`adaptclip gate`: three verdicts and an exit code."""

from __future__ import annotations

from pathlib import Path

from adaptclip.cli.judged import files_read, load_predictions, of_run
from adaptclip.errors import GateError
from adaptclip.terminal import console


def gate(
    predictions: list[Path],
    /,
    *,
    gates: Path | None = None,
    baseline: Path | None = None,
    classes: tuple[str, ...] = (),
    junit: Path | None = None,
) -> int:
    """Judge predictions by gates: exit code 0 all pass, 2 one failed, 3 one is inconclusive.

    Args:
        predictions: run folders, or files of predictions of any model (Parquet, CSV); of several, all must pass; one
            whose predictions are those of another is left out.
        gates: YAML file with a list of gates under the key `gates`; a run folder brings those it was judged by.
        baseline: predictions that gates compare with, on the same images; a run folder brings its zero-shot ones.
        classes: class names in the order of their ids, for a file that has numbers only.
        junit: where the verdicts are also written as JUnit XML.
    """
    from adaptclip.evaluation.repeated import same_predictions
    from adaptclip.gates import exit_code, load_gates
    from adaptclip.gates.belonging import gates_digest
    from adaptclip.gates.junit import to_junit
    from adaptclip.outputs import check_file
    from adaptclip.reports.render import print_report
    from adaptclip.reports.summary import build_report
    from adaptclip.storage import write_text

    if not predictions:
        raise GateError("name at least one run folder or file of predictions")
    if junit is not None:
        check_file(junit, files_read(*predictions, baseline, gates), judges_runs=True)
    judged, seen = {}, {}
    for path in dict.fromkeys(predictions):
        given = load_predictions(path, baseline, classes)
        source = gates or of_run(path, "gates.yaml")
        if source is None:
            raise GateError(f"{path} names no gates; give a YAML file: --gates gates.yaml")
        rules = gates_digest(load_gates(source))
        twins = [
            name for name, (by, other) in seen.items() if by == rules and same_predictions(given.predictions, other)
        ]
        if twins:
            console().print(f"{path} holds the same predictions as {twins[0]}: it is no further run, and is left out.")
            continue
        seen[path] = rules, given.predictions
        verdicts, judgement = given.judge(source, "gate", classes)
        judged[str(path)] = verdicts
        if len(predictions) > 1:
            console().print(f"{path}: {_summary(verdicts)}", style="bold")
        print_report({**build_report(given.predictions, given.baseline), "judged": judgement.to_dict()}, verdicts)
    if junit is not None:
        write_text(junit, to_junit(judged))
    # Several runs are judged as one release: the worst verdict counts, and a run without gates shows nothing.
    codes = [exit_code(verdicts) for verdicts in judged.values()]
    return 2 if 2 in codes else max(codes)


def _summary(verdicts: list) -> str:
    from adaptclip.gates import overall_verdict

    passed = sum(v.verdict == "pass" for v in verdicts)
    return f"{overall_verdict(verdicts)} ({passed} of {len(verdicts)} gates pass)"
