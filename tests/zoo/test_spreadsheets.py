# SPDX-License-Identifier: Apache-2.0
"""Excel and Parquet tables as clinics and museums have them, second tables, and links into stores of data managers."""

from __future__ import annotations

import datetime
import re
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from zoo.making import put, run

from adaptclip.data.card import parse_card
from adaptclip.data.image_files import list_images
from adaptclip.data.image_places import ImagePlaces
from adaptclip.data.sources import open_data, read_rows
from adaptclip.data.tables import open_table
from adaptclip.errors import AdaptclipError, CardError, DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


ROWS: list[list[Any]] = [
    ["file", "finding", "day", "age", "code", "checked"],
    ["0.png", "crack", datetime.datetime(2024, 3, 1), 50.5, 7, True],
    ["1.png", "intact", datetime.datetime(2024, 3, 1, 12, 30), 51, 12, False],
    ["2.png", "crack", None, None, 3, None],
]


def book(path: Path, rows: Sequence[Sequence[Any]] = ROWS, change: Callable[[Any], object] = lambda book: None) -> Path:
    """Writes an Excel file with one sheet, after a change."""
    made = openpyxl.Workbook()
    sheet = made.active
    assert sheet is not None
    for row in rows:
        sheet.append(list(row))
    change(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return path


def read(path: Path, sheet: str | None = None) -> tuple[list[list[Any]], tuple[str, ...]]:
    """The cells of a table by row, and what was said of it."""
    table = open_table(path, sheet)
    return [list(row.values()) for _, row in table.rows], table.notes


def test_cells_are_text_as_the_spreadsheet_shows_it(tmp_path):
    def formats(made: Any) -> None:
        for row in range(2, 5):
            made.active.cell(row, 5).number_format = "000"

    rows, said = read(book(tmp_path / "t.xlsx", ROWS, formats))
    assert rows == [
        ["0.png", "crack", "2024-03-01", "50.5", "007", "True"],
        ["1.png", "intact", "2024-03-01 12:30:00", "51", "012", "False"],
        ["2.png", "crack", None, None, "003", None],
    ]
    assert said == ()


def _hide(made: Any) -> None:
    made.active.row_dimensions[3].hidden = True
    made.active.column_dimensions["D"].hidden = True


def _merge_down(made: Any) -> None:
    made.active.merge_cells("B2:B3")


def _second(made: Any, state: str = "visible") -> None:
    sheet = made.create_sheet("Notes")
    sheet.append(["read me"])
    sheet.sheet_state = state


def _title(made: Any) -> None:
    made.active.insert_rows(1, 2)
    made.active["A1"] = "Patients of 2024"


def _far_away(made: Any) -> None:
    made.active.cell(200_000, 1).number_format = "0.00"  # a cell that was formatted and never filled


SAID: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hidden row": (_hide, "1 hidden row of the sheet 'Sheet' of t.xlsx is read like the others"),
    "a hidden column": (_hide, "hidden columns of the sheet 'Sheet' of t.xlsx are read like the others"),
    "cells merged down": (
        _merge_down,
        "1 merged cell of the sheet 'Sheet' of t.xlsx stands for each row",
    ),
    "a title above": (_title, "the rows above row 3 of t.xlsx are not used: the header is there"),
    "an empty second sheet": (lambda made: made.create_sheet("Sheet2"), ""),
    "a hidden second sheet": (lambda made: _second(made, "hidden"), ""),
    "a format far below the last row": (_far_away, ""),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_a_spreadsheet_hides_is_said(tmp_path, kind):
    change, expected = SAID[kind]
    rows, said = read(book(tmp_path / "t.xlsx", ROWS, change))
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png"]
    assert [row[1] for row in rows] == ["crack", "crack" if kind == "cells merged down" else "intact", "crack"]
    assert expected in " ".join(said)
    assert bool(said) == bool(expected)


def _formula(made: Any) -> None:
    made.active["D3"] = "=D2+1"


def _error(made: Any) -> None:
    made.active["D3"] = "#DIV/0!"
    made.active["D3"].data_type = "e"


def _merge_across(made: Any) -> None:
    made.active.merge_cells("B3:C3")


def _beyond(made: Any) -> None:
    made.active["I3"] = "see below"


DOUBTFUL: dict[str, tuple[Callable[[Any], object], str]] = {
    "two sheets": (_second, r"has 2 sheets that are not empty \(Sheet, Notes\).*`sheet` in the card, or --sheet"),
    "a formula without its result": (_formula, r"the cell D3 of the sheet 'Sheet' holds a formula without its result"),
    "an error": (_error, r"the cell D3 holds the error #DIV/0!"),
    "cells merged across": (_merge_across, r"line 3: cells are merged across columns"),
    "a note beside the table": (_beyond, r"line 3: a cell lies to the right of the 6 columns of the header in line 1"),
}


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_what_is_in_doubt_in_a_spreadsheet_is_refused(tmp_path, kind):
    change, message = DOUBTFUL[kind]
    with pytest.raises(DataError, match=message):
        read(book(tmp_path / "t.xlsx", ROWS, change))


def test_a_formula_is_the_result_that_was_stored(tmp_path):
    path = book(tmp_path / "t.xlsx", ROWS, _formula)
    with zipfile.ZipFile(path) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    parts[sheet] = re.sub(rb"(<f>D2\+1</f>)\s*<v\s*/?>(</v>)?", rb"\1<v>51.5</v>", parts[sheet])
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    assert read(path)[0][1][3] == "51.5"


def test_a_sheet_is_named(tmp_path):
    path = book(tmp_path / "t.xlsx", ROWS, _second)
    assert len(read(path, "Sheet")[0]) == 3
    with pytest.raises(DataError, match="has no sheet 'sheet'; its sheets are Sheet, Notes"):
        read(path, "sheet")
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="has no sheets, and the sheet 'x' is asked for"):
        open_table(tmp_path / "t.csv", "x")


@pytest.mark.parametrize("content", [b"", b"no archive", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 locked"])
def test_what_is_no_excel_file_is_refused(tmp_path, content):
    (tmp_path / "t.xlsx").write_bytes(content)
    with pytest.raises(DataError, match=r"is no Excel file \(.xlsx\), is damaged, or is locked by a password"):
        open_table(tmp_path / "t.xlsx")


def test_openpyxl_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    path = book(tmp_path / "t.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r'pip install "adaptclip\[excel\]"\. Or save the sheet as CSV UTF-8'):
        open_table(path)


@pytest.mark.parametrize("name", ["t.xls", "t.ods"])
def test_other_spreadsheets_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"must end in .csv, .*Save it as \.xlsx or as CSV UTF-8"):
        open_table(tmp_path / name)


def test_parquet_is_a_table_too(tmp_path):
    columns = {
        "file": ["0.png", "1.png"], "n": [1, None], "day": [datetime.date(2024, 3, 1), None],
        "thumb": [b"x", b"y"], "found": [["a", "b"], []], "__index_level_0__": [5, 6],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[0] == [["0.png", 1, "2024-03-01", ["a", "b"]], ["1.png", None, None, []]]
    (tmp_path / "t.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"cannot read .*t\.parquet"):
        open_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet"])
def test_a_card_names_such_a_table(tmp_path, suffix):
    rows = [["file", "label", "part"], *([f"{i}.png", "ab"[i % 2], "train" if i < 4 else "test"] for i in range(8))]
    for i in range(8):
        put(tmp_path, f"{i}.png", seed=i)
    if suffix == ".xlsx":
        book(tmp_path / "t.xlsx", rows)
    else:
        pq.write_table(
            pa.table({name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}), tmp_path / "t.parquet"
        )
    block = f"  source: {{kind: manifest, files: t{suffix}}}\n  columns: {{image: file}}\n"
    block += "  splits: {column: part, train: train, test: test}\n"
    data = open_data(parse_card(f"---\nadaptclip:\n{block}---\n", name="t"), data_root=tmp_path)
    assert (data.class_names, len(data.train), len(data.test)) == (("a", "b"), 4, 4)


# Names of images


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("a.png", "deep/down/a.png"),
        ("a", "deep/down/a.png"),
        ("down/a", "deep/down/a.png"),
        ("./down\\a.png", "deep/down/a.png"),
        ("A.PNG", "deep/down/a.png"),
        (7, "ids/7.jpg"),
        ("1.2.840.7", "dicom/1.2.840.7.png"),
        (unicodedata.normalize("NFC", "für/Bär.png"), unicodedata.normalize("NFD", "set/für/Bär.png")),
        ("b.png", "b.png"),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_a_name_is_found_where_a_single_image_fits(tmp_path, written, there):
    for name in ("deep/down/a.png", "ids/7.jpg", "dicom/1.2.840.7.png", "b.png", "more/b.png",
                 unicodedata.normalize("NFD", "set/für/Bär.png")):  # fmt: skip
        put(tmp_path, name)
    places = ImagePlaces(tmp_path / "t.csv")
    assert places.path(written, column="file", line=2) == (tmp_path / there).resolve()
    assert bool(places.notes()) == (there not in ("b.png", "nowhere.png"))


def test_a_name_that_several_images_fit_is_refused_with_their_paths(tmp_path):
    for name in ("x/a.png", "y/a.png", "x/b.jpg", "x/b.png", "001.png"):
        put(tmp_path, name)
    places = ImagePlaces(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"'a.png' without its folder, and several images fit: x/a.png, y/a.png"):
        places.path("a.png", column="file", line=2)
    with pytest.raises(DataError, match=r"'b' without an ending, and several images fit: x/b.jpg, x/b.png"):
        places.path("b", column="file", line=2)
    with pytest.raises(DataError, match=r"holds '1', and there is '001.png': the zeros before the number were lost"):
        places.path("1", column="file", line=2)


# Second tables


def study(root: Path, *, join: str, columns: str = "", patients: str | None = None) -> Any:
    """The card of 16 images of 8 patients, and a table of patients beside it."""
    lines = ["file,label,patient", *(f"{i}.png,{'ab'[i % 2]},P{i // 2}" for i in range(16))]
    for i in range(16):
        put(root, f"{i}.png", seed=i)
    put(root, "t.csv", "\n".join(lines).encode())
    table = "Patient ID;sex;site\n" + "".join(f"P{i};{'mf'[i % 2]};S{i % 4}\n" for i in range(7)) + "P99;m;S1\n"
    put(root, "patients.csv", (patients or table).encode())
    block = f"  source: {{kind: manifest, files: t.csv, join: {join}}}\n"
    block += "  splits: {fractions: {train: 0.5, test: 0.5}}\n"
    block += f"  columns: {{image: file, cluster: patient{columns}}}\n"
    return parse_card(f"---\nadaptclip:\n{block}---\n", name="t")


def test_patients_are_joined_by_their_key(tmp_path):
    card = study(tmp_path, join="[{file: patients.csv, by: {patient: Patient ID}}]", columns=", groups: {sex: sex}")
    data = open_data(card, data_root=tmp_path)
    groups = {part.where(i): value for part in data.parts.values() for i, value in enumerate(part.groups["sex"])}
    assert [groups[str(tmp_path / f"{i}.png")] for i in range(16)] == [*"mmffmmffmmffmm", "unknown", "unknown"]
    assert data.unused_columns == {"site": 4}
    assert (
        "2 images have no row in patients.csv, joined by 'patient' (first 'P7'): what it says is unknown for them"
        in data.notes
    )
    assert "1 row fits no image in patients.csv, joined by 'patient' (first 'P99')" in data.notes


JOINS: dict[str, tuple[str, str, str | None, str]] = {
    "no such table": ("[{file: x.csv, by: patient}]", "", None, "there is no table .*x.csv to join"),
    "no such key there": ("[{file: patients.csv, by: patient}]", "", None, "has no column 'patient' to join by"),
    "no such key here": (
        "[{file: patients.csv, by: {person: Patient ID}}]", "", None, "has no column 'person', which the card names",
    ),
    "a key twice": (
        "[{file: patients.csv, by: {patient: id}}]", "", "id,sex\nP1,m\nP1,f\n",
        r"has two rows for 'P1' in the column 'id' \(lines 2 and 3\)",
    ),
    "keys in another spelling": (
        "[{file: patients.csv, by: {patient: id}}]", "", "id,sex\np0,m\np1,f\n",
        "no image fits a row .* 'P0' here is 'p0' there; write each in one way",
    ),
    "a column in both": (
        "[{file: patients.csv, by: {patient: id}}]", ", groups: {g: label}", "id,label\nP1,x\nP2,y\n",
        "the column 'label', which the card names, is in .* among the images' own with other values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", JOINS)
def test_a_join_in_doubt_is_refused(tmp_path, kind):
    join, columns, patients, message = JOINS[kind]
    with pytest.raises(AdaptclipError, match=message):
        open_data(study(tmp_path, join=join, columns=columns, patients=patients), data_root=tmp_path)


def test_a_column_of_both_tables_that_agree_is_one(tmp_path):
    patients = "id,label\n" + "".join(f"P{i},\n" for i in range(8))
    card = study(tmp_path, join="[{file: patients.csv, by: {patient: id}}]", patients=patients)
    assert open_data(card, data_root=tmp_path).class_names == ("a", "b")


def test_a_taxonomy_is_joined_to_class_folders(tmp_path):
    for name in ("red kite", "black kite", "rook"):
        for i in range(4):
            put(tmp_path, f"set/{name}/{i}.png")
    put(tmp_path, "taxonomy.csv", b"species,family\nred kite,Accipitridae\nblack kite,Accipitridae\nrook,Corvidae\n")
    block = "  source: {kind: image_folder, path: set, join: [{file: taxonomy.csv, by: {label: species}}]}\n"
    block += "  splits: {fractions: {train: 0.5, test: 0.5}}\n  columns: {levels: {family: family}}\n"
    data = open_data(parse_card(f"---\nadaptclip:\n{block}---\n", name="t"), data_root=tmp_path)
    assert data.class_names == ("black kite", "red kite", "rook")
    assert data.test.levels == {"family": ("Accipitridae", "Accipitridae", "Corvidae")}
    plain = block.replace(", join: [{file: taxonomy.csv, by: {label: species}}]", "")
    with pytest.raises(DataError, match=r"an image folder has no columns but its folders' names.*join a table"):
        open_data(parse_card(f"---\nadaptclip:\n{plain}---\n", name="t"), data_root=tmp_path)


def test_a_card_without_joins_keeps_its_digest():
    block = "  source: {kind: manifest, files: t.csv}\n"
    card = parse_card(f"---\nadaptclip:\n{block}---\n", name="t")
    assert card.source.model_dump_json() == '{"kind":"manifest","files":"t.csv"}'
    with pytest.raises(CardError, match=r"adaptclip.source.join, entry 1, by: is missing"):
        parse_card(f"---\nadaptclip:\n{block.replace('}', ', join: [{file: x}]}')}---\n", name="t")


# Links as data managers make them


STORES = {
    "git-annex": ("set/images", ".git/annex/objects/a/b/MD5E-s1--0.png", "datalad get"),
    "a submodule of datalad": ("sub/set", ".git/modules/sub/annex/objects/a/0.png", "git annex get"),
    "DVC": ("set", ".dvc/cache/files/md5/ab/cdef", "dvc pull"),
    "DVC's cache of the user": ("work/set", ".cache/dvc/files/md5/ab/cdef", "dvc pull"),
    "the cache of the hub": ("snapshots/1a2b/data", "blobs/0123abcd", "hf download"),
}


def linked(root: Path, kind: str) -> Path:
    """A folder of eight images, the first of them a link into a store, with a table; returns the stored file."""
    folder, store, _ = STORES[kind]
    for i in range(1, 8):
        put(root / folder, f"{i}.png", seed=i)
    put(root, store, None, seed=0)
    (root / folder / "0.png").symlink_to(root / store)
    put(root / folder, "t.csv", "\n".join(["image,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(8))]).encode())
    return root / store


@pytest.mark.parametrize("kind", STORES)
def test_links_into_a_store_beside_the_data_are_followed(tmp_path, kind):
    stored = linked(tmp_path, kind)
    folder = tmp_path / STORES[kind][0]
    block = "  source: {kind: manifest, files: t.csv}\n  splits: {fractions: {train: 0.5, test: 0.5}}\n"
    card = parse_card(f"---\nadaptclip:\n{block}---\n", name="t")
    rows = read_rows(card, folder)
    assert rows.store.where(0) == str(folder / "0.png"), "the image's own name, not that of the store"
    assert sum(map(len, open_data(card, data_root=folder).parts.values())) == 8
    stored.unlink()
    with pytest.raises(DataError, match=f"0.png: cannot read .*content is not here: .*{STORES[kind][2]}"):
        open_data(card, data_root=folder)
    (folder / "t.csv").unlink()
    assert STORES[kind][2] in list_images(folder).words()


def test_no_other_link_is_followed(tmp_path):
    put(tmp_path, "elsewhere/0.png")
    put(tmp_path, "set/t.csv", b"image,label\n0.png,a\n")
    (tmp_path / "set/0.png").symlink_to(tmp_path / "elsewhere/0.png")
    with pytest.raises(DataError, match=r"'0.png' leaves .* by a link to .*elsewhere/0.png.*cp -rL"):
        ImagePlaces(tmp_path / "set/t.csv").path("0.png", column="image", line=2)
    with pytest.raises(DataError, match="leaves"):  # a store is not named, only linked to
        ImagePlaces(tmp_path / "set/t.csv").path("../.git/annex/objects/0.png", column="image", line=2)


def test_pointers_of_dvc_say_what_fetches_their_images(tmp_path, capsys):
    put(tmp_path, "set/images.dvc", b"outs:\n- path: images\n")
    put(
        tmp_path, "set/t.csv", "\n".join(["image,label", *(f"images/{i}.png,{'ab'[i % 2]}" for i in range(8))]).encode()
    )
    block = "  source: {kind: manifest, files: set/t.csv}\n  splits: {fractions: {train: 0.5, test: 0.5}}\n"
    put(tmp_path, "card.md", f"---\nadaptclip:\n{block}---\n".encode())
    assert run(["card", "check", str(tmp_path / "card.md")]) == 1
    assert "images.dvc stands for it: `dvc pull` fetches it" in capsys.readouterr().err
