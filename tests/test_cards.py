# SPDX-License-Identifier: Apache-2.0
"""Every card of the project is valid, honest about its data, and listed; those whose images are here open."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from adaptclip.data.card import Card, load_card
from adaptclip.data.card_block import ALLOWABLE, SOURCE_KINDS, CardBlock, HubSource
from adaptclip.data.sources import open_data
from adaptclip.datasets.specimens import SPECIES

FOLDER = Path(__file__).resolve().parents[1] / "data_cards"
FILES = sorted(path for path in FOLDER.glob("*.md") if path.stem not in ("README", "TEMPLATE"))
SECTIONS = (
    "Motivation",
    "Collection",
    "How groups and levels were made",
    "Known issues",
    "Uses to avoid",
    "Licence",
)
GROUPS = {
    "digits": {"stroke_weight": {"thin", "medium", "heavy"}},
    "specimens": {"site": {"museum", "field station"}, "marks": {"visible", "erased"}},
    "flowers17": {
        "family": {
            "Asteraceae", "Liliaceae", "Amaryllidaceae", "Asparagaceae", "Iridaceae", "Ranunculaceae", "Primulaceae",
            "Violaceae",
        }
    },
    "grocery": {"department": {"Fruit", "Vegetables", "Packages"}},
    "ham10000": {"sex": {"male", "female", "unknown"}, "age_group": {"0-39", "40-59", "60+", "unknown"}},
}  # fmt: skip
NUM_COARSE = {
    "digits": {"loop": 2},
    "specimens": {"genus": 5},
    "flowers17": {"family": 8},
    "grocery": {"department": 3, "product": 43},
    "ham10000": {"malignancy": 2},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cards-cache"))


def _table() -> dict[str, list[str]]:
    """Cells of the table in README.md, by card."""
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (.+) \|$", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert all(name == file for name, file, _ in rows)
    return {name: [cell.strip() for cell in rest.split("|")] for name, _, rest in rows}


def _listed(cell: str) -> set[str]:
    return set() if cell == "none" else {name.strip() for name in cell.split(",")}


def test_all_cards_are_looked_at():
    assert {path.stem for path in FILES} == {
        "aerial_features", "digits", "specimens", "grocery", "flowers17", "ham10000", "eurosat", "oxford_pets",
        "flickr8k",
        "imagenet1k_one_each",
    }  # fmt: skip
    assert set(_table()) == {path.stem for path in FILES}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def card(request: pytest.FixtureRequest) -> Card:
    return load_card(request.param)


def test_a_card_states_its_licence_and_name(card):
    assert card.front_matter["license"] not in (None, "", "unknown")
    assert card.front_matter["pretty_name"]
    task = "image-classification" if card.columns.label else "image-to-text"
    assert card.front_matter["task_categories"] == [task]
    assert _table()[card.name][-1].startswith(card.front_matter["license"])


def test_a_card_has_all_sections_with_text_in_them(card):
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", card.prose, re.M))
    assert tuple(sections) == SECTIONS
    short = {title: text for title, text in sections.items() if len(text.strip()) < 60}
    assert not short


def test_a_card_keeps_to_prompts_that_clip_can_read(card):
    words = [card.aliases.get(name, name) for name in card.class_names or ()]
    assert len(set(map(str.casefold, words))) == len(words)
    for template in card.templates:
        assert template.endswith(".")
        assert "  " not in template


def test_a_card_has_gates_and_known_issues(card):
    assert card.known_issues
    if card.columns.label is None:
        return  # gates judge classes
    assert len(card.gates) >= 3
    assert any(rule.no_worse_than == "zero_shot" for rule in card.gates)


def test_what_a_card_allows_is_explained(card):
    words = {"similar_images": "near twin", "duplicate_images": "copies"}
    for name in card.allow:
        assert words[name] in " ".join(card.known_issues), f"{name} is allowed without a word about it"


def test_a_card_names_no_place_on_a_machine(card):
    text = card.path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.:/])/(work|home|root|tmp|mnt|data)\b|\.\./|[A-Z]:\\", text)


def test_hub_cards_are_pinned_to_a_commit():
    hub = [source for source in (load_card(path).source for path in FILES) if isinstance(source, HubSource)]
    assert len(hub) == 2
    assert all(re.fullmatch(r"[0-9a-f]{40}", source.revision or "") for source in hub)


def test_the_readme_agrees_with_the_hub_cards():
    table = _table()
    for name in ("eurosat", "oxford_pets"):
        card, cells = load_card(FOLDER / f"{name}.md"), table[name]
        assert int(cells[1]) == len(card.class_names or ())
        assert _listed(cells[2]) == set(card.columns.groups)
        assert _listed(cells[3]) == set(card.columns.levels)


def test_specimen_aliases_are_the_common_names():
    assert load_card(FOLDER / "specimens.md").aliases == {s.name: s.common_name for s in SPECIES}


def test_the_template_is_a_valid_card_that_shows_every_key():
    card = load_card(FOLDER / "TEMPLATE.md")
    text = (FOLDER / "TEMPLATE.md").read_text(encoding="utf-8")
    for key in CardBlock.model_fields:
        assert re.search(rf"^ +(?:# )?{key}:", text, re.M), f"TEMPLATE.md does not show {key}"
    assert all(name in text for name in ALLOWABLE)
    assert all(f"kind: {kind}" in text for kind in SOURCE_KINDS)
    assert re.findall(r"^## (.+)$", card.prose, re.M) == list(SECTIONS)


def test_the_readme_explains_every_key():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    missing = [key for key in CardBlock.model_fields if not re.search(rf"^\| .*`{key}[`.]", text, re.M)]
    assert not missing
    assert all(f"`{name}`" in text for name in ALLOWABLE)


def _check_opened(card: Card, data) -> None:
    """The opened card has what its line in README.md says."""
    cells = _table()[card.name]
    counts = [int(number.replace(",", "")) for number in cells[0].split(" / ")]
    assert [len(data.train), len(data.validation), len(data.test)] == counts
    assert len(data.class_names) == int(cells[1])
    assert len(set(data.class_names)) == len(data.class_names)
    assert _listed(cells[2]) == set(data.test.groups)
    assert _listed(cells[3]) == set(data.test.levels)
    for name, values in GROUPS.get(card.name, {}).items():
        assert set(data.test.groups[name]) == values
    assert {name: len(set(values)) for name, values in data.test.levels.items()} == NUM_COARSE.get(card.name, {})
    assert min(Counter(data.train.labels.tolist()).values()) >= 16, "fewer than 16 shots in a class"
    assert not data.test.has_pixels or data.test.image(0).mode == "RGB"


def test_digits_open():
    card = load_card("digits")
    data = open_data(card)
    _check_opened(card, data)
    assert card.augmentation.horizontal_flip is False
    assert [note for note in data.notes if "similar_images" in note], "the allowance is no longer needed"


def test_features_open():
    card = load_card("aerial_features")
    _check_opened(card, open_data(card))


@pytest.mark.slow
def test_specimens_open():
    card = load_card("specimens")
    data = open_data(card)
    _check_opened(card, data)
    assert [note for note in data.notes if "similar_images" in note], "the allowance is no longer needed"


@pytest.mark.shared_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["flowers17", "grocery", "ham10000"])
def test_cards_of_real_images_open(name, shared_data):
    card = load_card(name)
    data = open_data(card, data_root=shared_data(name))
    _check_opened(card, data)
    assert not card.allow
    assert set(card.aliases) <= set(data.class_names)
    if name == "ham10000":
        parts = [set(part.clusters or ()) for part in (data.train, data.validation, data.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 3661


@pytest.mark.shared_data
@pytest.mark.slow
def test_captions_open(shared_data):
    data = open_data(load_card("flickr8k"), data_root=shared_data("flickr8k"))
    counts = [int(number.replace(",", "")) for number in _table()["flickr8k"][0].split(" / ")]
    assert [len(part) for part in data.parts.values()] == counts
    for part in data.parts.values():
        assert part.captions is not None
        assert {len(own) for own in part.captions} == {5}
    assert not data.notes


@pytest.mark.shared_data
@pytest.mark.slow
def test_a_set_for_evaluation_alone_opens(shared_data):
    data = open_data(load_card("imagenet1k_one_each"), data_root=shared_data("imagenet1k_one_each"))
    assert _table()["imagenet1k_one_each"][0] == "0 / 0 / 1,000"
    assert [len(part) for part in data.parts.values()] == [0, 0, 1000]
    assert set(data.test.class_counts().tolist()) == {1}
    assert len(set(data.test.levels["superclass"])) == 37
