"""The end of every recipe: judge the predictions, write the run folder, print the table, return the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from adaptclip.adapters import Adapter
from adaptclip.artifact import save_artifact
from adaptclip.backbone import ClipBackbone
from adaptclip.data.card import Card
from adaptclip.data.dataset import DomainData
from adaptclip.data.fewshot import FewShotSplit
from adaptclip.gates import check_gates, exit_code, load_gates
from adaptclip.reports.render import print_report, to_markdown
from adaptclip.reports.summary import build_report
from adaptclip.storage import write_json, write_text, write_yaml
from adaptclip.types import GateRule, Predictions

REPORT_ONLY = "report"
"""Value of a recipe's `gates` setting that judges by the card's gates without letting them decide the exit code."""


def choose_gates(gates: str, card: Card) -> Sequence[GateRule]:
    """Returns the rules that a recipe's `gates` setting names: the card's own, or those of a YAML file.

    Raises:
        GateError: the file is missing or not valid.
    """
    return card.gates if gates in ("card", REPORT_ONLY) else load_gates(Path(gates))


def finish_run(
    out: Path,
    adapter: Adapter,
    backbone: ClipBackbone,
    data: DomainData,
    split: FewShotSplit | None,
    *,
    method: str,
    predictions: Predictions,
    zero_shot: Predictions | None,
    rules: Sequence[GateRule],
    gates: str,
    accelerator: Accelerator,
    training: Mapping[str, Any] | None = None,
) -> int:
    """Writes predictions, report.json, report.md, gates.yaml and the artifact, and prints the report.

    Args:
        out: the run folder.
        adapter: the trained adapter, unwrapped.
        backbone: what it was trained on.
        data: what it was trained on.
        split: the images it was trained on; None where nothing was.
        method: a key of ADAPTERS.
        predictions: on the whole test split, the same on every process.
        zero_shot: the same of the backbone without adaptation; None where that is what was judged.
        rules: the gates (`choose_gates`), read before training so that a mistake in them costs no training.
        gates: the recipe's setting; REPORT_ONLY judges but does not decide.
        accelerator: the main process writes, all get the exit code.
        training: what the report says of it, JSON-able: `trainable_parameters`, `seconds`, `schedule`, `chosen`
            (hyper-parameters), `validation_used_for` (in words) and whatever else the method has to tell.

    Returns:
        0 all gates passed, none is declared, or REPORT_ONLY; 2 one failed; 3 one is inconclusive.
    """
    code = [0]
    if accelerator.is_main_process:
        declared = {"outcomes": data.card.outcomes, "intersections": data.card.intersections}
        predictions = replace(predictions, **declared)
        zero_shot = zero_shot and replace(zero_shot, **declared)
        verdicts = check_gates(predictions, zero_shot, rules)
        report = build_report(predictions, zero_shot)
        # How the shots for validation were used belongs to the result: no recipe chooses anything on test.
        report["split"] = split and {
            "shots": split.shots, "seed": split.seed, "rule": split.rule, "digest": split.digest,
            "num_train": len(split.train), "num_validation": len(split.validation),
            "validation_used_for": dict(training or {}).get("validation_used_for", "nothing"),
            "short_classes": dict(split.short_classes),
        }  # fmt: skip
        report["training"] = training and dict(training)
        predictions.save(out / "predictions.parquet")
        if zero_shot is not None:
            zero_shot.save(out / "zero_shot_predictions.parquet")
        write_yaml(out / "gates.yaml", {"gates": [rule.model_dump(exclude_defaults=True) for rule in rules]})
        write_json(out / "report.json", {**report, "verdicts": [verdict.to_dict() for verdict in verdicts]})
        write_text(out / "report.md", to_markdown(report, verdicts))
        save_artifact(
            out / "artifact", adapter, backbone, data, split, method=method,
            report=report, verdicts=verdicts, overwrite=True,
        )  # fmt: skip
        print_report(report, verdicts)
        accelerator.print(f"{out}: report.md, predictions.parquet, metrics.jsonl, artifact/ (for `adaptclip predict`)")
        code = [0 if gates == REPORT_ONLY or not rules else exit_code(verdicts)]
    # The launcher sees the codes of all processes: one that left with another would read as a crash.
    if accelerator.num_processes > 1:
        broadcast_object_list(code)
    return code[0]
