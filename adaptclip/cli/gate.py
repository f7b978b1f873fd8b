# SPDX-License-Identifier: Apache-2.0
"""`adaptclip gate`, `compare` and `plan`: verdicts, what a mitigation did to each group, images that gates need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adaptclip.errors import DataError, GateError
from adaptclip.settings import ExistingPath
from adaptclip.terminal import console, json_line, say

if TYPE_CHECKING:
    from adaptclip.gates import Verdict
    from adaptclip.gates.verdicts import Judged
    from adaptclip.predictions import Predictions

_READ = ("config.yaml", "gates.yaml", "judgements.jsonl", "probe.json", "report.json", "run.json", "split.json")
"""Files of a run folder that say what it was and how it is judged."""


@dataclass(frozen=True)
class Given:
    """What is judged.

    Attributes:
        path: the run folder or file.
        predictions: of the model.
        baseline: what it is compared with, or None.
        bound: the run's own zero-shot predictions, where another baseline is given in their place; otherwise None.
        another_set: says so where the file lies in a run folder and is of other images than the run; otherwise "".
    """

    path: Path
    predictions: Predictions
    baseline: Predictions | None
    bound: Predictions | None = None
    another_set: str = ""

    def judge(self, source: Path, command: str, classes: Sequence[str] = ()) -> tuple[list[Verdict], Judged]:
        """Judges by the gates of a file, and notes in the ledger of a run that it was judged."""
        from adaptclip.gates import check_gates, load_gates
        from adaptclip.gates.loading import load_references
        from adaptclip.gates.verdicts import note_judgement

        rules = load_gates(source)
        run = self.path if self.path.is_dir() else None
        # A run's gates came from a card; what they name lies beside the run, or where the command is given.
        places = [source.parent, *([run.parent] if run is not None else []), Path()]
        references = load_references(rules, places, classes=classes or None)
        verdicts = check_gates(self.predictions, self.baseline, rules, references=references, bound=self.bound)
        return verdicts, note_judgement(run, command, self.predictions, rules, another_set=self.another_set)


def load_predictions(path: Path, baseline: Path | None, classes: Sequence[str] = ()) -> Given:
    """Reads predictions and what they are compared with, from a run folder or a file.

    The files of a run are compared with the digests in its report.json; a file by itself has none.

    Args:
        path: a run folder, or a file of any model's predictions.
        baseline: likewise, or None for the one that the run brings.
        classes: class names in the order of their ids, for a file that has numbers only.

    Raises:
        StorageError: a file was changed after its run wrote it, or cannot be read.
        DataError: the folder is not that of a finished run, the file holds no predictions, or a run's are of other
            images than it was frozen with.
    """
    from adaptclip.outputs import KINDS, runs_below
    from adaptclip.predictions import Predictions

    for folder in (path, baseline):
        if folder is not None and folder.is_dir() and not KINDS["run"].made(folder) and (below := runs_below(folder)):
            raise DataError(f"{folder} is no run folder.{below}")
    names = None if path.is_dir() else classes or None
    predictions = Predictions.load(_file(path), classes=names)
    own = of_run(path, "zero_shot_predictions.parquet")
    reference = _file(baseline) if baseline else own
    differs = _differs(path if path.is_dir() else path.parent, predictions)
    if differs and path.is_dir():
        raise DataError(
            f"{path / 'predictions.parquet'} {differs}. Put back the run's own predictions, or judge the file by its "
            "path, which calls it another set"
        )
    return Given(
        path, predictions, Predictions.load(reference, classes=names) if reference else None,
        Predictions.load(own) if baseline and own else None,
        f"Another set: the file {differs}" if differs else "",
    )  # fmt: skip


def of_run(path: Path, name: str) -> Path | None:
    """A file of a run folder, as the run wrote it; None where it has none, or `path` is a file.

    Raises:
        StorageError: it was changed, swapped or taken away since.
    """
    from adaptclip.seals import run_file

    return run_file(path, name) if path.is_dir() else None


def _differs(run: Path, predictions: Predictions) -> str:
    """Says how predictions differ from the test images that a run was frozen with; "" where they do not, or no run is.

    The digest is kept in the run's report.json; runs of earlier versions have none.
    """
    from adaptclip.files import read_json
    from adaptclip.gates.verdicts import images_digest

    file = run / "report.json"
    known = read_json(file) if file.is_file() else None
    frozen = known.get("judged") if isinstance(known, dict) else None
    if not isinstance(frozen, dict) or frozen.get("images") == images_digest(predictions):
        return ""
    return (
        f"holds {len(predictions):,} rows whose ids and labels are not those of the {frozen.get('num_images', 0):,} "
        f"test images that the run {run} was judged on"
    )


def files_read(*paths: Path | None) -> list[Path]:
    """Returns the files that `paths` stand for when they are judged, which no output may replace.

    Args:
        *paths: run folders, files, and None for what was not given.
    """
    found: list[Path] = []
    for path in paths:
        if path is not None:
            inside = [p for p in path.iterdir() if p.suffix == ".parquet" or p.name in _READ] if path.is_dir() else []
            found += [path, *inside]
    return found


def _file(path: Path) -> Path:
    """The predictions of a run folder, or the file itself."""
    if not path.is_dir():
        return path
    found = of_run(path, "predictions.parquet")
    if found is None:
        raise DataError(f"{path} is not a finished run: it has no predictions.parquet")
    return found


def gate(
    predictions: list[ExistingPath],
    /,
    *,
    gates: ExistingPath | None = None,
    baseline: ExistingPath | None = None,
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
    from adaptclip.files import write_text
    from adaptclip.gates import exit_code, load_gates
    from adaptclip.gates.doubts import same_predictions
    from adaptclip.gates.verdicts import gates_digest
    from adaptclip.gates.wording import to_junit
    from adaptclip.outputs import check_file
    from adaptclip.reports.full import build_report
    from adaptclip.reports.render import print_report

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


def compare(
    before: ExistingPath,
    after: ExistingPath,
    /,
    *,
    group: str | None = None,
    metric: str = "accuracy",
    positive: tuple[str, ...] = (),
    margin: float = 0.02,
    min_n: int = 100,
    out: Path | None = None,
) -> int:
    """Compare two runs by group: exit code 0 the worst group is no worse, 2 it is (levelled down), 3 cannot tell.

    Args:
        before: run folder or Parquet file of predictions without the mitigation.
        after: the same with it, on the same images.
        group: the attribute, for example sex; without, the error names those that the predictions have.
        metric: accuracy, or another rate that is better when higher.
        positive: class or classes that count as positive, for sensitivity, specificity or auc.
        margin: acceptable loss of the worst group; 0.02 is 2 points.
        min_n: fewest images of a group that takes part in the verdict.
        out: where the comparison is written as Markdown, and as JSON beside it.
    """
    from adaptclip.files import write_json, write_text
    from adaptclip.outputs import check_file
    from adaptclip.reports.compare import compare_groups, exit_code, levelling_markdown

    written = [out.with_suffix(suffix) for suffix in (".md", ".json")] if out is not None else []
    for path in written:
        check_file(path, files_read(before, after), judges_runs=True)
    first, second = (load_predictions(path, None).predictions for path in (before, after))
    if group is None:
        has = ", ".join(first.groups) or "no group column (in a CSV: group:NAME)"
        raise GateError(f"name the attribute whose groups are compared: --group NAME. These predictions have: {has}.")
    result = compare_groups(first, second, group, metric=metric, positive=positive, margin=margin, min_n=min_n)
    text = levelling_markdown(result)
    for line in text.rstrip("\n").split("\n"):
        say(line)
    if written:
        write_text(written[0], text)
        write_json(written[1], result)
    return exit_code(result)


def plan(
    gates: str,
    /,
    *,
    expect: float | None = None,
    patients_with: int = 1,
    icc: float = 0.3,
    prevalence: tuple[str, ...] = (),
    groups: tuple[str, ...] = (),
    num_classes: int | None = None,
    changed: float = 0.1,
    power: float = 0.8,
    data_root: ExistingPath | None = None,
    format: Literal["text", "json"] = "text",
) -> int:
    """Say how many images or patients gates need to pass with a stated chance, before any are collected.

    A card says itself how many classes and groups there are, as far as its images are there.

    Args:
        gates: YAML file with a list of gates under the key `gates`, or a data card.
        expect: true value that is assumed of every metric, in every group.
        patients_with: images of each patient; 1 for independent images.
        icc: correlation of a patient's images, 0 to 1.
        prevalence: share of positive images, for gates on sensitivity and the like; of several findings each its own:
            Effusion=0.1 Mass=0.05.
        groups: how many groups an attribute has, such as sex=2.
        num_classes: number of classes, for means over the classes; a card with class_names says it itself.
        changed: for gates against a reference, share of the images whose answer changes.
        power: chance with which each gate shall pass.
        data_root: folder that holds a card's files.
        format: text, or JSON with one object per line.
    """
    from adaptclip.gates.loading import load_gates
    from adaptclip.gates.sample_size import Assumed, completed
    from adaptclip.gates.sample_size import plan as planned

    if Path(gates).suffix in (".yaml", ".yml"):
        rules, card = load_gates(gates), None
    else:
        from adaptclip.data.card import load_card

        card = load_card(gates)
        rules = list(card.gates)
    if not rules:
        raise GateError(f"{gates} declares no gates, so there is nothing to plan")
    overall, each = _prevalences(prevalence)
    assumed = Assumed(
        expect,
        patients_with,
        icc,
        overall,
        dict(map(_group, groups)),
        num_classes,
        changed,
        power,
        each,
    )
    if card is not None:
        assumed, said = completed(assumed, rules, card, data_root)
        if said and format == "text":
            say(f"from the card: {said}")
    for one in planned(rules, assumed):
        if format == "json":
            say(json_line(one.to_dict()))
            continue
        say(one.title)
        if one.images is None:
            say(f"  no number: {one.words}")
            continue
        patients = "" if one.patients is None else f" of {one.patients:,} patients"
        say(f"  {one.images:,} images{patients} give it a chance of {100 * (one.power or 0):.0f} % to pass")
        if one.groups > 1 or one.kind:
            counted = f", about {one.counted:,} of them {one.kind.strip()}" if one.kind else ""
            say(f"  {one.in_group:,} in each of {one.groups} groups{counted}" if one.groups > 1 else f"  {counted[2:]}")
        say(f"  {one.words}")
    return 0


def _prevalences(given: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """The share of positive images of every gate, and those of single findings (FINDING=0.1)."""
    overall, each = None, {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise GateError(f"a prevalence is a number, or FINDING=NUMBER such as Effusion=0.1; got {text!r}") from None
        if not name:
            overall = value
        else:
            each[name] = value
    return overall, each


def _group(text: str) -> tuple[str, int]:
    name, found, number = text.rpartition("=")
    if not found or not name or not number.isdecimal():
        raise GateError(f"groups are given as ATTRIBUTE=NUMBER, such as sex=2; got {text!r}")
    return name, int(number)
