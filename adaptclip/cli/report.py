# SPDX-License-Identifier: Apache-2.0
"""`adaptclip report`: numbers with intervals from saved predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptclip.cli.gate import files_read, load_predictions, of_run
from adaptclip.errors import ConfigError, DataError, StorageError, did_you_mean
from adaptclip.settings import ExistingPath

if TYPE_CHECKING:
    from PIL import Image

    from adaptclip.gates import Verdict

FORMATS = (".md", ".json", ".html")


def report(
    predictions: ExistingPath,
    /,
    *,
    baseline: ExistingPath | None = None,
    classes: tuple[str, ...] = (),
    validation: ExistingPath | None = None,
    source: ExistingPath | None = None,
    gates: ExistingPath | None = None,
    images: ExistingPath | None = None,
    out: Path | None = None,
) -> int:
    """Report on the predictions of a run or of any model.

    Args:
        predictions: a run folder, or a file of any model's predictions (Parquet, CSV).
        baseline: predictions to compare with, on the same images; a run folder brings its zero-shot ones.
        classes: class names in the order of their ids, for a file that has numbers only.
        validation: predictions on images neither trained on nor judged, to fit a temperature and sets of classes; a run
            folder brings its own.
        source: predictions of the same model on the domain it was adapted to, to say what another domain changes.
        gates: YAML file of gates whose verdicts the report shows; a run folder brings its own. See `adaptclip gate`.
        images: folder in which the files (or row ids) are paths of images, for thumbnails of the mistakes in HTML.
        out: where the report is written: NAME.html, NAME.md or NAME.json, or NAME for all three.
    """
    from adaptclip.outputs import check_file
    from adaptclip.predictions import Predictions
    from adaptclip.reports.full import full_report
    from adaptclip.reports.measuring import with_thresholds
    from adaptclip.reports.render import print_report
    from adaptclip.training.thresholds import Thresholds

    if out is not None and out.suffix not in ("", *FORMATS):
        raise ConfigError(f"--out {out}: cannot write {out.suffix!r}. {did_you_mean(out.suffix, FORMATS)}")
    for path in _outputs(out) if out is not None else ():
        read = files_read(predictions, baseline, validation, source, gates)
        check_file(path, read, judges_runs=True, images=[images] if images else [])
    given = load_predictions(predictions, baseline, classes)
    known = _known_of_run(predictions)
    file = validation or of_run(predictions, "validation_predictions.parquet")
    on_validation = Predictions.load(file, classes=classes or None) if file else None
    given = replace(given, predictions=with_thresholds(given.predictions, on_validation))
    # The new classes were predicted by zero-shot too, which another baseline is not.
    names = () if baseline else ("new_classes_predictions.parquet", "new_classes_zero_shot_predictions.parquet")
    new = [of_run(predictions, name) for name in names]
    chosen = (known.get("findings") or known.get("multi_label") or {}).get("thresholds")
    result = full_report(
        given.predictions,
        given.baseline,
        validation=on_validation,
        new_classes=(Predictions.load(new[0]), Predictions.load(new[1])) if new and new[0] and new[1] else None,
        validation_used_for=(known.get("split") or {}).get("validation_used_for", "nothing"),
        source=Predictions.load(source, classes=classes or None) if source else None,
        hard_pairs=[tuple(pair["pair"]) for pair in (known.get("fine_grained") or {}).get("hard_pairs", ())],
        thresholds=Thresholds.from_dict(chosen) if chosen else None,
    )
    result |= {key: known[key] for key in ("method", "data", "split", "training", "names", "learning") if key in known}
    if validation is None and known.get("slices"):
        result["slices"] = known["slices"]  # by the features of the images, which predictions do not keep
    _add_probe(predictions, result)
    rules, verdicts = gates or of_run(predictions, "gates.yaml"), None
    if rules:
        verdicts, judgement = given.judge(rules, "report", classes)
        result["judged"] = judgement.to_dict()
    print_report(result, verdicts)
    if out is not None:
        _write(out, result, verdicts, images)
    return 0


def _add_probe(run: Path, result: dict[str, Any]) -> None:
    """Adds the text probe that stands in a run folder, where it is one of the run's own model."""
    from adaptclip.files import digest
    from adaptclip.reports.probe import FORMAT_VERSION
    from adaptclip.seals import read_sealed

    manifest, why = run / "artifact" / "manifest.json", "is of another model or version"
    if not (run / "probe.json").is_file():
        return
    try:
        probe, sealed = read_sealed(run, "probe.json")
        of = digest(manifest.read_bytes()) if manifest.is_file() else None
        if sealed and probe.get("format_version") == FORMAT_VERSION and probe.get("model") == of:
            result["text_probe"] = probe
            return
    except StorageError:
        why = "is damaged"
    result["cautions"] = [
        *result["cautions"],
        f"probe.json in the run folder {why} and is left out; make it again (adaptclip probe)",
    ]


def _known_of_run(path: Path) -> Mapping[str, Any]:
    """What a run's own report knows of data and training, which predictions do not."""
    from adaptclip.seals import read_report

    return read_report(path) if path.is_dir() else {}


def _outputs(out: Path) -> list[Path]:
    return [out.with_suffix(suffix) for suffix in (FORMATS if out.suffix == "" else (out.suffix,))]


def _write(out: Path, result: Mapping[str, Any], verdicts: list[Verdict] | None, images: Path | None) -> None:
    from adaptclip.files import write_json, write_text
    from adaptclip.reports.fine_grained import example_names
    from adaptclip.reports.plots import thumbnails
    from adaptclip.reports.render import to_html, to_markdown

    for path in _outputs(out):
        if path.suffix == ".json":
            write_json(path, {**result, "verdicts": verdicts and [verdict.to_dict() for verdict in verdicts]})
        elif path.suffix == ".md":
            write_text(path, to_markdown(result, verdicts))
        else:
            pictures = None
            if images is not None:
                called = example_names(result["fine_grained"])
                pictures = thumbnails(list(called), lambda row, called=called: _picture(images, called[row]))
            write_text(path, to_html(result, verdicts, pictures=pictures))


def _picture(folder: Path, row: str) -> Image.Image | None:
    """The image that a file name or row id names below `folder`; None where there is none or it cannot be read."""
    from adaptclip.data.dataset import inside
    from adaptclip.data.transforms import decode_image

    try:
        path = inside(folder, row)
        return decode_image(path, row=row) if path.is_file() else None
    except DataError:
        return None
