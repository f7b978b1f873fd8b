# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptclip.data.card import parse_card
from adaptclip.data.checks import Checked, check_data
from adaptclip.data.dataset import DomainData, ImageDataset, MemoryStore
from adaptclip.data.fingerprints import content_digest
from adaptclip.errors import DataError, SplitError


def photo(seed: int, quality: int | None = None) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG" if quality else "PNG", **({"quality": quality} if quality else {}))
    return buffer.getvalue()


def part_of(name: str, images: list[bytes], labels: list[int], class_names=("cat", "dog"), **fields) -> ImageDataset:
    ids = tuple(f"{name}-{i}" for i in range(len(images)))
    return ImageDataset(
        store=MemoryStore(images, ids),
        rows=np.arange(len(images)),
        class_names=class_names,
        ids=ids,
        labels=np.array(labels, dtype=np.int64),
        contents=tuple(content_digest(image) for image in images),
        **fields,
    )


def data_of(block: str = "", *, train=None, validation=None, test=None, class_names=("cat", "dog")) -> DomainData:
    card = parse_card(f"---\nadaptclip:\n  source: {{kind: embedded, name: digits}}\n{block}---\n", name="pets")
    return DomainData(
        card,
        class_names,
        train or part_of("train", [photo(1), photo(2)], [0, 1], class_names),
        validation or part_of("validation", [], [], class_names),
        test or part_of("test", [photo(3), photo(4)], [0, 1], class_names),
    )


def test_sound_data_pass_without_a_word():
    assert check_data(data_of()) == Checked()


def test_the_same_file_in_train_and_test():
    data = data_of(test=part_of("test", [photo(3), photo(1)], [0, 1]))
    message = r"1 of 2 test images is the same file as a train image: image test-1 = image train-0"
    with pytest.raises(SplitError, match=rf"{message}.*allow: \[duplicate_images\]"):
        check_data(data)
    (note, conflict) = check_data(replace(data, card=data_of("  allow: [duplicate_images]\n").card)).notes
    assert "allowed by the card: duplicate_images" in note
    assert "2 images are found under several classes: 'train-0', 'test-1'" in conflict


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_same_file_under_two_classes_of_one_part(part):
    twice: dict[str, Any] = {part: part_of(part, [photo(5), photo(6), photo(5)], [0, 1, 1])}
    data = data_of(**twice)
    message = rf"label conflict: 2 of 3 {part} images are the same file as one of another class: "
    with pytest.raises(DataError, match=message + rf"image {part}-0 \(\w+\), image {part}-2 \(\w+\)\. Keep each image"):
        check_data(data)
    allowed = replace(data, card=data_of("  allow: [label_conflicts]\n").card)
    assert "label conflict: 2 of 3" in check_data(allowed).notes[0]
    assert "(allowed by the card: label_conflicts)" in check_data(allowed).notes[0]


def test_the_same_file_twice_under_one_class_is_no_conflict():
    assert check_data(data_of(train=part_of("train", [photo(5), photo(6), photo(5)], [0, 1, 0]))) == Checked()


def test_the_same_picture_saved_anew():
    data = data_of(test=part_of("test", [photo(3), photo(2, quality=60)], [0, 1]))
    with pytest.raises(SplitError, match=r"1 of 2 test images looks the same as a train image: image test-1 = "):
        check_data(data)
    (note,) = check_data(replace(data, card=data_of("  allow: [similar_images]\n").card)).notes
    assert "allowed by the card: similar_images" in note


def test_validation_is_compared_with_both_others():
    data = data_of(validation=part_of("validation", [photo(1), photo(3)], [0, 1]))
    with pytest.raises(SplitError) as caught:
        check_data(data)
    assert "1 of 2 validation images is the same file as a train image" in str(caught.value)
    assert "1 of 2 test images is the same file as a validation image" in str(caught.value)


def test_a_patient_in_train_and_test():
    train = part_of("train", [photo(1), photo(2)], [0, 1], clusters=("p1", "p2"))
    test = part_of("test", [photo(3), photo(4), photo(5)], [0, 1, 1], clusters=("p2", "p3", "p2"))
    with pytest.raises(SplitError, match=r"1 value of 'cluster' .*in both train and test, with 2 test images: 'p2'"):
        check_data(data_of(train=train, test=test))
    (note,) = check_data(data_of("  allow: [shared_clusters]\n", train=train, test=test)).notes
    assert note.startswith("1 value of 'cluster' (patient, site, ...) is in both train and test")


def test_a_class_without_images():
    data = data_of(test=part_of("test", [photo(3)], [0]))
    with pytest.raises(SplitError, match=r"1 of 2 classes has no test image: 'dog'. Add some.*\[missing_classes\]"):
        check_data(data)
    assert len(check_data(replace(data, card=data_of("  allow: [missing_classes]\n").card)).notes) == 1


def test_a_class_without_validation_images_is_only_remarked():
    (note,) = check_data(data_of(validation=part_of("validation", [photo(5)], [1]))).notes
    assert note == "1 class has no validation image: 'cat'"


def test_one_class_only():
    names = ("cat",)
    data = data_of(
        train=part_of("train", [photo(1)], [0], names), test=part_of("test", [photo(2)], [0], names), class_names=names
    )
    with pytest.raises(DataError, match=r"only one class \(cat\), and a classifier needs at least two. Add images of"):
        check_data(data)


@pytest.mark.parametrize("names", [("cat", "cat"), ("sea_otter", "Sea  otter"), ("Ärger", "ärger")])
def test_classes_that_read_the_same(names):
    with pytest.raises(DataError, match=r"read the same in a prompt. Merge them, or tell them apart .* `aliases`"):
        check_data(data_of(class_names=names))


def test_aliases_tell_classes_apart_and_must_name_classes():
    names = ("crane", "Crane")
    assert check_data(data_of("  aliases: {Crane: lifting crane}\n", class_names=names)) == Checked()
    with pytest.raises(DataError, match=r'aliases has no class \'crne\'. Did you mean "crane"'):
        check_data(data_of("  aliases: {crne: bird, Crane: machine}\n", class_names=names))


def test_non_ascii_names_are_fine():
    assert check_data(data_of(class_names=("crème brûlée", "寿司"))) == Checked()


def test_label_ids_out_of_range():
    data = data_of(train=part_of("train", [photo(1), photo(2)], [0, 2]))
    with pytest.raises(DataError, match=r"1 train image has a label id out of range, for example 2 \(image train-1\)"):
        check_data(data)


def test_groups():
    def data(block: str, values: tuple[str, ...]) -> DomainData:
        return data_of(block, test=part_of("test", [photo(3), photo(4)], [0, 1], groups={"age": values}))

    bins = "  groups: {age: {bins: [0, 60], labels: [young, old]}}\n"
    assert check_data(data(bins, ("young", "old"))) == Checked()
    with pytest.raises(DataError, match=r"group 'age' has no test image in 'old'. Merge bins.*\[empty_groups\]"):
        check_data(data(bins, ("young", "young")))
    with pytest.raises(DataError, match="group 'age' is unknown for every test image"):
        check_data(data("", ("unknown", "unknown")))
    assert check_data(data("", ("a", "unknown"))).notes == ("group 'age' is unknown for 1 of 2 test images",)
    with pytest.raises(DataError, match=r'gates of the card has no group \'aeg\'. Did you mean "age"'):
        check_data(data("  gates: [{group: aeg, at_least: 0.5}]\n", ("a", "b")))


def test_all_leaks_are_reported_at_once():
    test = part_of("test", [photo(1), photo(2, quality=60)], [0, 0], clusters=("p", "q"))
    train = part_of("train", [photo(1), photo(2)], [0, 1], clusters=("p", "r"))
    with pytest.raises(SplitError) as caught:
        check_data(data_of(train=train, test=test))
    for name in ("duplicate_images", "similar_images", "shared_clusters", "missing_classes"):
        assert f"allow: [{name}]" in str(caught.value)


def of_sites(classes: list[int], sites: list[str], levels=None) -> DomainData:
    """Images divided evenly between training and test."""
    parts = [
        part_of(name, [photo(100 + i) for i in range(start, len(classes), 2)], classes[start::2],
                groups={"site": tuple(sites[start::2])}, levels=levels or {})
        for start, name in enumerate(("train", "test"))
    ]  # fmt: skip
    return data_of("", train=parts[0], test=parts[1])


def test_a_class_that_is_always_of_one_site_cannot_be_told_from_it():
    checked = check_data(of_sites([0] * 8 + [1] * 8, ["Ulm"] * 8 + ["Bonn", "Ulm"] * 4))
    assert checked.notes == ()
    found = check_data(of_sites([0] * 12 + [1] * 12, ["Ulm"] * 12 + ["Bonn"] * 8 + ["Ulm"] * 4))
    (sentence,) = found.worries
    assert found.notes == found.worries
    assert sentence == (
        "site and class cannot be told apart: all 12 images of 'cat' are of 'Ulm', but 4 of 12 of the other classes. "
        "What is learnt of the class may be the site"
    )
    nearly = check_data(of_sites([0] * 40 + [1] * 40, ["Ulm"] * 39 + ["Bonn"] * 20 + ["Ulm"] * 21))
    assert "39 of 40 images of 'cat' are of 'Ulm', but 21 of 40 of the other classes" in nearly.worries[0]


@pytest.mark.parametrize(
    "sites",
    [
        ["Ulm"] * 24,
        ["Ulm", "Bonn", "Bonn"] * 8,
        ["Ulm"] * 12 + ["unknown"] * 12,
        ["Ulm"] * 11 + ["Bonn"] + ["Ulm"] * 12,
    ],
)
def test_sites_that_tell_nothing_of_the_class_are_no_worry(sites):
    assert check_data(of_sites([0] * 12 + [1] * 12, sites)).worries == ()


def test_a_level_of_the_taxonomy_is_no_site():
    names = ["Felidae"] * 12 + ["Canidae"] * 12
    classes = [0] * 12 + [1] * 12
    assert check_data(of_sites(classes, names)).worries
    assert check_data(of_sites(classes, names, {"family": ("Felidae", "Canidae")})).worries == ()


def test_an_allowed_leak_is_a_worry_and_a_missing_class_a_note():
    test = part_of("test", [photo(1)], [0])
    checked = check_data(data_of("  allow: [duplicate_images, missing_classes]\n", test=test))
    (worry,) = checked.worries
    assert worry.startswith("1 of 1 test images is the same file as a train image")
    assert len(checked.notes) == 2


def of_patients(train: tuple[str, ...], test: tuple[str, ...], block: str = "", **fields) -> DomainData:
    first = part_of("train", [photo(1), photo(2)], [0, 1], clusters=train, **fields)
    return data_of(block, train=first, test=part_of("test", [photo(3), photo(4)], [0, 1], clusters=test, **fields))


@pytest.mark.parametrize(("one", "other"), [("P003", "p003"), ("3", "3.0")])
def test_a_patient_spelt_in_two_ways_in_train_and_test(one, other):
    patients = ((one, "b"), (other, "c"))
    message = rf"1 value of 'cluster' .* in both train and test but for the spelling, .*'{one}' = '{other}'"
    with pytest.raises(SplitError, match=rf"{message}.*allow: \[shared_clusters\]"):
        check_data(of_patients(*patients))
    leak, spelling = check_data(of_patients(*patients, "  allow: [shared_clusters]\n")).worries
    assert "allowed by the card: shared_clusters" in leak
    assert f"clusters: '{one}' = '{other}' count as" in spelling


def test_a_patient_spelt_in_two_ways_in_one_part_is_a_worry():
    (worry,) = check_data(of_patients(("P1", "p1"), ("P2", "P3"))).worries
    assert worry.startswith("clusters: 'P1' = 'p1' count as different")


def test_groups_that_differ_only_in_spelling_are_a_worry():
    data = data_of(
        train=part_of("train", [photo(1), photo(2)], [0, 1], groups={"sex": ("m", "f")}),
        test=part_of("test", [photo(3), photo(4)], [0, 1], groups={"sex": ("M", "f")}),
    )
    (worry,) = check_data(data).worries
    assert worry.startswith("group 'sex': 'M' = 'm' count as different")


def test_images_without_a_patient_are_a_worry():
    (worry,) = check_data(of_patients(("a", "alone:1"), ("alone:2", "b"), "  columns: {cluster: who}\n")).worries
    assert worry.startswith("2 of 4 images have no value of 'who' (patient, site, ...): each such image is treated as")


def test_an_unused_column_that_divides_otherwise_is_asked_about():
    images = part_of("row", [photo(1), photo(2), photo(3), photo(4)], [0, 1, 0, 1])
    data = data_of(train=images.select([0, 1]), test=images.select([2, 3]))
    (note,) = check_data(data, unused={"Teil": ["train", "test", "test", "train"]}).notes
    assert note.startswith("the column 'Teil' says which images are for training and which for the test")
    assert note.endswith('`splits: {column: "Teil", train: "train", test: "test"}`')
    assert check_data(data, unused={"Teil": ["train", "train", "test", "test"]}) == Checked()
