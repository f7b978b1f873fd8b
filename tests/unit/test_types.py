# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from adaptclip.errors import DataError, StorageError
from adaptclip.files import write_parquet
from adaptclip.gate_rules import GateRule
from adaptclip.metrics import GENERAL_METRICS
from adaptclip.predictions import Predictions
from adaptclip.types import Batch, Features


def predictions(**fields: Any) -> Predictions:
    probs = np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0], [0.1, 0.8, 0.1]], np.float32)
    return Predictions(**({"ids": ("a", "b", "ü", "d"), "labels": np.array([0, 1, 2, 1]), "probs": probs,
                           "class_names": ("cat", "dög", "x|y")} | fields))  # fmt: skip


FULL = {
    "groups": {"sex": ("f", "unknown", "m", "f"), "age group": ("<40", "40+", "40+", "unknown")},
    "clusters": ("p1", "p1", "p2", "p3"),
    "levels": {"kind": ("pet", "pet", "thing")},
}


def test_pred_is_the_lowest_of_tied_classes():
    assert predictions().pred.tolist() == [0, 0, 2, 1]


@pytest.mark.parametrize("fields", [{}, FULL])
def test_predictions_survive_a_file_bit_for_bit(tmp_path, fields):
    before = predictions(**fields)
    before.save(tmp_path / "p.parquet")
    after = Predictions.load(tmp_path / "p.parquet")
    assert np.array_equal(after.probs, before.probs)
    assert after.probs.dtype == np.float32
    assert np.array_equal(after.labels, before.labels)
    for name in ("ids", "class_names", "groups", "clusters", "levels"):
        assert getattr(after, name) == getattr(before, name)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 2**31))
def test_any_number_of_rows_and_classes_survives(tmp_path_factory, n, c, seed):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(c), n).astype(np.float32)
    names = tuple(f"c{i}" for i in range(c))
    before = Predictions(tuple(map(str, range(n))), rng.integers(0, c, n), probs, names)
    path = tmp_path_factory.mktemp("p") / "p.parquet"
    before.save(path)
    assert np.array_equal(Predictions.load(path).probs, probs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": ("a", "b", "c")}, r"do not fit together: 3 ids"),
        ({"class_names": ("a", "b")}, r"expected \(4,\) and \(4, 2\)"),
        ({"ids": ("a", "a", "b", "b")}, "2 repeated ids"),
        ({"labels": np.array([0, 1, 2, 3])}, r"label ids 0\.\.3; allowed 0\.\.2"),
        ({"labels": np.array([0, 1, 2, -1])}, r"label ids -1\.\.2"),
        ({"probs": np.full((4, 3), np.nan, np.float32)}, "not finite"),
        ({"groups": {"sex": ("f",)}}, "'sex' has 1 values for 4 rows"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        predictions(**fields)


def test_files_that_are_not_predictions(tmp_path):
    write_parquet(tmp_path / "p.parquet", pa.table({"id": ["a"], "prob_0": [1.0]}), {"class_names": ["x", "y"]})
    with pytest.raises(DataError, match=r"no column 'label'.*It has: id, prob_0"):
        Predictions.load(tmp_path / "p.parquet")
    write_parquet(tmp_path / "q.parquet", pa.table({"id": ["a"], "label": [0]}), {})
    with pytest.raises(DataError, match="says nothing about what the model answered"):
        Predictions.load(tmp_path / "q.parquet")
    (tmp_path / "r.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(StorageError, match="cannot read"):
        Predictions.load(tmp_path / "r.parquet")


def test_a_batch_moves_as_a_whole():
    batch = Batch(torch.tensor([1, 0]), torch.tensor([5, 6]), features=torch.ones(2, 4))
    moved = batch.to("meta")
    assert moved.images is None
    assert moved.features is not None
    assert {moved.labels.device.type, moved.index.device.type, moved.features.device.type} == {"meta"}
    assert batch.labels.device.type == "cpu"


def test_features_know_their_length():
    assert len(Features(torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64), ("a", "b", "c"))) == 3


@pytest.mark.parametrize(
    ("rule", "title"),
    [
        ({"at_least": 0.8}, "accuracy ≥ 0.8"),
        ({"metric": "ece", "at_most": 0.05}, "ece ≤ 0.05"),
        ({"group": "sex", "at_least": 0.75}, "accuracy of every sex ≥ 0.75"),
        ({"no_worse_than": "zero_shot"}, "accuracy no worse than zero_shot"),
        (
            {"group": "sex", "no_worse_than": "zero_shot", "margin": 0.02},
            "accuracy of every sex no worse than zero_shot − 0.02",
        ),
    ],
)
def test_a_rule_words_itself(rule, title):
    assert GateRule(**rule).title == title


@pytest.mark.parametrize("metric", GENERAL_METRICS)
def test_every_metric_can_be_compared_with_zero_shot(metric):
    assert GateRule(metric=metric, no_worse_than="zero_shot").measure.name == metric


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"metric": "acc", "at_least": 0.5}, r"unknown metric .acc.\. .*Allowed: accuracy"),
        ({}, r"exactly one of at_least, at_most, no_worse_than, gap_at_most .*; got none"),
        ({"at_least": 0.5, "no_worse_than": "zero_shot"}, "exactly one"),
        ({"at_least": 0.5, "confidence": 0.5}, "confidence"),
        ({"at_least": 0.5, "min_n": 0}, "min_n"),
        ({"no_worse_than": "zero_shot", "margin": -0.1}, "margin"),
        ({"at_least": 0.5, "groups": "sex"}, "groups"),
    ],
)
def test_rules_that_are_not_valid(rule, message):
    with pytest.raises(ValidationError, match=message):
        GateRule(**rule)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probs": np.full((4, 3), 0.5, np.float32)}, "not probabilities: each must be >= 0 and sum to 1"),
        ({"probs": np.tile(np.array([1.5, -0.5, 0.0], np.float32), (4, 1))}, "not probabilities"),
        ({"class_names": ("a", "b", "a")}, "repeated class names"),
        ({"clusters": ("p1",)}, "'cluster' has 1 values for 4 rows"),
        ({"levels": {"kind": ("pet",)}}, "level 'kind' has 1 names for 3 classes"),
    ],
)
def test_predictions_that_would_be_judged_wrongly_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        predictions(**fields)


def test_missing_groups_in_a_file_are_unknown(tmp_path):
    columns = {"id": ["a", "b"], "label": [0, 1], "prob_0": [1.0, 0.0], "prob_1": [0.0, 1.0], "group:age": [40, None]}
    write_parquet(tmp_path / "p.parquet", pa.table(columns), {"class_names": ["x", "y"]})
    assert Predictions.load(tmp_path / "p.parquet").groups == {"age": ("40", "unknown")}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"at_least": 80}, "at_least must lie within 0 and 1, where accuracy does, got 80"),
        ({"metric": "ece", "at_most": 5}, "at_most must lie within 0 and 1, where ece does, got 5"),
        ({"at_least": 0.0}, "kept by every model"),
        ({"metric": "brier", "at_most": 2.0}, "kept by every model"),
        ({"no_worse_than": "zero_shot", "margin": 1.0}, "margin of 1 lets nearly every model through"),
        ({"at_least": 0.8, "confidence": 0.51}, "a confidence of 0.51, below 0.8, needs a reason"),
        ({"at_least": float("nan")}, "at_least"),
        ({"at_most": 0.8}, "accuracy is better when higher: use at_least, not at_most"),
        ({"metric": "ece", "at_least": 0.1}, "ece is better when lower: use at_most, not at_least"),
        ({"at_least": 0.8, "margin": 0.02}, "margin belongs to no_worse_than"),
    ],
)
def test_rules_that_would_always_or_never_pass_are_refused(rule, message):
    with pytest.raises(ValidationError, match=message):
        GateRule(**rule)
