# SPDX-License-Identifier: Apache-2.0
"""One process and two processes with the same global batch take the same steps; both processes are really there."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptclip.files import read_json, read_tensors

SCRIPT = Path(__file__).with_name("two_processes.py")
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    runpy.run_path(str(SCRIPT))["main"](folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_both_processes_are_there(one, two):
    assert read_json(one / "rank-0.json")["num_processes"] == 1
    assert [read_json(two / f"rank-{rank}.json")["num_processes"] for rank in (0, 1)] == [2, 2]


def test_same_weights(one, two):
    expected = read_tensors(one / "rank-0.safetensors")["weight"]
    first, second = (read_tensors(two / f"rank-{rank}.safetensors")["weight"] for rank in (0, 1))
    assert torch.equal(first, second)
    assert not torch.allclose(expected, torch.full_like(expected, 0.1), atol=0.05), "training moved the weights"
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)


def test_group_dro_moves_the_same_weights(one, two):
    """Both processes hold the weights of groups that one process would have, and train by them."""
    alone, first, second = (
        read_tensors(path / f"rank-{rank}.safetensors") for path, rank in ((one, 0), (two, 0), (two, 1))
    )
    for name in ("mitigated", "log_weights"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], atol=1e-5, rtol=0)
    assert alone["log_weights"].shape == (3,)
    assert alone["log_weights"].std() > 0.05, "the weights moved"
    assert not torch.allclose(alone["mitigated"], alone["weight"], atol=1e-3)


@pytest.mark.parametrize("folder", ["run", "mitigated"])
def test_same_metrics(one, two, folder):
    alone, together = (
        [json.loads(line) for line in (path / folder / "metrics.jsonl").read_text().splitlines()] for path in (one, two)
    )
    assert [line["step"] for line in together] == list(range(1, 13))
    for a, b in zip(alone, together, strict=True):
        assert a["lr"] == b["lr"], "the schedule counts optimizer steps, not processes"
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-4)


def test_loss_that_is_not_finite_on_one_process_stops_both(two):
    for rank in (0, 1):
        assert "the loss of step 3 is not finite" in read_json(two / f"rank-{rank}.json")["message"]
    assert len((two / "spoilt" / "metrics.jsonl").read_text().splitlines()) == 2


def test_features_are_shared_out_and_all_there(one, two):
    expected = read_tensors(one / "rank-0.safetensors")["cached"]
    assert expected.shape == (1, 600, 6)
    assert np.isfinite(expected.numpy()).all()
    for rank in (0, 1):
        got = read_tensors(two / f"rank-{rank}.safetensors")
        assert all(torch.equal(got[name], expected) for name in ("cached", "again", "uncached"))
    # 600 images are three blocks of at most 256: the first process takes two of them, the second one takes one; the
    # second request takes nothing from the backbone, the one without a cache the same again.
    first, second = (read_json(two / f"rank-{rank}.json")["batches"] for rank in (0, 1))
    alone = [32] * 18 + [24]
    assert first == ([32] * 8 + [32] * 2 + [24]) * 2 + [29]
    assert second == [32] * 8 * 2
    assert read_json(one / "rank-0.json")["batches"] == alone * 2 + [29]
    assert sorted(p.name for p in (one / "cache").rglob("*")) == sorted(p.name for p in (two / "cache").rglob("*"))
