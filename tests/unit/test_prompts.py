# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptclip.errors import BackboneError, ConfigError, DataError
from adaptclip.prompts import TEMPLATES, clean_class_name, fill, zero_shot_weights


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("great_white_shark", "great white shark"),
        ("  a \t b\n", "a b"),
        ("Lilium", "Lilium"),
        ("œillet_d'Inde", "œillet d'Inde"),
        ("3", "3"),
    ],
)
def test_class_names_become_words(name, cleaned):
    assert clean_class_name(name) == cleaned


@pytest.mark.parametrize("name", ["", "  ", "___", "_ \n_"])
def test_a_class_name_without_words_is_refused(name):
    with pytest.raises(DataError, match="no words"):
        clean_class_name(name)


@given(st.text())
def test_cleaning_twice_is_cleaning_once(name):
    try:
        once = clean_class_name(name)
    except DataError:
        assert not name.replace("_", " ").strip()
    else:
        assert clean_class_name(once) == once
        assert "_" not in once


def test_fill_keeps_the_order_of_classes_and_templates():
    assert fill(["a {}.", "the {}!"], ["red_fox", "owl"]) == [["a red fox.", "the red fox!"], ["a owl.", "the owl!"]]


def test_braces_in_names_and_templates_are_text():
    assert fill(["{x} of {}"], ["set {1}"]) == [["{x} of set {1}"]]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "at least one template"),
        ("a {}", "should be a list"),
        (["a photo"], "exactly once.*got 0"),
        (["{} {}"], "got 2"),
    ],
)
def test_bad_templates_are_refused(templates, message):
    with pytest.raises(ConfigError, match=message):
        fill(templates, ["owl"])


def test_all_published_templates_can_be_filled():
    for templates in TEMPLATES.values():
        assert all("owl" in prompt for prompt in fill(templates, ["owl"])[0])
    assert len(TEMPLATES["imagenet"]) == 7


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_zero_shot_weights_equal_those_of_open_clip(tiny_backbone, batch_size):
    names, templates = ["owl", "red fox", "œillet"], TEMPLATES["imagenet"]
    ours = zero_shot_weights(tiny_backbone, names, templates, batch_size=batch_size)
    theirs = open_clip.build_zero_shot_classifier(tiny_backbone.model, tiny_backbone.tokenizer, names, templates)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(3))


def test_a_prompt_longer_than_the_context_is_named_and_never_cut(tiny_backbone):
    name = "very " * 90 + "long_name"
    with pytest.raises(BackboneError, match=r"very very.*long name.*has 9\d tokens.*is 77"):
        zero_shot_weights(tiny_backbone, ["owl", name], ["a {}"])


def test_no_classes_is_an_error(tiny_backbone):
    with pytest.raises(DataError, match="at least one class"):
        zero_shot_weights(tiny_backbone, [], ["a {}"])
