# SPDX-License-Identifier: Apache-2.0
"""The sigmoid objective from the command line to what is used: recipes, files, predictions, a run that goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from made_artifacts import edit_manifest
from recipe_files import load_recipe
from tiny_clip import write_tiny_checkpoint

import adaptclip as ac
from adaptclip.cli import main as command
from adaptclip.errors import ArtifactError, ConfigError
from adaptclip.files import read_json, read_tensors
from adaptclip.predictions import Predictions
from adaptclip.training.thresholds import ThresholdRule, best_thresholds

RECIPES = {name: load_recipe(name) for name in ("coop", "lora", "linear_probe")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shared")
    tiny = write_tiny_checkpoint(folder / "tiny")
    (folder / "none.yaml").write_text("gates: []\n")
    return {
        "backbone": f"local-dir:{tiny}", "cache": folder / "cache", "shots": 2, "gates": str(folder / "none.yaml"),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch) -> Iterator[None]:
    """Judging is not what takes the time here; and Accelerate starts anew, as in a process of its own."""
    open_data = ac.open_data

    def few(*args, **kwargs):
        data = open_data(*args, **kwargs)
        return replace(data, test=data.test.select(range(0, len(data.test), 6)))

    monkeypatch.setattr(ac, "open_data", few)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config(name: str, shared: dict[str, Any], out: Path, **changes: Any) -> Any:
    short: dict[str, dict[str, Any]] = {
        "coop": {"epochs": 6, "views": 2, "batch_size": 10, "n_ctx": 3, "lr": 0.02, "save_every": 3},
        "lora": {"steps": 3, "lr": 0.02, "batch_size": 10},
        "linear_probe": {"head": "clap", "epochs": 20, "views": 2},
    }
    return RECIPES[name].Config(**{**shared, "objective": "sigmoid", "out": out, **short[name], **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("coop", {"mitigate": "class-weights"}),
        ("lora", {"objective": "sigmoid:sensitivity=0.9"}),
        ("linear_probe", {"mitigate": "group-dro:stroke_weight"}),
    ],
)
@pytest.mark.filterwarnings("ignore:class-weights changes nothing")
def test_a_run_from_card_to_artifact(name, changes, shared, tmp_path):
    cfg = config(name, shared, tmp_path / "run", **changes)
    assert RECIPES[name].main(cfg) == 0
    report = read_json(cfg.out / "report.json")
    judged, held = (Predictions.load(cfg.out / f"{part}predictions.parquet") for part in ("", "validation_"))
    assert judged.sigmoid is not None
    assert held.sigmoid is not None
    # The softmax of the same logits: single-label metrics are as ever, and the order within an image is the same.
    np.testing.assert_allclose(judged.probs.sum(1), 1, atol=1e-5)
    odds = judged.sigmoid.astype(float) / (1 - judged.sigmoid)
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), judged.probs, atol=1e-4)
    rule = ThresholdRule("sensitivity", 0.9) if name == "lora" else ThresholdRule()
    expected = best_thresholds(held.sigmoid, held.labels[:, None] == np.arange(10), rule)
    info = report["multi_label"]["thresholds"]
    assert info == {
        "rule": str(rule), "values": expected.tolist(), "num_images": len(held), "positives": [2] * 10, "fallbacks": [],
    }  # fmt: skip
    assert f"the threshold of each class ({rule}, 20 images)" in report["training"]["validation_used_for"]
    assert report["split"]["validation_used_for"] == report["training"]["validation_used_for"]
    assert report["training"]["objective"] == f"sigmoid:{rule}"
    manifest = read_json(cfg.out / "artifact" / "manifest.json")
    assert manifest["objective"] == {"name": "sigmoid", "thresholds": info}
    # The saved model says of the judged images what the run said.
    model = ac.load(cfg.out)
    test = ac.open_data(ac.load_card("digits")).test
    pictures = [test.image(i) for i in range(6)]
    np.testing.assert_allclose(model.probabilities(pictures).numpy(), judged.sigmoid[:6], atol=1e-5)
    for i, answer in enumerate(model.predict(pictures)):
        assert set(answer.labels) == {judged.class_names[c] for c in np.flatnonzero(judged.sigmoid[i] >= expected)}
        assert answer.label == judged.class_names[judged.pred[i]]
    assert "Several labels at once" in (cfg.out / "artifact" / "README.md").read_text()
    if name == "lora":
        names = {path.name for path in (cfg.out / "artifact").iterdir()}
        assert {"adapter_model.safetensors", "class_bias.safetensors"} < names


def test_a_broken_run_goes_on_with_its_bias(shared, tmp_path, monkeypatch):
    whole = config("coop", shared, tmp_path / "whole")
    assert RECIPES["coop"].main(whole) == 0
    cfg, steps = config("coop", shared, tmp_path / "broken"), ac.train_steps

    def breaks(*args, **kwargs):
        for step, batch in steps(*args, **kwargs):
            if step == 5:
                raise KeyboardInterrupt
            yield step, batch

    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setattr(ac, "train_steps", breaks)
        with pytest.raises(KeyboardInterrupt):
            RECIPES["coop"].main(cfg)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert RECIPES["coop"].main(replace(cfg, resume=True)) == 0
    states = [read_tensors(out / "artifact" / "adapter.safetensors") for out in (whole.out, cfg.out)]
    assert set(states[0]) == {"context", "bias_start", "bias_offset"}
    assert states[0]["bias_offset"].abs().min() > 0
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    cfg = config("linear_probe", shared, tmp_path_factory.mktemp("run") / "run")
    assert RECIPES["linear_probe"].main(cfg) == 0
    return cfg.out


def test_the_commands_tell_all_that_is_named(run, tmp_path, capsys):
    test = ac.open_data(ac.load_card("digits")).test
    (tmp_path / "images").mkdir()
    for i in range(3):
        test.image(i).save(tmp_path / "images" / f"{i}.png")
    expected = ac.load(run).predict(sorted((tmp_path / "images").iterdir()))
    printed = {}
    for form in ("table", "csv", "jsonl"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(["predict", str(run), str(tmp_path / "images"), "--format", form, "--top-k", "1"])
        assert stop.value.code == 0
        printed[form] = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("card ")]
    rows = [json.loads(line) for line in printed["jsonl"]]
    assert [tuple(row["labels"]) for row in rows] == [answer.labels for answer in expected]
    table = list(csv.DictReader(printed["csv"]))
    assert [tuple(json.loads(row["labels"])) for row in table] == [answer.labels for answer in expected]
    assert any("labels" in line for line in printed["table"])
    # Judged again from its files, with the thresholds of the run.
    with pytest.raises(SystemExit) as stop:
        command(["report", str(run), "--out", str(tmp_path / "again.json")])
    assert stop.value.code == 0
    assert read_json(tmp_path / "again.json")["multi_label"] == read_json(run / "report.json")["multi_label"]


def thresholds(**changes: Any) -> dict[str, Any]:
    right = {"rule": "f1", "values": [0.5] * 10, "num_images": 20, "positives": [2] * 10, "fallbacks": []}
    return {"objective": {"name": "sigmoid", "thresholds": {**right, **changes}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": None}, "objective should be that of the settings, 'sigmoid'"),
        ({"objective": "sigmoid"}, "objective should be that of the settings"),
        ({"objective": {"name": "softmax"}}, "objective should be that of the settings"),
        ({"objective": {"name": "sigmoid"}}, "thresholds should have rule, values"),
        ({"objective": {"name": "sigmoid", "thresholds": {"values": []}}}, "thresholds should have"),
        (thresholds(values=[0.5] * 9), "10 numbers from 0 to 1"),
        (thresholds(values=[0.5] * 9 + [1.5]), "10 numbers from 0 to 1"),
        (thresholds(values=[0.5] * 9 + [float("nan")]), "holds NaN, which is no JSON"),
        (thresholds(values=[0.5] * 9 + ["0.5"]), "10 numbers from 0 to 1"),
        (thresholds(values=[0.5] * 9 + [True]), "10 numbers from 0 to 1"),
        (thresholds(values=[0.5] * 9 + [10**400]), "10 numbers from 0 to 1"),
        (thresholds(values="0.5"), "values of the thresholds should be list"),
        (thresholds(rule=1), "rule of the thresholds should be str"),
        (thresholds(num_images=True), "num_images of the thresholds should be int"),
        (thresholds(positives=[21] * 10), "10 numbers from 0 to 20"),
        (thresholds(fallbacks=["eleven"]), "names of classes"),
        (thresholds(fallbacks=[{}]), "names of classes"),
        (
            {"settings": {"head": "clap", "templates": ["a photo of a {}."]}},
            "should be that of the settings, 'softmax'",
        ),
    ],
)
def test_a_manifest_with_other_thresholds_is_refused(run, tmp_path, change, message):
    import shutil

    shutil.copytree(run / "artifact", tmp_path / "artifact")
    edit_manifest(tmp_path / "artifact", **change)
    with pytest.raises(ArtifactError, match=message):
        ac.load(tmp_path / "artifact")


def test_without_validation_images_thresholds_stay_at_a_half(shared, tmp_path, monkeypatch):
    cfg = config("linear_probe", shared, tmp_path / "run")
    monkeypatch.setattr(ac, "predict_validation", lambda *_, **__: None)
    with pytest.warns(UserWarning, match=r"no validation images to choose thresholds on(.|\n)*sigmoid:0\.5"):
        assert RECIPES["linear_probe"].main(cfg) == 0
    info = read_json(cfg.out / "report.json")["multi_label"]["thresholds"]
    assert (info["values"], info["num_images"]) == ([0.5] * 10, 0)
    assert len(info["fallbacks"]) == 10
    AcceleratorState._reset_state(reset_partial_state=True)
    fixed = replace(cfg, objective="sigmoid:0.3", overwrite=True)
    assert RECIPES["linear_probe"].main(fixed) == 0
    info = read_json(cfg.out / "report.json")["multi_label"]["thresholds"]
    assert (info["values"], info["fallbacks"], info["rule"]) == ([0.3] * 10, [], "0.3")


def test_what_cannot_be_is_said_before_anything_is_written(shared, tmp_path):
    for changes, message in (
        ({"head": "logistic", "epochs": 0, "views": None}, "epochs must be 1 or more"),
        ({"head": "lp_plus_plus"}, "sigmoid takes logistic, text_init or clap"),
        ({"objective": "sigmoid:f2"}, 'Did you mean "f1"'),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ConfigError, match=message):
            RECIPES["linear_probe"].main(config("linear_probe", shared, tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []
