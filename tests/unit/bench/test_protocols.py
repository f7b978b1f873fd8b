# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptclip.bench.jobs import measure
from adaptclip.bench.protocols import PROTOCOLS, as_classes_of, check_targets
from adaptclip.data.card import load_card
from adaptclip.data.shots import base_and_new, select_classes
from adaptclip.data.sources import open_data
from adaptclip.errors import ConfigError, SplitError
from adaptclip.predictions import Predictions


@pytest.fixture(scope="module")
def data():
    return open_data(load_card("digits"))


def draw(protocol, data, *targets, shots=4, seed=1):
    return PROTOCOLS[protocol].draw(data, targets, shots, seed, "nested")


def test_every_protocol_judges_what_it_says(data):
    case = draw("all-classes", data)
    assert [(j.name, j.data is data, j.learnt) for j in case.judged] == [("test", True, True)]
    case = draw("base-to-new", data)
    base, new = base_and_new(data)
    assert case.data.class_names == base.class_names
    assert [(j.name, j.data.class_names, j.learnt) for j in case.judged] == [
        ("base", base.class_names, True),
        ("new", new.class_names, False),
    ]
    assert {*case.split.train} <= {*base.train.ids}
    case = draw("missing-class", data)
    missing = set(case.judged[2].classes)
    train, _ = case.split.select(data)
    assert missing
    assert set(train.labels.tolist()) == set(range(10)) - missing == set(case.judged[1].classes)
    case = draw("imbalanced", data, shots=16)
    train, _ = case.split.select(data)
    frequent, rare = (train.class_counts()[list(j.classes)] for j in case.judged[1:])
    assert frequent.min() >= rare.max()
    assert len(frequent) + len(rare) == 10


def test_targets_keep_their_names_or_take_the_sources_ids(data):
    other = select_classes(data, [7, 2, 5])
    other = replace(other, card=other.card.model_copy(update={"name": "other"}))
    case = draw("cross-dataset", data, other)
    assert [(j.name, j.learnt) for j in case.judged] == [("digits", True), ("other", False)]
    assert case.judged[1].data is other
    shifted = draw("domain-shift", data, other).judged[1]
    assert shifted.learnt
    assert shifted.data.class_names == data.class_names
    names = [data.class_names[label] for label in shifted.data.test.labels]
    assert names == [other.class_names[label] for label in other.test.labels]
    assert set(shifted.data.test.labels.tolist()) == {2, 5, 7}
    assert set(draw("domain-shift", data, other).split.train) == set(draw("all-classes", data).split.train)


def test_a_shift_to_other_classes_is_refused(data):
    half = select_classes(data, [0, 1])
    with pytest.raises(SplitError, match=r"has the class .* card digits has not"):
        as_classes_of(data, half)


@pytest.mark.parametrize(
    ("protocol", "targets", "message"),
    [("domain-shift", (), "--targets"), ("cross-dataset", (), "--targets"), ("all-classes", ("grocery",), "no target")],
)
def test_targets_are_given_where_they_are_needed(protocol, targets, message):
    with pytest.raises(ConfigError, match=message):
        check_targets(protocol, targets)


def test_measures_of_some_classes_count_their_images_alone():
    labels = np.array([0, 0, 1, 1, 2, 2])
    pred = np.array([0, 1, 1, 1, 0, 2])
    probs = np.full((6, 6), 0.1, dtype=np.float32)
    probs[np.arange(6), pred] = 0.5
    predictions = Predictions(tuple("abcdef"), labels, probs, tuple("uvwxyz"))
    whole, part = measure(predictions), measure(predictions, (0, 2))
    assert (whole["n"], whole["accuracy"], whole["num_classes"]) == (6, pytest.approx(4 / 6), 6)
    assert whole["mean_per_class_accuracy"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert (part["n"], part["accuracy"]) == (4, 0.5)
    assert measure(predictions, (5,)) == {
        "n": 0, "num_classes": 6, "accuracy": None, "mean_per_class_accuracy": None, "top5_accuracy": None, "ece": None,
    }  # fmt: skip
