# SPDX-License-Identifier: Apache-2.0
"""Images that may show several classes, or none: read from cells and columns, drawn, divided and checked."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.numpy import save_file

import adaptclip as ac
from adaptclip.data.card import parse_card
from adaptclip.data.card_block import SeveralLabels
from adaptclip.data.label_sets import in_words, read_flags, read_label_sets
from adaptclip.data.shots import base_and_new
from adaptclip.errors import CardError, ConfigError, DataError
from adaptclip.training.mitigation import build_mitigation


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))


def where(row: int) -> str:
    return f"row {row}"


def sets_of(cells, names=None, source=None, **rule):
    marks, found = read_label_sets(cells, SeveralLabels(**rule), card_names=names, source_names=source, where=where)
    return [{found[c] for c in np.flatnonzero(row == 1)} for row in marks], found, marks


@pytest.mark.parametrize(
    ("cells", "rule", "expected"),
    [
        (["Mass|Effusion", "Mass", "", None], {"separator": "|"}, [{"Mass", "Effusion"}, {"Mass"}, set(), set()]),
        (["a; b ;c", "b"], {"separator": ";"}, [{"a", "b", "c"}, {"b"}]),
        (["a;a", "b"], {"separator": ";"}, [{"a"}, {"b"}]),
        ([["a", "b"], [], ["b"], None], {}, [{"a", "b"}, set(), {"b"}, set()]),
        ([np.array(["a", "b"]), np.array([])], {}, [{"a", "b"}, set()]),
        (["No Finding", "a", "a, b"], {"separator": ",", "none": ["No Finding"]}, [set(), {"a"}, {"a", "b"}]),
        (["a", "b", float("nan")], {}, [{"a"}, {"b"}, set()]),
        (["cafe\u0301;b", "caf\u00e9"], {"separator": ";"}, [{"caf\u00e9", "b"}, {"caf\u00e9"}]),
    ],
)
def test_a_cell_names_all_classes_of_its_image(cells, rule, expected):
    found, names, marks = sets_of(cells, **rule)
    assert found == expected
    assert names == tuple(sorted(set.union(*expected)))
    assert marks.dtype == np.int8
    assert set(np.unique(marks)) <= {0, 1}


def test_ids_count_through_the_names_of_the_source_or_the_card():
    assert sets_of([[0, 2], [], [1]], source=("a", "b", "c"))[0] == [{"a", "c"}, set(), {"b"}]
    assert sets_of(["0;2", "1"], names=("a", "b", "c"), separator=";")[0] == [{"a", "c"}, {"b"}]
    assert sets_of([["b"], [0]], names=("b", "a"), source=("a", "b"))[0] == [{"b"}, {"a"}]
    with pytest.raises(
        DataError, match=r"row 0: the class id 3 is out of range; allowed: 0 to 2; do the numbers count"
    ):
        sets_of([[1, 3]], source=("a", "b", "c"))
    with pytest.raises(DataError, match="nothing says what they are called"):
        sets_of([[1, 3], [2]])


@pytest.mark.parametrize(
    ("cells", "rule", "message"),
    [
        (["a;b", "a"], {}, r"row 0: the cell 'a;b' seems to name several.*separator: \";\""),
        (["['a', 'b']"], {}, r"write it as a list, not as text"),
        (["a", "a;;b"], {"separator": ";"}, r"row 1: the cell 'a;;b' has an empty name"),
        (["None;a"], {"separator": ";", "none": ["None"]}, r"row 0: .* says 'None', which is none, and names a class"),
        ([["a", 1.5]], {}, r"row 0: 1\.5 in the cell .* is a float, and no class"),
        ([{"a": 1}], {}, r"row 0: .* is a dict, and no class"),
    ],
)
def test_a_cell_that_is_not_clear_is_refused(cells, rule, message):
    with pytest.raises(DataError, match=message):
        sets_of(cells, **rule)


def test_an_unknown_class_is_named_with_its_nearest_and_the_way_out():
    with pytest.raises(
        DataError, match=r"2 rows name 'Efusion', which is no class.*first row 1\. Did you mean \"Effusion\""
    ):
        sets_of(["Mass", "Efusion|Mass", "Efusion"], names=("Effusion", "Mass"), separator="|")


def flags(columns, names=None, **rule):
    marks, found = read_flags(columns, SeveralLabels(**rule) if True else None, card_names=names, where=where)
    return marks.tolist(), found


def test_a_column_for_each_class_holds_yes_no_or_what_the_card_says():
    columns = {"a": [1, 0, "1.0", True], "b": ["yes", "0", 0.0, "False"]}
    assert flags(columns) == ([[1, 1], [0, 0], [1, 0], [1, 0]], ("a", "b"))
    assert flags({"a": [1, -1.0], "b": [0, 1]}, uncertain="negative")[0] == [[1, 0], [0, 1]]
    assert flags({"a": [1, "-1"], "b": [0, 1]}, uncertain="positive")[0] == [[1, 0], [1, 1]]
    assert flags({"a": [1, -1], "b": [0, 1]}, uncertain="ignore")[0] == [[1, 0], [-1, 1]]
    assert flags({"a": [1, None], "b": ["", 1]}, blank="negative")[0] == [[1, 0], [0, 1]]
    assert flags({"a": [1, None], "b": ["", 1]}, blank="ignore")[0] == [[1, -1], [-1, 1]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"a": [1, -1], "b": [0, 0]},
            r"row 1: the column 'a' has -1, which is uncertain.*`several_labels: {uncertain:",
        ),
        (
            {"a": [1, 0], "b": [0, None]},
            r"row 1: the column 'b' has an empty cell.*`several_labels: {blank: negative}`",
        ),
        ({"a": [1, 2], "b": [0, 0]}, r"row 1: the column 'a' .* holds 2; allowed: 0 and 1, true and false"),
        ({"a": [0.7, 0], "b": [0, 0]}, r"row 0: the column 'a' .* holds 0\.7"),
    ],
)
def test_a_flag_that_is_none_is_refused_in_words(columns, message):
    with pytest.raises(DataError, match=message):
        flags(columns)


def test_the_card_may_order_or_rename_the_columns():
    columns = {"a": [1, 0], "b": [0, 0]}
    assert flags(columns, ("b", "a")) == ([[0, 1], [0, 0]], ("b", "a"))
    assert flags(columns, ("first", "second")) == ([[1, 0], [0, 0]], ("first", "second"))
    with pytest.raises(DataError, match=r"'b' is only in one of the two"):
        flags(columns, ("a", "c"))


# --- a whole card ---


def photo(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def found_in(count: int = 48) -> list[set[str]]:
    """Sets of findings of images: none, one, or both, and rarely a third."""
    return [{name for name, every in (("crack", 2), ("rust", 3), ("dent", 8)) if i % every == 1} for i in range(count)]


def table(tmp_path, header, row_of, count=48, name="table.csv"):
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["image", *header])
        for i, found in enumerate(found_in(count)):
            (tmp_path / f"{i}.png").write_bytes(photo(i))
            writer.writerow([f"{i}.png", *row_of(i, found)])


def card_of(tmp_path, block):
    usual = {
        "source": {"kind": "manifest", "files": "table.csv"},
        "splits": {"fractions": {"train": 0.5, "validation": 0.2, "test": 0.3}},
    }
    return parse_card(f"---\nadaptclip: {json.dumps({**usual, **block})}\n---\n", name="mine", path=tmp_path / "c.md")


def whole(data):
    """File name -> its classes, over all parts."""
    names = data.class_names
    return {
        int(part.where(i).rsplit("/", 1)[1][:-4]): {names[c] for c in np.flatnonzero(part.multi_hot[i] == 1)}
        for part in data.parts.values() for i in range(len(part))
    }  # fmt: skip


def by_content(data):
    parts = data.parts.values()
    return {content: row.tolist() for p in parts for content, row in zip(p.contents, p.multi_hot, strict=True)}


def test_the_same_set_is_read_from_cells_from_columns_and_from_lists(tmp_path):
    names = ["crack", "dent", "rust"]
    table(tmp_path, ["findings"], lambda i, found: [" , ".join(sorted(found))])
    cells = ac.open_data(card_of(tmp_path, {"columns": {"label": "findings"}, "several_labels": {"separator": ","}}))
    table(tmp_path, names, lambda i, found: [int(name in found) for name in names])
    columns = ac.open_data(card_of(tmp_path, {"columns": {"labels": names}, "several_labels": True}))
    rows = [
        {
            "image": {"bytes": photo(i), "path": f"/{i}.png"},
            "found": sorted(found),
            "ids": list(map(names.index, found)),
        }
        for i, found in enumerate(found_in())
    ]
    features = Features({"image": ImageFeature(), "found": List(Value("string")), "ids": List(ClassLabel(names=names))})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "t.parquet"))
    source = {"kind": "parquet", "files": "t.parquet"}
    lists = ac.open_data(card_of(tmp_path, {"source": source, "columns": {"label": "found"}, "several_labels": {}}))
    ids = ac.open_data(card_of(tmp_path, {"source": source, "columns": {"label": "ids"}, "several_labels": {}}))
    expected = dict(enumerate(found_in()))
    assert whole(cells) == whole(columns) == expected
    for data in (lists, ids):
        assert data.class_names == cells.class_names
        assert by_content(data) == by_content(cells)
    assert cells.several
    assert any("show none of them" in note for note in cells.notes)
    # The draw is stratified by class, "none" among them: each part has its share of each, to one unit.
    for part, share in (("train", 0.5), ("validation", 0.2), ("test", 0.3)):
        counts = cells.parts[part].class_counts()
        np.testing.assert_allclose(counts, share * np.array([sum(n in f for f in found_in()) for n in names]), atol=1.5)


def test_features_bring_a_matrix_of_labels(tmp_path):
    rng = np.random.default_rng(0)
    marks = rng.integers(0, 2, (40, 3)).astype(np.int64)
    arrays = {"image": rng.normal(size=(40, 8)).astype(np.float32), "text": rng.normal(size=(3, 8)).astype(np.float32)}
    save_file({**arrays, "label": marks}, tmp_path / "x.safetensors")
    block = {
        "source": {"kind": "features", "file": "x.safetensors"},
        "class_names": ["a", "b", "c"],
        "several_labels": {},
    }
    data = ac.open_data(card_of(tmp_path, block))
    for part in data.parts.values():
        np.testing.assert_array_equal(part.multi_hot, marks[part.rows])
    save_file({**arrays, "label": marks[:, :2].copy()}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"should be \(40, 3\), 0 or 1 for each image and class, got \(40, 2\)"):
        ac.open_data(card_of(tmp_path, block))


def test_one_column_for_each_class_may_be_one_class_each(tmp_path):
    names = ["crack", "dent", "rust"]
    table(tmp_path, names, lambda i, found: [int(i % 3 == c) for c in range(3)])
    data = ac.open_data(card_of(tmp_path, {"columns": {"labels": names}}))
    assert not data.several
    assert data.class_names == tuple(names)
    for part in data.parts.values():
        numbers = [int(part.where(i).rsplit("/", 1)[1][:-4]) for i in range(len(part))]
        assert part.labels.tolist() == [number % 3 for number in numbers]
    table(tmp_path, names, lambda i, found: [int(name in found) for name in names])
    with pytest.raises(DataError, match=r"12 rows show several classes and 16 show none.*`several_labels: {}`"):
        ac.open_data(card_of(tmp_path, {"columns": {"labels": names}}))


def test_few_shots_are_k_of_each_class_and_of_none_and_nested(tmp_path):
    table(tmp_path, ["findings"], lambda i, found: ["|".join(found)], count=96)
    data = ac.open_data(card_of(tmp_path, {"columns": {"label": "findings"}, "several_labels": {"separator": "|"}}))
    drawn = {k: ac.sample_few_shot(data, shots=k, seed=3) for k in (1, 2, 4)}
    assert set(drawn[1].train) < set(drawn[2].train) < set(drawn[4].train)
    for k, split in drawn.items():
        few, _ = split.select(data)
        assert len(set(few.ids)) == len(few)
        assert (few.class_counts() >= k).all()
        assert ((few.multi_hot == 1).sum(axis=1) == 0).sum() == k
    assert (
        drawn[4].train
        == ac.sample_few_shot(data, shots=4, seed=3).train
        != ac.sample_few_shot(data, shots=4, seed=4).train
    )


def test_what_needs_one_class_each_says_so(tmp_path):
    table(tmp_path, ["findings"], lambda i, found: ["|".join(found)])
    data = ac.open_data(card_of(tmp_path, {"columns": {"label": "findings"}, "several_labels": {"separator": "|"}}))
    with pytest.raises(DataError, match="base and new is about images of one class each"):
        base_and_new(data)
    for text in ("class-weights", "group-sampling:class"):
        with pytest.raises(ConfigError, match="balances classes that exclude each other"):
            build_mitigation(text, data.train, objective=ac.parse_objective("auto", data))
    with pytest.raises(ConfigError, match=r"a softmax names exactly one.*coop\.py"):
        build_mitigation("", data.train)
    with pytest.raises(ConfigError, match="a softmax names exactly one"):
        ac.parse_objective("softmax", data)
    assert ac.parse_objective("auto", data).name == "sigmoid"
    assert ac.parse_objective("auto").name == "softmax"


def test_one_file_in_two_rows_of_other_findings_is_a_conflict(tmp_path):
    table(tmp_path, ["findings"], lambda i, found: ["|".join(found)])
    (tmp_path / "2.png").write_bytes(photo(1))
    block = {"columns": {"label": "findings"}, "several_labels": {"separator": "|"}}
    with pytest.raises(DataError, match=r"label conflict: 2 of .*\(crack, rust\).*|label conflict: 2 of .*\(none\).*"):
        ac.open_data(card_of(tmp_path, block))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"columns": {"labels": ["a", "b"], "label": "c"}}, "has both label"),
        ({"columns": {"labels": ["a"]}}, "labels lists two columns or more"),
        ({"columns": {"labels": ["a", "a"]}}, "labels lists two columns or more"),
        ({"columns": {"captions": "text"}, "several_labels": {}}, "several_labels is about classes"),
        ({"columns": {"labels": ["a", "b"]}, "several_labels": {"separator": ";"}}, "separator has nothing to say"),
        ({"columns": {"label": "a"}, "several_labels": {"uncertain": "ignore"}}, "uncertain has nothing to say"),
        (
            {"columns": {"label": "a", "levels": {"family": "f"}}, "several_labels": {}},
            "columns.levels is about images of",
        ),
        ({"hard_pairs": [["a", "b"]], "several_labels": {}}, "hard_pairs is about images of one class each"),
        ({"several_labels": {"uncertain": "maybe"}}, "negative"),
        ({"several_labels": {"sep": ";"}}, "sep"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(tmp_path, block, message):
    with pytest.raises(CardError, match=message):
        card_of(tmp_path, block)


def test_an_image_of_which_nothing_is_known_is_not_drawn_as_one_of_none(tmp_path):
    table(tmp_path, ["findings"], lambda i, found: ["" if i % 4 == 0 else "|".join(found) or "none"], count=96)
    block = {
        "columns": {"label": "findings"},
        "several_labels": {"separator": "|", "none": ["none"], "blank": "ignore"},
    }
    data = ac.open_data(card_of(tmp_path, block))
    few, validation = ac.sample_few_shot(data, shots=3, seed=1).select(data)
    unknown = next(row for row in range(len(data.train)) if data.train.nothing_known(row))
    for part in (few, validation):
        assert not any(map(part.nothing_known, range(len(part))))
    assert data.train.label_text(unknown) == "not known"


def test_another_separator_than_the_card_says_is_seen():
    cells = ["Mass;Effusion", "Mass", "Effusion", ""]
    with pytest.raises(
        DataError, match=r"row 0: 'Mass;Effusion' seems to be 2 classes with ';' between.*separator: '\|'"
    ):
        sets_of(cells, separator="|")
    assert sets_of(["a, b;c", "c"], separator=";")[0] == [{"a, b", "c"}, {"c"}]


def test_what_is_said_of_a_set_counts_what_is_known():
    marks = np.array([[1, 0], [0, 0], [-1, 0], [-1, -1], [1, 1]], np.int8)
    words = in_words(marks, ("a", "b"))
    assert "images show 0.86 of 2 classes on average, 2 at most; 1 of 5 show none of them, as far as" in words
    assert "30.0% of the answers are not known" in words
