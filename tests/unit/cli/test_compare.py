# SPDX-License-Identifier: Apache-2.0
"""`adaptclip compare` as a user runs it: two files of predictions, a printed comparison, files, the exit code."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adaptclip.cli import main
from adaptclip.predictions import Predictions


def save(path, right):
    labels = np.arange(len(right)) % 2
    probs = np.where((np.asarray(right) == (labels == 1))[:, None], [0.2, 0.8], [0.8, 0.2]).astype(np.float32)
    groups = {"sex": tuple(("f", "m")[i // 500] for i in range(1000))}
    Predictions(tuple(map(str, range(1000))), labels, probs, ("nevus", "melanoma"), groups).save(path)
    return str(path)


def rates(first: float, second: float) -> np.ndarray:
    return np.tile(np.arange(500) / 500, 2) < np.repeat([first, second], 500)


@pytest.mark.parametrize(
    ("after", "verdict", "code"),
    [((0.8, 0.9), "better", 0), ((0.6, 0.7), "levelled down", 2), ((0.69, 0.9), "cannot tell", 3)],
)
def test_compare(tmp_path, capsys, after, verdict, code):
    files = save(tmp_path / "before.parquet", rates(0.7, 0.95)), save(tmp_path / "after.parquet", rates(*after))
    with pytest.raises(SystemExit) as stop:
        main(["compare", *files, "--group", "sex", "--margin", "0.01", "--out", str(tmp_path / "result.md")])
    assert stop.value.code == code
    printed = capsys.readouterr().out
    assert f"**{verdict}**" in printed
    assert printed == (tmp_path / "result.md").read_text()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["verdict"] == verdict
    assert [row["after"]["value"] for row in result["groups"]] == pytest.approx(after)


def test_wrong_input(tmp_path, capsys):
    file = save(tmp_path / "p.parquet", rates(0.7, 0.9))
    for argv, words in (
        ([file, file, "--group", "sexx"], 'Did you mean "sex"'),
        ([file, str(tmp_path), "--group", "sex"], "is not a finished run"),
        ([file, file], "--group"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", *argv])
        assert stop.value.code == 1
        assert words in capsys.readouterr().err
