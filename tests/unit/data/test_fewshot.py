# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptclip.data.card import parse_card
from adaptclip.data.dataset import DomainData, ImageDataset, MemoryStore
from adaptclip.data.shots import FewShotSplit, sample_few_shot
from adaptclip.errors import SplitError, StorageError

CARD = parse_card("---\nadaptclip:\n  source: {kind: embedded, name: digits}\n---\n", name="toy")
SHOTS = (1, 2, 4, 8, 16)


def part_of(name: str, counts: list[int], clusters: list[str] | None = None) -> ImageDataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = tuple(f"{name}-{i:03d}" for i in range(len(labels)))
    return ImageDataset(
        store=MemoryStore([b""] * len(ids), ids),
        rows=np.arange(len(ids)),
        class_names=tuple(f"class {c}" for c in range(len(counts))),
        ids=ids,
        labels=labels,
        contents=tuple(f"{name}{i:064x}" for i in range(len(ids))),
        clusters=None if clusters is None else tuple(clusters),
    )


def data_of(train: ImageDataset, validation: ImageDataset | None = None) -> DomainData:
    empty = part_of("validation", [0] * len(train.class_names))
    test = part_of("test", [1] * len(train.class_names))
    return DomainData(CARD, train.class_names, train, validation or empty, test)


def per_class(data: DomainData, ids: tuple[str, ...]) -> dict[int, int]:
    label_of = {
        row: int(label) for part in data.parts.values() for row, label in zip(part.ids, part.labels, strict=True)
    }
    return dict(Counter(label_of[row] for row in ids))


@pytest.mark.parametrize("rule", ["nested", "coop"])
@pytest.mark.parametrize("shots", SHOTS)
def test_numbers_per_class(rule, shots):
    data = data_of(part_of("train", [30, 20, 40]), part_of("validation", [10, 10, 10]))
    split = sample_few_shot(data, shots=shots, seed=0, rule=rule)
    assert per_class(data, split.train) == dict.fromkeys(range(3), shots)
    assert per_class(data, split.validation) == dict.fromkeys(range(3), min(shots, 4))
    assert len(set(split.train)) == len(split.train)
    assert (split.val_shots, split.short_classes) == (min(shots, 4), {})
    train, validation = split.select(data)
    assert (train.ids, validation.ids) == (split.train, split.validation)


def test_nested_splits_are_nested_and_those_of_coop_are_fresh():
    data = data_of(part_of("train", [40, 40]))
    nested = [set(sample_few_shot(data, shots=k, seed=3).train) for k in SHOTS]
    assert all(small < large for small, large in pairwise(nested))
    fresh = [set(sample_few_shot(data, shots=k, seed=3, rule="coop").train) for k in SHOTS]
    assert not all(small < large for small, large in pairwise(fresh))


def test_seed_zero_is_a_seed_and_the_draw_repeats():
    data = data_of(part_of("train", [40, 40]))
    splits = [sample_few_shot(data, shots=4, seed=seed).train for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len(set(splits)) == 3


def test_the_order_of_rows_does_not_matter():
    train = part_of("train", [20, 20])
    shuffled = train.select(np.random.default_rng(0).permutation(40))
    first = sample_few_shot(data_of(train), shots=4, seed=1)
    assert sample_few_shot(data_of(shuffled), shots=4, seed=1).train == first.train


@pytest.mark.parametrize("rule", ["nested", "coop"])
def test_a_short_class_gives_all_it_has(rule):
    data = data_of(part_of("train", [3, 20]))
    split = sample_few_shot(data, shots=16, seed=0, rule=rule)
    assert per_class(data, split.train) == {0: 3, 1: 16}
    assert split.short_classes == {"class 0": 3}
    assert per_class(data, split.validation) == {1: 4}


def test_zero_shots_are_all_images():
    data = data_of(part_of("train", [5, 7]), part_of("validation", [3, 2]))
    split = sample_few_shot(data, shots=0, seed=0)
    assert set(split.train) == set(data.train.ids)
    assert set(split.validation) == set(data.validation.ids)
    assert (split.shots, split.val_shots, split.short_classes) == (0, None, {})
    assert sample_few_shot(data, shots=0, seed=0, val_shots=1).val_shots == 1
    assert sample_few_shot(data_of(data.train), shots=0, seed=0).validation == ()


def test_no_validation_on_demand():
    split = sample_few_shot(data_of(part_of("train", [9, 9])), shots=2, seed=0, val_shots=0)
    assert (split.validation, split.val_shots) == ((), 0)
    assert len(split.select(data_of(part_of("train", [9, 9])))[1]) == 0


def test_validation_comes_from_what_is_left_over():
    data = data_of(part_of("train", [9, 9]))
    split = sample_few_shot(data, shots=4, seed=0)
    assert len(split.validation) == 8
    assert not set(split.train) & set(split.validation)
    assert set(split.validation) < set(data.train.ids)


def test_nested_prefers_different_clusters():
    clusters = ["a"] * 10 + ["b", "c"] + ["d"] * 8
    data = data_of(part_of("train", [12, 8], clusters))
    cluster_of = dict(zip(data.train.ids, clusters, strict=True))
    for seed in range(5):
        chosen = sample_few_shot(data, shots=4, seed=seed).train[:4]
        assert {cluster_of[row] for row in chosen[:3]} == {"a", "b", "c"}


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    shots=st.integers(1, 6),
    seed=st.integers(0, 3),
    rule=st.sampled_from(["nested", "coop"]),
    clusters=st.integers(1, 12),
)
def test_no_cluster_is_in_both_parts(counts, shots, seed, rule, clusters):
    names = [f"p{i * 7 % clusters}" for i in range(sum(counts))]
    train = part_of("train", counts, names)
    split = sample_few_shot(data_of(train), shots=shots, seed=seed, rule=rule)
    cluster_of = dict(zip(train.ids, names, strict=True))
    assert not {cluster_of[r] for r in split.train} & {cluster_of[r] for r in split.validation}
    assert per_class(data_of(train), split.train) == {c: min(n, shots) for c, n in enumerate(counts)}


def test_copies_of_a_training_picture_do_not_validate():
    train = part_of("train", [4, 4])
    same = replace(train, contents=("c" * 64,) * 4 + train.contents[4:])
    split = sample_few_shot(data_of(same), shots=1, seed=0)
    assert per_class(data_of(same), split.validation) == {1: 1}


def test_a_manifest_comes_back_and_notices_changes(tmp_path):
    data = data_of(part_of("train", [20, 2]))
    split = sample_few_shot(data, shots=4, seed=0)
    path = tmp_path / "few" / "split.json"
    split.save(path)
    assert FewShotSplit.load(path) == split
    content = json.loads(path.read_text())
    assert content["short_classes"] == {"class 1": 2}
    path.write_text(json.dumps(content | {"seed": 5}))
    with pytest.raises(SplitError, match="was changed after it was written"):
        FewShotSplit.load(path)
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "rule"}))
    with pytest.raises(SplitError, match=r"not a whole few-shot manifest .*rule"):
        FewShotSplit.load(path)
    path.write_text("[]")
    with pytest.raises(SplitError, match="is not a few-shot manifest"):
        FewShotSplit.load(path)
    path.write_text('{"format"')
    with pytest.raises(StorageError, match="cannot read"):
        FewShotSplit.load(path)


def test_other_data_are_refused():
    data = data_of(part_of("train", [9, 9]))
    split = sample_few_shot(data, shots=2, seed=0)
    split.check(data)
    with pytest.raises(SplitError, match=r"drawn from other data .*\(8 of its images are not there\)"):
        split.check(data_of(part_of("other", [9, 9])))
    with pytest.raises(SplitError, match="labels, images or groups changed"):
        split.select(data_of(replace(data.train, labels=data.train.labels[::-1].copy())))


def test_what_cannot_be_drawn():
    data = data_of(part_of("train", [9, 9]))
    with pytest.raises(SplitError, match=r'no few-shot rule \'nestd\'. Did you mean "nested"'):
        sample_few_shot(data, shots=1, seed=0, rule="nestd")  # pyright: ignore[reportArgumentType]
    for shots in (-1, 1.5, True):
        with pytest.raises(SplitError, match="shots must be a whole number from 0 up"):
            sample_few_shot(data, shots=shots, seed=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SplitError, match="no training images"):
        sample_few_shot(data_of(part_of("train", [0, 0])), shots=1, seed=0)
