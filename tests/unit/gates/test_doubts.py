# SPDX-License-Identifier: Apache-2.0
"""What keeps a verdict from being a pass: absent groups and classes, copied rows, references of another kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from adaptclip.cli.gate import gate
from adaptclip.data.declared import check_declared
from adaptclip.errors import GateError
from adaptclip.gate_rules import Expected, GateRule, Outcome
from adaptclip.gates import check_gates
from adaptclip.gates.doubts import repeated_rows, same_predictions
from adaptclip.predictions import Predictions
from adaptclip.reports.headline import verdict_of


def drawn(n=400, num_classes=3, share=0.9, seed=0, decimals=None, sharpness=3.0, **about) -> Predictions:
    """Predictions with probabilities of full precision, or rounded as in a table."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    logits = rng.normal(size=(n, num_classes))
    named = np.where(rng.random(n) < share, labels, (labels + 1) % num_classes)
    logits[np.arange(n), named] += sharpness
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if decimals is not None:
        probs = np.round(probs, decimals)
        probs[:, -1] = np.round(1 - probs[:, :-1].sum(axis=1), decimals).clip(0)
    return Predictions(
        tuple(map(str, range(n))), labels, probs.astype(np.float32), tuple("abcdefghij"[:num_classes]), **about
    )


def taken(predictions, rows, clusters=None) -> Predictions:
    """The rows at some positions, with new ids."""
    rows = np.asarray(rows)
    return replace(
        predictions, ids=tuple(map(str, range(len(rows)))), labels=predictions.labels[rows],
        probs=predictions.probs[rows], clusters=clusters,
        groups={name: tuple(values[i] for i in rows) for name, values in predictions.groups.items()},
    )  # fmt: skip


def sixty() -> Predictions:
    """Coarse answers by two groups: 48 of 60 are right, and every probability is 0.8 or 0.2."""
    rng = np.random.default_rng(3)
    labels, right = np.arange(60) % 2, rng.permutation(60) < 48
    named = np.where(right, labels, 1 - labels)
    probs = np.where(np.eye(2)[named] == 1, 0.8, 0.2).astype(np.float32)
    sex = tuple("m" if one else "f" for one in rng.random(60) < 0.4)
    return Predictions(tuple(map(str, range(60))), labels, probs, ("a", "b"), {"sex": sex})


# --- rows that stand in the table more than once


@pytest.mark.parametrize("times", [2, 8])
def test_a_table_several_times_over_passes_nothing(times):
    few, many = sixty(), taken(sixty(), np.tile(np.arange(60), times))
    rule = GateRule(at_least=0.7, min_n=30)
    assert repeated_rows(few) is None
    assert check_gates(few, None, [rule])[0].verdict == "inconclusive"
    found = check_gates(many, None, [rule])[0]
    assert found.verdict == "inconclusive"
    assert f"same sequence of 60 rows stands in the table {times} times" in found.reason
    # 48 of 60 are no less than 90 % for certain; a failure stays one, with the same words.
    failed = check_gates(many, None, [GateRule(at_least=0.95)])[0]
    assert failed.verdict == "fail"
    assert "fewer images than rows" in failed.reason


@pytest.mark.parametrize(
    "rows",
    [
        np.random.default_rng(1).permutation(np.tile(np.arange(200), 2)),
        np.repeat(np.arange(200), 2),
        np.r_[np.arange(400), np.random.default_rng(2).choice(400, 20, replace=False)],
        np.random.default_rng(1).permutation(np.tile(np.arange(200), 3)),
        np.random.default_rng(1).permutation(np.tile(np.arange(400), 4))[:-15],
        np.random.default_rng(1).permutation(np.tile(np.arange(60), 7)),
        np.random.default_rng(1).permutation(np.repeat(np.arange(400), np.arange(400) % 2 + 2)),
        np.random.default_rng(1).permutation(np.repeat(np.arange(400), np.arange(400) % 3 + 2)),
        np.random.default_rng(1).permutation(np.repeat(np.arange(400), 1 + 2 * (np.arange(400) % 10 == 0))),
    ],
    ids=["shuffled", "each twice", "twenty of four hundred", "three times", "nearly four times", "seven times",
         "two or three times", "two to four times", "one in ten three times"],
)  # fmt: skip
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_copies_of_exact_rows_are_found_in_any_order(rows, num_classes):
    whole = drawn(num_classes=num_classes)
    assert repeated_rows(whole) is None
    assert repeated_rows(taken(whole, rows)) is not None


def test_three_copies_of_exact_rows_among_rows_of_full_confidence_are_found():
    whole = drawn(600, 2, sharpness=8.0)
    sure = whole.probs.max(axis=1) >= 0.999
    assert 100 < sure.sum() < 500
    copied = taken(whole, np.random.default_rng(0).permutation(np.tile(np.arange(600), 3)))
    found = repeated_rows(copied)
    assert found is not None
    assert found.rows == 2 * (600 - sure.sum())
    assert repeated_rows(taken(copied, np.arange(1800), clusters=tuple(map(str, copied.probs[:, 0])))) is None


def test_copies_within_a_cluster_are_one_unit_anyway():
    rows = np.repeat(np.arange(200), 2)
    assert repeated_rows(taken(drawn(), rows, clusters=tuple(map(str, rows)))) is None
    assert repeated_rows(taken(drawn(), rows, clusters=tuple(map(str, range(400))))) is not None


@pytest.mark.parametrize("decimals", [1, 2, 3, 4, 6, None])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_equal_rows_by_rounding_are_no_copies(decimals, num_classes):
    for seed in range(3):
        for sharpness in (1.0, 4.0, 12.0):
            made = drawn(1000, num_classes, decimals=decimals, sharpness=sharpness, seed=seed)
            assert repeated_rows(made) is None, (seed, sharpness)


def test_equal_rows_by_rounding_of_few_images_are_no_copies():
    """With one decimal less hardly more of 60 rows are equal; but some answers stand there very often."""
    for seed in range(40):
        assert repeated_rows(drawn(60, 2, decimals=2, sharpness=4.0, seed=seed)) is None, seed


@pytest.mark.parametrize("decimals", [2, 3])
def test_uneven_copies_are_found_among_rounded_rows_too(decimals):
    """Of many classes, few rows are equal by rounding; a join that repeats all of them is seen by how even it is."""
    whole = drawn(num_classes=5, decimals=decimals, sharpness=2.0)
    assert repeated_rows(whole) is None
    found = repeated_rows(taken(whole, np.random.default_rng(1).permutation(np.repeat(np.arange(400), [2, 3] * 200))))
    assert found is not None
    assert found.total == 1000
    assert found.rows >= 600  # what is equal by rounding comes on top


def test_answers_that_vary_more_than_chance_are_no_copies():
    """Isotonic steps of three classes, normed: full precision, most rows different, some answers very frequent."""
    for seed in range(5):
        made = drawn(1500, 3, seed=seed)
        steps = np.random.default_rng(seed).exponential(size=(3, 80)).cumsum(axis=1)  # a class has steps of its own
        ends = np.c_[np.zeros(3), steps / steps[:, -1:]]
        heights = np.stack([ends[c][np.searchsorted(ends[c, 1:], made.probs[:, c])] for c in range(3)])
        probs = (heights.T + 1e-3) / (heights.T + 1e-3).sum(axis=1, keepdims=True)
        times = np.unique(np.c_[made.labels, probs].astype(np.float32), axis=0, return_counts=True)[1]
        assert times.max() > 8
        assert len(times) > 750  # most rows are different
        assert repeated_rows(replace(made, probs=probs.astype(np.float32))) is None, seed


def test_equally_likely_answers_are_no_copies():
    """Each of 500 answers of two classes about twice, by chance: a seventh of them never, a fourth just once."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        answers, labels = rng.dirichlet(np.ones(2), size=500), rng.integers(2, size=2000)
        made = replace(drawn(2000, 2), labels=labels, probs=answers[rng.integers(500, size=2000)].astype(np.float32))
        assert repeated_rows(made) is None, seed


def test_classes_of_fixed_size_with_few_answers_each_are_no_copies():
    """300 classes of 20 images, four answers of each: in a class the numbers add up to 20, which evens them out."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(300), 20)
    answers = rng.dirichlet(np.ones(300), size=(300, 4)).astype(np.float32)
    for _ in range(3):
        probs = answers[labels, rng.integers(4, size=6000)]
        names = tuple(f"c{i}" for i in range(300))
        assert repeated_rows(Predictions(tuple(map(str, range(6000))), labels, probs, names)) is None


def test_votes_and_steps_of_a_calibration_are_no_copies():
    made = drawn(1000, 2)
    for steps in (3, 7, 25, 60):  # full precision, and few values
        value = np.round(made.probs[:, 0] * steps) / steps
        assert repeated_rows(replace(made, probs=np.stack([value, 1 - value], axis=1).astype(np.float32))) is None
    perfect = np.eye(2, dtype=np.float32)[made.labels] * 0.8 + 0.1
    assert repeated_rows(replace(made, probs=perfect)) is None  # the design repeats, the answers say nothing


def test_a_run_that_is_the_same_file_as_another_is_left_out(tmp_path, capsys):
    drawn().save(tmp_path / "seed1.parquet")
    drawn().save(tmp_path / "seed2.parquet")
    drawn(seed=3).save(tmp_path / "seed3.parquet")
    (tmp_path / "gates.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.7}\n")
    files = [tmp_path / f"seed{i}.parquet" for i in (1, 2, 3)]
    assert gate(files, gates=tmp_path / "gates.yaml", junit=tmp_path / "junit.xml") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "it is no further run, and is left out" in said
    assert (tmp_path / "junit.xml").read_text().count("<testsuite ") == 2
    assert not same_predictions(drawn(), drawn(seed=3))
    assert same_predictions(drawn(), taken(drawn(), np.arange(400)))


# --- what the card expects


def test_expected_groups_and_classes_that_are_absent_hold_the_gates_that_depend_on_them(tmp_path):
    expected = Expected(groups={"sex": ("female", "male"), "site": ("x",)}, classes="all")
    made = replace(
        drawn(300, groups={"sex": ("female",) * 300, "site": ("x",) * 300}), expected=expected,
        class_names=("a", "b", "c", "d"), probs=np.c_[drawn(300).probs, np.zeros(300, np.float32)],
    )  # fmt: skip
    made.save(tmp_path / "made.parquet")
    made = Predictions.load(tmp_path / "made.parquet")  # it travels with the file
    assert made.expected == expected

    def judge(**rule):
        return check_gates(made, None, [GateRule(**rule)])[0]

    by_sex = judge(group="sex", at_least=0.7)
    assert by_sex.verdict == "inconclusive"
    assert by_sex.reason.startswith("The card expects images of sex = male, but there are none.")
    assert "class d" in judge(at_least=0.7).reason
    assert judge(at_least=0.7).verdict == "inconclusive"
    # What does not depend on it passes: another side of an outcome.
    assert judge(metric="specificity", positive=("b", "c", "d"), at_least=0.7, min_n=30).verdict == "pass"
    assert judge(metric="sensitivity", positive=("b", "d"), at_least=0.7, min_n=30).verdict == "inconclusive"
    whole = replace(made, expected=Expected(groups={"sex": ("female",)}, classes=("a", "b")))
    assert check_gates(whole, None, [GateRule(group="sex", at_least=0.7)])[0].verdict == "pass"
    left_out = GateRule(group="sex", at_least=0.7, exclude=("male",), reason="none were examined")
    with pytest.raises(GateError, match="no group here"):
        check_gates(whole, None, [left_out])


def test_what_is_expected_is_checked_when_the_card_is_read():
    known: dict[str, Any] = {"groups": ["sex"], "class_names": ["a", "b"]}
    check_declared((), (), (), expect=Expected(groups={"sex": ("female",)}, classes="all"), **known)
    with pytest.raises(ValueError, match=r"expect\.groups names a group that columns\.groups lacks: 'sx'"):
        check_declared((), (), (), expect=Expected(groups={"sx": ("female",)}), **known)
    with pytest.raises(ValueError, match=r"expect\.classes names a class that there is not: 'z'"):
        check_declared((), (), (), expect=Expected(classes=("z",)), **known)
    with pytest.raises(ValidationError, match="names nothing"):
        Expected()
    with pytest.raises(ValidationError, match="names no value"):
        Expected(groups={"sex": ()})


# --- references

ZERO_SHOT = GateRule(no_worse_than="zero_shot", margin=0.02)


def test_a_baseline_that_is_not_zero_shot_is_named():
    model, base = drawn(share=0.95), drawn(share=0.7, seed=1)

    def judge(baseline, bound=None):
        return check_gates(model, baseline, [ZERO_SHOT], bound=bound)[0]

    assert judge(base).verdict == "pass"
    for baseline, bound, words in (
        (replace(base, made_by={"method": "coop"}), None, "The baseline is a run of coop and not zero-shot"),
        (model, None, "The baseline is the model itself"),
        (base, drawn(share=0.7, seed=2), "The baseline that was given is not the zero-shot run"),
    ):
        found = judge(baseline, bound)
        assert found.verdict == "inconclusive"
        assert found.reason.startswith(words)
    assert judge(base, base).verdict == "pass"
    own = {"method": "zero_shot", "backbone": "ViT-B-32"}
    adapted = replace(model, made_by={"method": "coop", "backbone": "ViT-B-16"})
    found = check_gates(adapted, replace(base, made_by=own), [ZERO_SHOT])[0]
    assert "zero-shot of the backbone ViT-B-32, and the model was adapted from ViT-B-16" in found.reason
    # A rule that compares with nothing is not touched.
    assert check_gates(model, model, [GateRule(at_least=0.7)])[0].verdict == "pass"


def test_no_worse_than_any_named_run():
    model, coop = drawn(share=0.95), drawn(share=0.7, seed=1)
    rule = GateRule(no_worse_than="runs/coop_1", margin=0.02)
    found = check_gates(model, None, [rule], references={"runs/coop_1": coop})[0]
    assert (found.verdict, found.kind) == ("pass", "change")
    assert "change of accuracy against runs/coop_1" in found.reason
    assert check_gates(coop, None, [rule], references={"runs/coop_1": model})[0].verdict == "fail"
    itself = check_gates(model, None, [rule], references={"runs/coop_1": model})[0]
    assert itself.verdict == "inconclusive"
    assert itself.reason.startswith("runs/coop_1 is the model itself")
    both = check_gates(model, model, [rule, ZERO_SHOT], references={"runs/coop_1": coop})
    assert both[0].value == found.value != both[1].value == 0
    with pytest.raises(GateError, match="compares with 'runs/coop_1', whose predictions were not given"):
        check_gates(model, None, [rule])


def test_the_command_finds_the_named_run(tmp_path, monkeypatch):
    model, coop = drawn(share=0.95), drawn(share=0.7, seed=1)
    (tmp_path / "runs" / "coop").mkdir(parents=True)
    coop.save(tmp_path / "runs" / "coop" / "predictions.parquet")
    model.save(tmp_path / "model.parquet")
    rules = tmp_path / "gates.yaml"
    rules.write_text("gates:\n  - {metric: accuracy, no_worse_than: runs/coop}\n")
    assert gate([tmp_path / "model.parquet"], gates=rules) == 0  # beside the gates
    (tmp_path / "elsewhere").mkdir()
    moved = rules.rename(tmp_path / "elsewhere" / "gates.yaml")
    with pytest.raises(GateError, match="compares with 'runs/coop', and there is no such run folder or file"):
        gate([tmp_path / "model.parquet"], gates=moved)
    monkeypatch.chdir(tmp_path)
    assert gate([tmp_path / "model.parquet"], gates=moved) == 0  # where the command is given
    moved.write_text("gates:\n  - {metric: accuracy, no_worse_than: runs/coob}\n")
    with pytest.raises(GateError, match=r'Did you mean "runs/coop"'):
        gate([tmp_path / "model.parquet"], gates=moved)
    (tmp_path / "runs" / "coop" / "predictions.parquet").unlink()
    moved.write_text("gates:\n  - {metric: accuracy, no_worse_than: runs/coop}\n")
    with pytest.raises(GateError, match="not a finished run"):
        gate([tmp_path / "model.parquet"], gates=moved)


# --- a pass that shows nothing


def test_a_pass_that_one_answer_for_all_would_reach_says_so():
    made = drawn(600)  # always one class would be right in 33.3 %
    rare = Outcome(positive=("a",))
    assert rare.name == "a"
    for rules, little in (
        ([GateRule(at_least=0.3)], True),
        ([GateRule(at_least=0.4)], False),
        ([GateRule(at_least=0.3), GateRule(at_least=0.5)], False),
        ([GateRule(metric="ece", at_most=0.3)], True),
        ([GateRule(metric="brier", at_most=0.7)], True),
        ([GateRule(metric="brier", at_most=0.5)], False),
        ([GateRule(metric="sensitivity", positive=("b",), at_least=0.3, min_n=30)], False),
        ([GateRule(metric="specificity", positive=("b",), at_least=0.5, min_n=30)], True),
    ):
        verdicts = check_gates(made, None, rules)
        assert {v.verdict for v in verdicts} == {"pass"}, verdicts[0].reason
        words = verdict_of(verdicts)[1]
        assert ("the same answer for every image would pass too" in words) == little, (rules, words)
