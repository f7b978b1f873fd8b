# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from adaptclip.data.card import parse_card
from adaptclip.data.dataset import DomainData, ImageDataset, MemoryStore
from adaptclip.data.shots import base_and_new, harmonic_mean, sample_few_shot, select_classes
from adaptclip.errors import SplitError

ALIASES = "aliases: {class 1: first alias, class 4: last alias}"
CARD = parse_card(f"---\nadaptclip:\n  source: {{kind: embedded, name: digits}}\n  {ALIASES}\n---\n", name="toy")


def part_of(name: str, num_classes: int, labels: list[int]) -> ImageDataset:
    """Images in a mixed order, with every kind of column."""
    ids = tuple(f"{name}-{i}" for i in range(len(labels)))
    return ImageDataset(
        store=MemoryStore([f"{name} {i}".encode() for i in range(len(ids))], ids),
        rows=np.arange(len(ids)),
        class_names=tuple(f"class {c}" for c in range(num_classes)),
        ids=ids,
        labels=np.array(labels),
        contents=tuple(f"{name}{i:060x}" for i in range(len(ids))),
        clusters=tuple(f"tray {i // 2}" for i in range(len(ids))),
        groups={"site": tuple("north" if i % 3 else "south" for i in range(len(ids)))},
        levels={"genus": tuple(f"genus {c // 2}" for c in range(num_classes))},
    )


def data_of(num_classes: int) -> DomainData:
    rng = np.random.default_rng(num_classes)
    labels = {name: rng.permutation(np.arange(num_classes).repeat(n)).tolist() for name, n in SIZES.items()}
    parts = {name: part_of(name, num_classes, own) for name, own in labels.items()}
    return DomainData(CARD, parts["train"].class_names, parts["train"], parts["validation"], parts["test"])


SIZES = {"train": 6, "validation": 2, "test": 3}


@pytest.mark.parametrize(("num_classes", "half"), [(2, 1), (5, 3), (10, 5), (11, 6), (101, 51)])
def test_the_first_half_rounded_up_is_base(num_classes, half):
    data = data_of(num_classes)
    base, new = base_and_new(data)
    assert base.class_names == data.class_names[:half]
    assert new.class_names == data.class_names[half:]
    for name, part in data.parts.items():
        first, second = base.parts[name], new.parts[name]
        assert len(first) == SIZES[name] * half
        assert {*first.ids, *second.ids} == set(part.ids)
        assert len(first) + len(second) == len(part)
        assert first.class_names == base.class_names
        assert second.class_names == new.class_names


def test_every_image_keeps_its_class_and_columns():
    data = data_of(5)
    for half in base_and_new(data):
        for name, part in half.parts.items():
            whole = data.parts[name]
            row_of = {id_: i for i, id_ in enumerate(whole.ids)}
            for i, id_ in enumerate(part.ids):
                row = row_of[id_]
                assert part.class_names[part.labels[i]] == whole.class_names[whole.labels[row]]
                assert part.read(i) == whole.read(row)
                assert part.contents[i] == whole.contents[row]
                assert part.groups["site"][i] == whole.groups["site"][row]
                assert part.clusters is not None
                assert whole.clusters is not None
                assert part.clusters[i] == whole.clusters[row]
                genus = part.levels["genus"][part.labels[i]]
                assert genus == whole.levels["genus"][whole.labels[row]]
            assert [row_of[id_] for id_ in part.ids] == sorted(row_of[id_] for id_ in part.ids)
            assert part.class_counts().tolist() == [SIZES[name]] * len(half.class_names)


def test_labels_are_numbered_anew_and_aliases_follow_their_class():
    base, new = base_and_new(data_of(5))
    assert set(base.train.labels) == {0, 1, 2}
    assert set(new.train.labels) == {0, 1}
    assert base.prompt_names == ("class 0", "first alias", "class 2")
    assert new.prompt_names == ("class 3", "last alias")
    assert base.train.levels == {"genus": ("genus 0", "genus 0", "genus 1")}
    assert new.train.levels == {"genus": ("genus 1", "genus 2")}


def test_the_data_given_are_not_changed():
    data = data_of(5)
    before = data.digest
    base_and_new(data)
    assert data.digest == before
    assert set(data.train.labels) == set(range(5))


def test_few_shots_are_drawn_from_one_half_alone():
    data = data_of(6)
    base, new = base_and_new(data)
    split = sample_few_shot(base, shots=2, seed=1)
    assert len(split.train) == 6
    assert not {*split.train, *split.validation} & {*new.train.ids, *new.validation.ids}
    with pytest.raises(SplitError, match="drawn from other data"):
        split.select(data)  # a split of the half is not one of the whole


def test_chosen_classes_are_numbered_in_their_order():
    chosen = select_classes(data_of(5), (1, 4))
    assert chosen.class_names == ("class 1", "class 4")
    assert chosen.prompt_names == ("first alias", "last alias")
    assert {chosen.train.class_names[c] for c in chosen.train.labels} == {"class 1", "class 4"}
    assert len(chosen.train) == 12


def test_a_part_without_images_stays_empty():
    data = data_of(4)
    base, new = base_and_new(replace(data, validation=data.validation.select([])))
    assert len(base.validation) == len(new.validation) == 0
    assert base.validation.class_names == ("class 0", "class 1")


def test_one_class_cannot_be_cut():
    with pytest.raises(SplitError, match="at least two classes, card toy has 1"):
        base_and_new(data_of(1))


@pytest.mark.parametrize(("base", "new"), [(0.5, 0.25), (1.0, 1.0), (0.9, 0.1), (0.3, 0.0)])
def test_harmonic_mean(base, new):
    exact = 0 if not new else 2 / (1 / Fraction(base) + 1 / Fraction(new))
    assert harmonic_mean(base, new) == pytest.approx(float(exact), abs=1e-15)
    assert harmonic_mean(new, base) == harmonic_mean(base, new)


def test_harmonic_mean_of_nothing_right():
    assert harmonic_mean(0.0, 0.0) == 0.0
