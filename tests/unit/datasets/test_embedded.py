# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

from adaptclip.datasets.embedded import CLOSED_LOOP, DIGIT_NAMES, EMBEDDED, STROKE_WEIGHTS, digits, specimens
from adaptclip.datasets.specimens import draw_all
from adaptclip.errors import DataError

CELLS, TARGET = (np.asarray(column) for column in load_digits(return_X_y=True))
"""(1797, 64) ink from 0 to 16, and (1797,) digits."""


@pytest.fixture(scope="module")
def digit_set():
    return digits()


@pytest.fixture
def specimen_set(monkeypatch: pytest.MonkeyPatch):
    # Every fiftieth image is drawn; test_specimens.py looks at the drawing itself.
    def some(chosen, *, seed):
        return [draw_all([s], seed=seed)[0] if i % 50 == 0 else b"" for i, s in enumerate(chosen)]

    monkeypatch.setattr("adaptclip.datasets.embedded.draw_all", some)
    return specimens(per_species=40)


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_embedded_sets_are_known_by_name():
    assert set(EMBEDDED) == {"digits", "specimens"}


def test_digits_are_those_of_scikit_learn_enlarged_on_a_margin_of_paper(digit_set):
    assert len(digit_set.images) == 1797
    assert digit_set.labels == TARGET.tolist()
    assert [DIGIT_NAMES[label] for label in digit_set.labels[:4]] == ["zero", "one", "two", "three"]
    for i in range(0, 1797, 97):
        image = _open(digit_set.images[i])
        assert image.mode == "RGB"
        assert image.size == (64, 64)
        assert image.format == "PNG"
        # Read back: the centre of each cell carries its ink, dark on white.
        grey = np.asarray(image.convert("L").resize((10, 10), Image.Resampling.BOX), dtype=float)[1:-1, 1:-1]
        assert np.corrcoef(255 - grey.ravel(), CELLS[i])[0, 1] > 0.97
        assert np.asarray(image)[0].min() > 235


def test_digits_have_the_same_bytes_every_time(digit_set):
    assert digits().images == digit_set.images
    assert len(set(digit_set.images)) == len(digit_set.images)
    assert len(set(digit_set.ids)) == 1797


def test_stroke_weight_cuts_the_ink_into_thirds(digit_set):
    ink = CELLS.sum(axis=1)
    weight = np.array(digit_set.groups["stroke_weight"])
    assert Counter(weight) == {"thin": 603, "medium": 608, "heavy": 586}
    bounds = [(ink[weight == name].min(), ink[weight == name].max()) for name in STROKE_WEIGHTS]
    assert bounds[0][1] == 295 < bounds[1][0]
    assert bounds[1][1] == 329 < bounds[2][0]


def test_the_loop_level_agrees_with_the_drawn_digits(digit_set):
    assert digit_set.levels["loop"] == tuple("closed loop" if n in CLOSED_LOOP else "open" for n in DIGIT_NAMES)
    labels, closed = np.array(digit_set.labels), np.zeros(10)
    for i in range(0, 1797, 3):
        paper = np.asarray(_open(digit_set.images[i]).convert("L")) > 128
        _, num_patches = ndimage.label(paper)  # pyright: ignore[reportGeneralTypeIssues]
        closed[labels[i]] += num_patches > 1
    share = closed / np.bincount(labels[::3])
    assert all((share[i] > 0.5) == (level == "closed loop") for i, level in enumerate(digit_set.levels["loop"]))
    assert share[4] < 0.3


def test_the_digit_split_is_stratified_and_fixed(digit_set):
    assert Counter(digit_set.splits) == {"train": 898, "validation": 179, "test": 720}
    labels, splits = np.array(digit_set.labels), np.array(digit_set.splits)
    for label in range(10):
        share = {part: (splits[labels == label] == part).mean() for part in ("train", "validation", "test")}
        assert share == pytest.approx({"train": 0.5, "validation": 0.1, "test": 0.4}, abs=0.01)
    # A different draw would make results incomparable between versions without anybody noticing.
    assert hashlib.sha256("".join(s[0] for s in digit_set.splits).encode()).hexdigest()[:16] == "e3be84c903463979"


def test_specimens_have_consistent_columns(specimen_set):
    count = 25 * 40
    assert len(specimen_set.class_names) == len(set(specimen_set.class_names)) == 25
    for column in (
        specimen_set.images,
        specimen_set.labels,
        specimen_set.ids,
        specimen_set.splits,
        specimen_set.clusters,
    ):
        assert len(column) == count
    assert all(len(values) == count for values in specimen_set.groups.values())
    assert len(set(specimen_set.ids)) == count
    assert Counter(specimen_set.labels) == dict.fromkeys(range(25), 40)
    assert Counter(specimen_set.levels["genus"]) == dict.fromkeys(set(specimen_set.levels["genus"]), 5)
    assert len(set(specimen_set.levels["genus"])) == 5
    image = _open(specimen_set.images[0])
    assert (image.mode, image.size, image.format) == ("RGB", (96, 96), "PNG")
    drawn = specimen_set.images[::50]
    assert len(set(drawn)) == len(drawn) == 20


def test_genus_is_the_first_word_of_the_species(specimen_set):
    for name, genus in zip(specimen_set.class_names, specimen_set.levels["genus"], strict=True):
        assert name.split()[0] == genus


def test_embedded_options_out_of_range_are_refused():
    with pytest.raises(DataError, match=r"site_effect is a share from 0 to 1, got 1\.5"):
        specimens(site_effect=1.5)
    with pytest.raises(DataError, match="per_species must be a multiple of 4 and at least 40, got 42"):
        specimens(per_species=42)
