"""A preset fills in what is not given; what is given changes nothing but itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from recipe_files import load_recipe

from adaptclip.errors import ConfigError
from adaptclip.training.presets import chosen_preset

LENGTHS = {
    "lora": ((60, 1e-2), (8000, 2e-4), {"steps": 30}, (30, 1e-2)),
    "two_stage": ((48, 32, 1e-2), (2880, 1920, 2e-4), {"lr": 3e-3}, (48, 32, 3e-3)),
    "coop": ((50, 5, 32), (200, 200, 32), {"views": 2}, (50, 2, 32)),
    "contrastive": ((16, 2, 32), (0, 10, 256), {"epochs": 1}, (16, 1, 32)),
}
"""Recipe -> its length by smoke, by its paper, one setting, and what smoke and it come to."""


def length(recipe: str, **changes):
    module = load_recipe(recipe)
    cfg = replace(module.Config(), **changes)
    return module.training_length(cfg, *((16.0,) if recipe in ("lora", "two_stage") else ()))


@pytest.mark.parametrize("recipe", LENGTHS)
def test_one_setting_changes_one_thing(recipe):
    smoke, paper, one, with_one = LENGTHS[recipe]
    assert length(recipe) == smoke == length(recipe, preset="smoke", card="flowers17")
    assert length(recipe, preset="paper") == paper
    assert length(recipe, backbone="ViT-B-16") == paper == length(recipe, card="flowers17")
    assert length(recipe, **one) == with_one
    assert sum(a != b for a, b in zip(smoke, with_one, strict=True)) == 1
    with pytest.raises(ConfigError, match='Did you mean "smoke"'):
        length(recipe, preset="smok")


def test_auto_is_smoke_for_the_embedded_default_alone():
    assert chosen_preset("auto", "digits", "starter") == "smoke"
    assert chosen_preset("auto", "digits", "ViT-B-32") == "paper"
    assert chosen_preset("paper", "digits", "starter") == "paper"
