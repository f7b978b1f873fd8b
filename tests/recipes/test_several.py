# SPDX-License-Identifier: Apache-2.0
"""A set with several findings per image, as its owner has it: card new, check, three recipes, gate, predict, export.

The images are mosaics of drawn figures; the table is a semicolon CSV with BOM, patients, a clinic and 0/1/-1 columns.
The numbers of a report are computed again by scikit-learn from the predictions and from the owner's table.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw
from recipe_files import load_recipe
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from tiny_clip import write_tiny_checkpoint

import adaptclip as ac
from adaptclip.cli import main as command
from adaptclip.errors import ConfigError
from adaptclip.files import read_json
from adaptclip.predictions import Predictions

FINDINGS = ("crack", "rust", "dent")
SHAPES = {"crack": (230, 40, 40), "rust": (40, 200, 60), "dent": (60, 80, 230)}


def draw(path: Path, shown: set[str], seed: int) -> None:
    """A noisy plate with a spot of its own colour for each finding."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(90, 170, (32, 32, 3), dtype=np.uint8))
    brush = ImageDraw.Draw(image)
    for place, name in enumerate(FINDINGS):
        if name in shown:
            x, y = (int(v) for v in rng.integers(0, 10, 2))
            brush.ellipse((x + 8 * place, y + 4 * place, x + 8 * place + 12, y + 4 * place + 12), fill=SHAPES[name])
    image.save(path)


@pytest.fixture(scope="module")
def plates(tmp_path_factory) -> dict[str, Any]:
    """The owner's folder, and what is true of every image: file -> finding -> 1, 0 or -1."""
    folder = tmp_path_factory.mktemp("plates")
    rng, truth = np.random.default_rng(5), {}
    with (folder / "plates.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=";", lineterminator="\r\n")
        table.writerow(["Photo", "Plant ID", "site", "part", *FINDINGS])
        for number in range(120):
            plant = number // 2
            part = "train" if plant < 24 else "validation" if plant < 36 else "test"
            found = {name: int(rng.random() < 0.4) for name in FINDINGS}
            draw(folder / f"{number}.png", {name for name in FINDINGS if found[name]}, number)
            truth[f"{number}.png"] = dict(found)
            if number % 10 == 3:
                truth[f"{number}.png"]["rust"] = -1
            row = truth[f"{number}.png"]
            table.writerow([f"{number}.png", f"P{plant}", ("north", "south")[plant % 2], part, *row.values()])
    tiny = write_tiny_checkpoint(folder / "tiny")
    block = {
        "source": {"kind": "manifest", "files": "plates.csv"},
        "columns": {"image": "Photo", "labels": list(FINDINGS), "cluster": "Plant ID", "groups": {"site": "site"}},
        "several_labels": {"uncertain": "ignore"}, "allow": ["similar_images"],
        "splits": {"column": "part", "train": "train", "validation": "validation", "test": "test"},
        "gates": [
            {"metric": "labels_macro_auc", "at_least": 0.1, "min_n": 10},
            {"metric": "sensitivity", "positive": "crack", "at_least": 0.99},
        ],
    }  # fmt: skip
    (folder / "plates.md").write_text(f"---\nlicense: mit\nadaptclip: {json.dumps(block)}\n---\n# Plates\n")
    return {"folder": folder, "truth": truth, "backbone": f"local-dir:{tiny}"}


@pytest.fixture(autouse=True)
def anew() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        command([str(argument) for argument in arguments])
    assert ended.value.code == 0


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_probe": ("linear_probe", {"head": "text_init", "epochs": 30, "views": 1}),
    "logistic": ("linear_probe", {"head": "logistic"}),
    "coop": ("coop", {"epochs": 4, "views": 1, "n_ctx": 2, "lr": 0.02}),
    "lora": ("lora", {"steps": 2, "lr": 0.02, "batch_size": 8}),
    "gda": ("tip_adapter", {"variant": "gda", "views": 1}),
    "zero_shot": ("zero_shot", {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_table_of_findings_becomes_a_judged_model(name, plates, tmp_path, capsys):
    recipe, given = RUNS[name]
    module, card = load_recipe(recipe), str(plates["folder"] / "plates.md")
    shots = {} if recipe == "zero_shot" else {"shots": 4}
    cfg = module.Config(
        card=card, backbone=plates["backbone"], cache=plates["folder"] / "cache", out=tmp_path / "run",
        gates="card", **shots, **given,
    )  # fmt: skip
    assert module.main(cfg) in (2, 3)  # no sensitivity is surely 99 % on so few images
    judged, report = Predictions.load(cfg.out / "predictions.parquet"), read_json(cfg.out / "report.json")
    assert judged.positive is not None
    assert judged.known is not None
    assert judged.sigmoid is not None
    files = sorted(plates["truth"], key=lambda file: int(file[:-4]))[72:]
    known = np.array([[plates["truth"][file][finding] for finding in FINDINGS] for file in files])
    # Ids are digests where the table has no id column, so the rows are compared as a set of answers per plant.
    mine = sorted(map(tuple, np.where(judged.known, judged.positive, -1).astype(int).tolist()))
    assert mine == sorted(map(tuple, known.tolist()))
    assert len(set(judged.clusters or ())) == 24
    # The same areas and rates by scikit-learn and by hand, without what nobody knows.
    rows = {row["class"]: row for row in report["findings"]["rows"]}
    areas, limits = [], report["findings"]["thresholds"]["values"]
    for c, finding in enumerate(FINDINGS):
        told = judged.known[:, c]
        shown, probs = judged.positive[told, c], judged.sigmoid[told, c]
        # scikit-learn takes probabilities that differ by less than 1e-8 for equal; their order is that of the ranks.
        areas.append(roc_auc_score(shown, rankdata(probs)))
        found = {metric: rows[finding][metric]["model"]["value"] for metric in ("auc", "sensitivity", "specificity")}
        assert found["auc"] == pytest.approx(areas[-1])
        assert found["sensitivity"] == pytest.approx((probs[shown] >= limits[c]).mean())
        assert found["specificity"] == pytest.approx((probs[~shown] < limits[c]).mean())
        assert rows[finding]["num_known"] == told.sum()
    assert report["overall"]["labels_macro_auc"]["model"]["value"] == pytest.approx(np.mean(areas))
    # The thresholds are the artifact's; predicting an image names what reaches them.
    adapted = ac.load(cfg.out / "artifact", device="cpu")
    assert adapted.thresholds is not None
    np.testing.assert_allclose(adapted.thresholds.values, limits)
    capsys.readouterr()
    photo = plates["folder"] / files[0]
    run("predict", cfg.out, photo, "--format", "jsonl")
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    (answer,) = adapted.predict([photo])
    assert set(line["labels"]) == set(answer.labels)
    assert set(answer.labels) == {
        finding for c, finding in enumerate(FINDINGS) if answer.probabilities[finding] >= limits[c]
    }
    if name == "linear_probe":
        run("export", cfg.out, "--to", "onnx", "--out", tmp_path / "onnx")
        told = read_json(tmp_path / "onnx" / "classes.json")
        assert told["objective"] == "sigmoid"
        np.testing.assert_allclose(told["thresholds"], limits)


def test_the_bench_compares_methods_on_findings(plates, tmp_path):
    module = load_recipe("few_shot")
    cfg = module.Config(
        cards=(str(plates["folder"] / "plates.md"),), backbone=plates["backbone"], shots=(2,), seeds=(1,),
        methods=("zero_shot", "logistic", "gda"), settings=("gda.views=0",), cache=plates["folder"] / "cache",
        out=tmp_path / "bench",
    )  # fmt: skip
    assert module.main(cfg) == 0
    with (cfg.out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["zero_shot", "logistic", "gda"]
    assert all(0 <= float(row["labels_macro_auc"]) <= 1 and row["accuracy"] == "" for row in rows)
    assert "AUC" in (cfg.out / "tables.md").read_text()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match=r"ss_text: the images may show several classes.*--methods zero_shot"):
        module.main(replace(cfg, methods=("zero_shot", "ss_text"), settings=(), out=tmp_path / "other"))


def test_a_recipe_of_one_class_each_refuses_before_anything_is_written(plates, tmp_path):
    module = load_recipe("cocoop")
    cfg = module.Config(card=str(plates["folder"] / "plates.md"), backbone=plates["backbone"], out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"a softmax names exactly one.*linear_probe\.py"):
        module.main(cfg)
    assert list(tmp_path.iterdir()) == []
