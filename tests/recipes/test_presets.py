# SPDX-License-Identifier: Apache-2.0
"""A preset fills in what is not given; what is given changes nothing but itself."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import pytest
from recipe_files import load_recipe
from tiny_clip import make_tiny_backbone

from adaptclip.errors import BackboneError, ConfigError
from adaptclip.methods.registry import named
from adaptclip.training.support import chosen_preset, preset_line, schedule_words

LENGTHS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lora": ({"steps": 60, "lr": 1e-2}, {"steps": 8000, "lr": 2e-4}, {"steps": 30}),
    "layernorm": ({"steps": 60, "lr": 1e-2}, {"steps": 4800, "lr": 2e-4}, {"lr": 1e-3}),
    "two_stage": ({"steps": 80, "lr": 1e-2, "head_lr": 2e-4}, {"steps": 4800, "lr": 2e-4}, {"lr": 3e-3}),
    "coop": ({"epochs": 50, "views": 5, "batch_size": 32}, {"epochs": 200, "views": None}, {"views": 2}),
    "cocoop": ({"epochs": 10, "views": None, "batch_size": 1}, {"epochs": 10}, {"lr": 1e-3}),
    "tip_adapter_f": ({"epochs": 20, "lr": 1e-3, "views": 10}, {"epochs": 20, "lr": 1e-3}, {"epochs": 100}),
    "clap": ({"epochs": 300, "lr": 0.1, "views": 20}, {"epochs": 300, "clap_weight": 1.0}, {"clap_weight": 0.0}),
}
"""Method -> some of its settings by smoke and by its paper at 16 shots, and one setting to change."""


@pytest.fixture(scope="module")
def backbone() -> Any:
    return make_tiny_backbone()


@pytest.mark.parametrize("method", LENGTHS)
def test_one_setting_changes_one_thing(method, backbone):
    smoke, paper, one = LENGTHS[method]
    made = named()[method].build(backbone, ("cat", "dog"), ("a {}.",), seed=1)
    short, full = asdict(made.schedule(16, preset="smoke")), asdict(made.schedule(16))
    nothing: dict[str, Any] = dict.fromkeys(full)
    assert {name: short[name] for name in smoke} == smoke
    assert {name: full[name] for name in paper} == paper
    assert asdict(made.schedule(16, preset="smoke", **one)) == {**short, **one}
    assert asdict(made.schedule(16, **nothing)) == full  # None is "not given"
    with pytest.raises(ConfigError, match='Did you mean "smoke"'):
        made.schedule(16, preset="smok")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no setting 'stepps'"):
        made.schedule(16, stepps=3)


def test_contrastive_has_presets_of_its_own():
    recipe = load_recipe("contrastive")
    asked = ({}, {"preset": "smoke", "card": "flowers17"}, {"preset": "paper"}, {"card": "flowers17"}, {"epochs": 1})
    lengths = [recipe.training_length(replace(recipe.Config(), **changes)) for changes in asked]
    assert lengths == [(16, 2, 32), (16, 2, 32), (0, 10, 256), (0, 10, 256), (16, 1, 32)]


def test_what_is_about_to_be_learnt_is_said_in_words(backbone):
    """As `key value` pairs, for every method, and where the papers' settings came without being asked for, that."""
    assert preset_line("auto", "smoke", "x 1") == "preset smoke: x 1"
    assert preset_line("paper", "paper", "x 1") == "preset paper: x 1"
    assert preset_line("auto", "paper", "x 1").startswith("preset paper (for a card or model of your own; --preset")
    looked_at = 0
    for one in named().values():
        try:
            made = one.build(backbone, ("cat", "dog"), ("a {}.",), seed=1)
        except BackboneError:
            continue
        words = str(made.schedule(16))
        assert words == schedule_words(made.schedule(16))
        assert re.fullmatch(r"nothing to set|\w+ [\w.-]+(, \w+ [\w.-]+)*", words), words
        looked_at += 1
    assert looked_at >= 20
    assert schedule_words(named()["gda"].method.schedule_type()) == "views 10, min_scale 0.5, choose yes"


def test_auto_is_smoke_for_the_embedded_default_alone():
    assert chosen_preset("auto", "digits", "starter") == "smoke"
    assert chosen_preset("auto", "digits", "ViT-B-32") == "paper"
    assert chosen_preset("paper", "digits", "starter") == "paper"
    with pytest.raises(ConfigError, match='Did you mean "smoke"'):
        chosen_preset("smok", "digits", "starter")  # type: ignore[arg-type]
