# SPDX-License-Identifier: Apache-2.0
"""Artifacts that are older than a setting of their method are read as what they were made with."""

from __future__ import annotations

import pytest
import torch
from tiny_clip import make_tiny_backbone

from adaptclip.artifact.checks import complete_settings
from adaptclip.methods.registry import methods

NAMES = ("rose", "dog", "handwritten digit")
TEMPLATES = ["a photo of a {}."]


@pytest.mark.parametrize(
    ("method", "written", "added"),
    [
        ("linear_probe", {"head": "text_init"}, {"start_norm": 1.0}),
        ("linear_probe", {"head": "clap"}, {"start_norm": 1.0}),
        ("linear_probe", {"head": "lp_plus_plus"}, {"reading": "paper"}),
        ("linear_probe", {"head": "logistic"}, {}),
        ("ss_text", {}, {"mode": "adaptive"}),
        ("two_stage", {"towers": "both", "rank": 2}, {"tune": "lora"}),
        ("gda", {"alpha": 2.0}, {}),
    ],
)
def test_what_was_not_written_is_what_the_method_then_did(method, written, added):
    backbone = make_tiny_backbone()
    written = {"templates": TEMPLATES, **written}
    settings = complete_settings(method, written)
    assert settings == {**written, **added}
    adapter = methods()[method](backbone, NAMES, **settings)
    assert settings.items() <= adapter.settings.items(), "and it says so"
    assert complete_settings(method, adapter.settings) == adapter.settings


def test_what_is_written_stays():
    for settings in ({"head": "clap", "start_norm": 10.0}, {"head": "lp_plus_plus", "reading": "code"}):
        assert complete_settings("linear_probe", settings) == settings
    assert complete_settings("ss_text", {"mode": "plain"}) == {"mode": "plain"}


def test_an_lp_plus_plus_without_bias_is_taken_over():
    backbone = make_tiny_backbone()
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=rng) for name, shape in (("weight", (3, 48)), ("text", (3, 48)))}
    state["alpha"] = torch.rand(3, generator=rng)
    settings = complete_settings("linear_probe", {"head": "lp_plus_plus", "templates": TEMPLATES})
    adapter = methods()["linear_probe"](backbone, NAMES, **settings)
    adapter.load_adapter_state(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.adapter_state().items())
