# SPDX-License-Identifier: Apache-2.0
"""`adaptclip gate` on files and run folders: exit codes, several runs as one release, JUnit, wrong input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from adaptclip.artifact import load
from adaptclip.cli.gate import gate
from adaptclip.errors import ArtifactError, DataError, GateError
from adaptclip.predictions import Predictions

AT_LEAST_80 = "gates:\n  - {metric: accuracy, at_least: 0.8}\n"


def judged(right: int, n: int) -> Predictions:
    """Predictions of n images of two classes and two sites, of which `right` are right."""
    labels = np.arange(n) % 2
    pred = np.where(np.arange(n) < right, labels, 1 - labels)
    probs = np.where(np.eye(2)[pred] == 1, 0.9, 0.1).astype(np.float32)
    return Predictions(tuple(map(str, range(n))), labels, probs, ("a", "b"), {"site": ("x", "y") * (n // 2)})


@pytest.fixture
def files(tmp_path):
    """Files whose accuracy certainly is, certainly is not, and may be 80 %; and the rule."""
    found = {}
    for name, (right, n) in {"good": (390, 400), "better": (396, 400), "bad": (200, 400), "open": (322, 400)}.items():
        found[name] = tmp_path / f"{name}.parquet"
        judged(right, n).save(found[name])
    found["rule"] = tmp_path / "gates.yaml"
    found["rule"].write_text(AT_LEAST_80)
    return found


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("good",), 0),
        (("bad",), 2),
        (("open",), 3),
        (("good", "better"), 0),
        (("good", "bad"), 2),
        (("good", "open"), 3),
        (("open", "bad", "good"), 2),
        (("good", "good"), 0),
    ],
)
def test_of_several_runs_all_must_pass(files, names, code, capsys):
    assert gate([files[name] for name in names], gates=files["rule"]) == code
    out = capsys.readouterr().out
    kinds = {"good": "pass", "better": "pass", "bad": "fail", "open": "inconclusive"}
    for name in set(names):
        assert kinds[name] in out
        # Several runs are told apart by name, with a verdict each; a file named twice is judged once.
        line = f"{kinds[name]} ({int(kinds[name] == 'pass')} of 1 gates pass)"
        assert (line in out.replace("\n", " ")) == (len(names) > 1)


def test_a_run_folder_brings_gates_and_zero_shot(files, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    judged(390, 400).save(run / "predictions.parquet")
    judged(300, 400).save(run / "zero_shot_predictions.parquet")
    (run / "gates.yaml").write_text("gates:\n  - {metric: accuracy, group: site, no_worse_than: zero_shot}\n")
    assert gate([run]) == 0
    assert gate([run], baseline=files["better"]) == 3
    (run / "gates.yaml").write_text("gates: []\n")
    assert gate([run]) == 3  # nothing was judged, which is not a pass
    assert "nothing was judged" in capsys.readouterr().out.replace("\n", " ")
    (run / "gates.yaml").unlink()
    with pytest.raises(GateError, match="names no gates; give a YAML file: --gates"):
        gate([run])
    (run / "predictions.parquet").unlink()
    with pytest.raises(DataError, match="not a finished run"):
        gate([run], gates=files["rule"])


def test_junit_has_a_suite_per_run(files, tmp_path, capsys):
    path = tmp_path / "junit.xml"
    assert gate([files["good"], files["bad"], files["open"]], gates=files["rule"], junit=path) == 2
    suites = ElementTree.parse(path).getroot().findall("testsuite")
    assert [(s.get("failures"), s.get("errors")) for s in suites] == [("0", "0"), ("1", "0"), ("0", "1")]
    assert [Path(s.get("name") or "").stem for s in suites] == ["good", "bad", "open"]
    capsys.readouterr()


def test_the_folder_above_runs_says_which_lie_in_it(tmp_path, files):
    marker = '{"adaptclip": "0", "num_processes": 1, "config": {}}'
    for name in ("coop", "lora"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(marker)
    (tmp_path / "runs" / "notes").mkdir()
    with pytest.raises(DataError) as caught:
        gate([tmp_path / "runs"])
    home = tmp_path / "runs"
    assert str(caught.value) == (
        f"{home} is no run folder. 2 runs lie in it: {home / 'coop'}, {home / 'lora'}; name those you mean."
    )
    (home / "coop" / "run.json").unlink()
    with pytest.raises(DataError, match=r"A run lies in it: .*lora; name it\."):
        gate([files["good"]], gates=files["rule"], baseline=home)
    with pytest.raises(ArtifactError, match=r"is not an artifact: .*A run lies in it: .*lora; name it\."):
        load(home)


def test_wrong_input_is_named(files, tmp_path):
    with pytest.raises(GateError, match="name at least one run folder or file"):
        gate([], gates=files["rule"])
    for text, message in (
        (
            "gates:\n  - {metric: accuracy, group: sit, at_least: 0.5}\n",
            r"attribute 'sit'. Did you mean \"site\"",
        ),
        ("gates:\n  - {metric: acuracy, at_least: 0.5}\n", r"unknown metric 'acuracy'. Did you mean \"accuracy\""),
        ("gates:\n  - {metric: accuracy, level: genus, at_least: 0.5}\n", "no levels at all"),
        ("gates:\n  - {metric: sensitivity, positive: c, at_least: 0.5}\n", "nothing is 'c'"),
        (
            "gates:\n  - {metric: accuracy, no_worse_than: zero_shot}\n",
            "no zero-shot predictions were given",
        ),
        ("gates:\n  - {metric: accuracy, group: site, at_least: 0.5, exclude: z, reason: r}\n", "excludes 'z'"),
        ("gate: []\n", 'unknown key "gate"'),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(GateError, match=message):
            gate([files["good"]], gates=tmp_path / "wrong.yaml")


def test_the_process_ends_with_the_verdict(files):
    def end(*words: str) -> tuple[int, str]:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "adaptclip.cli", "gate", *words],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    rule = ("--gates", str(files["rule"]))
    assert end(str(files["good"]), str(files["bad"]), *rule)[0] == 2
    # A process takes seconds to start; that its code is what is returned was just seen.
    assert gate([files["good"]], gates=files["rule"]) == 0
    assert gate([files["open"]], gates=files["rule"]) == 3
    files["good"].write_text("label,pred\n")
    code, said = end(str(files["good"]), *rule)
    assert code == 1
    assert "cannot read" in said
    assert "Traceback" not in said
