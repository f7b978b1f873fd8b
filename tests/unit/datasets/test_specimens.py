# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptclip.datasets.specimens import SITES, SPECIES, TRAY_SIZE, draw, plan


def test_the_default_collection_has_the_documented_counts():
    specimens = plan()
    assert len(specimens) == 2000
    where = Counter((s.split, SITES[s.site]) for s in specimens)
    assert where == {
        ("train", "museum"): 700,
        ("train", "field station"): 300,
        ("validation", "museum"): 152,
        ("validation", "field station"): 48,
        ("test", "museum"): 548,
        ("test", "field station"): 252,
    }
    assert Counter(s.split for s in specimens if s.erased) == {"train": 120, "validation": 19, "test": 101}


@settings(max_examples=25, deadline=None)
@given(effect=st.floats(0, 1), seed=st.integers(0, 2**31), trays=st.integers(10, 25))
def test_any_plan_keeps_its_promises(effect: float, seed: int, trays: int):
    specimens = plan(site_effect=effect, seed=seed, per_species=trays * TRAY_SIZE)
    together = defaultdict(set)
    for s in specimens:
        together[s.label, s.tray].add((s.site, s.split))
    assert all(len(places) == 1 for places in together.values())
    for split in ("train", "validation", "test"):
        assert {s.label for s in specimens if s.split == split} == set(range(len(SPECIES)))
        there = [s for s in specimens if s.split == split and s.site == 1]
        assert sum(s.erased for s in there) == math.floor(effect * len(there) + 0.5)
    assert not any(s.erased for s in specimens if s.site == 0)


def test_damage_is_spread_over_the_species_and_grows_by_inclusion():
    small, large = ({(s.label, s.number) for s in plan(site_effect=effect) if s.erased} for effect in (0.2, 0.6))
    assert small < large
    per_species = Counter(label for label, _ in large)
    assert set(per_species) == set(range(25))
    assert max(per_species.values()) - min(per_species.values()) <= 4


def test_seeds_give_other_plans_and_zero_is_a_seed():
    assert plan(seed=0) == plan(seed=0)
    assert plan(seed=0) != plan(seed=1)


def test_the_second_site_is_the_smaller_one():
    share = np.mean([s.site for s in plan()])
    assert share == pytest.approx(0.3)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_drawing_is_deterministic_and_depends_on_the_seed():
    specimen = plan()[7]
    first = draw(specimen)
    assert first.tobytes() == draw(specimen).tobytes()
    assert first.tobytes() != draw(specimen, seed=1).tobytes()


def test_an_intact_picture_does_not_depend_on_the_effect():
    none, some = plan(site_effect=0), plan(site_effect=0.4)
    intact = [(a, b) for a, b in zip(none, some, strict=True) if not b.erased][::397]
    assert len(intact) >= 4
    assert all(draw(a).tobytes() == draw(b).tobytes() for a, b in intact)


@pytest.mark.parametrize("label", range(len(SPECIES)))
def test_every_species_shows_a_mark_and_an_erased_picture_hides_it(label: int, monkeypatch: pytest.MonkeyPatch):
    specimen = next(s for s in plan(site_effect=0) if s.label == label and s.site == 1)
    erased = replace(specimen, erased=True)
    shown, hidden = _pixels(draw(specimen)), _pixels(draw(erased))
    # What is left of the species once its marks are gone: the same image, whatever the marks were.
    other = replace(SPECIES[label], marks=SPECIES[label - 1 if label % 5 else label + 1].marks)
    patched = (*SPECIES[:label], other, *SPECIES[label + 1 :])
    monkeypatch.setattr("adaptclip.datasets.specimens.SPECIES", patched)
    assert (_pixels(draw(erased)) == hidden).all()
    assert np.abs(_pixels(draw(specimen)) - shown).max() > 60
    assert hidden.std() < 0.8 * shown.std()


def test_common_names_are_distinct_words_for_prompts():
    names = [s.common_name for s in SPECIES]
    assert len(set(names)) == len(names) == 25
    for species in SPECIES:
        assert species.common_name.split()[-1] == species.genus.body
        assert species.name == f"{species.genus.name} {species.epithet}"
        assert species.marks, "a species told by having no marks would be the answer for every erased image"
