# SPDX-License-Identifier: Apache-2.0
"""The linear probe as a user runs it: every head from card to artifact, on two processes, and with wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_files import CPU, ROOT, load_recipe
from safetensors.torch import load_file

import adaptclip as ac
from adaptclip import features
from adaptclip.errors import AdaptclipError
from adaptclip.predictions import Predictions

SETTINGS = {
    "logistic": {"C": 5.0},
    "text_init": {"epochs": 30, "views": 2},
    "clap": {"epochs": 30, "views": 2, "clap_weight": 0.5},
    "lp_plus_plus": {"epochs": 30},
}

recipe = load_recipe("linear_probe")


@pytest.fixture
def cfg(tiny, cache, tmp_path):
    """Two shots of digits and a random tiny model."""
    return recipe.Config(backbone=tiny, shots=2, gates="report", cache=cache, out=tmp_path / "run")


def training(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())["training"]


@pytest.mark.parametrize("head", SETTINGS)
def test_every_head_goes_from_card_to_artifact(cfg, head):
    cfg = replace(cfg, head=head, **SETTINGS[head])
    assert recipe.main(cfg) == 0
    judged = Predictions.load(cfg.out / "predictions.parquet")
    baseline = Predictions.load(cfg.out / "zero_shot_predictions.parquet")
    assert len(judged) == len(baseline) > 500
    accuracy, chance = ((p.pred == p.labels).mean() for p in (judged, baseline))
    assert accuracy > chance + 0.03  # even a random tower tells some digits apart
    info = training(cfg.out)
    assert info["trainable_parameters"] == 10 * 48 + {"logistic": 10, "lp_plus_plus": 20}.get(head, 0)
    assert info["validation_used_for"] == ("choosing the epoch" if head == "lp_plus_plus" else "nothing")
    assert {"seconds", "schedule"} <= set(info)
    asked = {k: v for k, v in SETTINGS[head].items() if k != "views"}
    assert {k: info["chosen"][k] for k in asked} == asked
    test = ac.open_data(ac.load_card("digits")).test
    model = ac.load(cfg.out, allow_failed_gates=True)
    live = model.probabilities([test.image(i) for i in range(30)]).numpy()
    assert live == pytest.approx(judged.probs[:30], abs=1e-5)
    again = replace(cfg, out=cfg.out.parent / "again")
    recipe.main(again)
    first, second = (load_file(run.out / "artifact" / "adapter.safetensors") for run in (cfg, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_c_is_chosen_on_the_validation_shots(cfg):
    recipe.main(cfg)
    info = training(cfg.out)
    report = json.loads((cfg.out / "report.json").read_text())
    assert info["validation_used_for"] == report["split"]["validation_used_for"] == "choosing C"
    assert report["split"]["num_validation"] == 20
    best = max(entry["accuracy"] for entry in info["chosen"]["tried"])
    assert info["chosen"]["validation_accuracy"] == best
    fixed = replace(cfg, C=info["chosen"]["C"], out=cfg.out.parent / "fixed")
    recipe.main(fixed)
    a, b = (Predictions.load(run.out / "predictions.parquet") for run in (cfg, fixed))
    assert (a.probs == b.probs).all()


def test_the_cards_larger_smallest_crop_wins(cfg, monkeypatch):
    asked = []
    build = features.train_augment

    def spy(size, **settings):
        asked.append(settings)
        return build(size, **settings)

    monkeypatch.setattr(features, "train_augment", spy)
    for min_scale in (0.5, 0.8):
        recipe.main(replace(cfg, head="lp_plus_plus", epochs=1, min_scale=min_scale, overwrite=True))
    assert [s["scale"] for s in asked] == [(0.6, 1.0), (0.8, 1.0)]  # the card says 0.6
    assert not any(s["horizontal_flip"] for s in asked)


@pytest.mark.slow
def test_two_processes_equal_one(cfg, tmp_path):
    recipe.main(replace(cfg, head="clap", epochs=20, views=2, out=tmp_path / "one"))
    flags = ["--backbone", cfg.backbone, "--shots", "2", "--gates", "report", "--head", "clap", "--epochs", "20"]
    flags += ["--views", "2", "--cache", str(cfg.cache)]
    script = [str(ROOT / "recipes" / "linear_probe.py"), *flags, "--out"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *launcher, *script, str(tmp_path / "two")],
        env={**CPU, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["num_processes"] == 2
    a, b = (Predictions.load(tmp_path / run / "predictions.parquet") for run in ("one", "two"))
    assert a.ids == b.ids
    assert a.probs == pytest.approx(b.probs, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "logistics"}, 'Did you mean "logistic"'),
        ({"lr": 0.1}, "'logistic' has no setting --lr"),
        ({"head": "clap", "C": 1.0}, "'clap' has no setting --C"),
        ({"head": "text_init", "clap_weight": 0.0}, "'text_init' has no setting --clap-weight"),
        ({"C": -1.0}, "--C must be a number above 0"),
        ({"head": "clap", "epochs": -2}, "epochs must be 1 or more, got -2"),
        ({"templates": ("a photo.",), "head": "lp_plus_plus"}, "exactly once"),
        ({"views": -1}, "views"),
        ({"min_scale": 1.5}, "min_scale must be a share of the area, above 0 and up to 1, got 1.5"),
        ({"card": "digit"}, 'Did you mean "digits"'),
    ],
)
def test_wrong_input_is_said_and_leaves_no_artifact(cfg, changes, message):
    with pytest.raises(AdaptclipError, match=message):
        recipe.main(replace(cfg, **changes))
    assert not (cfg.out / "artifact").exists()


def test_no_images_left_for_validation(cfg, tmp_path):
    from PIL import Image

    card = tmp_path / "images"
    for part, count in (("train", 2), ("test", 3)):
        for name, colour in {"red": (200, 20, 20), "blue": (20, 20, 200)}.items():
            (card / part / name).mkdir(parents=True)
            for i in range(count):
                noise = Image.effect_noise((40, 36), 30 + 7 * i + len(part) + len(name)).convert("RGB")
                Image.blend(noise, Image.new("RGB", noise.size, colour), 0.5).save(card / part / name / f"{i}.png")
    cfg = replace(cfg, card=str(card))
    with pytest.raises(AdaptclipError, match=r"--C"):
        recipe.main(cfg)
    assert recipe.main(replace(cfg, C=1.0, overwrite=True)) == 0
