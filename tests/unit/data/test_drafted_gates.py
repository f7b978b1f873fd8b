# SPDX-License-Identifier: Apache-2.0
"""Gates of new cards fit the task, parse as they are and uncommented, and `card check` finds nothing wrong."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from adaptclip.cli.card import check
from adaptclip.data.card import Card, load_card
from adaptclip.data.drafted_gates import Units, drafted_gates
from adaptclip.data.scaffold import new_card
from adaptclip.gate_rules import GateRule, Outcome

DOC = Path(__file__).parents[3] / "docs" / "choosing_gates.md"


def table_of(root: Path, classes: list[str], columns: dict[str, list[str]], each: int = 6) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    with (root / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", *columns])
        for i in range(each * len(classes)):
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(root / f"{i}.png")
            writer.writerow([f"{i}.png", classes[i % len(classes)], *(v[i % len(v)] for v in columns.values())])
    return root


def drafted(folder: Path) -> tuple[Card, str]:
    out = new_card(folder, folder.parent / "card.md")
    assert check(str(out)) == 0
    return load_card(out), out.read_text(encoding="utf-8")


def uncommented(text: str) -> list[GateRule]:
    """Every rule of the card, those that are commented out as well."""
    block = text[text.index("\n  gates:\n") : text.index("\n  known_issues:")]
    lines = re.findall(r"^    (?:# )?(- \{.*\})$", block, re.M)
    return [GateRule.model_validate(rule) for rule in yaml.safe_load("\n".join(lines))]


def test_two_classes_ask_for_sensitivity_and_specificity_of_a_named_side(tmp_path):
    classes = ["harmless", "harmless", "harmless", 'a: "rare" one']
    card, text = drafted(table_of(tmp_path / "moles", classes, {}, 5))
    assert [(o.positive, o.rule) for o in card.outcomes] == [(('a: "rare" one',), "argmax")]
    assert [(g.metric, g.positive, g.no_worse_than) for g in card.gates] == [
        ("sensitivity", ('a: "rare" one',), "zero_shot"),
        ("specificity", ('a: "rare" one',), "zero_shot"),
    ]
    assert [g.metric for g in uncommented(text) if g.at_least] == ["sensitivity", "specificity"]
    assert "A choice to check" in text
    assert "mean_per_class" not in text


def test_many_classes_ask_for_the_mean_over_the_classes(tmp_path):
    card, text = drafted(table_of(tmp_path / "birds", ["a", "b", "c"], {}))
    assert not card.outcomes
    assert [g.metric for g in card.gates] == ["accuracy", "mean_per_class_accuracy"]
    assert len(uncommented(text)) == 4
    assert "3 of 3 classes have fewer than 10 images" in text


def test_from_twenty_classes_on_the_worst_tenth_is_proposed():
    for number, proposed in ((19, False), (20, True)):
        lines = drafted_gates({f"c{i}": 50 for i in range(number)}, Units())
        assert any("worst_decile" in line for line in lines) == proposed


def test_patients_and_groups_have_gates_of_their_own_with_what_was_counted(tmp_path):
    columns = {"patient": [f"p{i // 4}" for i in range(36)], "sex": ["m", "f", ""], "site": ["North # 1", "South"]}
    _, text = drafted(table_of(tmp_path / "study", ["a", "b", "c"], columns, 12))
    grouped = [g for g in uncommented(text) if g.group]
    assert [(g.group, g.at_least, g.gap_at_most) for g in grouped] == [
        ("sex", 0.7, None), ("sex", None, 0.1), ("site", 0.7, None), ("site", None, 0.1),
    ]  # fmt: skip
    assert [g.exclude for g in grouped] == [("unknown",), ("unknown",), (), ()]
    assert 'What is sampled is "patient" (9 of them)' in text
    assert '# Groups of "sex" (m: 12, f: 12, unknown: 12)' in text


@pytest.mark.parametrize("labels", [["0", "1"], ["1", "2"], ["yes", "Échidna"]])
def test_the_positive_side_is_a_class_that_the_card_has(tmp_path, labels):
    card, _ = drafted(table_of(tmp_path / "set", labels, {}, 8))
    assert len(card.gates) == 2
    for outcome in card.outcomes:
        assert card.class_names is None or outcome.positive[0] in card.class_names


def test_groups_of_two_classes_ask_for_sensitivity(tmp_path):
    _, text = drafted(table_of(tmp_path / "study", ["a", "b"], {"site": ["x", "y", "z"]}, 12))
    assert [g.metric for g in uncommented(text) if g.group] == ["sensitivity", "sensitivity"]
    assert "A group needs 30 positive test images (min_n)" in text


BLOCKS = re.findall(r"```yaml\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_example_of_the_page_is_valid(block):
    content = yaml.safe_load(block)
    assert content.keys() <= {"gates", "outcomes"}
    rules = [GateRule.model_validate(rule) for rule in content.get("gates", ())]
    asked = [Outcome.model_validate(outcome) for outcome in content.get("outcomes", ())]
    assert rules or asked


def test_the_page_has_examples_of_every_condition():
    text = "".join(BLOCKS)
    assert len(BLOCKS) >= 9
    for word in ("at_least", "at_most", "no_worse_than", "gap_at_most", "margin", "exclude", "min_n", "confidence"):
        assert f"{word}: " in text


def test_several_classes_to_an_image_ask_for_each_of_them(tmp_path):
    counts = {"Effusion": 300, "Edema": 80, "Fracture": 7}
    lines = drafted_gates(counts, Units(groups={"sex": {"f": 200, "m": 25}}), several=True)
    rules = [GateRule.model_validate(yaml.safe_load(line.removeprefix("# "))[0]) for line in lines if "- {" in line]
    assert (rules[0].metric, rules[0].no_worse_than) == ("labels_macro_auc", "zero_shot")
    asked = {(rule.metric, rule.positive and rule.positive[0]) for rule in rules[1:] if rule.group is None}
    assert asked == {(m, name) for m in ("sensitivity", "specificity") for name in counts}
    assert [(r.metric, r.positive) for r in rules if r.group == "sex"] == [("sensitivity", ("Effusion",))] * 2
    assert "fewer of: Fracture" in " ".join(lines)
    two = " ".join(drafted_gates({"crack": 40, "rust": 60}, Units(), several=True))
    assert 'positive: "crack", at_least' in two
    assert "labels_macro_auc" in two
