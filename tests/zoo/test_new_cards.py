# SPDX-License-Identifier: Apache-2.0
"""`adaptclip card new` on tables and folders as people have them: what it asks, what it understands, and that the check
accepts what it wrote."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from zoo.making import picture, put, run, tree

from adaptclip.data.asking import Given
from adaptclip.data.card import load_card
from adaptclip.data.scaffold import new_card
from adaptclip.data.sources import open_data, read_rows
from adaptclip.errors import AdaptclipError

PICTURES = [picture(seed) for seed in range(96)]


@pytest.fixture(autouse=True, scope="module")
def _one_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def images(root: Path, number: int = 16, name: str = "{i}.png") -> None:
    for i in range(number):
        put(root, name.format(i=i), PICTURES[i])


def table(root: Path, header: str, row: str, number: int = 16, name: str = "t.csv") -> Path:
    """A table of images; of `row`, {i} is the number, {c} one of two classes, {p} one of eight patients."""
    images(root, number)
    rows = [
        row.format(i=i, c=("crack", "intact")[i % 2], p=f"P{i // 2}", n=i % 2, n1=i % 2 + 1, k=i % 3)
        for i in range(number)
    ]
    put(root, name, "\n".join([header, *rows, ""]).encode())
    return root / name


def made(source: Path, out: Path, **flags: Any) -> tuple[str, str]:
    """The text of a new card and what was said."""
    said: list[str] = []
    path = new_card(source, out, given=Given(**flags), say=said.append)
    return path.read_text(encoding="utf-8"), "\n".join(said)


# What cannot be guessed


def test_all_that_is_missing_is_said_at_once_with_the_command_to_type(tmp_path, capsys):
    source = table(tmp_path, "bild_pfad_alt,farbe", "{i}.xyz,{c}")
    out = tmp_path / "card.md"
    assert run(["card", "new", str(source), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "no column that looks like the image paths: its columns are bild_pfad_alt, farbe (--image-column)" in error
    assert "no column that looks like the classes: its columns are bild_pfad_alt, farbe (--label-column)" in error
    line = f"adaptclip card new {source} --out {out} --image-column COLUMN --label-column farbe"
    assert f"type: {line}" in error
    assert not out.exists()


def test_flags_name_the_columns(tmp_path, capsys):
    source = table(tmp_path, "wo,was,wer,alter", "{i}.png,{c},{p},{i},5".replace("{i},5", "{i}"))
    command = ["card", "new", str(source), "--out", str(tmp_path / "card.md"), "--image-column", "wo", "--label-column"]
    assert run([*command, "was", "--cluster-column", "wer", "--group", "alter"]) == 0
    out = capsys.readouterr().out
    assert "2 classes with their images: crack 8, intact 8" in out
    assert "the column 'wer' says who or what images are of: 8 of them" in out
    assert "results are reported by 'alter': numbers, in 1 bin that" in out
    assert "a split is drawn: train 60%, validation 10%, test 30%" in out
    assert "3 images were opened and can be read" in out
    card = load_card(tmp_path / "card.md")
    assert (card.columns.image, card.columns.label, card.columns.cluster) == ("wo", "was", "wer")
    assert card.columns.groups == {"alter": "alter"}
    assert run(["card", "check", str(tmp_path / "card.md")]) == 0


def test_a_flag_that_names_no_column_is_refused_with_the_nearest(tmp_path):
    source = table(tmp_path, "image,label,sex", "{i}.png,{c},m")
    with pytest.raises(AdaptclipError, match=r"no column 'Sexx' for --group; nor 'x' for --shared. Did you mean .sex"):
        made(source, tmp_path / "card.md", group=("Sexx",), shared=("x",))


def test_a_column_that_may_be_patients_is_asked_about(tmp_path, capsys):
    images(tmp_path, 80)
    rows = [f"{i}.png,{'ab'[i % 2]},S{i // 4}" for i in range(80)]
    put(tmp_path, "t.csv", "\n".join(["image,label,Aufnahmeserie", *rows]).encode())
    out = tmp_path / "card.md"
    assert run(["card", "new", str(tmp_path / "t.csv"), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "the column 'Aufnahmeserie' has 20 values that several images share, and may say who or what images" in error
    assert error.rstrip().endswith(f"--out {out} --cluster-column Aufnahmeserie")
    for flags in (["--cluster-column", "Aufnahmeserie"], ["--shared", "Aufnahmeserie"], ["--group", "Aufnahmeserie"]):
        out.unlink(missing_ok=True)
        assert run(["card", "new", str(tmp_path / "t.csv"), "--out", str(out), *flags]) == 0, flags
        assert run(["card", "check", str(out)]) == 0, flags
        capsys.readouterr()


def test_a_person_at_a_terminal_is_asked(tmp_path):
    source = table(tmp_path, "wo,was,farbe", "{i}.xyz,{c},{n}")
    images(tmp_path, 16, "{i}.xyz")
    (tmp_path / "0.xyz").unlink()  # so that nothing tells that "wo" names images
    asked: list[tuple[str, Sequence[str]]] = []

    def ask(question: str, answers: Sequence[str]) -> str | None:
        asked.append((question, answers))
        return {0: "wo", 1: "was"}.get(len(asked) - 1)

    new_card(source, tmp_path / "card.md", ask=ask)
    assert [answers for _, answers in asked] == [["wo", "was", "farbe"]] * 2
    assert load_card(tmp_path / "card.md").columns.label == "was"
    with pytest.raises(AdaptclipError, match="no column that looks like the image paths"):
        new_card(source, tmp_path / "other.md", ask=lambda question, answers: None)


def test_images_that_are_not_there_are_seen_before_a_card_is_written(tmp_path):
    source = table(tmp_path, "image,label", "else/{i}.jpg,{c}")
    with pytest.raises(AdaptclipError, match=r"the first, middle and last image cannot be read: .*No such file"):
        made(source, tmp_path / "card.md")
    source = table(tmp_path, "image,label", "{i}.png,{c}")
    (tmp_path / "15.png").unlink()
    assert "1 of 3 images that were opened cannot be read: " in made(source, tmp_path / "card.md")[1]


# How labels are written

LABELS: dict[str, tuple[str, str, str]] = {
    "from 0": ("{n}", 'class_names: ["class 0", "class 1"]', "the labels are the numbers 0 to 1"),
    "from 0 with zeros before": ("00{n}", 'class_names: ["class 0", "class 1"]', "numbers 0 to 1"),
    "from 1": ("{n1}", 'class_names: ["1", "2"]', "do not count from 0 (1 to 2), and are taken as names"),
    "from 1 with zeros before": ("00{n1}", 'class_names: ["001", "002"]', "do not count from 0 (1 to 2)"),
    "floats that pandas wrote": (
        "{n}.0",
        'class_names: ["class 0", "class 1"]',
        "labels such as '0.0' are read as whole",
    ),
    "floats from 1": ("{n1}.0", 'class_names: ["1", "2"]', "labels such as '1.0' are read as whole numbers"),
    "true and false": ("{n}", 'class_names: ["class 0"', ""),
    "names": ("{c}", "# aliases:", "crack 8, intact 8"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_read_as_they_are_meant(tmp_path, kind):
    cell, written, info = LABELS[kind]
    text, said = made(table(tmp_path, "image,label", "{i}.png," + cell), tmp_path / "card.md")
    assert written in text
    assert info in said
    data = open_data(load_card(tmp_path / "card.md"))
    assert sum(part.class_counts() for part in data.parts.values()).tolist() == [8, 8]  # pyright: ignore


def test_truths_of_json_are_names(tmp_path):
    images(tmp_path)
    rows = "".join(json.dumps({"image": f"{i}.png", "label": i % 2 == 0}) + "\n" for i in range(16))
    put(tmp_path, "t.jsonl", rows.encode())
    assert "False 8, True 8" in made(tmp_path / "t.jsonl", tmp_path / "card.md")[1].replace(
        "True 8, False 8", "False 8, True 8"
    )
    assert open_data(load_card(tmp_path / "card.md")).class_names == ("False", "True")


def test_numbers_with_gaps_are_names(tmp_path):
    source = table(tmp_path, "image,label", "{i}.png,{k}")
    source.write_text(source.read_text().replace(",1\n", ",7\n"))
    assert 'class_names: ["0", "2", "7"]' in made(source, tmp_path / "card.md")[0]
    assert open_data(load_card(tmp_path / "card.md")).class_names == ("0", "2", "7")


NO_CLASSES = {
    "hidden labels": ("{n}", ",1\n", ",-1\n", "holds -1 in 8 of 16 rows, which usually marks the hidden labels"),
    "measured numbers": (
        "0.{i}",
        "",
        "",
        "holds measured numbers .* it is no column of classes. Name another with --la",
    ),
    "one value": ("x", "", "", "has the one value 'x' in all 16 rows"),
    "a sentence each": ("case number {i}", "", "", "has 16 different values in 16 rows"),
}


@pytest.mark.parametrize("kind", NO_CLASSES)
def test_what_is_no_column_of_classes_is_refused_with_the_reason(tmp_path, kind):
    cell, old, new, message = NO_CLASSES[kind]
    source = table(tmp_path, "image,label", "{i}.png," + cell)
    source.write_text(source.read_text().replace(old, new) if old else source.read_text())
    with pytest.raises(AdaptclipError, match=message):
        made(source, tmp_path / "card.md")


# Other tables


def sheets(path: Path, **contents: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for name, rows in contents.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


ROWS = [["file", "species"], *([f"{i}.png", ("kite", "rook")[i % 2]] for i in range(16))]


def test_of_several_sheets_the_one_that_lists_images_is_taken(tmp_path):
    images(tmp_path)
    source = sheets(tmp_path / "t.xlsx", Notes=[["what", "who"], ["checked", "me"]], Images=ROWS)
    text, said = made(source, tmp_path / "card.md")
    assert 'sheet: "Images"' in text
    assert "kite 8, rook 8" in said
    assert open_data(load_card(tmp_path / "card.md")).class_names == ("kite", "rook")
    assert "the sheet 'Notes' of t.xlsx is not used" in said
    both = sheets(tmp_path / "both.xlsx", Old=ROWS, New=ROWS)
    with pytest.raises(
        AdaptclipError, match=r"has 2 sheets \(Old, New\), and 2 of them list images .--sheet.* --sheet Old$"
    ):
        made(both, tmp_path / "other.md")
    assert 'sheet: "New"' in made(both, tmp_path / "other.md", sheet="New")[0]


@pytest.mark.parametrize("parts", [True, False])
def test_a_folder_of_parquet_files_with_images(tmp_path, parts):
    for number, part in enumerate(("train", "train", "train", "test")):
        seeds = range(12 * number, 12 * number + 12)
        columns = {
            "image": [{"bytes": PICTURES[i], "path": f"{i}.png"} for i in seeds],
            "label": ["ab"[i % 2] for i in seeds],
            "sex": ["mf"[i // 2 % 2] for i in seeds],
        }
        name = f"{part if parts else 'data'}-{number:05d}-of-00004.parquet"
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "set" / name)
    text, said = made(tmp_path / "set", tmp_path / "card.md", group=("sex",))
    assert "a 24, b 24" in said
    assert ('"train": "set/train-0000*.parquet"' if parts else 'files: "set/data-0000*.parquet"') in text
    data = open_data(load_card(tmp_path / "card.md"))
    assert sum(map(len, data.parts.values())) == 48
    assert (len(data.test) == 12) == parts
    assert set(data.test.groups["sex"]) == {"m", "f"}


def test_patients_beside_the_images_are_joined(tmp_path):
    table(tmp_path / "set", "image,label,Patient", "{i}.png,{c},{p}")
    patients = "Patient ID;sex;ward\n" + "".join(f"P{i};{'mf'[i % 2]};W{i % 3}\n" for i in range(8))
    put(tmp_path / "set", "patients.csv", patients.encode())
    text, said = made(tmp_path / "set", tmp_path / "card.md", group=("sex",))
    assert '{"file": "set/patients.csv", "by": {"Patient": "Patient ID"}}' in text
    assert "patients.csv is joined to the images by 'Patient' = its 'Patient ID'" in said
    assert '#   "ward": "ward"' in text
    assert set(open_data(load_card(tmp_path / "card.md")).test.groups["sex"]) <= {"m", "f"}


def test_the_classes_may_be_in_the_joined_table(tmp_path):
    source = table(tmp_path, "image,patient", "{i}.png,{p}")
    findings = "id,diagnosis,also\n" + "".join(f"P{i},{'ab'[i % 2]},P{i}\n" for i in range(8))
    put(tmp_path, "elsewhere/findings.csv", findings.encode())
    file = str(tmp_path / "elsewhere/findings.csv")
    with pytest.raises(
        AdaptclipError, match=rf"which column .*is joined: 2 pairs of columns fit .--join.* {file}:patient=id$"
    ):
        made(source, tmp_path / "card.md", join=(file,))
    text, said = made(source, tmp_path / "card.md", join=(f"{file}:patient=id",))
    assert 'label: "diagnosis"' in text
    assert "a 8, b 8" in said
    assert open_data(load_card(tmp_path / "card.md")).class_names == ("a", "b")


# Nested folders

ANIMALS = {
    "Carnivora/Canidae/Vulpes vulpes": 6,
    "Carnivora/Canidae/Canis lupus": 6,
    "Carnivora/Felidae/Lynx lynx": 6,
    "Rodentia/Sciuridae/Sciurus vulgaris": 6,
}


def test_biological_families_are_levels_without_being_asked(tmp_path):
    text, said = made(tree(tmp_path / "set", ANIMALS), tmp_path / "card.md")
    assert 'levels: ["order", "family"]' in text
    assert "the folders above the classes are levels: order, family" in said
    data = open_data(load_card(tmp_path / "card.md"))
    assert data.class_names == ("Canis lupus", "Lynx lynx", "Sciurus vulgaris", "Vulpes vulpes")
    assert data.test.levels == {
        "order": ("Carnivora", "Carnivora", "Rodentia", "Carnivora"),
        "family": ("Canidae", "Felidae", "Sciuridae", "Canidae"),
    }


def test_other_nested_folders_are_levels_when_somebody_says_so(tmp_path, capsys):
    tree(
        tmp_path / "set",
        {f"{part}/{name}": 6 for part in ("train", "test") for name in ("fruit/apple", "fruit/pear", "leek/long")},
    )
    out = str(tmp_path / "card.md")
    assert run(["card", "new", str(tmp_path / "set"), "--out", out]) == 1
    assert "`adaptclip card new FOLDER --classes nested` takes the innermost" in capsys.readouterr().err
    assert run(["card", "new", str(tmp_path / "set"), "--out", out, "--level", "kind"]) == 0
    assert run(["card", "check", out]) == 0
    data = open_data(load_card(out))
    assert (len(data.train), len(data.test)) == (18, 18)
    assert data.test.levels == {"kind": ("fruit", "leek", "fruit")}
    made(tmp_path / "set", tmp_path / "other.md", classes="nested")
    assert open_data(load_card(tmp_path / "other.md")).test.levels == {"level 1": ("fruit", "leek", "fruit")}


NOT_NESTED = {
    "images at two depths": ({"fruit/apple": 2, "leek": 2}, "nested class folders all have as many folders above"),
    "a class in two places": ({"fruit/a": 2, "leek/a": 2}, "has the class 'a' both in fruit and in leek; rename one"),
}


@pytest.mark.parametrize("kind", NOT_NESTED)
def test_folders_that_are_no_taxonomy_are_refused(tmp_path, kind):
    folders, message = NOT_NESTED[kind]
    with pytest.raises(AdaptclipError, match=message):
        made(tree(tmp_path / "set", folders), tmp_path / "card.md", classes="nested")


# What is written is accepted


def somebodys_table(seed: int, root: Path) -> tuple[Path, Counter[str]]:
    """A random table with what people do to tables, and how many images of each class it has."""
    rng = random.Random(seed)
    number = rng.randrange(48, len(PICTURES))
    separator = rng.choice([",", ";", "\t", "|"])
    comma = separator != "," and rng.random() < 0.7
    forms = [["naevus", "Melanom (böse)", "andere, seltene"], ["0", "1", "2"], ["1", "2", "3"], ["001", "002", "003"],
             ["0.0", "1.0", "2.0"], ["0", "5", "9"], ["ja", "nein"]]  # fmt: skip
    classes = rng.choice(forms)
    ages = [rng.randrange(180, 900) / 10 for _ in range(number // 2 + 1)]
    name = rng.choice(["{i}.png", "{i}", "deep/{i}.png", "Deep\\{i}.PNG"])
    size = rng.choice([1, 2, 3])
    columns: dict[str, list[str]] = {
        rng.choice(["Bild", "image", "file name"]): [name.format(i=i) for i in range(number)],
        rng.choice(["Diagnose", "label", "species"]): [rng.choice(classes) for _ in range(number)],
        rng.choice(["Patient ID", "PatientID", "patient"]): [f"P{i // size:03d}" for i in range(number)],
        rng.choice(["Alter", "age", "Gewicht in kg", "Wert"]): [
            rng.choice(["", "{:.1f}"]).format(ages[i // 2]) if i % 7 == 0 else f"{ages[i // 2]:.1f}"
            for i in range(number)
        ],
        rng.choice(["sex", "Geschlecht"]): [rng.choice(["m", "w", ""]) for _ in range(number)],
        "Bemerkung": [rng.choice(["", "ohne, Befund", 'sagt "gut"', "zwei\nZeilen"]) for _ in range(number)],
    }
    if comma:
        for head in {"Alter", "age", "Gewicht in kg", "Wert"} & set(columns):
            columns[head] = [cell.replace(".", ",") for cell in columns[head]]
    order = list(columns)
    rng.shuffle(order)
    for i in range(number):
        put(root, f"{'deep/' if 'eep' in name or rng.random() < 0.3 else ''}{i}.png", PICTURES[i])
    with (root / "t.csv").open("w", encoding=rng.choice(["utf-8", "utf-8-sig", "utf-16"]), newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator=rng.choice(["\n", "\r\n"]))
        writer.writerow(order)
        writer.writerows(zip(*(columns[head] for head in order), strict=True))
    label = next(cells for head, cells in columns.items() if head in ("Diagnose", "label", "species"))
    return root / "t.csv", Counter(label)


@pytest.mark.parametrize("seed", range(24))
def test_what_is_written_is_accepted_and_counts_as_the_csv_module_does(tmp_path, seed):
    source, counts = somebodys_table(seed, tmp_path)
    header = source.read_text(
        encoding="utf-16" if source.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    ).splitlines()[0]
    number = next(name for name in ("Alter", "age", "Gewicht in kg", "Wert") if name in header)
    _, said = made(source, tmp_path / "card.md", group=(number,) if seed % 2 else ())
    card = load_card(tmp_path / "card.md")
    assert card.columns.cluster in ("Patient ID", "PatientID", "patient")
    data = open_data(card)
    assert not [worry for worry in data.worries if "shared" in worry]
    found = sum(part.class_counts() for part in data.parts.values()).tolist()  # pyright: ignore
    assert sorted(found) == sorted(counts.values())
    words = dict(zip(data.class_names, found, strict=True))
    for text, count in counts.items():
        key = text if text in words else str(int(float(text)))
        assert words.get(key, words.get(f"class {key}")) == count
    assert f"{len(counts)} classes" in said
    rows = read_rows(card, None)
    assert [rows.store.read(i) for i in range(len(rows))] == PICTURES[: len(rows)]
    if seed % 2:
        assert set(data.test.groups[number]) - {"unknown"} == set(card.groups[number].names)


# As they came to the door


def test_a_clinic_with_semicolons_decimal_commas_and_numbers_of_images(tmp_path, capsys):
    rows = ["\ufeffBildnummer;Befund;Patient ID;Alter;Geschlecht;Aufnahmedatum;Bemerkung"]
    for i in range(90):
        put(tmp_path, f"klinik/Bilder/{2023 + i % 2}/{i:04d}.png", PICTURES[i])
        age, sex = f"{30 + i // 3},{i % 10}" if i % 11 else "", "mw"[i // 3 % 2]
        note = '"siehe Brief; dringend"' if i % 4 else ""
        rows.append(
            f"{i:04d};{('unauffällig', 'Katarakt')[i % 2]};P{i // 3:03d};{age};{sex};{1 + i % 28}.1.2024;{note}"
        )
    put(tmp_path, "klinik/Befunde.csv", ("\r\n".join(rows) + "\r\n").encode())
    command = [
        "card",
        "new",
        str(tmp_path / "klinik/Befunde.csv"),
        "--out",
        str(tmp_path / "card.md"),
        "--group",
        "Alter",
    ]
    assert run(command) == 1
    assert "'Aufnahmedatum' beside 'Patient ID' has 28 values that several images share" in capsys.readouterr().err
    assert run([*command, "--shared", "Aufnahmedatum"]) == 0
    out = capsys.readouterr().out
    assert (
        "90 names of Befunde.csv are written otherwise than the files, and a single image fits each: '0000' is" in out
    )
    assert "the column 'Patient ID' says who or what images are of: 30 of them, none in two parts" in out
    assert run(["card", "check", str(tmp_path / "card.md")]) == 0
    assert "Katarakt 45, unauffällig 45" in capsys.readouterr().out


def test_a_museum_with_nested_folders_and_a_workbook(tmp_path, capsys):
    species = {"Vanessa atalanta": "Nymphalidae", "Aglais io": "Nymphalidae", "Pieris rapae": "Pieridae"}
    rows: list[list[Any]] = [["Sammlung, Stand 2024"], [], ["Katalog", "Datei", "Art", "Sammler", "Ort"]]
    for i in range(48):
        name = list(species)[i % 3]
        put(tmp_path, f"museum/Fotos/Lepidoptera/{species[name]}/{name}/n{i}.jpg", PICTURES[i])
        rows.append([i, f"n{i}", name, ["Müller", "Rossi", "Tanaka", "Smith"][i // 3 % 4], "Ulm"])
    taxa = [["Art", "Familie"], *map(list, species.items())]
    sheets(tmp_path / "museum/Sammlung.xlsx", Sammlung=rows, Taxonomie=taxa, Notizen=[["nur", "Text"], ["x", "y"]])
    assert run(["card", "new", str(tmp_path / "museum"), "--out", str(tmp_path / "card.md")]) == 0
    out = capsys.readouterr().out
    assert "the sheet 'Taxonomie' of Sammlung.xlsx is joined to the images by 'Art'" in out
    assert "the rows above row 3 of Sammlung.xlsx are not used: the header is there" in out
    assert "the column 'Sammler' says who or what images are of: 4 of them" in out
    assert run(["card", "check", str(tmp_path / "card.md")]) == 0
    assert load_card(tmp_path / "card.md").columns.levels == {"Familie": "Familie"}
