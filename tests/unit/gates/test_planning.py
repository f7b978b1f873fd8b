# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from recipe_files import ROOT

from adaptclip.cli.card import check
from adaptclip.cli.gate import plan as command
from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.errors import GateError
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.gates.sample_size import Assumed, plan, too_few
from adaptclip.metrics import find_metric
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.metric import MIN_CLASS_IMAGES, MIN_IMAGES, MIN_OUTCOMES
from adaptclip.predictions import Predictions


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


GATES = """gates:
- {metric: accuracy, at_least: 0.95}
- {metric: accuracy, group: site, at_least: 0.7}
- {metric: sensitivity, positive: ill, group: sex, at_least: 0.7}
- {metric: mean_per_class_accuracy, at_least: 0.7}
- {metric: accuracy, no_worse_than: zero_shot}
- {metric: ece, at_most: 0.1}
"""


def test_what_is_missing_is_asked_for_all_at_once(tmp_path):
    (tmp_path / "gates.yaml").write_text(GATES)
    with pytest.raises(GateError) as caught:
        command(str(tmp_path / "gates.yaml"))
    for flag in ("--expect", '--groups "site=2"', '--groups "sex=2"', "--prevalence", "--num-classes"):
        assert str(caught.value).count(flag) == 1, caught.value


def test_a_gate_that_cannot_be_planned_stops_no_other(tmp_path, capsys):
    (tmp_path / "gates.yaml").write_text(GATES)
    command(
        str(tmp_path / "gates.yaml"),
        expect=0.9,
        groups=("site=3", "sex=2"),
        prevalence=("0.3",),
        num_classes=4,
        format="json",
    )
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["images"] is not None for one in found] == [False, True, True, True, False, False]
    assert "can never pass" in found[0]["words"]
    assert "has no margin" in found[4]["words"]
    assert found[1]["images"] == images({"at_least": 0.7, "group": "site"}, Assumed(0.9, groups={"site": 3}))


def test_a_card_says_how_many_classes_and_groups_there_are(capsys):
    command("digits", expect=0.9)
    said = capsys.readouterr().out
    assert said.startswith("from the card: 3 groups of stroke_weight, 10 classes\n")
    assert "in each of 3 groups" in said
    assert "10 equally frequent" in said
    command("digits", expect=0.9, num_classes=7, groups=("stroke_weight=2",))
    assert "7 equally frequent" in (said := capsys.readouterr().out)
    assert "from the card" not in said


def dataset(labels, **columns) -> ImageDataset:
    ids = tuple(map(str, range(len(labels))))
    groups = {name: tuple(values) for name, values in columns.items()}
    clusters = groups.pop("patient", None)
    return ImageDataset(
        MemoryStore([], []), np.arange(len(ids)), ("ill", "well"), ids, np.array(labels), ids, clusters, groups=groups
    )


@pytest.mark.parametrize(
    ("fields", "patients", "words"),
    [
        ({"at_least": 0.8}, 120, ""),
        ({"at_least": 0.8, "min_n": 200}, 120, "120 of 200 images."),
        ({"at_least": 0.8, "group": "site"}, 120, "20 of 100 images for site = B."),
        ({"gap_at_most": 0.1, "group": "site"}, 120, "20 of 100 images for site = B."),
        ({"at_least": 0.8, "group": "site", "exclude": ["B"], "reason": "few"}, 120, ""),
        ({"at_least": 0.8, "group": "site", "min_n": 20}, 120, ""),
        ({"metric": "sensitivity", "positive": "ill", "at_least": 0.8}, 120, "24 of 30 positive images."),
        ({"metric": "specificity", "positive": "ill", "at_least": 0.8}, 120, ""),
        ({"metric": "mean_per_class_accuracy", "at_least": 0.8}, 120, "76 of 100 evenly spread images."),
        ({"at_least": 0.8}, 5, "5 of 8 clusters."),
        ({"no_worse_than": "zero_shot", "min_n": 121}, 120, "120 of 121 images."),
    ],
)  # fmt: skip
def test_gates_that_the_test_images_are_too_few_for_are_named_before_anything_is_trained(fields, patients, words):
    labels = [0] * 24 + [1] * 96
    images = dataset(labels, site=["A"] * 100 + ["B"] * 20, patient=[f"p{i % patients}" for i in range(120)])
    rule = GateRule.model_validate(fields)
    said = too_few([rule], images)
    assert bool(said) == bool(words), said
    if said:
        assert said[0].startswith(f'gate "{rule.title}" cannot pass, as the test images are too few: {words}'), said
    # A model that is always right cannot pass either, and where nothing is said, it does.
    probs = np.eye(2, dtype=np.float32)[labels] * 0.98 + 0.01
    judged = Predictions(
        images.ids, images.labels, probs, images.class_names, groups=images.groups, clusters=images.clusters
    )
    (verdict,) = check_gates(judged, judged, [rule])
    assert verdict.verdict == ("inconclusive" if words else "pass"), verdict.reason


def test_findings_are_counted_by_themselves():
    marks = np.array([[1, 0]] * 20 + [[1, 1]] * 20 + [[0, -1]] * 80, np.int8)
    images = replace(dataset([0] * 120), multi_hot=marks)
    asked = [GateRule(metric="sensitivity", positive=(name,), at_least=0.8) for name in ("ill", "well")]
    (said,) = too_few(asked, images)
    assert said.startswith(
        'gate "sensitivity (well) ≥ 0.8" cannot pass, as the test images are too few: 20 of 30 positive'
    )


def test_card_check_says_which_gates_the_test_images_are_too_few_for(tmp_path, capsys):
    for name in ("cat", "dog"):
        for i in range(12):
            folder = tmp_path / "images" / ("test" if i < 3 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 40), 40 + 9 * i).save(folder / f"{i}.png")
    (tmp_path / "card.md").write_text(
        "---\nadaptclip:\n  source: {kind: image_folder, path: images}\n  splits: {train: train, test: test}\n"
        "  gates:\n  - {metric: accuracy, at_least: 0.8}\n---\n"
    )
    assert check(str(tmp_path / "card.md")) == 0
    said = capsys.readouterr().out
    assert 'to worry about: gate "accuracy ≥ 0.8" cannot pass, as the test images are too few: 6 of 100 images.' in said


def test_the_documents_say_the_numbers_that_the_code_asks_for():
    for path in ("docs/choosing_gates.md", "data_cards/README.md"):
        text = " ".join((ROOT / path).read_text(encoding="utf-8").split())
        for number in (MIN_IMAGES, MIN_OUTCOMES, MIN_CLASS_IMAGES):
            assert f"{number} " in text[text.index("`min_n`") - 900 :], (path, number)
    text = " ".join((ROOT / "docs/choosing_gates.md").read_text(encoding="utf-8").split())
    assert (
        f"{MIN_CLASS_IMAGES} images of the smallest class, and {MIN_IMAGES} images as far as the classes share them "
        "evenly" in text
    )
    labels = np.repeat([0, 1], [80, 20])
    mean = find_metric("mean_per_class_accuracy")
    worth, smallest = mean.support(Judged(labels, np.full((100, 2), 0.5, np.float32), Sampling.of(100)))
    assert (worth.count, worth.default, smallest.count, smallest.default) == (64, MIN_IMAGES, 20, MIN_CLASS_IMAGES)
