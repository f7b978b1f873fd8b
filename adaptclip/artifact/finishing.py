# SPDX-License-Identifier: Apache-2.0
"""The end of every recipe: judge the predictions, write the run folder, print the table, return the exit code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import broadcast_object_list

from adaptclip.artifact import save_artifact
from adaptclip.errors import DataError, GateError, SplitError
from adaptclip.features import FeatureCache
from adaptclip.files import write_text, write_yaml
from adaptclip.gate_rules import ZERO_SHOT, GateRule
from adaptclip.gates import Verdict, check_gates, check_rules, exit_code, load_gates
from adaptclip.gates.loading import load_references
from adaptclip.gates.verdicts import note_judgement
from adaptclip.methods.predicting import predict
from adaptclip.reports.fine_grained import example_names
from adaptclip.reports.full import full_report
from adaptclip.reports.learning import learning_curves
from adaptclip.reports.measuring import with_thresholds
from adaptclip.reports.plots import thumbnails
from adaptclip.reports.render import print_report, to_html, to_markdown
from adaptclip.seals import REPORT_FILE, describe_files, write_sealed
from adaptclip.training.thresholds import Thresholds, choose_thresholds

if TYPE_CHECKING:
    from accelerate import Accelerator

    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import DomainData, ImageDataset
    from adaptclip.data.shots import FewShotSplit
    from adaptclip.methods.method import Method
    from adaptclip.predictions import Predictions
    from adaptclip.training.criterion import Objective

REPORT_ONLY = "report"
"""Value of a recipe's `gates` setting that judges by the card's gates without letting them decide the exit code."""


def choose_gates(gates: str, data: DomainData) -> Sequence[GateRule]:
    """Returns the rules that a recipe's `gates` setting names: the card's own, or those of a YAML file.

    Args:
        gates: "card", "report", or the path of a YAML file.
        data: the images that will be judged. Rules and outcomes that do not fit them are refused here, before anything
            is encoded or learnt.

    Raises:
        StorageError: the file is missing or is not YAML.
        GateError: a rule is not valid, names a group, level or class that the data do not have, or needs a class of
            which there is no test image.
        SplitError: there is no test image at all.
        DataError: an outcome of the card is about classes that were left out.
    """
    rules = data.card.gates if gates in ("card", REPORT_ONLY) else load_gates(Path(gates))
    if rules and not data.has_classes:
        raise GateError(f"card {data.card.name} has captions and no classes: no gate can be judged with it")
    if len(data.test) == 0:
        raise SplitError(
            f"card {data.card.name}: there is no test image, so nothing that is learnt could be judged. Name a split "
            "with images as `test` under `splits:`, or let one be drawn (`splits: {fractions: ...}`)"
        )
    check_rules(rules, data.test)
    _check_references(rules, load_references(rules, _places(gates, data)), data.test)
    for rule in rules:
        _require_images(rule, data)
    try:
        for outcome in data.card.outcomes:  # classes may have been taken away since the card was checked (base and new)
            outcome.check(data.class_names, data.test.levels, several=data.test.several)
    except DataError as error:
        raise DataError(f"card {data.card.name}: {error}") from error
    return rules


def _places(gates: str, data: DomainData) -> list[Path]:
    """Where a run is looked up that gates name: beside the file they are from, then where the command was given."""
    source = data.card.path if gates in ("card", REPORT_ONLY) else Path(gates)
    return [*([source.parent] if source is not None else []), Path()]


def _check_references(rules: Sequence[GateRule], references: Mapping[str, Predictions], test: ImageDataset) -> None:
    """Raises GateError where a run that gates compare with did not judge these images; known before training."""
    for rule in rules:
        reference = references.get(rule.no_worse_than or "")
        if reference is None:
            continue
        lacking = set(test.ids) - set(reference.ids)
        if lacking or len(reference) != len(test) or tuple(reference.class_names) != tuple(test.class_names):
            what = (
                "has other classes" if tuple(reference.class_names) != tuple(test.class_names)
                else f"judged {len(reference):,} images, of which {len(test) - len(lacking):,} are among the "
                f"{len(test):,} test images of the card"
            )  # fmt: skip
            raise GateError(
                f'card: the gate "{rule.title}" compares with a run on other images: {rule.no_worse_than} {what}'
            )


def _require_images(rule: GateRule, data: DomainData) -> None:
    """Raises GateError where the test part lacks the classes that a gate is about."""
    names = data.test.class_names if rule.level is None else data.test.levels[rule.level]
    seen = {names[c] for c in np.flatnonzero(data.test.class_counts())}
    where = f'card {data.card.name}: the gate "{rule.title}"'
    if rule.positive is not None:
        # An image that shows none of its classes is on the other side where images may show several.
        several = data.test.several
        for side in (side for side in rule.measure.sides if side or not several):
            asked = [name for name in dict.fromkeys(names) if (name in rule.positive) == bool(side)]
            if not seen & set(asked):
                raise GateError(
                    f"{where} needs test images of {' or '.join(map(repr, asked[:3]))}, but there are none. Add some, "
                    "or take the gate out"
                )
    elif rule.measure.over_classes:
        lacking = [name for name in dict.fromkeys(names) if name not in seen]
        if lacking:
            raise GateError(
                f"{where} is a mean over all classes, and {len(lacking)} of {len(set(names))} have no test image: "
                f"{', '.join(map(repr, lacking[:3]))}. Add some, take the classes out, or judge by accuracy"
            )


def predict_validation(
    adapter: Any, validation: ImageDataset, cache: FeatureCache, *, accelerator: Accelerator | None = None
) -> Predictions | None:
    """Predicts the few-shot validation images, on which the report fits a temperature and sets of classes.

    Args:
        adapter: the trained adapter, unwrapped.
        validation: images that it was not trained on and that are not judged.
        cache: of image features; not used where the adapter has changed the image tower.
        accelerator: divides the work among its processes.

    Returns:
        None where there are no such images.
    """
    if len(validation) == 0:
        return None
    store = cache if adapter.encoder is adapter.backbone else FeatureCache(None)
    features = store.get(adapter.encoder, validation, accelerator=accelerator)
    return predict(adapter, features, validation, accelerator=accelerator)


def finish_run(
    out: Path,
    adapter: Method,
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
    validation: Predictions | None = None,
    new_classes: tuple[Predictions, Predictions] | None = None,
    names: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> int:
    """Writes predictions, report.json, report.md, report.html, gates.yaml and the artifact, and prints the report.

    Args:
        out: the run folder.
        adapter: the trained adapter, unwrapped.
        backbone: what it was trained on.
        data: what it was trained on.
        split: the images it was trained on; None where nothing was.
        method: a key of the registry (`methods.registry`).
        predictions: on the whole test split, the same on every process.
        zero_shot: the same of the backbone without adaptation; None where that is what was judged.
        rules: the gates (`choose_gates`), read before training so that a mistake in them costs no training.
        gates: the recipe's setting; REPORT_ONLY judges but does not decide.
        accelerator: the main process writes, all get the exit code.
        validation: of the few-shot validation images (`predict_validation`); None where there are none.
        new_classes: (adapted, zero-shot) predictions of classes that were not learnt (`predict_new_classes`), or None.
        names: a name audit (`reports.names`), or None.
        training: what the report says of it, JSON-able: `trainable_parameters`, `seconds`, `schedule`, `chosen`
            (hyper-parameters), `validation_used_for` (in words) and whatever else the method has to tell.
        objective: what the adapter learnt to tell; None is softmax. Under sigmoid it says how thresholds are chosen, on
            the few-shot validation images.

    Returns:
        0 all gates passed, none is declared, or REPORT_ONLY; 2 one failed; 3 one is inconclusive.
    """
    code = [0]
    if accelerator.is_main_process:
        card = data.card
        declared = {"outcomes": card.outcomes, "intersections": card.intersections, "expected": card.expect}
        # By digest and without its place: a run that is done again elsewhere writes the same bytes.
        made_by = {"method": method, "backbone": f"{Path(backbone.name).name} ({backbone.digest})"}
        thresholds, training = _thresholds(objective, validation, data.class_names, training)
        if predictions.several and thresholds is not None:  # gates and report name classes from the same ones
            predictions = replace(predictions, thresholds=thresholds.values)
        predictions = with_thresholds(replace(predictions, **declared, made_by=made_by), validation)
        # Judged by the same thresholds: another operating point would compare rules, and not models.
        declared["outcomes"] = predictions.outcomes
        zero_shot = zero_shot and replace(zero_shot, **declared, made_by={"method": ZERO_SHOT})
        references = load_references(rules, _places(gates, data))
        verdicts = check_gates(predictions, zero_shot, rules, references=references)
        judgement = note_judgement(out, f"recipe {method}", predictions, rules)
        # How the shots for validation were used belongs to the result: no recipe chooses anything on test.
        used_for = dict(training or {}).get("validation_used_for", "nothing")
        report = full_report(
            predictions, zero_shot, validation=validation, validation_used_for=used_for, new_classes=new_classes,
            thresholds=thresholds,
            hard_pairs=[pair for pair in data.card.hard_pairs if set(pair) <= set(data.class_names)],
        )  # fmt: skip
        report["method"] = method
        report["judged"] = judgement.to_dict()  # later judgements of the run must be of the same images
        report["data"] = describe_data(data)
        report["split"] = split and {
            "shots": split.shots, "seed": split.seed, "rule": split.rule, "digest": split.digest,
            "num_train": len(split.train), "num_validation": len(split.validation), "validation_used_for": used_for,
            "short_classes": dict(split.short_classes),
        }  # fmt: skip
        report["training"] = training and dict(training)
        report["names"] = names and dict(names)
        made = {"": predictions, "zero_shot_": zero_shot, "validation_": validation}
        if new_classes is not None:
            made |= {"new_classes_": new_classes[0], "new_classes_zero_shot_": new_classes[1]}
        written = ["gates.yaml", "artifact/manifest.json"]
        for name, judged in made.items():
            if judged is not None:
                judged.save(out / f"{name}predictions.parquet")
                written.append(f"{name}predictions.parquet")
        write_yaml(out / "gates.yaml", {"gates": [rule.model_dump(exclude_defaults=True) for rule in rules]})
        save_artifact(
            out / "artifact", adapter, backbone, data, split, method=method,
            report=report, verdicts=verdicts, rules=rules, thresholds=thresholds, overwrite=True,
        )  # fmt: skip
        report["learning"] = learning_curves(out)
        # By these, whoever reads the run later knows that its files are the ones that were judged.
        report["files"] = describe_files(out, written)
        _write_report(out, report, verdicts, data.test if data.card.show_images and data.test.has_pixels else None)
        print_report(report, verdicts)
        accelerator.print(
            f"{out}: report.html, report.md, predictions.parquet, metrics.jsonl, artifact/ (for `adaptclip predict`)"
        )
        code = [0 if gates == REPORT_ONLY or not rules else exit_code(verdicts)]
    # The launcher sees the codes of all processes: one that left with another would read as a crash.
    if accelerator.num_processes > 1:
        broadcast_object_list(code)
    return code[0]


def _thresholds(
    objective: Objective | None,
    validation: Predictions | None,
    class_names: Sequence[str],
    training: Mapping[str, Any] | None,
) -> tuple[Thresholds | None, Mapping[str, Any] | None]:
    """Chooses the thresholds of the sigmoid objective, and adds to what is told of training that they were chosen."""
    if objective is None or objective.name == "softmax":
        return None, training
    found = choose_thresholds(validation, class_names, objective.thresholds)
    if objective.thresholds.kind == "fixed":
        return found, {**(training or {}), "objective": str(objective)}
    if not found.num_images:
        warnings.warn(
            "there are no validation images to choose thresholds on: every class is named from a probability of 0.5. "
            "Take fewer --shots, so that images are left, or give a number (--objective sigmoid:0.5).",
            stacklevel=3,
        )
        return found, {**(training or {}), "objective": str(objective)}
    used = dict(training or {}).get("validation_used_for", "nothing")
    chosen = f"the threshold of each class ({objective.thresholds}, {found.num_images} images)"
    uses = chosen if used == "nothing" else f"{used}; {chosen}"
    return found, {**(training or {}), "objective": str(objective), "validation_used_for": uses}


def describe_data(data: DomainData) -> dict[str, Any]:
    """What a report says of its images: JSON-able, from the data card and what was found when it was opened."""
    card = data.card
    return {
        "name": card.name,
        "pretty_name": card.front_matter.get("pretty_name"),
        "license": card.front_matter.get("license"),
        "source": card.source.kind,
        "digest": data.digest,
        "images": {part: len(images) for part, images in data.parts.items()},
        "known_issues": list(card.known_issues),
        "allowed": list(data.notes),
        "worries": list(data.worries),
        "skipped": list(data.skipped),
    }


def _write_report(out: Path, report: dict[str, Any], verdicts: Sequence[Verdict], images: ImageDataset | None) -> None:
    """Writes report.json, report.md and report.html, the last with images of mistakes where images may be shown."""
    write_sealed(out / REPORT_FILE, {**report, "verdicts": [verdict.to_dict() for verdict in verdicts]})
    write_text(out / "report.md", to_markdown(report, verdicts))
    pictures = None
    if images is not None:
        position = {row: i for i, row in enumerate(images.ids)}
        pictures = thumbnails(list(example_names(report["fine_grained"])), lambda row: images.image(position[row]))
    write_text(out / "report.html", to_html(report, verdicts, pictures=pictures))
