# SPDX-License-Identifier: Apache-2.0
"""Labels and probabilities of any model, judged in one call."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef, recall_score

import adaptclip as ac
from adaptclip.errors import AdaptclipError, DataError, GateError
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.metrics import Metric
from adaptclip.predictions import Predictions

NAMES = ["cat", "dog", "fox"]


def answers(num: int = 240, seed: int = 0, right: float = 0.8):
    """Label ids and probabilities of a model that is right for about that share."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 3, num)
    said = np.where(draws.random(num) < right, labels, draws.integers(0, 3, num))
    probs = draws.dirichlet([1, 1, 1], num) + 2 * np.eye(3)[said]
    return labels, (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


def test_the_figures_are_those_of_scikit_learn():
    labels, probs = answers()
    report = ac.judge(labels, probs).report
    said = probs.argmax(axis=1)
    overall = report["overall"]
    assert overall["accuracy"]["model"]["value"] == pytest.approx(accuracy_score(labels, said))
    assert overall["mean_per_class_accuracy"]["model"]["value"] == pytest.approx(
        recall_score(labels, said, average="macro")
    )


def test_labels_are_ids_or_names_and_probabilities_of_any_kind():
    labels, probs = answers()
    names = [NAMES[c] for c in labels]
    frame = pd.DataFrame(probs, columns=NAMES)
    shuffled = frame[["fox", "cat", "dog"]]
    info = [
        ac.judge(labels, probs, class_names=NAMES), ac.judge(names, probs, class_names=NAMES), ac.judge(names, frame),
        ac.judge(torch.as_tensor(labels), torch.as_tensor(probs), class_names=NAMES),
        ac.judge(pd.Series(names), probs.tolist(), class_names=NAMES),
    ]  # fmt: skip
    assert {judgement.to_markdown() for judgement in info} == {info[0].to_markdown()}
    other = ac.judge(names, shuffled).report["overall"]["accuracy"]["model"]["value"]
    assert other == info[0].report["overall"]["accuracy"]["model"]["value"]


def test_groups_clusters_and_gates_are_those_of_a_run():
    labels, probs = answers()
    sex = ["female", "male", None, float("nan")] * 60
    patients = [f"p{i // 4}" for i in range(240)]
    gates = [
        {"metric": "accuracy", "at_least": 0.7}, {"metric": "accuracy", "group": "sex", "at_least": 0.99},
        {"metric": "accuracy", "no_worse_than": "zero_shot", "margin": 0.02},
    ]  # fmt: skip
    before = np.full((240, 3), 1 / 3, np.float32)
    found = ac.judge(
        labels, probs, class_names=NAMES, groups=pd.DataFrame({"sex": sex}), clusters=patients, zero_shot=before,
        gates=gates,
    )  # fmt: skip
    assert found.predictions.groups["sex"] == ("female", "male", "unknown", "unknown") * 60
    assert [verdict.verdict for verdict in found.verdicts] == ["pass", "fail", "pass"]
    assert (found.verdict, found.exit_code) == ("fail", 2)
    info = {"ids": tuple(map(str, range(240))), "labels": labels, "class_names": tuple(NAMES)}
    info |= {"groups": found.predictions.groups, "clusters": tuple(patients)}
    by_hand = check_gates(
        Predictions(probs=probs, **info),
        Predictions(probs=before, **info, made_by={"method": "zero_shot"}),
        [GateRule.model_validate(gate) for gate in gates],
    )
    assert [verdict.reason for verdict in by_hand] == [verdict.reason for verdict in found.verdicts]


def test_the_columns_of_a_table_are_taken_by_name_and_not_by_place():
    labels, probs = answers()
    names, frame = [NAMES[c] for c in labels], pd.DataFrame(probs, columns=NAMES)
    shuffled = frame[["fox", "cat", "dog"]]
    before = pd.DataFrame(answers(seed=1)[1], columns=NAMES)
    expected = ac.judge(names, probs, class_names=NAMES, zero_shot=before.to_numpy()).to_markdown()
    for table, zero_shot in ((frame, before), (shuffled, before[["dog", "fox", "cat"]])):
        found = ac.judge(names, table, class_names=NAMES, zero_shot=zero_shot)
        assert found.predictions.class_names == tuple(NAMES)
        assert found.to_markdown() == expected
    floats = ac.judge(labels.astype(float), probs, class_names=NAMES, zero_shot=before.to_numpy())
    assert floats.to_markdown() == expected


def test_gates_may_be_a_file_and_none_is_no_pass(tmp_path):
    labels, probs = answers()
    (tmp_path / "gates.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.5}\n")
    assert ac.judge(labels, probs, gates=tmp_path / "gates.yaml").verdict == "pass"
    nothing = ac.judge(labels, probs)
    assert (nothing.verdict, nothing.exit_code, nothing.verdicts) == ("none", 0, ())


def test_a_notebook_shows_the_page_of_a_run():
    labels, probs = answers()
    found = ac.judge(labels, probs, class_names=["<b>cat</b>", "dog", "fox"])
    page = found._repr_html_()
    assert page == found.to_html()
    assert page.startswith("<!doctype html>")
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>cat</b>" not in page


def test_metrics_of_your_own_are_reported():
    labels, probs = answers()
    mcc = Metric.of("mcc", lambda y, p: matthews_corrcoef(y, p.argmax(1)), scale=(-1, 1), per_cent=False)
    report = ac.judge(labels, probs, metrics=[mcc]).report
    assert report["overall"]["mcc"]["model"]["value"] == pytest.approx(matthews_corrcoef(labels, probs.argmax(1)))


LABELS, PROBS = answers(30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"y_true": LABELS[:29]}, "29 labels and 30 rows"),
        ({"y_true": LABELS + 1}, "with 3 columns 0..2"),
        ({"y_true": ["cat"] * 30}, "give class_names"),
        ({"y_true": ["dgo"] * 30, "class_names": NAMES}, 'Did you mean "dog"'),
        ({"class_names": NAMES[:2]}, "2 class names and 3 columns"),
        ({"probabilities": PROBS[:, 0]}, "1 - p and p"),
        ({"probabilities": [["a", "b"]] * 30}, "numbers"),
        ({"probabilities": 100 * PROBS}, "divide per cent by 100"),
        ({"groups": ["f"] * 30}, "mapping"),
        ({"groups": {"sex": ["f"] * 29}}, "'sex' has 29 values for 30"),
        ({"clusters": ["p"] * 3}, "cluster"),
        ({"clusters": ["p", None, float("nan")] * 10}, "20 images have no cluster"),
        ({"gates": [{"metric": "acuracy", "at_least": 0.5}]}, "accuracy"),
        ({"gates": [{"metric": "accuracy", "at_least": 0.5, "group": "sex"}]}, "sex"),
        ({"gates": ["accuracy"]}, "mapping"),
        ({"gates": {"metric": "accuracy", "at_least": 0.5}}, "brackets"),
        ({"class_names": set(NAMES)}, "in the order"),
        ({"class_names": "abc"}, "in the order"),
        ({"y_true": LABELS[:, None]}, "one label for each image"),
        ({"y_true": [None, *LABELS[1:]]}, "1 labels are missing"),
        ({"y_true": LABELS + 0.5}, "whole numbers"),
        ({"y_true": [float("inf"), *LABELS[1:]]}, "whole numbers"),
        (
            {"probabilities": pd.DataFrame(PROBS, columns=["cat", "dog", "cow"]), "class_names": NAMES},
            "'cow' is only in",
        ),
        ({"probabilities": pd.DataFrame(PROBS, columns=["cat", "dog", "dog"])}, "two columns of one name"),
        ({"y_true": pd.Series(LABELS), "groups": pd.DataFrame({"sex": ["f"] * 30})[::-1]}, "different indices"),
        ({"outcomes": [{"positiv": ["cat"]}]}, "positiv"),
        ({"metrics": [lambda y, p: 0.0]}, "name"),
        ({"ids": ["a"] * 30}, "repeated ids"),
    ],
)
def test_what_does_not_fit_says_so(call, message):
    with pytest.raises((DataError, GateError), match=message):
        ac.judge(**{"y_true": LABELS, "probabilities": PROBS, **call})


def test_errors_are_adaptclips_own():
    with pytest.raises(AdaptclipError):
        ac.judge([], np.zeros((0, 3)))


@pytest.mark.parametrize("kind", [np.asarray, list, pd.Series, torch.as_tensor])
def test_labels_in_the_place_of_probabilities_get_words(kind):
    labels, probs = answers()
    for said in (labels, [NAMES[c] for c in labels]) if kind is not torch.as_tensor else (labels,):
        with pytest.raises(DataError, match=r"these are 240 labels: give what the model's predict_proba returns"):
            ac.judge(labels, kind(said), class_names=NAMES)
    with pytest.raises(DataError, match="y_true comes first"):
        ac.judge(probs, kind(labels))
    with pytest.raises(DataError, match="a column for each of the two classes, 1 - p and p"):
        ac.judge(labels % 2, probs[:, 0])


def test_a_judgement_prints_its_headline():
    labels, probs = answers()
    judged = ac.judge(
        labels, probs, class_names=NAMES, groups={"sex": ["f", "m"] * 115 + ["x"] * 10},
        gates=[{"metric": "accuracy", "at_least": 0.5}, {"metric": "accuracy", "at_least": 0.999}],
    )  # fmt: skip
    lines = str(judged).splitlines()
    assert lines[0] == "1 of 2 gates failed: not for release."
    assert [line.partition(".")[0] for line in lines[1:3]] == ["- pass: accuracy ≥ 0", "- fail: accuracy ≥ 0"]
    assert lines[3].startswith("Accuracy: ")
    assert "the lowest of 2 groups, which may partly be chance; 1 group of fewer than 30 images left out" in lines[4]
    assert repr(judged) == (
        "<Judgement: fail by 2 gates, Predictions: 240 images, 3 classes (cat, dog, fox), groups sex>"
    )
