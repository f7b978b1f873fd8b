# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import pytest

from adaptclip.data.card import load_card
from adaptclip.data.shots import (
    FewShotSplit,
    base_and_new,
    class_order,
    imbalanced_shots,
    missing_classes,
    sample_few_shot,
    without_classes,
)
from adaptclip.data.sources import open_data
from adaptclip.errors import SplitError


@pytest.fixture(scope="module")
def data():
    return open_data(load_card("digits"))


def counts(ids, data) -> Counter:
    label_of = dict(zip(data.train.ids, data.train.labels.tolist(), strict=True))
    label_of |= dict(zip(data.validation.ids, data.validation.labels.tolist(), strict=True))
    return Counter(label_of[row] for row in ids)


def test_the_tail_is_exponential_and_part_of_the_balanced_split(data, tmp_path):
    balanced = sample_few_shot(data, shots=16, seed=3)
    uneven = imbalanced_shots(balanced, data, ratio=16)
    own = counts(uneven.train, data)
    # 16 · 16^(-r/9) for r = 0 … 9, worked out by hand.
    assert [own[c] for c in class_order(data, 3)] == [16, 12, 9, 6, 5, 3, 3, 2, 1, 1]
    assert set(uneven.train) < set(balanced.train)
    for label, rows in counts(uneven.validation, data).items():
        assert rows == min(4, own[label])
    assert uneven.short_classes == {data.class_names[c]: n for c, n in own.items() if n < 16}
    assert uneven.digest != balanced.digest
    assert imbalanced_shots(balanced, data, ratio=1).train == balanced.train
    uneven.save(tmp_path / "split.json")
    assert FewShotSplit.load(tmp_path / "split.json") == uneven
    train, validation = uneven.select(data)
    assert (len(train), len(validation)) == (58, len(uneven.validation))


def test_more_shots_hold_fewer_and_seeds_differ(data):
    few, many = (imbalanced_shots(sample_few_shot(data, shots=k, seed=1), data) for k in (4, 8))
    assert set(few.train) < set(many.train)
    assert class_order(data, 1) != class_order(data, 2)
    assert sorted(class_order(data, 0)) == list(range(10))


def test_missing_classes_have_no_image_and_no_validation_image(data):
    missing = missing_classes(data, 1)
    assert len(missing) == 2  # round(0.25 · 10), half to even
    split = without_classes(sample_few_shot(data, shots=4, seed=1), data, missing)
    for ids in (split.train, split.validation):
        assert set(counts(ids, data)) == set(range(10)) - set(missing)
        assert set(counts(ids, data).values()) == {4}
    assert split.short_classes == {data.class_names[c]: 0 for c in missing}
    assert len(missing_classes(data, 1, share=0.999)) == 9
    assert len(missing_classes(data, 1, share=0.001)) == 1


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("inf"), float("nan")])
def test_a_wrong_ratio(data, ratio):
    with pytest.raises(SplitError, match="ratio"):
        imbalanced_shots(sample_few_shot(data, shots=2, seed=1), data, ratio=ratio)


def test_wrong_classes_and_other_data(data):
    split = sample_few_shot(data, shots=2, seed=1)
    for wrong in ([10], list(range(10)), [-1]):
        with pytest.raises(SplitError, match=r"label ids 0\.\.9"):
            without_classes(split, data, wrong)
    with pytest.raises(SplitError, match="between 0 and 1"):
        missing_classes(data, 1, share=1)
    with pytest.raises(SplitError, match="other data"):
        imbalanced_shots(split, base_and_new(data)[0])
