# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest

from adaptclip.data import card as card_module
from adaptclip.data.card import list_cards, load_card, parse_card
from adaptclip.data.card_block import ALLOWABLE, GroupBins, Splits
from adaptclip.data.layouts import MADE_UP_FRACTIONS
from adaptclip.errors import CardError

MINIMAL = "  source: {kind: parquet, files: 'a/*.parquet'}\n"


def text_of(block: str, head: str = "license: mit\n", prose: str = "# Prose\n") -> str:
    return f"---\n{head}adaptclip:\n{block}---\n{prose}"


def card_of(block: str, **kwargs):
    return parse_card(text_of(block, **kwargs), name="mine")


def test_a_minimal_card_has_defaults():
    card = card_of(MINIMAL)
    assert (card.name, card.source.kind, card.splits, card.class_names) == ("mine", "parquet", None, None)
    assert card.templates == ("a photo of a {}.",)
    assert card.columns.image == "image"
    assert card.front_matter["license"] == "mit"
    assert card.prose == "# Prose"


def test_keys_that_came_later_leave_digests_as_they_were():
    """Computed by version 0.2.0: runs and artifacts name their card by it."""
    assert load_card("digits").digest[:12] == "c8b1edc29e87"
    assert load_card("ham10000").digest[:12] == "48581f882c2c"


def test_the_digest_follows_the_block_and_not_the_words():
    assert card_of(MINIMAL).digest == card_of(MINIMAL, head="license: other\n", prose="More.").digest
    assert card_of(MINIMAL).digest != card_of(MINIMAL + "  splits: {fractions: {train: .5, test: .5}}\n").digest


def test_every_source_kind_parses():
    for source in (
        "{kind: hub, id: a/b, revision: abc}",
        "{kind: parquet, files: {train: 'a-*.parquet', test: [b.parquet, c.parquet]}}",
        "{kind: image_folder, path: images}",
        "{kind: manifest, files: [a.csv, b.jsonl]}",
        "{kind: embedded, name: digits, options: {size: 3}}",
    ):
        assert card_of(f"  source: {source}\n").source.kind in source


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "  source: {kind: parqet, files: a}\n",
            r'adaptclip.source: Did you mean "parquet"\? Allowed: embedded, features, hub',
        ),
        ("  source: {files: a}\n", r"adaptclip.source.kind: is missing. Allowed: hub, parquet"),
        ("  source: {kind: hub}\n", r"adaptclip.source.id: is missing. Keys here: kind, id, config, revision"),
        ("  source: {kind: hub, id: a, revison: b}\n", r'source.revison: unknown key. Did you mean "revision"\?'),
        (
            MINIMAL + "  colums: {}\n",
            r'adaptclip.colums: unknown key. Did you mean "columns"\? Allowed: aliases, allow',
        ),
        (MINIMAL + "  columns: {lable: y}\n", r'columns.lable: unknown key. Did you mean "label"\?'),
        (MINIMAL + "  gates: [{metrc: accuracy}]\n", r'gates, gate 1, metrc: unknown key. Did you mean "metric"\?'),
        (MINIMAL + "  gates: [{metric: acuracy, at_least: 1}]\n", r"gates, gate 1: unknown metric 'acuracy'"),
        (MINIMAL + "  allow: [similar]\n", r'no check named \'similar\'. Did you mean "similar_images"'),
        (
            MINIMAL + "  class_names: [yes, 7]\n",
            r"class_names, entry 1: expected text, got True \(bool\); write it in quotes",
        ),
        (MINIMAL + "  templates: [a photo]\n", r"templates need exactly one \{\}"),
        (MINIMAL + "  templates: []\n", r"adaptclip.templates: Tuple should have at least 1"),
        (
            MINIMAL + "  class_names: [cat, dog]\n  aliases: {dgo: hound}\n",
            r'aliases has no class \'dgo\'. Did you mean "dog"',
        ),
        (MINIMAL + "  window: [5, 5]\n", r"window must be \[black, white\] with black < white"),
        (MINIMAL + "  augmentation: {scale: [0.0, 1.0]}\n", r"scale must be \[low, high\]"),
        (MINIMAL + "  splits: {train: a}\n", r"needs both train and test; got only train"),
        (MINIMAL + "  splits: {train: a, test: a}\n", r"uses one source split for two parts"),
        (MINIMAL + "  splits: {fractions: {train: .5, test: .4}}\n", r"fractions must sum to 1; got 0.9"),
        (MINIMAL + "  splits: {fractions: {train: 1.0}}\n", r"need train and test above 0"),
        (MINIMAL + "  splits: {column: s, fractions: {train: .5, test: .5}}\n", r"both fractions and column"),
        (MINIMAL + "  splits: {fractions: {trian: .5}}\n", r"fractions.trian.*'train', 'validation' or 'test'"),
        (MINIMAL + "  groups: {age: {bins: [0, 40]}}\n", r"groups.age names a group that columns.groups lacks"),
        (MINIMAL + "  gates: [{group: sx, at_least: 1}]\n  columns: {groups: {sex: s}}\n", r'Did you mean "sex"'),
        ("  source: nothing\n", r"adaptclip.source: .*'nothing'"),
    ],
)
def test_mistakes_name_the_key_and_what_is_allowed(block, message):
    with pytest.raises(CardError, match=message):
        card_of(block)


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(CardError) as caught:
        card_of("  source: {kind: hub, id: 3}\n  colums: {}\n  templates: 5\n")
    for key in ("source.id", "colums", "templates"):
        assert f"adaptclip.{key}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no head", "needs YAML front matter between two lines of `---`"),
        ("---\nlicense: mit\n", "needs YAML front matter"),
        ("---\nlicense: mit\n---\n", "has no `adaptclip:` block; its keys are license"),
        ("---\n- a\n---\n", "should be `key: value` lines, got list"),
        ("---\na: 1\nb: [1, 2\n---\n", r"not valid YAML at line \d"),
        ("---\na: 1\nb: x: y\n---\n", r"not valid YAML at line 3, column 5"),
        ("---\nadaptclip:\n  a: 1\n  a: 2\n---\n", r"line 4, column 3: the key 'a' is given twice"),
    ],
)
def test_yaml_mistakes_name_the_line(text, message):
    with pytest.raises(CardError, match=message):
        parse_card(text, name="mine")


def test_names_are_brought_to_one_unicode_form():
    decomposed = unicodedata.normalize("NFD", "crème brûlée")
    card = card_of(MINIMAL + f"  class_names: ['{decomposed}', 寿司]\n")
    assert card.class_names == ("crème brûlée", "寿司")


def test_bins_name_themselves():
    assert GroupBins(bins=(0, 40, 60)).names == ("0 to <40", "40 to <60", "60 and above")
    with pytest.raises(ValueError, match="2 labels for 3 bins"):
        GroupBins(bins=(0, 40, 60), labels=("a", "b"))
    with pytest.raises(ValueError, match="bins must be rising"):
        GroupBins(bins=(0, 40, 40))


def test_split_names_default_to_the_parts_own():
    assert Splits(column="s").names == {"train": "train", "validation": "validation", "test": "test"}
    assert Splits(train="a", test="b").names == {"train": "a", "test": "b"}


def test_an_unknown_card_is_named_with_the_nearest(monkeypatch, tmp_path):
    (tmp_path / "flowers17.md").write_text(text_of(MINIMAL))
    (tmp_path / "README.md").write_text("no card")
    monkeypatch.setattr(card_module, "card_folders", lambda: (tmp_path,))
    assert list_cards() == ["flowers17"]
    assert load_card("flowers17").path == tmp_path / "flowers17.md"
    with pytest.raises(
        CardError, match=r'no data card \'flower17\'.*Did you mean "flowers17"\? Cards by name: flowers17'
    ):
        load_card("flower17")


def test_a_card_is_loaded_from_its_file_and_tells_its_known_issues(tmp_path, caplog):
    path = tmp_path / "skin.md"
    path.write_text(text_of(MINIMAL + "  known_issues: [mostly light skin]\n"), encoding="utf-8-sig")
    with caplog.at_level(logging.WARNING):
        card = load_card(path)
    assert (card.name, card.path, card.is_made_up) == ("skin", path, False)
    assert "card skin, known issue: mostly light skin" in caplog.text


def test_a_card_that_is_no_text(tmp_path):
    (tmp_path / "bad.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CardError, match="a card is a UTF-8 text file"):
        load_card(tmp_path / "bad.md")


def test_a_folder_of_class_folders_gets_a_card(tmp_path, caplog):
    for name in ("cat", "dog", ".git"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        card = load_card(tmp_path / "pets")
    assert card.is_made_up
    assert (card.name, card.source.kind) == ("pets", "image_folder")
    assert card.splits is not None
    assert card.splits.fractions == MADE_UP_FRACTIONS
    assert "made up a card for the image folder" in caplog.text


def test_a_folder_with_its_own_splits_keeps_them(tmp_path):
    for name in ("Train/a", "val/a", "test/a"):
        (tmp_path / name).mkdir(parents=True)
    splits = load_card(tmp_path).splits
    assert splits is not None
    assert splits.names == {"train": "Train", "validation": "val", "test": "test"}
    (tmp_path / "training").mkdir()
    with pytest.raises(CardError, match="several train folders: Train, training"):
        load_card(tmp_path)


def test_values_of_a_column_can_be_several_for_one_part():
    head = "---\nadaptclip:\n  source: {kind: manifest, files: t.csv}\n  splits: "
    card = parse_card(head + '{column: fold, train: ["1", "2"], test: ["0"]}\n---\n', name="t")
    assert card.splits is not None
    assert card.splits.parts == {"1": "train", "2": "train", "0": "test"}
    assert card.splits.names == {"train": "1, 2", "test": "0"}
    for rule, message in (
        ('{train: ["a", "b"], test: c}', "several names for a part, which only the values of a `column`"),
        ('{column: fold, train: ["1", "0"], test: "0"}', "one source split for two parts"),
        ('{column: fold, train: ["1", "1"], test: "0"}', "one source split for two parts"),
        ('{column: fold, train: [], test: "0"}', "lists no name at all for a part"),
    ):
        with pytest.raises(CardError, match=message):
            parse_card(head + rule + "\n---\n", name="t")


def test_a_training_folder_without_a_test_folder_is_not_guessed_at(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(CardError, match="none for the test images"):
        load_card(tmp_path)


def test_the_allowable_checks_are_those_that_exist():
    source = (
        Path(card_module.__file__).with_name("checks.py").read_text()
        + Path(card_module.__file__).with_name("sources.py").read_text()
    )
    for name in ALLOWABLE:
        assert f'"{name}"' in source


def test_checks_by_their_names_of_version_0_1_are_still_allowed():
    card = card_of(MINIMAL + "  allow: [similar_pictures, duplicate_pictures, missing_classes]\n")
    assert card.allow == ("similar_images", "duplicate_images", "missing_classes")
