"""`adaptclip compare`: what a mitigation did to every group, and whether it levelled down."""

from __future__ import annotations

from pathlib import Path

from adaptclip.cli.judged import files_read, load_predictions
from adaptclip.terminal import say


def compare(
    before: Path,
    after: Path,
    /,
    *,
    group: str,
    metric: str = "accuracy",
    margin: float = 0.02,
    min_n: int = 100,
    out: Path | None = None,
) -> int:
    """Compare two runs by group: exit code 0 the worst group is no worse, 2 it is (levelled down), 3 cannot tell.

    Args:
        before: run folder or Parquet file of predictions without the mitigation.
        after: the same with it, on the same images.
        group: the attribute.
        metric: accuracy, or another rate that is better when higher.
        margin: acceptable loss of the worst group; 0.02 is 2 points.
        min_n: fewest images of a group that takes part in the verdict.
        out: where the comparison is written as Markdown, and as JSON beside it.
    """
    from adaptclip.outputs import check_file
    from adaptclip.reports.levelling import compare_groups, exit_code, levelling_markdown
    from adaptclip.storage import write_json, write_text

    written = [out.with_suffix(suffix) for suffix in (".md", ".json")] if out is not None else []
    for path in written:
        check_file(path, files_read(before, after), judges_runs=True)
    first, second = (load_predictions(path, None).predictions for path in (before, after))
    result = compare_groups(first, second, group, metric=metric, margin=margin, min_n=min_n)
    text = levelling_markdown(result)
    for line in text.rstrip("\n").split("\n"):
        say(line)
    if written:
        write_text(written[0], text)
        write_json(written[1], result)
    return exit_code(result)
