# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import unicodedata

import numpy as np
import pytest

from adaptclip.data.card_block import GroupBins
from adaptclip.data.columns import group_values, level_values, resolve_labels, row_ids
from adaptclip.errors import DataError


def where(row: int) -> str:
    return f"row {row}"


def labels_of(values, card_names=None, source_names=None):
    ids, names = resolve_labels(values, card_names=card_names, source_names=source_names, where=where)
    return ids.tolist(), names


def test_texts_are_sorted_into_classes():
    assert labels_of(["dog", "cat", "dog "]) == ([1, 0, 1], ("cat", "dog"))


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([["Mass"], ["Effusion", "Mass"], []], None, r"3 rows have a list of labels, first row 0: \['Mass'\]"),
        ([np.array([0, 1]), 1], None, "1 row has a list of labels, first row 0"),
        (["Mass", "Effusion|Mass", "Effusion"], None, r"row 1: the label 'Effusion\|Mass' is 2 labels in one cell"),
        (["Effusion; Mass"], ("Effusion", "Mass"), "row 0: the label 'Effusion; Mass' is 2 labels in one cell"),
    ],
)
def test_several_labels_in_a_cell_are_not_one_class(values, names, message):
    with pytest.raises(DataError, match=f"{message}.*the card says so with `several_labels:`"):
        labels_of(values, names)
    # A name that has such a sign in it is a name.
    assert labels_of(["a|b", "c", "a"])[1] == ("a", "a|b", "c")


def test_the_order_of_the_card_wins():
    assert labels_of(["dog", "cat"], ("dog", "cat")) == ([0, 1], ("dog", "cat"))
    assert labels_of([0, 1, 1], ("dog", "cat"), ("cat", "dog")) == ([1, 0, 0], ("dog", "cat"))


def test_a_card_may_rename_all_classes():
    assert labels_of([0, 1], ("nevus", "melanoma"), ("nv", "mel")) == ([0, 1], ("nevus", "melanoma"))
    with pytest.raises(DataError, match=r"only in the card \['melanoma'\], only in the data \['mel'\]"):
        labels_of([0, 1], ("nv", "melanoma"), ("nv", "mel"))


def test_names_in_any_unicode_form_are_the_same_class():
    assert labels_of([unicodedata.normalize("NFD", "Bäume"), "Bäume", "寿司"])[1] == ("Bäume", "寿司")


def test_numbers_need_names():
    assert labels_of([1, 0.0, np.int32(1)], ("a", "b")) == ([1, 0, 1], ("a", "b"))
    assert labels_of(["1", "0"], ("a", "b")) == ([1, 0], ("a", "b"))
    for values in ([0, 1], ["0", "1"]):
        with pytest.raises(DataError, match="numbers 0 to 1 and nothing says what they are called: add class_names"):
            labels_of(values)
    assert labels_of(["7", "8"], ("7", "8")) == ([0, 1], ("7", "8"))


def test_ids_out_of_range_name_the_row():
    with pytest.raises(DataError, match=r"1 row has a label id out of range, for example 2 \(row 1\). Allowed: 0 to 1"):
        labels_of([0, 2], ("a", "b"))
    with pytest.raises(DataError, match="-1 usually marks the hidden labels"):
        labels_of([-1, 0], None, ("a", "b"))


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(DataError, match=r"for example 'dgo' \(2 rows, first row 1\). Did you mean \"dog\"\?"):
        labels_of(["cat", "dgo", "dgo"], ("cat", "dog"))


@pytest.mark.parametrize("value", [None, math.nan, "", " "])
def test_missing_labels_are_counted(value):
    with pytest.raises(DataError, match="1 row has no label, first row 1"):
        labels_of(["a", value])


@pytest.mark.parametrize("value", [0.5, {1: 2}, 3])
def test_labels_of_mixed_kinds_are_refused(value):
    with pytest.raises(DataError, match="labels must be all whole numbers or all texts"):
        labels_of(["a", value], ("a", "b"))


def test_groups_become_text():
    assert group_values(["f", None, math.nan, " ", 3.0, True], None, name="g") == (
        "f", "unknown", "unknown", "unknown", "3", "True",
    )  # fmt: skip


def test_bins_have_closed_lower_edges():
    bins = GroupBins(bins=(0, 40, 60), labels=("young", "middle", "old"))
    values = group_values([0, 39.9, 40, "59", 60, 99, None], bins, name="age")
    assert values == ("young", "young", "middle", "middle", "old", "old", "unknown")
    for bad in (-1, "n/a"):
        with pytest.raises(DataError, match=rf"group 'age' has bins from 0, but a row holds {bad!r}"):
            group_values([bad], bins, name="age")


def test_levels_are_a_function_of_the_class():
    labels = np.array([0, 1, 1, 0])
    assert level_values(["x", "y", None, "x"], labels, ("a", "b", "c"), name="family") == ("x", "y", "unknown")
    with pytest.raises(DataError, match=r"level 'family' must be the same .* but 'b' has y, z"):
        level_values(["x", "y", "z", "x"], labels, ("a", "b", "c"), name="family")


def test_ids_are_made_of_contents_and_stay_unique():
    contents = ["a" * 64, "b" * 64, "a" * 64, "a" * 64]
    assert row_ids(None, contents) == ("a" * 16, "b" * 16, "a" * 16 + "-2", "a" * 16 + "-3")
    assert row_ids([1, 2.0, "x", "y"], contents) == ("1", "2", "x", "y")
    with pytest.raises(DataError, match=r"0 empty and 1 repeated values \(for example 'x'\)"):
        row_ids(["x", "x", "y", "z"], contents)
    with pytest.raises(DataError, match="1 empty"):
        row_ids(["x", None, "y", "z"], contents)


@pytest.mark.parametrize("values", [["0", "0.0", "1"], ["1", "1,0", "x"], ["01", "1", "1.5"]])
def test_a_number_spelt_in_two_ways_is_no_class_of_its_own(values):
    with pytest.raises(DataError, match=rf"the labels '{values[0]}' = '{values[1]}' are one number spelt .*row \d"):
        labels_of(values)
