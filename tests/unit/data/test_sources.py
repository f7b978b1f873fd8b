# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import pickle
import time
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from adaptclip.data.card import Card, load_card, parse_card
from adaptclip.data.fingerprints import similar_pairs
from adaptclip.data.sources import open_data
from adaptclip.errors import DataError, SplitError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))


def photo(seed: int, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def card_of(block: str) -> Card:
    return parse_card(f"---\nadaptclip:\n{block}---\n", name="mine")


def write_rows(path: Path, rows: list[dict], **columns) -> None:
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])}
        | {name: Value("string") for name in rows[0] if name not in ("image", "label")}
        | columns
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(str(path))


def rows_of(seeds: range, **cells) -> list[dict]:
    return [
        {"image": {"bytes": photo(s), "path": f"{s}.png"}, "label": s % 2} | {k: v(s) for k, v in cells.items()}
        for s in seeds
    ]


def write_folder(root: Path, names: list[str], count: int, start: int = 0) -> None:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k}.png").write_bytes(photo(start + 1000 * i + k))


# Parquet


def test_parquet_with_a_split_column(tmp_path):
    part = {0: "train", 1: "train", 2: "val", 3: "test", 4: "test", 5: "other"}
    rows = rows_of(range(12), part=lambda s: part[s // 2], sex=lambda s: "f" if s < 8 else None, who=lambda s: f"p{s}")
    write_rows(tmp_path / "a" / "all.parquet", rows)
    card = card_of(
        "  source: {kind: parquet, files: 'a/*.parquet'}\n"
        "  splits: {column: part, train: train, validation: val, test: test}\n"
        "  columns: {cluster: who, groups: {sex: sex}}\n"
    )
    data = open_data(card, data_root=tmp_path)
    assert [len(p) for p in data.parts.values()] == [4, 2, 4]
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.test.groups == {"sex": ("f", "f", "unknown", "unknown")}
    assert data.test.clusters == ("p6", "p7", "p8", "p9")
    assert data.skipped == ("2 images of the split 'other' are not used",)
    assert data.notes == ("group 'sex' is unknown for 2 of 4 test images",)
    pixels = np.asarray(data.test.image(0))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(photo(6)))))
    assert data.test.where(0) == "row 6 (6.png)"
    sent = pickle.loads(pickle.dumps(data.test))
    assert np.array_equal(np.asarray(sent.image(0)), pixels)


def test_parquet_with_a_file_per_split_that_numbers_its_classes_differently(tmp_path):
    write_rows(tmp_path / "train.parquet", rows_of(range(4)))
    write_rows(tmp_path / "test.parquet", rows_of(range(4, 8)), label=ClassLabel(names=["dog", "cat"]))
    card = card_of("  source: {kind: parquet, files: {train: train.parquet, test: test.parquet}}\n")
    data = open_data(card, data_root=tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.test.labels.tolist() == [1, 0, 1, 0]


def test_parquet_without_the_metadata_of_datasets(tmp_path):
    images = pa.array([{"bytes": photo(s), "path": None} for s in range(4)])
    pq.write_table(pa.table({"image": images, "label": ["a", "b"] * 2}), tmp_path / "x.parquet")
    binary = pa.table({"image": [photo(s) for s in range(4, 8)], "label": ["a", "b"] * 2})
    pq.write_table(binary, tmp_path / "y.parquet")
    card = card_of("  source: {kind: parquet, files: {train: x.parquet, test: y.parquet}}\n")
    data = open_data(card, data_root=tmp_path)
    assert data.class_names == ("a", "b")
    assert data.test.image(3).size == (40, 32)


def test_parquet_paths_do_not_leave_the_data_root(tmp_path):
    (tmp_path / "secret.png").write_bytes(photo(99))
    images = pa.array(
        [{"bytes": photo(s), "path": None} for s in range(3)] + [{"bytes": None, "path": "../secret.png"}]
    )
    table = pa.table({"image": images, "label": ["a", "b"] * 2, "split": ["train", "train", "test", "test"]})
    (tmp_path / "root").mkdir()
    pq.write_table(table, tmp_path / "root" / "x.parquet")
    card = card_of("  source: {kind: parquet, files: x.parquet}\n  splits: {column: split}\n")
    with pytest.raises(DataError, match=r"row 3 \(../secret.png\): the image path '../secret.png' leaves"):
        open_data(card, data_root=tmp_path / "root")


def test_a_split_made_here_keeps_copies_and_patients_together(tmp_path):
    rows = rows_of(range(40), who=lambda s: f"p{s // 4}")
    copies = [{"image": {"bytes": photo(s, "JPEG"), "path": None}, "label": s % 2, "who": f"c{s}"} for s in range(6)]
    write_rows(tmp_path / "x.parquet", rows + copies)
    card = card_of(
        "  source: {kind: parquet, files: x.parquet}\n  splits: {fractions: {train: .5, validation: .1, test: .4}}\n"
        "  columns: {cluster: who}\n"
    )
    data = open_data(card, data_root=tmp_path)
    assert sum(len(part) for part in data.parts.values()) == 46
    parts = [set(part.clusters or ()) for part in data.parts.values()]
    assert not parts[0] & parts[2]
    for original, copy in (("p0", "c0"), ("p0", "c3"), ("p1", "c5")):
        assert [original in part for part in parts] == [copy in part for part in parts]
    assert open_data(card, data_root=tmp_path).digest == data.digest


def test_everything_in_one_cluster_cannot_be_split(tmp_path):
    write_rows(tmp_path / "x.parquet", rows_of(range(8), who=lambda s: "same"))
    card = card_of(
        "  source: {kind: parquet, files: x.parquet}\n  splits: {fractions: {train: .5, test: .5}}\n"
        "  columns: {cluster: who}\n"
    )
    with pytest.raises(SplitError, match="8 of 8 images are tied together as clusters"):
        open_data(card, data_root=tmp_path)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "  source: {kind: parquet, files: none/*.parquet}\n",
            r"no file matches 'none/\*.parquet' under .*`--data-root`",
        ),
        ("  source: {kind: parquet, files: 'a/x.parquet'}\n", r"did you mean `--data-root "),
        ("  source: {kind: parquet, files: x.parquet}\n  columns: {label: lable}\n", r'no column \'lable\'.*"label"'),
        (
            "  source: {kind: parquet, files: x.parquet}\n  columns: {image: label}\n",
            r"column 'label' as encoded images",
        ),
        (
            "  source: {kind: parquet, files: x.parquet}\n  splits: {column: sx}\n",
            r"no column 'sx', which the card names",
        ),
        ("  source: {kind: parquet, files: bad.parquet}\n", r"bad.parquet cannot be loaded"),
    ],
)
def test_parquet_mistakes(tmp_path, block, message):
    write_rows(tmp_path / "a" / "x.parquet", rows_of(range(4), sex=str))
    (tmp_path / "a" / "bad.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match=message):
        open_data(card_of(block), data_root=tmp_path / "a")


def test_nothing_says_how_to_split(tmp_path):
    write_rows(tmp_path / "x.parquet", rows_of(range(4)))
    with pytest.raises(SplitError, match=r"nothing says which images are for training.*fractions"):
        open_data(card_of("  source: {kind: parquet, files: x.parquet}\n"), data_root=tmp_path)


# Hub


def test_a_hub_card_without_a_network_fails_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"The images of card mine \(nobody/nothing\).*--data-root"):
        open_data(card_of("  source: {kind: hub, id: nobody/nothing}\n"))
    assert time.monotonic() - start < 10


def test_a_hub_card_reads_a_local_copy(tmp_path):
    for split, seeds in (("train", range(4)), ("test", range(4, 8))):
        write_rows(tmp_path / "pets" / "data" / f"{split}-00000-of-00001.parquet", rows_of(seeds))
    card = card_of("  source: {kind: hub, id: someone/pets}\n")
    data = open_data(card, data_root=tmp_path)
    assert [len(part) for part in data.parts.values()] == [4, 0, 4]
    with pytest.raises(DataError, match=r"no local copy of a/b under the data root; looked for"):
        open_data(card_of("  source: {kind: hub, id: a/b}\n"), data_root=tmp_path)


# Manifests


def manifest(tmp_path: Path, text: str, name: str = "list.csv") -> Card:
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(photo(seed))
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    return card_of(
        f"  source: {{kind: manifest, files: {name}}}\n  splits: {{column: split}}\n"
        "  columns: {image: file, label: class, id: code}\n"
    )


CSV = "file;class;split;code\n0.png;Bär;train;001\n1.png;犬;train;002\n2.png;Bär;test;003\n3.png;犬;test;004\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_manifest(tmp_path, separator):
    data = open_data(manifest(tmp_path, CSV.replace(";", separator)), data_root=tmp_path)
    assert data.class_names == ("Bär", "犬")
    assert data.train.ids == ("001", "002")
    assert data.test.where(1) == str(tmp_path / "3.png")


def test_a_jsonl_manifest_with_numbers(tmp_path):
    rows = [{"file": f"{s}.png", "class": s % 2, "split": "train" if s < 2 else "test", "code": s} for s in range(4)]
    card = manifest(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "list.jsonl")
    with pytest.raises(DataError, match="add class_names"):
        open_data(card, data_root=tmp_path)
    data = open_data(card.model_copy(update={"class_names": ("cat", "dog")}), data_root=tmp_path)
    assert data.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CSV.replace("2.png", "../2.png"), r"image path '../2.png' leaves"),
        (CSV.replace("2.png", "/etc/passwd"), r"image path '/etc/passwd' leaves"),
        (CSV.replace("2.png", ""), r"line 4: the column 'file' should hold a path"),
        (CSV.replace("class", "klass"), r"line 2, has no column 'class', which the card names. Did you mean \"klass\""),
        (CSV.replace("003", "003;x"), r"line 4: more cells than the 4 columns"),
        (CSV.replace(";003", ""), r"line 4: fewer cells than the 4 columns"),
        (CSV.replace("003", "001"), r"0 empty and 1 repeated values"),
        (CSV.replace("2.png", "9.png"), r"9.png: cannot read .*9.png: No such file"),
        ("file;class;split;code\n", r"not a single image"),
    ],
)
def test_manifest_mistakes(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        open_data(manifest(tmp_path, text), data_root=tmp_path)


def test_manifests_of_other_kinds(tmp_path):
    with pytest.raises(DataError, match=r"a manifest must end in .csv, .tsv, .jsonl, .ndjson"):
        open_data(manifest(tmp_path, CSV, "list.xls"), data_root=tmp_path)
    with pytest.raises(DataError, match=r"list.jsonl, line 1: it is not valid JSON"):
        open_data(manifest(tmp_path, CSV, "list.jsonl"), data_root=tmp_path)
    card = manifest(tmp_path, CSV)
    (tmp_path / "list.csv").write_bytes(CSV.replace("犬", "Hund").encode("cp1252"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        open_data(card, data_root=tmp_path)
    (tmp_path / "list.csv").write_bytes(CSV.encode("utf-16"))  # its mark says so
    assert open_data(card, data_root=tmp_path).class_names == ("Bär", "犬")


# Image folders


def test_a_bare_folder_of_class_folders(tmp_path):
    write_folder(tmp_path / "pets", ["Kätzchen", "犬"], 10)
    (tmp_path / "pets" / "犬" / ".hidden.png").write_bytes(b"not an image")
    (tmp_path / "pets" / "犬" / "notes.txt").write_text("passed over")
    (tmp_path / "pets" / ".cache" / "x").mkdir(parents=True)
    data = open_data(load_card(tmp_path / "pets"))
    assert data.class_names == ("Kätzchen", "犬")
    assert [len(part) for part in data.parts.values()] == [12, 2, 6]
    assert data.test.class_counts().tolist() == [3, 3]
    again = open_data(load_card(tmp_path / "pets"))
    assert again.digest == data.digest


def test_a_folder_with_train_and_test(tmp_path):
    write_folder(tmp_path / "train", ["a", "b"], 3)
    write_folder(tmp_path / "val", ["b"], 1, start=100)
    write_folder(tmp_path / "test", ["a", "b"], 2, start=200)
    data = open_data(load_card(tmp_path))
    assert [len(part) for part in data.parts.values()] == [6, 1, 4]
    assert data.validation.labels.tolist() == [1]
    assert data.notes == ("1 class has no validation image: 'a'",)


def test_folder_mistakes(tmp_path):
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.png").write_bytes(photo(0))
    with pytest.raises(DataError, match="has no class folders: put the images of each class into a folder"):
        open_data(load_card(tmp_path / "loose"))
    write_folder(tmp_path / "one", ["cat"], 4)
    with pytest.raises(DataError, match="only one class"):
        open_data(load_card(tmp_path / "one"))
    write_folder(tmp_path / "empty", ["cat"], 4)
    (tmp_path / "empty" / "dog").mkdir()
    with pytest.raises(SplitError, match="1 of 2 classes has no train image: 'dog'"):
        open_data(load_card(tmp_path / "empty"))
    forms = [unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD")]
    write_folder(tmp_path / "forms", forms, 2)
    with pytest.raises(DataError, match="two folders that differ from 'Bär' only in its Unicode form"):
        open_data(load_card(tmp_path / "forms"))
    card = card_of("  source: {kind: image_folder, path: one}\n  columns: {label: species}\n")
    with pytest.raises(DataError, match="an image folder has no columns but its folders' names"):
        open_data(card, data_root=tmp_path)


def test_the_same_picture_in_train_and_test_folders(tmp_path):
    write_folder(tmp_path / "train", ["a", "b"], 3)
    write_folder(tmp_path / "test", ["a", "b"], 2, start=200)
    (tmp_path / "test" / "a" / "copy.png").write_bytes(photo(0))
    with pytest.raises(SplitError, match=r"1 of 5 test images is the same file as a train image: .*copy.png = .*0.png"):
        open_data(load_card(tmp_path))
    assert len(open_data(load_card(tmp_path), check=False).test) == 5


# Unreadable images


def test_unreadable_images(tmp_path):
    write_folder(tmp_path / "train", ["a", "b"], 3)
    write_folder(tmp_path / "test", ["a", "b"], 2, start=200)
    (tmp_path / "train" / "a" / "0.png").write_bytes(photo(0)[:60])
    (tmp_path / "test" / "b" / "0.png").write_bytes(b"")
    card = load_card(tmp_path)
    with pytest.raises(DataError, match=r"2 of 10 images cannot be used:\n(.|\n)*--on-bad-image skip") as caught:
        open_data(card)
    for name in ("train/a/0.png: the image is damaged or truncated", "test/b/0.png: the image is empty (0 bytes)"):
        assert name in str(caught.value)
    data = open_data(card, on_bad_image="skip")
    assert [len(part) for part in data.parts.values()] == [5, 0, 3]
    assert len(data.skipped) == 2
    assert "left out" in data.skipped[0]
    allowed = card.model_copy(update={"allow": ("unreadable_images",)})
    assert open_data(allowed).skipped == data.skipped
    unchecked = open_data(card, check=False)
    with pytest.raises(DataError, match=r"train/a/0.png: the image is damaged or truncated"):
        unchecked.train.image(0)


def test_no_readable_image_at_all(tmp_path):
    for name in ("train/a", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 2 images can be used; the first: .*0 bytes"):
        open_data(load_card(tmp_path), on_bad_image="skip")


def test_sixteen_bit_images_need_the_window_of_the_card(tmp_path):
    for split, value in (("train", 0), ("test", 500)):
        for i, name in enumerate(("a", "b")):
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.random.default_rng(value + i).integers(0, 1000, (16, 16)).astype(np.uint16)
            Image.fromarray(pixels).save(tmp_path / split / name / "x.png")
    with pytest.raises(DataError, match=r"16-bit grey values from \d+ to \d+.*`window:"):
        open_data(load_card(tmp_path))
    block = "  source: {kind: image_folder, path: .}\n  window: [0, 1000]\n"
    assert open_data(card_of(block), data_root=tmp_path).train.image(0).mode == "RGB"


# Embedded sets


def test_embedded_digits():
    data = open_data(load_card("digits"))
    assert len(data.class_names) == 10
    assert sum(len(part) for part in data.parts.values()) == 1797
    assert set(data.test.groups) == {"stroke_weight"}
    assert len(data.train.levels["loop"]) == 10
    assert data.train.image(0).mode == "RGB"


def test_embedded_mistakes():
    with pytest.raises(DataError, match=r'no embedded set \'digit\'. Did you mean "digits"'):
        open_data(card_of("  source: {kind: embedded, name: digit}\n"))
    with pytest.raises(DataError, match=r'specimens has no option \'sead\'. Did you mean "seed"'):
        open_data(card_of("  source: {kind: embedded, name: specimens, options: {sead: 1}}\n"))
    with pytest.raises(DataError, match="the embedded set digits has no column 'weight'"):
        open_data(card_of("  source: {kind: embedded, name: digits}\n  columns: {groups: {weight: weight}}\n"))


def test_a_data_root_that_is_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"the data root .*nowhere is not a folder"):
        open_data(card_of("  source: {kind: parquet, files: x}\n"), data_root=tmp_path / "nowhere")


# Real images


@pytest.mark.shared_data
def test_flowers_have_copies_and_the_split_made_here_keeps_them_together(shared_data):
    from adaptclip.data.fingerprints import fingerprints

    data = open_data(load_card("flowers17"), data_root=shared_data("flowers17"))
    assert [len(part) for part in data.parts.values()] == [680, 136, 544]
    assert set(data.test.class_counts()) == {32}
    found = fingerprints(data.train.read, data.train.contents, where=data.train.where, window=None, store=None)
    assert len(list(similar_pairs(found))) > 10
