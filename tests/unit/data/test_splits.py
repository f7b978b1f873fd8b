# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptclip.data.card_block import Splits
from adaptclip.data.sources import UNUSED, drawn_parts, named_parts, units
from adaptclip.errors import SplitError


def fractions(train: float, validation: float, test: float, seed: int = 0) -> Splits:
    return Splits(fractions={"train": train, "validation": validation, "test": test}, seed=seed)


def contents_of(count: int) -> list[str]:
    return [f"{i * 7919:064x}" for i in range(count)]


def drawn(splits, labels, unit_of_row=None, contents=None):
    labels = np.asarray(labels)
    unit_of_row = np.arange(len(labels)) if unit_of_row is None else np.asarray(unit_of_row)
    return drawn_parts(splits, [(int(label),) for label in labels], contents or contents_of(len(labels)), unit_of_row)


def test_named_parts_follow_the_card():
    splits = Splits(train="fit", test="holdout")
    assert named_parts(splits, ["fit", "holdout", "extra"]) == ("train", "test", UNUSED)
    assert named_parts(None, ["test", "train", "validation"]) == ("test", "train", "validation")


def test_a_split_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(SplitError, match=r"no image is in the split 'trian', which the card takes for train"):
        named_parts(Splits(train="trian", test="test"), ["train", "test"])
    with pytest.raises(SplitError, match=r'Did you mean "test"\?'):
        named_parts(Splits(train="train", test="tets"), ["train", "test"])


def test_units_hold_together_what_is_linked_in_any_way():
    clusters, contents = ["p", "q", "p", "r", "s"], ["1", "2", "3", "2", "5"]
    found = units(5, keys=[clusters, contents], pairs=[(3, 4)])
    assert found[0] == found[2]
    assert found[1] == found[3] == found[4]
    assert found[0] != found[1]
    assert units(3, keys=[]).tolist() == [0, 1, 2]


def test_fractions_are_met_exactly_per_class():
    labels = np.repeat([0, 1, 2], [80, 40, 20])
    parts = np.asarray(drawn(fractions(0.5, 0.1, 0.4), labels))
    for label, total in enumerate((80, 40, 20)):
        counts = [(parts[labels == label] == part).sum() for part in ("train", "validation", "test")]
        assert counts == [0.5 * total, 0.1 * total, 0.4 * total]


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    labels, contents = np.arange(60) % 3, contents_of(60)
    parts = np.asarray(drawn(fractions(0.5, 0.1, 0.4), labels, contents=contents))
    shuffle = np.random.default_rng(0).permutation(60)
    again = drawn(fractions(0.5, 0.1, 0.4), labels[shuffle], contents=[contents[i] for i in shuffle])
    assert np.array_equal(again, parts[shuffle])
    assert drawn(fractions(0.5, 0.1, 0.4, seed=1), labels, contents=contents) != tuple(parts)


def test_too_few_clusters():
    with pytest.raises(SplitError, match=r"4 images in 2 clusters cannot be divided into train, validation, test"):
        drawn(fractions(0.5, 0.1, 0.4), [0, 1, 0, 1], [0, 0, 1, 1])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=10), min_size=2, max_size=5),
    shares=st.sampled_from([(0.5, 0.1, 0.4), (0.9, 0.0, 0.1), (0.1, 0.6, 0.3), (0.6, 0.1, 0.3)]),
    seed=st.integers(0, 5),
)
def test_units_stay_whole_and_every_class_reaches_train_and_test(sizes, shares, seed):
    # `sizes`: per class, the sizes of its clusters.
    labels, unit_of_row = [], []
    for label, clusters in enumerate(sizes):
        for size in clusters:
            unit_of_row += [max(unit_of_row, default=-1) + 1] * size
            labels += [label] * size
    parts = np.asarray(drawn(fractions(*shares, seed=seed), labels, unit_of_row))
    assert UNUSED not in parts
    for unit in set(unit_of_row):
        assert len(set(parts[np.asarray(unit_of_row) == unit])) == 1
    for label in range(len(sizes)):
        assert {"train", "test"} <= set(parts[np.asarray(labels) == label])
