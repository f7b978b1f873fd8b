# SPDX-License-Identifier: Apache-2.0
"""Tip-Adapter, Tip-Adapter-F, GDA and SS-Text as a user runs them, on two shots of digits and a random tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from recipe_files import load_recipe
from safetensors.torch import load_file

import adaptclip as ac
from adaptclip.errors import AdaptclipError, ConfigError
from adaptclip.predictions import Predictions

recipe = load_recipe("tip_adapter")


@pytest.fixture
def cfg(tiny, cache, tmp_path):
    return recipe.Config(
        backbone=tiny, shots=2, views=2, epochs=10, batch_size=8, lr=0.01, gates="report", save_every=5, cache=cache,
        out=tmp_path / "run",
    )  # fmt: skip


def as_variant(cfg: Any, variant: str, **changes: Any) -> Any:
    """The settings of tip_adapter_f, without those of its training for a variant that is computed."""
    trained = {} if variant == "tip_adapter_f" else dict.fromkeys(("epochs", "batch_size", "lr"))
    return replace(cfg, variant=variant, **trained, **changes)


def adapter_file(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "adapter.safetensors")


def report_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


@pytest.mark.parametrize(
    ("variant", "method", "chosen", "parameters"),
    [
        ("tip_adapter", "tip_adapter", {"alpha", "beta"}, 0),
        ("tip_adapter_f", "tip_adapter", {"alpha", "beta"}, 20 * 48),
        ("gda", "gda", {"alpha"}, 0),
        ("ss_text", "ss_text", set(), 0),
    ],
)
def test_every_variant_ends_in_an_artifact_that_predicts_as_the_run_did(cfg, variant, method, chosen, parameters):
    assert recipe.main(as_variant(cfg, variant)) == 0
    judged = Predictions.load(cfg.out / "predictions.parquet")
    test = ac.open_data(ac.load_card("digits")).test
    images = [test.image(i) for i in range(30)]
    model = ac.load(cfg.out, allow_failed_gates=True)
    assert model.manifest["method"] == method
    assert model.probabilities(images).numpy() == pytest.approx(judged.probs[:30], abs=1e-5)
    zero_shot = Predictions.load(cfg.out / "zero_shot_predictions.parquet")
    assert abs(judged.probs - zero_shot.probs).max() > 0.01
    report = report_of(cfg.out)
    training = report["training"]
    assert set(training["chosen"]) == chosen
    assert training["trainable_parameters"] == parameters
    assert training["seconds"] > 0
    assert ("cosine, 10 epochs" in training["schedule"]) == (variant == "tip_adapter_f")
    used = report["split"]["validation_used_for"]
    assert used == "nothing" if variant == "ss_text" else "on 20 images" in used
    assert {name: model.manifest["settings"][name] for name in chosen} == training["chosen"]
    assert bool((cfg.out / "metrics.jsonl").read_text()) == (variant == "tip_adapter_f")


def test_tip_f_learns_from_the_keys_of_tip_and_is_the_same_every_time(cfg, tmp_path):
    runs = {}
    for name, variant in (("tip_adapter", "tip_adapter"), ("once", "tip_adapter_f"), ("again", "tip_adapter_f")):
        recipe.main(as_variant(cfg, variant, out=tmp_path / name))
        runs[name] = adapter_file(tmp_path / name)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(runs["once"]["keys"], runs["again"]["keys"])
    assert torch.equal(runs["once"]["key_labels"], runs["tip_adapter"]["key_labels"])
    moved = (runs["once"]["keys"] - runs["tip_adapter"]["keys"]).abs().max().item()
    assert 0.01 < moved < 1  # AdamW moves a weight by about the rate per step, 20 steps here
    losses = [json.loads(line)["loss"] for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_the_test_split_is_read_after_every_choice(cfg, monkeypatch):
    events = []
    get, choose = ac.FeatureCache.get, ac.TipAdapter.choose

    def recorded_get(self, backbone, dataset, **options):
        events.append(len(dataset))
        return get(self, backbone, dataset, **options)

    def recorded_choose(self, validation, **grids):
        events.append("choice")
        return choose(self, validation, **grids)

    monkeypatch.setattr(ac.FeatureCache, "get", recorded_get)
    monkeypatch.setattr(ac.TipAdapter, "choose", recorded_choose)
    recipe.main(cfg)
    # The report reads the validation images once more, for its temperature; the test images are read once, before that.
    assert events == [20, 20, "choice", "choice", "choice", 720, 20]


def test_fixed_values_use_no_validation(cfg):
    recipe.main(as_variant(cfg, "tip_adapter", choose="fixed", alpha=0.7, beta=3.0, views=0))
    report = report_of(cfg.out)
    assert report["training"]["chosen"] == {"alpha": 0.7, "beta": 3.0}
    assert report["training"]["views"] == 0
    assert report["split"]["validation_used_for"] == "nothing"


def test_one_image_per_class_seen_once(cfg):
    recipe.main(as_variant(cfg, "gda", shots=1, views=0))
    assert all(torch.isfinite(tensor).all() for tensor in adapter_file(cfg.out).values())
    judged = Predictions.load(cfg.out / "predictions.parquet")
    assert (judged.pred == judged.labels).mean() > 0.15


def test_without_validation_images_the_fixed_values_are_named(cfg, monkeypatch):
    monkeypatch.setattr(ac, "sample_few_shot", partial(ac.sample_few_shot, val_shots=0), raising=False)
    for variant in ("tip_adapter", "tip_adapter_f", "gda"):
        with pytest.raises(ConfigError, match=r"no validation images .* --choose fixed"):
            recipe.main(as_variant(cfg, variant))
    assert not cfg.out.exists()
    assert recipe.main(as_variant(cfg, "ss_text")) == 0
    assert recipe.main(as_variant(cfg, "gda", choose="fixed", overwrite=True)) == 0


@pytest.mark.parametrize("stop_at", [3, 13])
def test_stopped_and_resumed_equals_undisturbed(cfg, tmp_path, monkeypatch, stop_at):
    whole, stopped = (replace(cfg, out=tmp_path / name) for name in ("whole", "stopped"))
    recipe.main(whole)
    step_once = ac.backward_and_step

    def stopping(*arguments, step, **options):
        if step == stop_at:
            raise KeyboardInterrupt
        return step_once(*arguments, step=step, **options)

    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setattr(ac, "backward_and_step", stopping, raising=False)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(stopped)
    assert not (stopped.out / "artifact").exists()
    saved = [path.name.split("-")[1] for path in (stopped.out / "checkpoints").glob("step-*")]
    assert saved == ([] if stop_at < 5 else ["00000010"])
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe.main(replace(stopped, resume=True))
    assert torch.equal(adapter_file(whole.out)["keys"], adapter_file(stopped.out)["keys"])
    assert (whole.out / "metrics.jsonl").read_text() == (stopped.out / "metrics.jsonl").read_text()
    assert report_of(whole.out)["training"]["chosen"] == report_of(stopped.out)["training"]["chosen"]
    a, b = (Predictions.load(run.out / "predictions.parquet") for run in (whole, stopped))
    assert (a.probs == b.probs).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "tip_adapter_g"}, 'Did you mean "tip_adapter_f"'),
        ({"alpha": 2.0, "beta": 1.0}, "--alpha and --beta would be overwritten by --choose validation"),
        ({"variant": "ss-text"}, 'Did you mean "ss_text"'),
        ({"choose": "valid"}, 'Did you mean "validation"'),
        ({"alpha": -1.0, "choose": "fixed"}, "alpha must be a finite number from 0 up, got -1.0"),
        ({"beta": float("nan"), "choose": "fixed"}, "beta must be a finite number from 0 up, got nan"),
        ({"min_scale": 0.0, "views": -1}, "views"),
        ({"min_scale": 1.5}, "scale"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"card": "digit"}, 'Did you mean "digits"'),
    ],
)
def test_wrong_input_is_said_and_leaves_no_artifact(cfg, changes, message):
    with pytest.raises(AdaptclipError, match=message):
        recipe.main(replace(cfg, **changes))
    assert not (cfg.out / "artifact").exists()
