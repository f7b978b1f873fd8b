# SPDX-License-Identifier: Apache-2.0
"""Every recipe that learns by gradients with every mitigation that applies to it, on a few digits and a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from recipe_files import load_recipe
from safetensors.torch import load_file

import adaptclip as ac
from adaptclip.data.dataset import DomainData
from adaptclip.errors import ConfigError

GROUPS = {"thin": 34, "medium": 12, "heavy": 14}
"""Training images of each stroke weight."""

SETTINGS = {
    "coop": {"epochs": 2, "views": 1, "batch_size": 20, "n_ctx": 2, "lr": 0.02},
    "cocoop": {"epochs": 1, "views": 1, "batch_size": 20, "lr": 0.02},
    "lora": {"steps": 3, "lr": 0.01, "batch_size": 20},
    "two_stage": {"steps": 4, "views": 1, "lr": 0.01, "head_lr": 0.01, "tower_share": 0.5, "batch_size": 20},
    "contrastive": {"train": "text", "epochs": 1, "batch_size": 20, "lr": 1e-3},
    "tip_adapter": {"views": 1, "epochs": 2, "batch_size": 20, "lr": 0.01, "choose": "fixed"},
    "linear_probe": {"head": "clap", "views": 1, "epochs": 5},
}

IMAGES = (
    "class-sampling",
    "class-weights",
    "class-balanced:0.9",
    "group-sampling:stroke_weight",
    "group-dro:stroke_weight",
)
SHOWN = ("class-sampling", "group-sampling:stroke_weight+class")
CASES = [
    *(("coop", text) for text in IMAGES),
    ("cocoop", "group-dro:stroke_weight,step=0.1"),
    ("lora", "group-sampling:stroke_weight"),
    ("lora", "group-dro:stroke_weight"),
    ("two_stage", "group-dro:stroke_weight"),
    *(("contrastive", text) for text in SHOWN),
    ("tip_adapter", "class-weights"),
    ("tip_adapter", "group-dro:stroke_weight"),
    *(("linear_probe", text) for text in IMAGES),
]


@pytest.fixture(scope="module")
def few_digits() -> DomainData:
    """Digits with few test images, and training images of unequal classes and groups."""
    data = ac.open_data(ac.load_card("digits"))
    strokes, labels = np.asarray(data.train.groups["stroke_weight"]), data.train.labels
    rows: list[int] = []
    for name, count in GROUPS.items():
        own = np.flatnonzero(strokes == name)
        # One of each class first, so that none is without images; the rest as they come.
        first = [own[labels[own] == c][0] for c in range(10)]
        rows += [*first, *[row for row in own if row not in set(first)][: count - 10]]
    return replace(data, train=data.train.select(rows), test=data.test.select(range(0, len(data.test), 12)))


@pytest.fixture(autouse=True)
def on_few_digits(few_digits, monkeypatch):
    """Judging is not what takes the time here; Accelerate forgets its settings between runs."""
    monkeypatch.setattr(ac, "open_data", lambda *args, **kwargs: few_digits)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config(name, tiny, cache, out, mitigate):
    recipe = load_recipe(name)
    common = {"backbone": tiny, "shots": 0, "gates": "report", "cache": cache, "out": out, "mitigate": mitigate}
    return recipe, recipe.Config(**common, **SETTINGS[name])


def learnt(run: Path, name: str) -> dict[str, torch.Tensor]:
    paths = {"contrastive": "model/open_clip_model.safetensors", "lora": "artifact/adapter_model.safetensors"}
    files = [*run.glob(paths.get(name, "artifact/*.safetensors")), *run.glob("artifact/**/*.safetensors")]
    return load_file(files[0])


@pytest.fixture(scope="module")
def plain(tiny, cache, tmp_path_factory, few_digits):
    """Recipe -> what it learns without a mitigation."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def get(name: str) -> dict[str, torch.Tensor]:
        if name not in known:
            out = tmp_path_factory.mktemp("plain") / name
            recipe, cfg = config(name, tiny, cache, out, "")
            assert recipe.main(cfg) == 0
            assert json.loads((out / "report.json").read_text())["training"]["mitigation"] is None
            known[name] = learnt(out, name)
            AcceleratorState._reset_state(reset_partial_state=True)
        return known[name]

    return get


@pytest.mark.parametrize(("name", "text"), CASES)
def test_it_runs_changes_what_is_learnt_and_is_accounted_for(name, text, tiny, cache, tmp_path, plain, few_digits):
    before = plain(name)
    recipe, cfg = config(name, tiny, cache, tmp_path / "run", text)
    assert recipe.main(cfg) == 0
    after = learnt(cfg.out, name)
    assert after.keys() == before.keys()
    assert any((after[key].float() - before[key].float()).abs().max() > 1e-6 for key in after)
    training = json.loads((cfg.out / "report.json").read_text())["training"]
    info = training["mitigation"]
    assert info["setting"] == text
    counts = {group: entry["images"] for group, entry in info["groups"].items()}
    if "class" not in text:
        assert counts == GROUPS
    elif "+" not in text:
        assert list(counts.values()) == few_digits.train.class_counts().tolist()
    assert sum(counts.values()) == 60
    if text.startswith("group-dro"):
        assert sum(entry["weight"] for entry in info["groups"].values()) == pytest.approx(1)
        assert len({entry["weight"] for entry in info["groups"].values()}) == 3, "the weights moved"
    if name == "two_stage":
        assert training["head_mitigation"]["groups"] != info["groups"], "each stage starts anew"


@pytest.mark.parametrize(
    ("name", "text", "changes", "message"),
    [
        ("contrastive", "group-dro:stroke_weight", {}, "a contrastive loss has none"),
        ("tip_adapter", "class-weights", {"variant": "gda"}, "gda is computed and not trained"),
        (
            "linear_probe",
            "class-sampling",
            {"head": "lp_plus_plus", "views": 0},
            "takes start and step sizes",
        ),
        ("linear_probe", "group-dro:stroke_weight", {"head": "logistic"}, "logistic sees all images at once"),
        ("coop", "group-dro:stroke", {}, 'no attribute .stroke.*Did you mean "stroke_weight"'),
        ("lora", "group-drop:stroke_weight", {}, 'Did you mean "group-dro"'),
        ("cocoop", "class-balanced:2", {}, "from 0 to below 1"),
    ],
)
def test_what_does_not_apply_is_refused_before_anything_is_made(name, text, changes, message, tiny, cache, tmp_path):
    recipe, cfg = config(name, tiny, cache, tmp_path / "run", text)
    if "head" in changes:
        changes = {**changes, "epochs": None}
    with pytest.raises(ConfigError, match=message):
        recipe.main(replace(cfg, **changes))
    assert not cfg.out.exists()


def test_logistic_takes_class_weights(tiny, cache, tmp_path, few_digits):
    """Weights of 1 / n as scikit-learn's own balanced class weights."""
    from sklearn.linear_model import LogisticRegression

    recipe, cfg = config("linear_probe", tiny, cache, tmp_path / "run", "class-weights")
    assert recipe.main(replace(cfg, head="logistic", C=5.0, epochs=None, views=0)) == 0
    backbone = ac.load_backbone(tiny)
    features = ac.FeatureCache(cache).get(backbone, few_digits.train).values[0].numpy()
    model = LogisticRegression(C=5.0, max_iter=1000, class_weight="balanced").fit(features, few_digits.train.labels)
    state = learnt(cfg.out, "linear_probe")
    assert state["weight"].numpy() == pytest.approx(model.coef_, abs=2e-3)
