# SPDX-License-Identifier: Apache-2.0
"""Tables of images as people have them: from Excel in other countries, pandas, R, DICOM; and what each is read as."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from zoo.making import picture, put, run, tree

from adaptclip.data.card import load_card, parse_card
from adaptclip.data.readers import RawRows
from adaptclip.data.scaffold import new_card
from adaptclip.data.sources import READERS, open_data
from adaptclip.errors import AdaptclipError, DataError, SplitError
from adaptclip.words import identity_rank, is_person, is_place


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def lines(header: str, row: str, number: int = 8) -> str:
    """A table of the images 0.png to 7.png; of `row`, {i} is the number, {c} a class and {p} the patient of two."""
    rows = [row.format(i=i, c=("crack", "intact")[i % 2], p=f"P{i // 2}", n=i % 2 + 1) for i in range(number)]
    return "\n".join([header, *rows]) + "\n"


PLAIN = lines("image,label", "{i}.png,{c}")

READ: dict[str, tuple[str, bytes | str, dict[str, str]]] = {
    "plain": ("t.csv", PLAIN, {"image": "image", "label": "label"}),
    "the index that pandas writes": (
        "t.csv",
        lines(",image,label", "{i},{i}.png,{c}"),
        {"said": "column 1 of t.csv has no name and is not used"},
    ),
    "the index that pandas wrote twice": (
        "t.csv",
        lines(",Unnamed: 0,image,label", "{i},{i},{i}.png,{c}"),
        {"label": "label"},
    ),
    "German Excel": (
        "t.csv",
        ("\ufeff" + lines("Bild Datei;Haupt Diagnose;Patient ID;Alter;Geschlecht", "{i}.png;{c};{p};5{i},0;w"))
        .replace("57,0;w", ";m")
        .replace("\n", "\r\n")
        .encode(),
        {
            "image": "Bild Datei",
            "label": "Haupt Diagnose",
            "cluster": "Patient ID",
            "text": '"Alter": {bins: [50, 52, 54]}',
            "said": "'Patient ID' says who or what images are of: 4 of them",
        },
    ),
    "DICOM keywords": (
        "t.csv",
        lines("file,diagnosis,PatientID,PatientSex", "{i}.png,{c},{p},M").replace(
            "7.png,intact,P3,M", "7.png,intact,P3,F"
        ),
        {"cluster": "PatientID", "text": '"PatientSex": "PatientSex"  # M: 7, F: 1'},
    ),
    "Excel's line about the separator": ("t.csv", "sep=;\r\n" + PLAIN.replace(",", ";").replace("\n", "\r\n"), {}),
    "UTF-16 with its mark": ("t.csv", PLAIN.replace("crack", "Riß").encode("utf-16"), {"classes": "Riß 4, intact 4"}),
    "UTF-8 with a mark": ("t.csv", PLAIN.replace("crack", "Riß").encode("utf-8-sig"), {"image": "image"}),
    "tabs": ("t.tsv", PLAIN.replace(",", "\t"), {}),
    "bars": ("t.csv", PLAIN.replace(",", "|"), {}),
    "old line ends of a Mac": ("t.csv", PLAIN.replace("\n", "\r"), {}),
    "a header in quotes, with the separator in it": (
        "t.csv",
        lines('"image","label","age, years"', "{i}.png,{c},30"),
        {"label": "label"},
    ),
    "text with line breaks": ("t.csv", lines("image,label,report", '{i}.png,{c},"no {i}\nfinding, at all"'), {}),
    "blank lines": ("t.csv", "\n" + PLAIN.replace("2.png", "\n2.png") + "\n\n  \n,\n,\n", {}),
    "separators at the ends of lines": (
        "t.csv",
        lines("image,label,,", "{i}.png,{c},,"),
        {"said": "column 3, 4 of t.csv"},
    ),
    "blanks in the header": ("t.csv", lines("image , label ", " {i}.png , {c} "), {"image": "image", "label": "label"}),
    "JSON lines with a mark": (
        "t.jsonl",
        ("\ufeff" + "".join(json.dumps({"path": f"{i}.png", "class": "ab"[i % 2]}) + "\n" for i in range(8))).encode(),
        {"image": "path", "label": "class"},
    ),
    "backslashes": ("t.csv", lines("image,label", "more\\{i}.png,{c}"), {}),
    "names without ending, as ISIC has them": (
        "t.csv",
        lines("image_id,dx", "{i},{c}"),
        {"image": "image_id", "label": "dx"},
    ),
    "paths in a column of another name": (
        "t.csv",
        lines("foto,klasse", "{i}.png,{c}"),
        {"image": "foto", "label": "klasse"},
    ),
    "ids that count from 1": (
        "t.csv",
        lines("image,label", "{i}.png,00{n}"),
        {"text": 'class_names: ["001", "002"]', "classes": "001 4, 002 4"},
    ),
    "a column of splits in words": (
        "t.csv",
        lines("image,label,Partition", "{i}.png,{c},Training Set").replace(
            "k,Training Set\n7.png,intact,Training", "k,Test Set\n7.png,intact,Test"
        ),
        {"text": 'train: "Training Set"  # 6 images', "cluster": "None"},
    ),
    "two identities": ("t.csv", lines("image,label,lesion,patient", "{i}.png,{c},L{i},{p}"), {"cluster": "patient"}),
    "an attribute of the patient is no patient": (
        "t.csv",
        lines("image,label,patient_age,patient sex", "{i}.png,{c},4{i},f"),
        {"cluster": "None"},
    ),
    "a label with a blank behind it": (
        "t.csv",
        PLAIN.replace("3.png,intact", "3.png,intact "),
        {"said": "the labels 'intact' = 'intact ' differ only in blanks around them", "classes": "crack 4, intact 4"},
    ),
    "folds": (
        "t.csv",
        lines("image,label,fold", "{i}.png,{c},{n}").replace("0.png,crack,1", "0.png,crack,0"),
        {
            "said": "the column 'fold' numbers 3 folds, and the card follows it: train is 2, validation is 1, test is",
            "text": 'column: "fold"\n    train: ["2"]  # 4 images\n    validation: ["1"]  # 3 images\n    test: ["0"]',
        },
    ),
    "few sites are groups": ("t.csv", lines("image,label,site", "{i}.png,{c},S{n}"), {"cluster": "None"}),
}


def folder_with(root: Path, name: str, table: bytes | str) -> Path:
    """A folder of eight images, some of them in a folder below too, and the table."""
    for i in range(8):
        put(root, f"{i}.png", seed=i)
        put(root, f"more/{i}.png", seed=i)
    put(root, name, table.encode() if isinstance(table, str) else table)
    return root


@pytest.mark.parametrize("kind", READ)
def test_a_table_is_read(tmp_path, kind):
    name, table, expected = READ[kind]
    said: list[str] = []
    path = new_card(folder_with(tmp_path / "set", name, table), tmp_path / "card.md", say=said.append)
    card, text = load_card(path), path.read_text(encoding="utf-8")
    rows: RawRows = READERS["manifest"](card, None)
    assert [rows.store.read(i) for i in range(len(rows))] == [picture(i) for i in range(8)]
    counts = Counter(map(str.strip, map(str, rows.values[card.columns.label or ""])))
    facts = {
        "image": card.columns.image,
        "label": card.columns.label,
        "cluster": str(card.columns.cluster),
        "classes": ", ".join(f"{label} {count}" for label, count in sorted(counts.items())),
        "said": " ".join(said),
        "text": text,
    }
    for fact, value in {"classes": "crack 4, intact 4" if "crack" in str(table) else "", **expected}.items():
        assert facts[fact] == value if fact not in ("said", "text", "classes") else value in facts[fact], fact


def jsonl(*pairs: str) -> str:
    return "".join("{" + pair.replace("'", '"') + "}\n" for pair in pairs)


REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "a column twice": (
        "t.csv",
        lines("image,label,label", "{i}.png,{c},x"),
        r"2 columns named 'label' \(columns 2 and 3\)",
    ),
    "a column twice but for blanks": ("t.csv", lines("image,label, label", "{i}.png,{c},x"), "2 columns named 'label'"),
    "a column twice but for its Unicode form": (
        "t.csv",
        lines(f"image,Größe,{unicodedata.normalize('NFD', 'Größe')},label", "{i}.png,1,2,{c}"),
        "2 columns named 'Größe'",
    ),
    "a key twice": ("t.jsonl", jsonl("'image': '0.png', 'label': 'a', 'label': 'b'"), "label.* twice"),
    "a key twice but for blanks": (
        "t.jsonl",
        jsonl("'image': '0.png', 'label': 'a', 'label ': 'b'"),
        "2 columns named 'label'",
    ),
    "two names that read the same": (
        "t.csv",
        lines("image,Label,label", "{i}.png,{c},x"),
        "'Label' and 'label', which read the same",
    ),
    "Windows-1252": (
        "t.csv",
        PLAIN.replace("crack", "Riß").encode("cp1252"),
        "is not UTF-8 text .byte 0xdf.*Windows-1252.*CSV UTF-8",
    ),
    "UTF-16 without its mark": (
        "t.csv",
        PLAIN.encode("utf-16-le"),
        "holds NUL bytes: it is damaged, or UTF-16 without its mark",
    ),
    "a drive": (
        "t.csv",
        lines("image,label", "D:\\scans\\set\\{i}.png,{c}"),
        r"line 2: the column 'image' holds paths of a Windows machine, 'D:.*relative to the table's own folder.*take "
        r"'D:.*set.*' away from each path; 0.png is there",
    ),
    "a share": ("t.csv", lines("image,label", "\\\\server\\scans\\{i}.png,{c}"), "holds paths of a Windows machine"),
    "web addresses": (
        "t.csv",
        lines("image,label", "https://example.org/{i}.png,{c}"),
        "https://example.org/0.png is not on this machine, and HF_HUB_OFFLINE=1 forbids to fetch it",
    ),
    "a path of another machine": ("t.csv", lines("image,label", "/home/me/{i}.png,{c}"), "'/home/me/0.png' leaves"),
    "a NUL character": ("t.jsonl", jsonl("'image': '0\\u0000.png', 'label': 'a'"), "holds a NUL character"),
    "NUL characters in a late cell": (
        "t.csv",
        lines("image,label,note", "{i}.png,{c}," + 200 * "x").replace("7.png,intact", "7.png,in\0tact"),
        "line 9: the column 'label' holds a NUL character",
    ),
    "a name without ending that fits two images": (
        "t.csv",
        lines("image,label", "both,{c}"),
        "several images fit: both.jpg, both.png",
    ),
    "a number in two spellings": (
        "t.csv",
        lines("image,label", "{i}.png,{n}").replace("6.png,1", "6.png,01"),
        "the labels '01' = '1' are one number spelt in several ways",
    ),
    "a zero in two spellings, where ids count from 0": (
        "t.csv",
        lines("image,label", "{i}.png,{n}").replace(",2", ",0").replace("7.png,0", "7.png,00"),
        "the labels '0' = '00' are one number spelt in several ways",
    ),
    "a number with and without a point": (
        "t.csv",
        lines("image,label", "{i}.png,{n}").replace("6.png,1", "6.png,1.0"),
        r"the labels '1' = '1\.0' are one number spelt in several ways",
    ),
    "German Excel in Windows-1252": (
        "t.csv",
        PLAIN.replace(",", ";").replace("crack", "Riß").replace("\n", "\r\n").encode("cp1252"),
        "is not UTF-8 text .byte 0xdf.*Windows-1252.*CSV UTF-8",
    ),
    "a list of labels in a cell": ("t.csv", lines("image,labels", "{i}.png,\"['{c}']\""), "is a list in one cell"),
    "a header alone": ("t.csv", "image,label\n", "lists no image: its columns are image, label, and there are no rows"),
    "no classes": (
        "t.csv",
        lines("image,colour", "{i}.png,red"),
        "no column that looks like the classes: its columns are image, colour",
    ),
    "cells that were not quoted": (
        "t.csv",
        lines("image,label", "{i}.png,{c}, or so"),
        "line 2: more cells than the 2 columns",
    ),
    "a cut line": ("t.csv", PLAIN.replace("7.png,intact", "7.png"), "line 9: fewer cells than the 2 columns"),
    "an open quote": ("t.csv", PLAIN.replace("7.png", '"7.png'), "cannot read .*t.csv: unexpected end of data"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_table_in_doubt_is_refused_by_name(tmp_path, kind):
    name, table, message = REFUSED[kind]
    folder_with(tmp_path / "set", name, table)
    for ending in ("jpg", "png"):
        put(tmp_path / "set", f"both.{ending}")
    with pytest.raises(AdaptclipError, match=re.compile(message, re.S)):
        new_card(tmp_path / "set", tmp_path / "card.md")
    assert not (tmp_path / "card.md").exists()


def test_the_zoo_is_large_enough():
    assert len(READ) + len(REFUSED) >= 45


@pytest.mark.parametrize("twice", ["label", "label "])
def test_a_column_twice_in_parquet(tmp_path, twice):
    names = ["image", "label", twice]
    pq.write_table(
        pa.Table.from_arrays([pa.array([picture(0)]), pa.array(["a"]), pa.array(["b"])], names), tmp_path / "t.parquet"
    )
    card = parse_card("---\nadaptclip:\n  source: {kind: parquet, files: t.parquet}\n---\n", name="t")
    with pytest.raises(DataError, match="2 columns named 'label'"):
        open_data(card, data_root=tmp_path)


def test_blanks_in_a_column_name_of_parquet_are_no_matter(tmp_path):
    images = [{"bytes": picture(i), "path": None} for i in range(8)]
    columns = {"image ": images, " label": ["ab"[i % 2] for i in range(8)], "part": ["train"] * 6 + ["test"] * 2}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    block = "  source: {kind: parquet, files: t.parquet}\n  splits: {column: part, train: train, test: test}\n"
    data = open_data(parse_card(f"---\nadaptclip:\n{block}---\n", name="t"), data_root=tmp_path)
    assert (data.class_names, len(data.train), len(data.test)) == (("a", "b"), 6, 2)


def test_a_taxonomy_beside_class_folders_is_joined_to_them(tmp_path, capsys):
    tree(tmp_path / "set", {"red kite": 5, "black kite": 5, "rook": 5})
    table = "species,genus,family\nred kite,Milvus,Accipitridae\nblack kite,Milvus,Accipitridae\nrook,Corvus,Corvidae\n"
    put(tmp_path / "set", "taxonomy.csv", table.encode())
    assert run(["card", "new", str(tmp_path / "set"), "--out", str(tmp_path / "card.md")]) == 0
    out = capsys.readouterr().out
    assert "black kite 5, red kite 5, rook 5" in out
    assert "taxonomy.csv is joined to the images by 'label' = its 'species'" in out
    card = load_card(tmp_path / "card.md")
    assert card.columns.levels == {"genus": "genus"}, "family says the same, and is proposed beside it"
    assert open_data(card).test.levels == {"genus": ("Milvus", "Milvus", "Corvus")}


@pytest.mark.parametrize("ids", [("1", "2"), (1, 2)])
def test_ids_that_count_from_1_are_explained(tmp_path, ids):
    rows = "".join(json.dumps({"image": f"{i}.png", "label": ids[i % 2]}) + "\n" for i in range(8))
    folder_with(tmp_path, "t.jsonl", rows)
    block = "  source: {kind: manifest, files: t.jsonl}\n  splits: {fractions: {train: 0.5, test: 0.5}}\n"
    message = r'labels are the numbers 1 to 2 .* so take them as names: `class_names: \["1", "2"\]`.*`aliases: \{"1": '
    with pytest.raises(DataError, match=message):
        open_data(parse_card(f"---\nadaptclip:\n{block}---\n", name="t"), data_root=tmp_path)
    named = "  class_names: [cat, dog]\n"
    with pytest.raises(DataError, match=r"id out of range.*The numbers here are 1 to 2: .* take them as names"):
        open_data(parse_card(f"---\nadaptclip:\n{block}{named}---\n", name="t"), data_root=tmp_path)
    named = '  class_names: ["1", "2"]\n  aliases: {"1": cat, "2": dog}\n'
    data = open_data(parse_card(f"---\nadaptclip:\n{block}{named}---\n", name="t"), data_root=tmp_path)
    assert data.prompt_names == ("cat", "dog")
    assert [data.class_names[c] for c in data.train.labels] == [
        str(ids[int(data.train.where(i)[-5]) % 2]) for i in range(4)
    ]


def test_decimal_commas_fall_into_bins(tmp_path):
    folder_with(
        tmp_path, "t.csv", lines("image;label;age", "{i}.png;{c};5{i},5").replace("7.png;intact;57,5", "7.png;intact;")
    )
    block = "  source: {kind: manifest, files: t.csv}\n  splits: {fractions: {train: 0.5, test: 0.5}}\n"
    block += "  columns: {groups: {age: age}}\n  groups: {age: {bins: [0, 54]}}\n"
    data = open_data(parse_card(f"---\nadaptclip:\n{block}---\n", name="t"), data_root=tmp_path)
    groups = {int(part.where(i)[-5]): part.groups["age"][i] for part in data.parts.values() for i in range(len(part))}
    assert groups == {**dict.fromkeys(range(4), "0 to <54"), **dict.fromkeys(range(4, 7), "54 and above"), 7: "unknown"}


@pytest.mark.skipif(os.name == "nt", reason="file names are text on Windows")
def test_a_table_whose_name_is_not_utf_8_is_refused(tmp_path, capsys):
    put(tmp_path / "set", b"caf\xe9.csv", PLAIN.encode())
    assert run(["card", "new", str(tmp_path / "set"), "--out", str(tmp_path / "card.md")]) == 1
    assert "caf\\xe9.csv is not UTF-8 text, so no card can name it" in capsys.readouterr().err


# Who or what images are of


@pytest.mark.parametrize(
    ("name", "person"),
    [
        ("Patient ID", True), ("PatientID", True), ("patientId", True), ("patient_id", True), ("MRN", True),
        ("Patienten ID", True), ("Patientennummer", True), ("Patient's ID", True), ("paciente", True),
        ("subject", True), ("SubjectNo", True), ("participant", True), ("individual", True), ("animal id", True),
        ("case_id", True),
        ("Fallnummer", False), ("StudyInstanceUID", True), ("Accession Number", True), ("lesion_id", True),
        ("lesion", False), ("specimen", False), ("Slide-Nr.", True), ("video", False), ("group_id", True),
        ("collector", False), ("case", False), ("study", False),
    ],
)  # fmt: skip
def test_names_of_what_images_are_of(name, person):
    assert identity_rank(name) is not None
    assert is_person(name) == person


@pytest.mark.parametrize("name", ["PatientSex", "patient_age", "study description", "group", "id", "sex"])
def test_names_that_only_sound_like_it(name):
    assert identity_rank(name) is None


def test_places():
    assert all(map(is_place, ["site", "camera trap site", "CameraID", "Standort", "location_id", "plot"]))
    assert not any(map(is_place, ["site temperature", "image", "location quality"]))


def survey(root: Path, column: str, values: list[str], *, split: bool, lines: str = "") -> Path:
    """A card of 40 images of two classes, with one column that it does not name."""
    rows = [f"{i}.png,{'ab'[i % 2]},{'test' if i % 4 > 1 else 'train'},{value}" for i, value in enumerate(values)]
    for i in range(len(values)):
        put(root, f"{i}.png", seed=i)
    put(root, "t.csv", "\n".join([f"image,label,split,{column}", *rows]).encode())
    rule = "{column: split, train: train, test: test}" if split else "{fractions: {train: 0.5, test: 0.5}}"
    card = f"---\nadaptclip:\n  source: {{kind: manifest, files: t.csv}}\n  splits: {rule}\n{lines}---\n"
    (root / "card.md").write_text(card, encoding="utf-8")
    return root / "card.md"


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("column", ["Patient ID", "Aufnahmeserie"])
def test_an_unused_column_that_straddles_must_be_answered(tmp_path, capsys, split, column):
    values = [f"v{i // 4}" for i in range(80)]
    card = survey(tmp_path, column, values, split=split)
    assert run(["card", "check", str(card)]) == 1
    error = capsys.readouterr().err
    assert f"the column {column!r}, which the card does not use, has 20 values" in error
    if split:
        assert "40 of 40 test images (100%) have one" in error
    assert f'write `columns: {{cluster: "{column}"}}`' in error
    answer = f'allow: ["shared_values.{column}"]' if " " in column else f"allow: [shared_values.{column}]"
    assert answer in error
    allowed = survey(tmp_path, column, values, split=split, lines=f"  {answer}\n")
    assert run(["card", "check", str(allowed)]) == 0
    out = capsys.readouterr().out
    assert f"columns that the card does not use: {'split (2 values), ' if not split else ''}{column} (20 values)" in out
    assert f"to worry about: the column {column!r}" in out
    answered = survey(tmp_path, column, values, split=False, lines=f'  columns: {{cluster: "{column}"}}\n')
    assert run(["card", "check", str(answered)]) == 0
    assert "to worry about" not in capsys.readouterr().out


FOLDS = [str(i // 2 % 5) for i in range(40)]


@pytest.mark.parametrize("column", ["fold", "kfold", "CV_Fold", "Partition"])
def test_folds_that_the_card_does_not_follow_must_be_answered(tmp_path, capsys, column):
    assert run(["card", "check", str(survey(tmp_path, column, FOLDS, split=False))]) == 1
    error = capsys.readouterr().err
    assert f"the column {column!r} seems to number 5 folds (0, 1, 2, 3, 4), and the card does not follow it" in error
    follow = f'splits: {{column: "{column}", train: ["2", "3", "4"], validation: ["1"], test: ["0"]}}'
    assert f"for example `{follow}`. If it must be so, the card can say `allow: [unused_folds.{column}]`" in error
    allowed = survey(tmp_path, column, FOLDS, split=False, lines=f"  allow: [unused_folds.{column}]\n")
    assert run(["card", "check", str(allowed)]) == 0
    capsys.readouterr()
    text = allowed.read_text(encoding="utf-8").replace("splits: {fractions: {train: 0.5, test: 0.5}}", follow)
    allowed.write_text(text, encoding="utf-8")
    data = open_data(load_card(allowed))
    folds = {part: {FOLDS[row] for row in images.rows} for part, images in data.parts.items()}
    assert folds == {"train": {"2", "3", "4"}, "validation": {"1"}, "test": {"0"}}
    assert sum(map(len, data.parts.values())) == 40


@pytest.mark.parametrize(
    ("kind", "column", "values"),
    [
        ("names of sources", "dataset", ["ab"[i // 4 % 2] for i in range(40)]),
        ("numbers of a scale", "grade", FOLDS),
        ("folds within the parts", "fold", [str(i % 4) for i in range(40)]),
    ],
)
def test_what_does_not_look_like_folds_or_is_followed(tmp_path, capsys, kind, column, values):
    assert run(["card", "check", str(survey(tmp_path, column, values, split=True))]) == 0
    assert "folds" not in capsys.readouterr().out


def test_a_blank_that_two_labels_differ_in_is_told(tmp_path, capsys):
    card = survey(tmp_path, "grade", FOLDS, split=True)
    table = tmp_path / "t.csv"
    table.write_text(table.read_text().replace("3.png,b,", "3.png,b ,"))  # and those of 13, 23 and 33
    assert run(["card", "check", str(card)]) == 0
    info = "to worry about: the labels 'b' = 'b ' differ only in blanks around them or in the Unicode form of a letter"
    out = capsys.readouterr().out
    assert f"{info}, and each is read as one class (4 of 40 rows are written otherwise than the rest, first" in out


def test_a_picture_under_two_labels_is_counted(tmp_path, capsys):
    card = survey(tmp_path, "grade", FOLDS, split=True)
    put(tmp_path, "4.png", picture(1))
    put(tmp_path, "5.png", picture(0))
    assert run(["card", "check", str(card)]) == 1
    error = capsys.readouterr().err
    assert "label conflict: 4 of 20 train images are the same file as one of another class: " in error
    assert "allow: [label_conflicts]" in error


@pytest.mark.parametrize(
    ("kind", "column", "values"),
    [
        ("few values are groups", "site", [f"s{i // 2 % 3}" for i in range(80)]),
        ("one value per class", "genus", [f"g{i % 2}" for i in range(80)]),
        ("every image has its own", "file id", [str(i) for i in range(80)]),
        ("each value is in one part", "session", [f"{i % 4 > 1}{i // 8}" for i in range(80)]),
        ("hardly any value twice", "code", [str(i // 2 if i < 4 else i) for i in range(80)]),
        ("widths of pictures", "image_width", [str(100 + i // 4) for i in range(80)]),
        ("sentences", "report", [f"there is no finding in image {i // 4}" for i in range(80)]),
    ],
)
def test_what_is_like_a_group_or_a_label_is_only_listed(tmp_path, capsys, kind, column, values):
    assert run(["card", "check", str(survey(tmp_path, column, values, split=True))]) == 0
    assert f"columns that the card does not use: {column} ({len(set(values))} values)" in capsys.readouterr().out


def test_ages_in_years_of_many_images_are_numbers_and_no_clusters():
    from adaptclip.data.columns import is_like_a_cluster

    labels = [i % 2 for i in range(600)]
    assert not is_like_a_cluster("age", [str(20 + i * 7 % 20) for i in range(600)], labels)
    assert is_like_a_cluster("age", [str(20 + i * 7 % 60) for i in range(600)], labels), "ten rows each may be patients"
    assert is_like_a_cluster("PatientID", [str(i % 2 + i % 3) for i in range(600)], labels), "a name needs no counting"


def test_a_lesion_of_one_patient_is_no_finding_beside_the_patient(tmp_path):
    values = [f"v{i // 4}" for i in range(80)]
    rows = [f"{i}.png,{'ab'[i % 2]},{value},{value}-{i % 4 // 2}" for i, value in enumerate(values)]
    for i in range(80):
        put(tmp_path, f"{i}.png", seed=i)
    put(tmp_path, "t.csv", "\n".join(["image,label,patient,lesion_id", *rows]).encode())
    head = "---\nadaptclip:\n  source: {kind: manifest, files: t.csv}\n  splits: {fractions: {train: 0.5, test: 0.5}}\n"
    assert (
        open_data(parse_card(f"{head}  columns: {{cluster: patient}}\n---\n", name="t"), data_root=tmp_path).worries
        == ()
    )
    with pytest.raises(SplitError, match="the column 'patient', which the card does not use"):
        open_data(parse_card(f"{head}  columns: {{cluster: lesion_id}}\n---\n", name="t"), data_root=tmp_path)


@pytest.mark.parametrize("name", ["shared_values", "similar_images.x", "shared_value.x"])
def test_unused_columns_are_allowed_by_name(name):
    with pytest.raises(AdaptclipError, match="allow"):
        parse_card(f"---\nadaptclip:\n  source: {{kind: manifest, files: t.csv}}\n  allow: [{name}]\n---\n", name="t")


DIVIDED: dict[str, tuple[str, str, str, str]] = {
    "patients in both parts": (
        "image,label,PatientID,split", "{i}.png,{c},{p},{t}",
        'cluster: "PatientID"  # 4 of them, 4 in two parts, which `card check` refuses', "4 of them, 4 in two parts;",
    ),
    "patients in both parts, spelt in two ways": (
        "image,label,PatientID,split", "{i}.png,{c},{n}{z},{t}",
        'cluster: "PatientID"  # 2 of them, 2 in two parts, which', "2 of them, 2 in two parts;",
    ),
    "patients in one part each": (
        "image,label,PatientID,split", "{i}.png,{c},{t}{n},{t}",
        'cluster: "PatientID"  # 4 of them, none in two parts\n', "4 of them, none in two parts",
    ),
    "a column of parts that is called otherwise": (
        "image,label,Teil", "{i}.png,{c},{t}",
        'column: "Teil"\n    train: "train"  # 4 images\n    test: "test"  # 4 images\n',
        "the column 'Teil' divides the images, and the card follows it: train is train, test is test",
    ),
    "a flag": (
        "image,label,is_test", "{i}.png,{c},{f}",
        'column: "is_test"\n    train: "0"  # 4 images\n    test: "1"  # 4 images\n',
        "the column 'is_test' divides the images, and the card follows it: train is 0, test is 1",
    ),
    "folds": (
        "image,label,fold", "{i}.png,{c},{f}", 'train: ["1"]  # 4 images\n    test: ["0"]  # 4 images',
        "the column 'fold' numbers 2 folds, and the card follows it: train is 1, test is 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIVIDED)
def test_how_a_table_divides_is_seen(tmp_path, kind):
    header, row, written, info = DIVIDED[kind]
    rows = [
        row.format(
            i=i, c="ab"[i // 4], p=i // 2, n=i // 2 % 2, t=("train", "test")[i % 2], f=i % 2, z=("", ".0")[i % 2]
        )
        for i in range(8)
    ]
    said: list[str] = []
    table = "\n".join([header, *rows]) + "\n"
    path = new_card(folder_with(tmp_path / "set", "t.csv", table), tmp_path / "card.md", say=said.append)
    assert written in path.read_text(encoding="utf-8")
    assert any(info in sentence for sentence in said)
