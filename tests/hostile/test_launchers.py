# SPDX-License-Identifier: Apache-2.0
"""SIGTERM to a launcher reaches the processes it started: they finish their step and save it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adaptclip.files import read_tensors
from adaptclip.training.checkpoint import newest_checkpoint, step_of

PROGRAM = Path(__file__).with_name("launched_loop.py")
ROOT = Path(__file__).resolve().parents[2]

LAUNCHERS: dict[str, tuple[list[str], int, int]] = {
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2, 1),
    "accelerate launch": (["accelerate.commands.launch", "--cpu", "--num_processes", "1"], 1, -signal.SIGTERM),
}
"""Name -> the module and its flags, how many processes it starts, and its own exit code, which is not the recipe's."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told when its launcher ends"),
]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_that_is_asked_to_end_lets_the_step_be_saved(tmp_path, name):
    module, size, code = LAUNCHERS[name]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *module, str(PROGRAM), "--out", str(tmp_path / "run")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=said, stderr=subprocess.STDOUT)
    wait_for(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
    assert process.poll() is None, (tmp_path / "said").read_text()
    time.sleep(0.4)  # in the loop, of 1.8 s
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == code
    # A launcher of one process does not wait for it.
    wait_for(lambda: "stopped by SIGTERM" in (tmp_path / "said").read_text())
    text = (tmp_path / "said").read_text()
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None, text
    assert 0 < step_of(newest) < 12
    assert text.count("the step is finished and saved first") == 1
    assert f"The checkpoint of step {step_of(newest)} is kept" in text
    done = subprocess.run(
        [*command, "--resume"], env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [read_tensors(tmp_path / f"weights-{rank}.safetensors") for rank in range(size)]
    for weights in found:
        assert torch.equal(weights["resumed"], weights["undisturbed"])
        assert torch.equal(weights["resumed"], found[0]["resumed"])
    assert len(list(tmp_path.glob("weights-*"))) == size


def wait_for(condition, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)
