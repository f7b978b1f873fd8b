# SPDX-License-Identifier: Apache-2.0
"""The artifact's README is a model card that the hub can read, filled from the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from adaptclip.artifact.model_card import model_card
from adaptclip.data.card import load_card
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.prediction_files import shares
from adaptclip.predictions import Predictions
from adaptclip.reports.full import full_report


@pytest.fixture(scope="module")
def made():
    card = load_card("digits")
    labels = np.arange(400) % 10
    probs = np.full((400, 10), 0.02, np.float32)
    probs[np.arange(400), np.where(labels == 3, 4, labels)] = 0.82
    names = tuple(f"{d}<b>|`" for d in range(10))
    p = Predictions(tuple(map(str, range(400))), labels, probs, names, {"weight": ("thin", "heavy") * 200})
    report = full_report(p)
    verdicts = check_gates(p, None, [GateRule(metric="accuracy", at_least=0.95)])
    manifest = {
        "method": "coop", "class_names": names, "backbone": {"name": "hf-hub:org/clip", "pretrained": None},
        "split": {"shots": 16, "seed": 1, "rule": "nested"},
    }  # fmt: skip
    report["split"] = {"num_train": 160, "num_validation": 40, "validation_used_for": "nothing"}
    return model_card(manifest, card, report, verdicts), report


def test_the_hub_reads_results_from_it(made):
    text, report = made
    data: Any = ModelCard(text).data
    assert data.library_name == "adaptclip"
    assert data.base_model == "org/clip"
    values = {r.metric_name: r.metric_value for r in data.eval_results or []}
    assert values["Accuracy"] == pytest.approx(report["overall"]["accuracy"]["model"]["value"])
    assert values["Macro-F1"] == pytest.approx(
        report["fine_grained"]["overall"]["macro_f1"]["model"]["value"], abs=1e-6
    )
    assert {r.dataset_split for r in data.eval_results or []} == {"test"}


def test_it_says_use_limits_and_gates(made):
    text, _ = made
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Intended use", "## Out of scope", "## How to load it", "## Training data", "## Limits", "## Gates",
        "## Results on the test split",
    ]  # fmt: skip
    assert "160 of them" in text
    assert "The writers are not recorded" in text
    assert "**fail**: accuracy ≥ 0.95" in text
    assert "allow_failed_gates=True" in text
    assert "- Groups that are reported: weight" in text


def test_class_names_are_no_markup(made):
    text, _ = made
    assert "<b>" not in text
    assert text.count("\n# ") == 1


def test_of_several_classes_to_an_image_it_says_what_each_is_worth():
    rng, names = np.random.default_rng(0), ("crack", "rust", "dent")
    shown = rng.random((300, 3)) < [0.4, 0.3, 0.02]
    given = np.clip(rng.beta(2, 4, (300, 3)) + 0.4 * shown, 0, 1).astype(np.float32)
    p = Predictions(
        tuple(map(str, range(300))), shown.argmax(axis=1), shares(given), names, {"site": ("north", "south") * 150},
        sigmoid=given, positive=shown,
    )  # fmt: skip
    report = full_report(p)
    manifest = {"method": "linear", "class_names": names, "backbone": {"name": "x", "pretrained": None}, "split": None}
    text = model_card(manifest, load_card("digits"), report, [])
    for words in (
        "Saying which of these 3 classes an image shows, which may be several or none, on images",
        "may name several of them for an image, or none",
        "1 of 3 findings has fewer than 30 test images",
        "### Findings",
        "1 class has fewer than 10 test images that are known to show it",
    ):
        assert words in text
    data: Any = ModelCard(text).data
    values = {r.metric_type: r.metric_value for r in data.eval_results or []}
    assert values["roc_auc"] == pytest.approx(report["overall"]["labels_macro_auc"]["model"]["value"], abs=1e-6)
