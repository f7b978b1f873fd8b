# SPDX-License-Identifier: Apache-2.0
"""The runs that gates compare with by name."""

from __future__ import annotations

import numpy as np
import pytest

from adaptclip.errors import GateError
from adaptclip.gate_rules import GateRule
from adaptclip.gates.loading import load_references


def table(path, answers=("0", "1")):
    """A table of predictions by class number, of two images of two classes."""
    rows = [f"i{k},{k},{answer}" for k, answer in enumerate(answers)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("id,label,pred\n" + "\n".join(rows) + "\n")
    return path


def rules(*names):
    return [GateRule(no_worse_than=name) for name in names]


def test_only_named_runs_are_read_and_each_once(tmp_path):
    table(tmp_path / "other.csv")
    found = load_references(
        [GateRule(at_least=0.5), *rules("zero_shot", "other.csv", "other.csv")], [tmp_path], classes=("ill", "well")
    )
    assert list(found) == ["other.csv"]
    assert found["other.csv"].class_names == ("ill", "well")
    assert np.array_equal(found["other.csv"].labels, [0, 1])
    assert load_references(rules("zero_shot"), []) == {}


def test_the_first_place_that_has_it_is_taken(tmp_path):
    table(tmp_path / "a" / "x.csv")
    table(tmp_path / "b" / "x.csv", ("1", "1"))
    first, second = ([tmp_path / name for name in names] for names in ("ab", "ba"))
    assert load_references(rules("x.csv"), first, classes=("u", "v"))["x.csv"].pred.tolist() == [0, 1]
    assert load_references(rules("x.csv"), second, classes=("u", "v"))["x.csv"].pred.tolist() == [1, 1]
    only_there = [tmp_path / "none", tmp_path / "b"]
    assert load_references(rules("x.csv"), only_there, classes=("u", "v"))["x.csv"].pred.tolist() == [1, 1]


def test_what_is_not_there_gets_the_nearest_name(tmp_path):
    table(tmp_path / "runs" / "coop.csv")
    (tmp_path / "runs" / "notes.txt").write_text("x")
    (tmp_path / "runs" / "coop").mkdir()
    with pytest.raises(GateError, match=r'compares with .*Did you mean "runs/coop\.csv"') as raised:
        load_references(rules("runs/coop.csb"), [tmp_path, tmp_path])
    assert str(raised.value).count(str(tmp_path / "runs" / "coop.csb")) == 1
    with pytest.raises(GateError, match='Did you mean "zero_shot"'):
        load_references(rules("zero_shoot"), [tmp_path])


def test_an_unfinished_run_and_a_broken_file_are_named_with_the_gate(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(GateError, match=r'gate "accuracy no worse than run": .*is not a finished run'):
        load_references(rules("run"), [tmp_path])
    (tmp_path / "x.csv").write_text("nothing\n1\n")
    with pytest.raises(GateError, match=r'gate "accuracy no worse than x.csv": '):
        load_references(rules("x.csv"), [tmp_path])
