"""`adaptclip report` on files of any model, with every kind of output."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adaptclip.cli.report import report
from adaptclip.errors import ConfigError


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
