# SPDX-License-Identifier: Apache-2.0
"""The checks of a GPU where there is one; anywhere, that the script which runs and times them does run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import check  # puts the folders of what follows on the path

import checks  # isort: skip

CUDA = torch.cuda.is_available()
GROUPS = dict.fromkeys(group for group, _ in checks.CHECKS.values())
TIMED = ("coop", "lora-b16", "features", "waits", "knobs")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no CUDA GPU; tests/gpu/check.py runs all of this where there is one")
@pytest.mark.parametrize("group", GROUPS)
def test_what_must_hold_on_a_gpu(group):
    rows = list(check.check_rows(check.parsed(["out"]), groups=lambda own: own == group))
    assert rows
    assert not {row["check"]: row["error"] for row in rows if not row["passed"]}


def test_nothing_is_left_out():
    assert sum(group == "identities" for group, _ in checks.CHECKS.values()) == 16
    assert sum(group == "training" for group, _ in checks.CHECKS.values()) == 9
    assert len([group for group in GROUPS if group.startswith("matrix")]) == 12
    assert len(checks.PAIRS) >= 204
    assert len(checks.CHECKS) == 16 + 9 + len(checks.PAIRS)


def test_the_script_runs_without_a_gpu(tmp_path, capsys):
    parts = ["identities", "training", "matrix0", *TIMED]
    code = check.main([str(tmp_path), "--device", "cpu", "--tiny", "--here", "--parts", *parts])
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = {name: part["rows"] for name, part in result["parts"].items()}
    wrong = [row for own in rows.values() for row in own if row["what"] == "error" or row.get("passed") is False]
    assert not wrong
    assert code == 0
    assert list(rows) == parts
    assert {name: len(own) for name, own in rows.items()} == {
        "identities": 2, "training": 2, "matrix0": 2, "coop": 2, "lora-b16": 2, "features": 6, "waits": 2, "knobs": 1,
    }  # fmt: skip
    steps = [*rows["coop"], *rows["lora-b16"]]
    assert all(row["ratio"] > 0 and row["published_run_on_classes"] == row["classes"] == 6 for row in steps)
    exact = rows["lora-b16"][1]
    assert exact["gradient_difference"] < 1e-4 * exact["gradient_size"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert text in capsys.readouterr().out
    assert "6 of 6 checks passed." in text
    assert text.count("| CoOp step") == text.count("| LoRA step") == 2
    assert text.count("images/s") == 1


def broken(args):
    raise ZeroDivisionError("out of luck")


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fails(device: torch.device) -> dict[str, float]:
        return {"zero-shot": checks.near(torch.tensor([1.0]), torch.tensor([1.1]), 1e-3, "planted")}

    name = next(iter(checks.CHECKS))
    monkeypatch.setitem(checks.CHECKS, name, ("identities", fails))
    monkeypatch.setitem(check.PARTS, "coop", check.Part(broken, 1.0))
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"parts": {"waits": {"ended": "done", "seconds": 1, "rows": []}}}))
    parts = ["--parts", "identities", "coop", "--earlier", str(earlier)]
    assert check.main([str(tmp_path), "--device", "cpu", "--tiny", "--here", *parts]) == 1
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(result["parts"]) == ["waits", "identities", "coop"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "1 of 2 checks passed." in text
    assert f"**{name}**: AssertionError: planted: differs by 1.00e-01" in text
    assert "part coop: ZeroDivisionError: out of luck" in text


@pytest.mark.parametrize(("ends", "info"), [(None, "ended after 1"), (3, "exit code 3"), (0, "done")])
def test_a_part_that_hangs_or_crashes_keeps_its_rows(ends, info, monkeypatch):
    def run(command, *, timeout, stdout, **_):
        Path(command[2]).write_text('{"what": "check", "check": "a", "passed": true}\n')
        stdout.write(b"out of luck")
        if ends is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=ends)

    monkeypatch.setattr(check.subprocess, "run", run)
    part = check.run_apart("coop", check.parsed(["out", "--device", "cpu"]), check.time.monotonic() + 100)
    assert part["ended"].startswith(info)
    assert [row["check"] for row in part["rows"]] == ["a"]
    assert part.get("log") == (None if ends == 0 else "out of luck")
    late = check.run_apart("coop", check.parsed(["out"]), check.time.monotonic() + 5)
    assert late["ended"].startswith("not started")


def test_float64_on_a_device_is_seen():
    with checks.NoFloat64(torch.device("cpu")) as mode:
        torch.ones(2).double()
    assert mode.found == {"aten._to_copy.default"}
    mode.check()  # on a CPU it is allowed
    mode.device = torch.device("cuda")
    with pytest.raises(AssertionError, match="float64 on cuda"):
        mode.check()


@pytest.mark.parametrize("count", [8, 3])
def test_what_does_not_fit_runs_on_fewer_classes(count):
    asked = []

    def make(classes):
        def step():
            asked.append(classes)
            if classes > 3:
                raise torch.OutOfMemoryError

        return step

    from timing import largest_that_fits

    run_on, _ = largest_that_fits(make, count)
    assert asked == ([8, 4, 2] if count == 8 else [3])
    assert run_on == asked[-1]
