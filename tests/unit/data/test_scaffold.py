# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptclip.data.asking import Given
from adaptclip.data.card import load_card
from adaptclip.data.card_block import ManifestSource
from adaptclip.data.scaffold import new_card
from adaptclip.data.sources import open_data
from adaptclip.errors import CardError, DataError


def _image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(path)


def _class_folders(root: Path, names: tuple[str, ...], each: int) -> None:
    for number, name in enumerate(names):
        for i in range(each):
            _image(root / name / f"{i}.png", 100 * number + i + len(root.name) * 1000)


def _table(root: Path, rows: list[dict], name: str = "table.csv", delimiter: str = ",") -> None:
    for i, row in enumerate(rows):
        _image(root / row["file"], i)
    with (root / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _rows(count: int = 24) -> list[dict]:
    return [
        {
            "file": f"images/{i}.png",
            "species": ["Vulpes: vulpes", "Échidna, n° 2"][i % 2],
            "family": ["Canidae", "Tachyglossidae"][i % 2],
            "split": "train" if i < 12 else "test",
            "sex": ["m", "f", ""][i % 3],
            "patient": f"p{i // 4}",
        }
        for i in range(count)
    ]


def test_class_folders_become_a_card_that_opens(tmp_path):
    _class_folders(tmp_path / "foxes", ("Red_fox", "arctic-fox"), 10)
    out = new_card(tmp_path / "foxes", tmp_path / "foxes.md")
    card, data = load_card(out), open_data(load_card(out))
    assert data.class_names == ("Red_fox", "arctic-fox")
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 2, 6)
    text = out.read_text(encoding="utf-8")
    assert 'path: "foxes"' in text
    assert '#   "Red_fox": "red fox"' in text
    assert "20 images of 2 classes; the smallest class, Red_fox, has 10." in card.prose


def test_split_folders_are_named_in_the_card(tmp_path):
    for part in ("train", "val", "testing"):
        _class_folders(tmp_path / "set" / part, ("a", "b"), 4)
    card = load_card(new_card(tmp_path / "set", tmp_path / "card.md"))
    assert card.splits is not None
    assert card.splits.names == {"train": "train", "validation": "val", "test": "testing"}
    assert card.splits.fractions is None


def test_a_folder_elsewhere_is_named_in_full(tmp_path):
    _class_folders(tmp_path / "images", ("a", "b"), 3)
    (tmp_path / "cards").mkdir()
    out = new_card(tmp_path / "images", tmp_path / "cards" / "mine.md")
    assert load_card(out).source.path == (tmp_path / "images").resolve().as_posix()  # pyright: ignore


def test_a_table_gives_columns_splits_and_proposals(tmp_path):
    _table(tmp_path / "survey", _rows())
    out = new_card(tmp_path / "survey", tmp_path / "survey.md")
    card, text = load_card(out), out.read_text(encoding="utf-8")
    assert (card.columns.image, card.columns.label, card.columns.cluster) == ("file", "species", "patient")
    assert card.splits is not None
    assert card.splits.column == "split"
    assert '#   "sex": "sex"  # m: 8, f: 8, unknown: 8' in text
    assert '#   "family": "family"  # 2 names' not in text, "one name per class is no coarser level"
    data = open_data(card)
    assert data.class_names == ("Vulpes: vulpes", "Échidna, n° 2")
    assert (len(data.train), len(data.test)) == (12, 12)


def test_a_coarser_column_is_proposed_as_a_level(tmp_path):
    rows = [row | {"species": f"species {i % 4}", "family": f"family {i % 2}"} for i, row in enumerate(_rows())]
    _table(tmp_path / "survey", rows, "table.tsv", "\t")
    text = new_card(tmp_path / "survey", tmp_path / "survey.md").read_text(encoding="utf-8")
    assert '#   "family": "family"  # 2 names, each class has one' in text


def test_uncommented_proposals_are_valid(tmp_path):
    rows = [row | {"species": f"species {i % 4}", "family": f"family {i % 2}"} for i, row in enumerate(_rows())]
    _table(tmp_path / "survey", rows)
    out = new_card(tmp_path / "survey", tmp_path / "survey.md")
    lines = out.read_text(encoding="utf-8").splitlines()
    kept = (
        "# groups:",
        '#   "sex"',
        "# levels:",
        '#   "family": "family"  # 2 names, ',
        '#   "family": "family"  # family',
    )
    out.write_text(
        "\n".join(line.replace("# ", "", 1) if line.strip().startswith(kept) else line for line in lines),
        encoding="utf-8",
    )
    card = load_card(out)
    assert card.columns.groups["sex"] == "sex"
    assert card.columns.levels == {"family": "family"}


def test_jsonl_tables_by_part_are_read_together(tmp_path):
    for part, start in (("train", 0), ("test", 12)):
        lines = []
        for i in range(start, start + 12):
            _image(tmp_path / "set" / "images" / f"{i}.png", i)
            lines.append(json.dumps({"path": f"images/{i}.png", "class": f"class {'ab'[i % 2]}", "id": f"r{i}"}))
        (tmp_path / "set" / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    card = load_card(new_card(tmp_path / "set", tmp_path / "card.md"))
    assert card.columns.id == "id"
    data = open_data(card)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 0, 12)
    assert data.train.ids[0] == "r0"


def test_numbered_labels_ask_for_names(tmp_path):
    _table(tmp_path / "survey", [row | {"species": str(i % 3)} for i, row in enumerate(_rows())])
    out = new_card(tmp_path / "survey", tmp_path / "survey.md")
    assert load_card(out).class_names == ("class 0", "class 1", "class 2")
    assert "The labels are numbers" in out.read_text(encoding="utf-8")


def test_a_table_without_splits_gets_fractions(tmp_path):
    _table(tmp_path / "survey", [{k: v for k, v in row.items() if k != "split"} for row in _rows()])
    splits = load_card(new_card(tmp_path / "survey", tmp_path / "survey.md")).splits
    assert splits is not None
    assert splits.fractions == {"train": 0.6, "validation": 0.1, "test": 0.3}


@pytest.mark.parametrize("inside", [True, False])
def test_a_table_itself_is_taken_as_a_folder_with_it_is(tmp_path, inside):
    _table(tmp_path / "survey", _rows())
    table = tmp_path / "survey" / "table.csv"
    of_folder = new_card(tmp_path / "survey", tmp_path / "survey.md").read_text(encoding="utf-8")
    (tmp_path / "survey" / "other.csv").write_text("a,b\n1,2\n")  # which of several is meant is said by naming it
    out = (table.parent if inside else tmp_path) / "own.md"
    text = new_card(table, out).read_text(encoding="utf-8")
    source = load_card(out).source
    assert isinstance(source, ManifestSource)
    assert source.files == ("table.csv" if inside else "survey/table.csv")
    named = text.replace('pretty_name: "table"', 'pretty_name: "survey"').replace("# table\n", "# survey\n")
    assert named.replace('files: "table.csv"', 'files: "survey/table.csv"') == of_folder


def test_a_table_has_no_folders_for_classes(tmp_path):
    _table(tmp_path, _rows())
    with pytest.raises(CardError, match="is a table, which has no folders for classes"):
        new_card(tmp_path / "table.csv", tmp_path / "card.md", given=Given(classes="folders"))
    (tmp_path / "table.docx").touch()
    with pytest.raises(DataError, match=r"a manifest must end in \.csv, \.tsv, \.jsonl"):
        new_card(tmp_path / "table.docx", tmp_path / "card.md")
    with pytest.raises(CardError, match=r"neither a folder nor a table of image paths \(\.csv, \.tsv, \.jsonl"):
        new_card(tmp_path / "nowhere.csv", tmp_path / "card.md")


def test_an_existing_card_is_never_overwritten(tmp_path):
    _class_folders(tmp_path / "images", ("a", "b"), 3)
    (tmp_path / "card.md").write_text("my work")
    with pytest.raises(CardError, match="exists already"):
        new_card(tmp_path / "images", tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text() == "my work"


def test_unusable_folders_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CardError, match="is neither a folder nor a table"):
        new_card(tmp_path / "nowhere", tmp_path / "card.md")
    with pytest.raises(CardError, match="holds no image and no table"):
        new_card(tmp_path / "empty", tmp_path / "card.md")
    with pytest.raises(CardError, match=r"should end in \.md"):
        new_card(tmp_path / "empty", tmp_path / "card.yaml")
    assert not list(tmp_path.glob("card*"))


def test_unusable_tables_are_refused_with_what_to_do(tmp_path):
    for number, (content, message) in enumerate(
        [
            ("a,b\n1,2\n", "no column that looks like the image paths: its columns are a, b"),
            ("file,colour\nx.png,red\n", "no column that looks like the classes"),
            ("file,label\n", "lists no image"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "table.csv").write_text(content)
        with pytest.raises(CardError, match=message):
            new_card(folder, tmp_path / "card.md")
    (tmp_path / "0" / "other.csv").write_text("file,label\n")
    with pytest.raises(CardError, match=r"holds 2 tables \(other.csv, table.csv\)"):
        new_card(tmp_path / "0", tmp_path / "card.md")


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "table.csv").write_text("file,label\n../../secret.png,a\n")
    with pytest.raises(DataError, match="secret"):
        new_card(tmp_path / "set", tmp_path / "card.md")
