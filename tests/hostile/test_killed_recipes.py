# SPDX-License-Identifier: Apache-2.0
"""Recipes killed at 20 random moments and asked to end at 10: resumed, they are what they would have been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adaptclip.outputs import strangers

HERE = Path(__file__).resolve().parent
RESULTS = ("metrics.jsonl", "split.json", "*.parquet", "*.safetensors")
"""What must not differ by a bit; the name of a checkpoint holds the digest of weights, optimizer and generators."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "ADAPTCLIP_CACHE": str(folder / "fingerprints"),
    }  # fmt: skip
    program = [sys.executable, str(HERE / "killed_recipes.py"), str(folder)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "events.json").read_text())


def results(run: Path) -> dict[str, bytes]:
    files = {path for pattern in RESULTS for path in run.rglob(pattern)}
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_resumed_equals_undisturbed_bit_for_bit(ran):
    folder, events = ran
    assert set(events) == {"adapt", "coop", "cocoop", "lora", "two_stage", "contrastive", "tip_adapter"}
    for recipe in events:
        undisturbed, disturbed = (results(folder / recipe / run) for run in ("undisturbed", "disturbed"))
        assert undisturbed.keys() == disturbed.keys(), recipe
        assert len(undisturbed) >= 5, recipe
        assert [name for name in undisturbed if undisturbed[name] != disturbed[name]] == [], recipe


def test_a_run_holds_nothing_that_overwriting_would_stop_at(ran):
    folder, events = ran
    assert {name: strangers(folder / name / "disturbed", "run") for name in events} == {name: [] for name in events}


def test_the_signals_met_running_processes(ran):
    ended = [(event["signal"], event["code"]) for own in ran[1].values() for event in own]
    assert ended.count((signal.SIGKILL, -signal.SIGKILL)) == 20
    assert ended.count((signal.SIGTERM, 143)) == 10
    assert len(ended) == 30


def test_what_is_said_after_sigterm_is_true(ran):
    asked = [event for own in ran[1].values() for event in own if event["signal"] == signal.SIGTERM]
    with_checkpoint = 0
    for event in asked:
        assert "Traceback" not in event["said"], event["said"]
        assert "stopped by SIGTERM." in event["said"], event["said"]
        info = re.search(r"The checkpoint of step (\d+) is kept \(\S*/(step-\S+\.safetensors)\)", event["said"])
        if info:
            with_checkpoint += 1
            assert info[2] in event["kept"]
            assert int(info[1]) == int(info[2].split("-")[1])
        else:
            nothing = re.search("holds no checkpoint yet|Nothing was written to", event["said"])
            assert (event["kept"] == []) if nothing else ("Nothing was left half-written" in event["said"]), event
    assert with_checkpoint >= 4
    in_the_loop = [event for event in asked if "the step is finished and saved first" in event["said"]]
    assert len(in_the_loop) >= 3
    assert min(int(event["kept"][-1].split("-")[1]) for event in in_the_loop) < 12, "none waited for the last step"
