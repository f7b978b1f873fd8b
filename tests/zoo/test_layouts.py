# SPDX-License-Identifier: Apache-2.0
"""Folders of images as people have them, and what each is understood as; a wrong guess is worse than a question."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from zoo.making import put, run, tree

from adaptclip.data.image_files import list_images
from adaptclip.data.layouts import images_below, read_layout
from adaptclip.errors import CardError, DataError

UNDERSTOOD: dict[str, tuple[dict[str, int], str]] = {
    "class folders": ({"cat": 2, "dog": 3}, "drawn: cat 2, dog 3"),
    "numbers for classes": ({"0": 1, "1": 1, "10": 1}, "drawn: 0 1, 1 1, 10 1"),
    "spellings of the usual split": (
        {"Train/cat": 2, "Train/dog": 2, "VAL/cat": 1, "VAL/dog": 1, "Test/cat": 1, "Test/dog": 1},
        "Train: cat 2, dog 2; VAL: cat 1, dog 1; Test: cat 1, dog 1",
    ),
    "training_set and test_set": (
        {"training_set/cat": 2, "training_set/dog": 2, "test_set/cat": 1, "test_set/dog": 1},
        "training_set: cat 2, dog 2; test_set: cat 1, dog 1",
    ),
    "camel case": (
        {"TrainingSet/a": 2, "TrainingSet/b": 2, "ValidationSet/a": 1, "TestSet/a": 1, "TestSet/b": 1},
        "TrainingSet: a 2, b 2; ValidationSet: a 1; TestSet: a 1, b 1",
    ),
    "Intel scenes of Kaggle, nested twice, with unlabelled images": (
        {
            "seg_train/seg_train/buildings": 2, "seg_train/seg_train/sea": 2, "seg_test/seg_test/buildings": 1,
            "seg_test/seg_test/sea": 1, "seg_pred/seg_pred": 3,
        },
        "seg_train: buildings 2, sea 2; seg_test: buildings 1, sea 1"
        " | 3 images in the folder seg_pred are not used: it is no split and no class",
    ),
    "train_images and test_images": (
        {"train_images/a": 2, "train_images/b": 1, "test_images/a": 1, "test_images/b": 1},
        "train_images: a 2, b 1; test_images: a 1, b 1",
    ),
    "trainval and test": (
        {"trainval/a": 2, "trainval/b": 1, "test/a": 1, "test/b": 1},
        "trainval: a 2, b 1; test: a 1, b 1",
    ),
    "versions": (
        {"train/a": 2, "train/b": 2, "validation/a": 1, "test-v3/a": 1, "test-v3/b": 1},
        "train: a 2, b 2; validation: a 1; test-v3: a 1, b 1",
    ),
    "dev and holdout": (
        {"train/a": 2, "train/b": 2, "dev/a": 1, "dev/b": 1, "hold-out/a": 1, "hold-out/b": 1},
        "train: a 2, b 2; dev: a 1, b 1; hold-out: a 1, b 1",
    ),
    "a shared prefix": (
        {"chest_xray_train/N": 1, "chest_xray_train/P": 1, "chest_xray_test/N": 1, "chest_xray_test/P": 1},
        "chest_xray_train: N 1, P 1; chest_xray_test: N 1, P 1",
    ),
    "German": (
        {"Trainingsdaten/gut": 2, "Trainingsdaten/Riss": 2, "Testdaten/gut": 1, "Testdaten/Riss": 1},
        "Trainingsdaten: Riss 2, gut 2; Testdaten: Riss 1, gut 1",
    ),
    "French": (
        {"entraînement/a": 1, "entraînement/b": 1, "validation/a": 1, "test/a": 1, "test/b": 1},
        "entraînement: a 1, b 1; validation: a 1; test: a 1, b 1",
    ),
    "Spanish": (
        {"entrenamiento/a": 1, "entrenamiento/b": 1, "prueba/a": 1, "prueba/b": 1},
        "entrenamiento: a 1, b 1; prueba: a 1, b 1",
    ),
    "Chinese": (
        {"训练集/猫": 1, "训练集/狗": 1, "测试集/猫": 1, "测试集/狗": 1},
        "训练集: 狗 1, 猫 1; 测试集: 狗 1, 猫 1",
    ),
    "a wrapper of an archive": ({"archive/pets/cat": 2, "archive/pets/dog": 2}, "drawn: cat 2, dog 2"),
    "a wrapper around splits, and what a Mac leaves": (
        {
            "data/train/a": 2, "data/train/b": 2, "data/test/a": 1, "data/test/b": 1, "__MACOSX/data/train/a": 2,
            "data/train/.ipynb_checkpoints": 1, "data/.DS_Store": 0,
        },
        "train: a 2, b 2; test: a 1, b 1",
    ),
    "images wrapped inside each split": (
        {"train/images/a": 2, "train/images/b": 1, "test/images/a": 1, "test/images/b": 1},
        "train: a 2, b 1; test: a 1, b 1",
    ),
    "junk of a network drive and a viewer": (
        {"cat": 2, "dog": 2, "cat/@eaDir/0.png": 0, "@eaDir/cat": 1, "dog/.ipynb_checkpoints": 1, "cat/Thumbs.db": 0},
        "drawn: cat 2, dog 2",
    ),
    "images beside the class folders": (
        {"cat": 2, "dog": 2, ".": 3},
        "drawn: cat 2, dog 2 | 3 images directly in ROOT are not used: they lie in no class folder",
    ),
    "a class that is called train": ({"bus": 2, "train": 2, "tram": 1}, "drawn: bus 2, train 2, tram 1"),
    "classes test and control": ({"control": 2, "test": 2}, "drawn: control 2, test 2"),
    "classes valid and invalid": ({"invalid": 2, "valid": 2}, "drawn: invalid 2, valid 2"),
    "kinds of train": ({"freight train": 1, "steam_train": 1}, "drawn: freight train 1, steam_train 1"),
    "with and without a mask": ({"mask": 1, "without_mask": 1}, "drawn: mask 1, without_mask 1"),
    "humidity in per cent": ({"10 percent": 1, "30 percent": 1}, "drawn: 10 percent 1, 30 percent 1"),
    "sub-folders beside images": ({"cat": 1, "cat/more": 2, "dog": 1}, "drawn: cat 3, dog 1"),
    "masks below the classes": (
        {"benign": 2, "benign/masks": 2, "malignant": 1, "malignant/masks": 1},
        "drawn: benign 2, malignant 1",
    ),
    "images and masks below the classes, as of COVID radiographs": (
        {"COVID/images": 2, "COVID/masks": 2, "Normal/images": 1, "Normal/masks": 1},
        "drawn: COVID 2, Normal 1",
    ),
    "masks beside the class folders": (
        {"gut": 2, "Riss": 2, "ground_truth/gut": 2, "ground_truth/Riss": 2},
        "drawn: Riss 2, gut 2"
        " | 4 masks in the folder ground_truth are not used: an image of the same name lies beside each",
    ),
    "classes below a folder of images and again below one of masks": (
        {"images/cat": 2, "images/dog": 1, "masks/cat": 2, "masks/dog": 1},
        "drawn: cat 2, dog 1 | 3 masks in the folder masks are not used: an image of the same name lies beside each",
    ),
    "a test part with a single class": (
        {"train/a": 1, "train/b": 1, "test/a": 1}, "train: a 1, b 1; test: a 1"
    ),
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, int], str]] = {
    "splits without class folders": (
        {"train": 2, "test": 2},
        r"train, test|test, train look like splits, and hold images without class folders, .* not taken for classes",
    ),
    "two divisions of one name": (
        {"trainA": 2, "trainB": 2, "testA": 2, "testB": 2},
        r"look like splits, and hold images without class folders, .* not taken for classes",
    ),
    "unlabelled test images": (
        {"train/a": 2, "train/b": 2, "test": 2},
        r"folder 'train' but none for the test images; test holds images without class folders",
    ),
    "a test folder whose name says more": (
        {"train/a": 1, "validation/a": 1, "test_autumn/a": 1, "test_autumn/b": 1},
        r"none for the test images; test_autumn may hold some.*`splits: \{train: train, test: test_autumn\}`",
    ),
    "development and holdout": (
        {"development/a": 2, "development/b": 2, "holdout/a": 1, "holdout/b": 1},
        r"none for the training images; .*`splits: \{test: holdout\}`.*`splits: \{train: development, test: holdout\}`",
    ),
    "two folders that differ in a blank": (
        {"cat": 1, "cat ": 1, "dog": 1},
        r"two folders that differ from 'cat' only in blanks around it; merge them",
    ),
    "two folders of one name in two Unicode forms": (
        {"\u00fcber": 1, "u\u0308ber": 1, "dog": 1},
        r"differ from '\u00fcber' only in its Unicode form; merge them",
    ),
    "train and val": ({"train/a": 1, "val/a": 1}, r"folder 'train', 'val' but none for the test images"),
    "a test folder alone": (
        {"test/a": 1, "test/b": 1},
        r"folder 'test' but none for the training images; to judge models on them alone.*splits: \{test: test\}",
    ),
    "folds": (
        {"fold1/a": 1, "fold1/b": 1, "fold2/a": 1, "fold2/b": 1},
        r"fold1, fold2 look like the folds of a cross-validation.*`splits: \{train: FOLDER, test: FOLDER\}`",
    ),
    "shares": ({"70 percent/a": 1, "30 percent/a": 1}, r"look like shares of one set.*not taken for classes"),
    "sites with the same classes": (
        {"Ulm/normal": 1, "Ulm/crack": 1, "Bonn/normal": 1, "Bonn/crack": 1},
        r"all have the same folders in them \(crack, normal\), so they are not taken for classes.*names: \[Bonn, ",
    ),
    "splits below the classes": (
        {"cat/train": 1, "cat/test": 1, "dog/train": 1, "dog/test": 1},
        r"all have the same folders in them \(test, train\)",
    ),
    "folders of masks without the images": (
        {"benign": 1, "benign/masks": 2, "malignant": 1, "malignant/masks": 2},
        r"all have the same folders in them \(masks\)",
    ),
    "patients below the classes": (
        {"naevus/p1": 1, "naevus/p2": 1, "melanoma/p3": 1},
        r"hold only folders \(p3\).*name them there: `class_names: \[melanoma, naevus\]`.*--classes folders",
    ),
    "an old copy beside the classes": (
        {"cat": 1, "dog": 1, "old/cat": 1, "old/dog": 1},
        r"old hold only folders \(cat, dog\)",
    ),
    "images and masks": ({"images": 2, "masks": 2}, r"images, masks have names of kinds of files"),
    "several training folders": (
        {"train/a": 1, "training/a": 1, "test/a": 1},
        r"several train folders: train, training; keep one, or name one for each part",
    ),
    "a split inside a split": (
        {"train/train/a": 1, "train/val/a": 1, "test/a": 1},
        r"all have the same folders in them \(a\)",
    ),
    "no folder at all": ({".": 3}, r"has no class folders: put the images of each class into a folder"),
}


def words(root: Path, **options) -> str:
    """The layout in one line: splits, classes with their numbers of images, and what is unused."""
    layout = read_layout(root, **options)
    splits: dict[str, list[str]] = {}
    for split, name, folder in layout.classes:
        splits.setdefault(split or "drawn", []).append(f"{name} {len(images_below(folder))}")
    line = "; ".join(f"{split}: {', '.join(sorted(classes))}" for split, classes in splits.items())
    return " | ".join([line, *layout.unused]).replace(str(root), "ROOT")


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_what_is_clear_is_understood(tmp_path, kind):
    folders, expected = UNDERSTOOD[kind]
    assert words(tree(tmp_path, folders)) == expected


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_in_doubt_is_asked(tmp_path, kind):
    folders, message = REFUSED[kind]
    with pytest.raises((CardError, DataError), match=message):
        read_layout(tree(tmp_path, folders))


@pytest.mark.parametrize("end", ["_mask", "_segmentation", "-seg", " mask", "_mask_1", "_GT", ".ground_truth"])
def test_masks_are_told_by_the_end_of_their_names_where_the_image_is_there(tmp_path, end):
    for name in ("a (1).png", f"a (1){end}.png", f"b{end}.png", "mask.png", "c.jpg", "c.xml"):
        put(tmp_path, name)
    listing = list_images(tmp_path)
    assert [path.name for path in listing.images] == ["a (1).png", f"b{end}.png", "c.jpg", "mask.png"]
    assert listing.words() == f".xml x 1 (c.xml), mask or annotation of an image beside it x 1 (a (1){end}.png)"


def test_what_is_left_out_as_a_mask_is_said(tmp_path, capsys):
    for name in ("benign", "malignant"):
        for i in range(5):
            put(tmp_path, f"set/{name}/{i}.png")
            put(tmp_path, f"set/{name}/{i}_mask.png")
    assert run(["card", "new", str(tmp_path / "set"), "--out", str(tmp_path / "card.md")]) == 0
    out = capsys.readouterr().out
    assert "benign 5, malignant 5" in out
    assert "no images: mask or annotation of an image beside it x 10 (0_mask.png, 1_mask.png, 2_mask.png, ...)" in out


def test_the_zoo_is_large_enough():
    assert len(UNDERSTOOD) + len(REFUSED) >= 40


def card_file(folder: Path, lines: str) -> Path:
    path = folder / "card.md"
    path.write_text(f"---\nadaptclip:\n  source: {{kind: image_folder, path: set}}\n{lines}---\n", encoding="utf-8")
    return path


FRACTIONS = "  splits: {fractions: {train: 0.5, test: 0.5}}\n"


def test_the_advice_to_draw_a_split_does_not_make_classes_of_split_folders(tmp_path, capsys):
    tree(tmp_path / "set", {"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 2})
    card = card_file(tmp_path, FRACTIONS)
    assert run(["card", "check", str(card)]) == 0
    out = capsys.readouterr().out
    assert "2 classes with their images: cat 6, dog 6" in out
    assert "the images of the folders train, test are put together, and divided anew" in out


def test_what_is_asked_for_is_taken(tmp_path, capsys):
    tree(tmp_path / "set", {"naevus/p1": 3, "naevus/p2": 3, "melanoma/p3": 4})
    asked = card_file(tmp_path, FRACTIONS + "  class_names: [naevus, melanoma]\n")
    assert run(["card", "check", str(asked)]) == 0
    assert "2 classes with their images: naevus 6, melanoma 4" in capsys.readouterr().out
    assert run(["card", "check", str(card_file(tmp_path, FRACTIONS))]) == 1
    assert "hold only folders" in capsys.readouterr().err


def test_sites_can_be_the_splits_when_the_card_says_so(tmp_path, capsys):
    tree(tmp_path / "set", {"Ulm/normal": 2, "Ulm/crack": 2, "Bonn/normal": 2, "Bonn/crack": 2})
    assert run(["card", "check", str(card_file(tmp_path, "  splits: {train: Ulm, test: Bonn}\n"))]) == 0
    assert "2 classes with their images: crack 4, normal 4" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["archive", "archive/archive/pets"])
def test_a_new_card_says_what_it_understood(tmp_path, capsys, given):
    tree(tmp_path / "archive/archive/pets", {"cat": 3, "dog": 5})
    assert run(["card", "new", str(tmp_path / given), "--out", str(tmp_path / "card.md")]) == 0
    out = capsys.readouterr().out
    assert "2 classes with their images: cat 3, dog 5" in out
    assert 'path: "archive/archive/pets"' in (tmp_path / "card.md").read_text(encoding="utf-8")
    assert run(["card", "check", str(tmp_path / "card.md")]) == 0


def test_a_new_card_takes_folders_for_classes_on_request(tmp_path, capsys):
    tree(tmp_path / "set", {"naevus/p1": 5, "melanoma/p3": 5})
    assert run(["card", "new", str(tmp_path / "set"), "--out", str(tmp_path / "card.md")]) == 1
    assert "--classes folders" in capsys.readouterr().err
    assert not (tmp_path / "card.md").exists()
    command = ["card", "new", str(tmp_path / "set"), "--out", str(tmp_path / "card.md"), "--classes", "folders"]
    assert run(command) == 0
    assert run(["card", "check", str(tmp_path / "card.md")]) == 0
    assert "melanoma 5, naevus 5" in capsys.readouterr().out


needs_bytes = pytest.mark.skipif(os.name == "nt", reason="file names are text on Windows")


@needs_bytes
def test_an_image_whose_name_is_not_utf_8_is_read_and_can_be_shown(tmp_path, capsys):
    tree(tmp_path / "set", {"cat": 4, "dog": 4})
    put(tmp_path / "set", b"cat/caf\xe9.png")
    put(tmp_path / "set", b"dog/broken\xff.png", b"no image")
    assert run(["card", "check", str(tmp_path / "set"), "--on-bad-image", "skip"]) == 0
    out = capsys.readouterr().out
    assert "cat 5, dog 4" in out
    assert "broken\\xff.png" in out
    assert run(["card", "check", str(tmp_path / "set")]) == 1
    assert "broken\\xff.png" in capsys.readouterr().err


@needs_bytes
def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path, capsys):
    tree(tmp_path / "set", {"cat": 2})
    put(tmp_path / "set", b"caf\xe9/0.png")
    for command in (["check", str(tmp_path / "set")], ["new", str(tmp_path / "set"), "--out", str(tmp_path / "c.md")]):
        assert run(["card", *command]) == 1
        assert "caf\\xe9 has a name that is not UTF-8 text; rename it" in capsys.readouterr().err
    whole = str(tmp_path / os.fsdecode(b"caf\xe9"))
    tree(Path(whole), {"cat": 2, "dog": 2})
    for command in (["check", whole], ["new", whole, "--out", str(tmp_path / "c.md")]):
        assert run(["card", *command]) == 1
        assert "is not UTF-8 text, so no card can name it" in capsys.readouterr().err


def test_terminal_escapes_in_a_folder_name_are_not_sent_to_the_terminal(tmp_path, capsys):
    tree(tmp_path / "set", {"cat": 4, "dog\x1b[31m": 4})
    run(["card", "check", str(tmp_path / "set")])
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
