# SPDX-License-Identifier: Apache-2.0
"""A gate that the data cannot answer is refused before anything is encoded, in every recipe that has gates."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from recipe_files import RECIPES, load_recipe

import adaptclip as ac
from adaptclip.artifact.finishing import choose_gates
from adaptclip.data.shots import base_and_new
from adaptclip.errors import DataError, GateError, SplitError
from adaptclip.gate_rules import Outcome
from adaptclip.predictions import Predictions

WRONG = {
    "group: writer, at_least: 0.5": "no group attribute 'writer'",
    "level: parity, at_least: 0.5": "no taxonomy level 'parity'",
}


@pytest.fixture(scope="module")
def digits():
    return ac.open_data(ac.load_card("digits"), check=False)


@pytest.fixture
def gates(tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text("gates:\n  - {metric: accuracy, group: writer, at_least: 0.5}\n")
    return path


def test_every_recipe_refuses_before_it_loads_a_model(gates, tmp_path, digits, monkeypatch):
    def too_late(*args, **kwargs):
        raise AssertionError("a model was loaded before the gates were looked at")

    monkeypatch.setattr(ac, "load_backbone", too_late)
    monkeypatch.setattr(ac, "open_data", lambda *args, **kwargs: digits)
    refused = []
    for path in RECIPES:
        recipe = load_recipe(path.stem)
        if "gates" not in {field.name for field in fields(recipe.Config)}:
            continue
        AcceleratorState._reset_state(reset_partial_state=True)
        cfg = replace(recipe.Config(), gates=str(gates), out=tmp_path / path.stem)
        with pytest.raises(GateError, match="no group attribute 'writer'"):
            recipe.main(cfg)
        assert not (tmp_path / path.stem).exists()
        refused.append(path.stem)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(refused) >= 8, refused


@pytest.mark.parametrize("rule", WRONG)
def test_what_the_data_do_not_have_is_named(gates, digits, rule):
    gates.write_text(f"gates:\n  - {{metric: accuracy, {rule}}}\n")
    with pytest.raises(GateError, match=WRONG[rule]):
        choose_gates(str(gates), digits)


def test_an_unknown_positive_class_and_a_card_without_classes(gates, digits):
    gates.write_text("gates:\n  - {metric: sensitivity, positive: ten, at_least: 0.5}\n")
    with pytest.raises(GateError, match="nothing is 'ten'"):
        choose_gates(str(gates), digits)
    gates.write_text("gates:\n  - {metric: sensitivity, positive: zero, at_least: 0.5}\n")
    assert [rule.metric for rule in choose_gates(str(gates), digits)] == ["sensitivity"]
    columns = digits.card.columns.model_copy(update={"label": None})
    captions = replace(digits, card=digits.card.model_copy(update={"columns": columns}))
    with pytest.raises(GateError, match="captions and no classes: no gate can be judged"):
        choose_gates(str(gates), captions)


def test_an_outcome_of_classes_that_were_taken_away_is_named(digits):
    # Base and new classes: the card was checked against all of them.
    card = digits.card.model_copy(update={"outcomes": (Outcome(positive=("nine",)),)})
    base, new = base_and_new(replace(digits, card=card))
    assert choose_gates("card", new) == card.gates
    with pytest.raises(DataError, match="card digits: outcome 'nine': nothing is 'nine'"):
        choose_gates("card", base)


MISSING = {
    "metric: sensitivity, positive: nine, at_least: 0.5": "needs test images of 'nine', but there are none",
    "metric: auc, positive: nine, at_least: 0.5": "needs test images of 'nine'",
    "metric: mean_per_class_accuracy, at_least: 0.5": "a mean over all classes, and 1 of 10 have no test image: 'nine'",
    "metric: macro_auc, at_least: 0.5": "a mean over all classes",
}


@pytest.mark.parametrize("rule", MISSING)
def test_a_class_that_a_gate_needs_and_the_test_part_lacks_is_named(gates, digits, rule):
    gates.write_text(f"gates:\n  - {{{rule}}}\n")
    lacking = replace(digits, test=digits.test.select(np.flatnonzero(digits.test.labels != 9)))
    assert choose_gates(str(gates), digits)
    with pytest.raises(GateError, match=MISSING[rule]):
        choose_gates(str(gates), lacking)
    gates.write_text("gates:\n  - {metric: specificity, positive: nine, at_least: 0.5}\n  - {at_least: 0.5}\n")
    assert len(choose_gates(str(gates), lacking)) == 2
    only_nines = replace(digits, test=digits.test.select(np.flatnonzero(digits.test.labels == 9)))
    with pytest.raises(GateError, match="needs test images of 'zero' or 'one' or 'two', but there are none"):
        choose_gates(str(gates), only_nines)


@pytest.mark.parametrize("setting", ["card", "report"])
def test_an_empty_test_part_is_refused_with_gates_and_without(digits, setting):
    for rules in (digits.card.gates, ()):
        card = digits.card.model_copy(update={"gates": rules})
        empty = replace(digits, card=card, test=digits.test.select([]))
        with pytest.raises(SplitError, match="there is no test image, so nothing that is learnt could be judged"):
            choose_gates(setting, empty)


def test_a_run_that_gates_compare_with_is_looked_at_first(gates, digits):
    def judged(ids):
        n, names = len(ids), digits.class_names
        probs = np.full((n, len(names)), 1 / len(names), np.float32)
        return Predictions(tuple(ids), digits.test.labels[:n], probs, names)

    gates.write_text("gates:\n  - {metric: accuracy, no_worse_than: coop.parquet}\n")
    with pytest.raises(GateError, match=r"compares with 'coop\.parquet', and there is no such run folder"):
        choose_gates(str(gates), digits)
    judged(digits.test.ids[:100]).save(gates.parent / "coop.parquet")
    with pytest.raises(GateError, match=r"on other images: coop\.parquet judged 100 images, of which 100 are among"):
        choose_gates(str(gates), digits)
    judged(digits.test.ids).save(gates.parent / "coop.parquet")
    assert [rule.no_worse_than for rule in choose_gates(str(gates), digits)] == ["coop.parquet"]
