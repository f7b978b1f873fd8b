# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from adaptclip.data.checks import division
from adaptclip.words import blanks_apart, numbers_twice, plain, several_spellings, spelt


@pytest.mark.parametrize(
    ("one", "other"),
    [("P003", "p003 "), ("3", "3.0"), ("3", "3,0"), ("007", "7"), ("+4", "4"), ("a  b", "A b"), ("0", "00.0")],
)
def test_spellings_of_one_value(one, other):
    assert plain(one) == plain(other)
    assert several_spellings([one, other, "else"]) == [tuple(sorted([one, other]))]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P003", "P03"), ("1.10", "1.1"), ("-3", "3"), ("1e3", "1000"),
        ("12345678901234567890", "12345678901234567891"),
    ],
)  # fmt: skip
def test_values_that_are_different(one, other):
    assert plain(one) != plain(other)
    assert several_spellings([one, other, one]) == []


def test_numbers_and_blanks():
    assert numbers_twice(["01", "1", "P1", "p1", "2"]) == [("01", "1")]
    assert blanks_apart(["a", "a ", "A", "b"]) == [("a", "a ")]
    several = blanks_apart(["\u00e9", "e\u0301"])  # which look the same when they are printed
    assert spelt(several) == r"'e\u0301' = '\xe9'"


def test_spellings_in_words():
    pairs = [("a", "A"), ("b", "B"), ("c", "C")]
    assert spelt(pairs, 2) == "'a' = 'A', 'b' = 'B' and 1 more"


@pytest.mark.parametrize(
    ("name", "cells", "expected"),
    [
        ("Teil", ["train", "test", None], {"train": "train", "test": "test"}),
        ("x", ["Test", "val", "Training"], {"train": "Training", "validation": "val", "test": "Test"}),
        ("split", ["train", "test", "extra"], {"train": "train", "test": "test"}),
        ("is_test", ["0", "1"], {"train": "0", "test": "1"}),
        ("is_train", ["False", "True"], {"train": "True", "test": "False"}),
        ("holdout", [0.0, 1.0], {"train": "0", "test": "1"}),
        ("x", ["train", "test", "other"], {}),
        ("x", ["train"], {}),
        ("sex", ["0", "1"], {}),
        ("fold", ["0", "1"], {}),
        ("is_test", ["0", "1", "2"], {}),
        ("test", ["positive", "negative"], {}),
    ],
)
def test_columns_that_divide(name, cells, expected):
    assert division(name, cells) == expected
