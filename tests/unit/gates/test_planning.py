# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from adaptclip.cli.gate import plan as command
from adaptclip.errors import GateError
from adaptclip.gate_rules import GateRule
from adaptclip.gates.sample_size import Assumed, plan


def images(fields, assumed):
    found = plan([GateRule(**fields)], assumed)[0].images
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fields", "assumed", "message"),
    [
        ({"at_least": 0.9}, Assumed(0.9), "can never pass"),
        ({"at_least": 0.9}, Assumed(), "Say --expect"),
        ({"at_least": 0.9}, Assumed(95), "between 0 and 1, got 95"),
        ({"at_least": 0.9}, Assumed(0.95, power=1.0), "power must be"),
        ({"at_least": 0.9}, Assumed(0.95, power=0.2), "power must be"),
        ({"at_least": 0.9}, Assumed(0.95, icc=1.5), "icc must"),
        ({"at_least": 0.9}, Assumed(0.95, per_patient=0), "images per patient"),
        ({"at_least": 0.9, "group": "sex"}, Assumed(0.95), "--groups"),
        ({"at_least": 0.9, "group": "sex"}, Assumed(0.95, groups={"sxe": 2}), 'Did you mean "sex"'),
        ({"at_least": 0.9, "metric": "sensitivity", "positive": "ill"}, Assumed(0.95), "--prevalence"),
        ({"at_least": 0.8, "metric": "mean_per_class_accuracy"}, Assumed(0.95), "Say --num-classes"),
        ({"at_least": 0.8}, Assumed(0.95, classes=1), "classes is too small"),
        ({"no_worse_than": "zero_shot"}, Assumed(), "has no margin"),
    ],
)
def test_wrong_assumptions_are_named(fields, assumed, message):
    with pytest.raises(GateError, match=message):
        plan([GateRule(**fields)], assumed)


def test_more_is_needed_where_less_is_left_to_the_limit_or_more_is_asked():
    base = images({"at_least": 0.8}, Assumed(0.9))
    assert base < images({"at_least": 0.8}, Assumed(0.87))
    assert base < images({"at_least": 0.8}, Assumed(0.9, power=0.9))
    assert base < images({"at_least": 0.8, "confidence": 0.99}, Assumed(0.9))
    assert base < images({"at_least": 0.8}, Assumed(0.9, per_patient=5))
    each = [images({"at_least": 0.8, "group": "site"}, Assumed(0.9, groups={"site": g})) / g for g in (2, 6, 12, 40)]
    assert base < each[0] < each[1] < each[2] < each[3]
    assert images({"at_least": 0.5}, Assumed(0.99)) == 100, "the rule's own minimum"
    assert images({"at_least": 0.5, "min_n": 300}, Assumed(0.99)) == 300


def test_what_cannot_be_planned_is_said():
    rules = [GateRule(metric="ece", at_most=0.1), GateRule(group="sex", gap_at_most=0.1)]
    calibration, gap = plan(rules, Assumed(0.9, groups={"sex": 2}))
    assert calibration.images is None
    assert "not known before there are predictions" in calibration.words
    assert gap.images is None
    assert "Simulate" in gap.words


def test_the_command_prints_text_and_json(tmp_path, capsys):
    path = tmp_path / "gates.yaml"
    path.write_text("gates:\n- {metric: sensitivity, positive: ill, group: sex, at_least: 0.8}\n")
    asked = {"expect": 0.9, "prevalence": ("0.1",), "groups": ("sex=2",), "patients_with": 5}
    assert command(str(path), **asked) == 0
    said = capsys.readouterr().out
    assert "patients give it a chance of" in said
    assert "in each of 2 groups, about" in said
    assert command(str(path), format="json", **asked) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["images"] == 5 * info["patients"] == 2 * info["in_group"]
    with pytest.raises(GateError, match="ATTRIBUTE=NUMBER"):
        command(str(path), expect=0.9, groups=("sex",))
    path.write_text("gates: []\n")
    with pytest.raises(GateError, match="no gates"):
        command(str(path), expect=0.9)


def test_classes_have_shares_of_their_own_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "gates.yaml"
    rules = "".join(f"- {{metric: sensitivity, positive: {name}, at_least: 0.8}}\n" for name in ("Effusion", "Edema"))
    path.write_text("gates:\n" + rules)
    assert command(str(path), expect=0.9, prevalence=("0.3", "Edema=0.05")) == 0
    out = capsys.readouterr().out
    assert "a prevalence of 0.3" in out
    assert "a prevalence of 0.05" in out
    for wrong, message in (
        ("Edema=often", "FINDING=NUMBER"),
        ("Edma=0.1", 'Did you mean "Edema"'),
        ("Edema=2", "between 0 and 1"),
    ):
        with pytest.raises(GateError, match=message):
            command(str(path), expect=0.9, prevalence=(wrong,))
