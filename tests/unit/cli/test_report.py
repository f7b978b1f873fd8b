# SPDX-License-Identifier: Apache-2.0
"""`adaptclip report` on files of any model, with every kind of output."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adaptclip.cli.gate import compare, gate
from adaptclip.cli.report import report
from adaptclip.errors import AdaptclipError, ConfigError, GateError, StorageError
from adaptclip.predictions import Predictions
from adaptclip.seals import describe_files, write_sealed


@pytest.fixture
def file(tmp_path):
    """Predictions of a scikit-learn classifier, as a CSV table with class names in the column names."""
    x, y = load_wine(return_X_y=True)
    probs = make_pipeline(StandardScaler(), LogisticRegression(C=0.01)).fit(x[::3], y[::3]).predict_proba(x)
    path = tmp_path / "predictions.csv"
    with path.open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["id", "label", "prob_barolo", "prob_grignolino", "prob_barbera", "group:cellar"])
        names = ("barolo", "grignolino", "barbera")
        for i, (label, row) in enumerate(zip(y, probs, strict=True)):
            table.writerow([f"w{i}.png", names[label], *row, "old" if i % 2 else "new"])
    return path


def test_another_models_predictions_get_the_full_report(file, tmp_path, capsys):
    assert report(file, out=tmp_path / "r") == 0
    assert "178 images, 3 classes" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found) >= {"overall", "groups", "fine_grained", "calibration", "per_class"}
    assert found["verdicts"] is None
    assert "## Calibration" in (tmp_path / "r.md").read_text()
    assert "<h2" in (tmp_path / "r.html").read_text()


def test_one_format_by_suffix_with_gates_and_pictures(file, tmp_path, capsys):
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates:\n  - {metric: accuracy, at_least: 0.5}\n")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(178):
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(folder / f"w{i}.png")
    assert report(file, gates=gates, images=folder, out=tmp_path / "r.html") == 0
    assert not (tmp_path / "r.md").exists()
    text = (tmp_path / "r.html").read_text()
    wrong = json.loads(json.dumps(text.count('<img src="data:image/jpeg')))
    assert wrong >= 1
    assert "✓ pass" in text
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"cannot write '.htm'. Did you mean \".html\""):
        report(file, out=tmp_path / "r.htm")


@pytest.fixture
def run(file, tmp_path):
    """A run folder as `finish_run` leaves it: predictions, what they are compared with, gates, and their digests."""
    run = tmp_path / "run"
    run.mkdir()
    model = Predictions.load(file)
    model.save(run / "predictions.parquet")
    replace(model, probs=np.full_like(model.probs, 1 / 3)).save(run / "zero_shot_predictions.parquet")
    validation = replace(model, ids=tuple(f"v{i}" for i in range(len(model))))
    validation.save(run / "validation_predictions.parquet")
    (run / "gates.yaml").write_text("gates:\n  - {metric: accuracy, no_worse_than: zero_shot, margin: 0.2}\n")
    (run / "artifact").mkdir()
    (run / "artifact" / "manifest.json").write_text("{}")
    write_sealed(run / "report.json", {"method": "coop", "files": describe_files(run)})
    return run


def test_a_run_is_read_as_it_was_written(run, capsys, recwarn):
    before = (run / "report.json").read_bytes()
    with pytest.raises(StorageError, match=r"report\.json is itself what is read"):
        report(run, out=run / "report")
    assert gate([run]) == 0
    assert (run / "report.json").read_bytes() == before
    assert report(run, out=run.parent / "elsewhere.json") == 0
    found = json.loads((run.parent / "elsewhere.json").read_text())
    assert found["method"] == "coop"
    assert "files" not in found  # it is nobody's run
    assert not recwarn.list
    capsys.readouterr()


@pytest.mark.parametrize(
    "name",
    ["predictions.parquet", "zero_shot_predictions.parquet", "gates.yaml", "artifact/manifest.json", "report.json"],
)
def test_what_changed_in_a_run_is_refused(run, name, capsys):
    whole = (run / name).read_bytes()
    other = Predictions.load(run / "predictions.parquet")
    other = replace(other, ids=other.ids[::-1])
    other.save(run.parent / "swapped.parquet")
    draw = np.random.default_rng(0)
    cases = [whole[:-2], b"", (run.parent / "swapped.parquet").read_bytes()]
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[draw.integers(len(whole))] ^= 1 << int(draw.integers(8))
        cases.append(bytes(damaged))
    for content in cases:
        (run / name).write_bytes(content)
        for read in (lambda: gate([run]), lambda: report(run)):
            with pytest.raises(AdaptclipError):
                read()
    if name == "predictions.parquet":
        with pytest.raises(AdaptclipError, match="missing or changed"):
            compare(run, run, group="cellar")
        with pytest.raises(AdaptclipError, match="missing or changed"):
            gate([run.parent / "swapped.parquet"], baseline=run, gates=run / "gates.yaml")
        (run / name).write_bytes((run.parent / "swapped.parquet").read_bytes())  # by itself a file is nobody's
        assert gate([run / name], gates=run / "gates.yaml", baseline=run / name) is not None
    (run / name).unlink()
    with (
        pytest.raises(AdaptclipError) if name != "report.json" else pytest.warns(UserWarning, match="keeps no digests")
    ):
        gate([run])
    capsys.readouterr()


def test_a_changed_run_is_not_compared_with(run, tmp_path, capsys):
    rules = tmp_path / "others.yaml"
    rules.write_text("gates:\n  - {metric: accuracy, no_worse_than: run, margin: 0.2}\n")
    model = Predictions.load(run / "predictions.parquet")
    model.save(tmp_path / "model.parquet")
    assert gate([tmp_path / "model.parquet"], gates=rules) == 3  # the model itself
    replace(model, probs=np.full_like(model.probs, 1 / 3)).save(run / "predictions.parquet")
    with pytest.raises(GateError, match=r"^gate .* no worse than run .*predictions\.parquet is missing or changed"):
        gate([tmp_path / "model.parquet"], gates=rules)
    capsys.readouterr()


def test_a_run_without_its_report_is_refused(run):
    (run / "run.json").write_text("{}")
    (run / "report.json").unlink()
    with pytest.raises(StorageError, match=r"has no report\.json, which every finished run has"):
        gate([run])


def test_gates_of_a_run_are_replaced_by_naming_others(run, tmp_path, capsys):
    (run / "gates.yaml").write_text("gates: []\n")
    with pytest.raises(StorageError, match=r"gates\.yaml is missing or changed"):
        gate([run])
    (tmp_path / "others.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.5}\n")
    assert gate([run], gates=tmp_path / "others.yaml") == 0
    capsys.readouterr()


def test_predictions_that_the_run_did_not_write_are_refused(run, capsys):
    (run / "new_classes_predictions.parquet").write_bytes((run / "predictions.parquet").read_bytes())
    with pytest.raises(StorageError, match=r"new_classes_predictions\.parquet is none of the files"):
        report(run)
    capsys.readouterr()


def test_a_probe_that_changed_is_left_out(run, capsys):
    for content in ("[]", "{", json.dumps({"format_version": 1, "model": None})):
        (run / "probe.json").write_text(content)
        report(run, out=run.parent / "r.json")
        found = json.loads((run.parent / "r.json").read_text())
        assert any("probe.json" in caution for caution in found["cautions"])
        assert "text_probe" not in found
    capsys.readouterr()
