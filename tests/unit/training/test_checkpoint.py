# SPDX-License-Identifier: Apache-2.0
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from adaptclip.errors import StorageError, TrainingError
from adaptclip.files import read_tensors
from adaptclip.seeding import seed_everything
from adaptclip.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, step_of
from adaptclip.training.tracking import make_accelerator

ROOT = Path(__file__).parents[3]


class Adapter(nn.Module):
    """An adapter with a frozen part, which must never be written."""

    def __init__(self, width=3):
        super().__init__()
        self.backbone = nn.Linear(100, 100).requires_grad_(False)
        self.weight = nn.Parameter(torch.zeros(width))

    def adapter_state(self):
        return {"weight": self.weight}

    def load_adapter_state(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])


def _parts(width=3) -> tuple[Any, Any, Any, Any]:
    accelerator = make_accelerator(cpu=True)
    adapter = Adapter(width)
    optimizer = AdamW([adapter.weight], lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    adapter, optimizer = accelerator.prepare(adapter, optimizer)
    return adapter, optimizer, scheduler, accelerator


def _step(adapter, optimizer, scheduler):
    """One step whose gradient comes from all three global generators."""
    optimizer.zero_grad()
    noise = torch.rand(3) + random.random() + np.random.rand()
    (adapter.weight * noise).sum().backward()
    optimizer.step()
    scheduler.step()
    return adapter.weight.detach().clone()


def test_resumed_steps_are_the_same_bit_for_bit(tmp_path):
    seed_everything(0)
    adapter, optimizer, scheduler, accelerator = _parts()
    for _ in range(3):
        _step(adapter, optimizer, scheduler)
    save_checkpoint(tmp_path, 3, adapter, optimizer, scheduler, accelerator)
    expected = [_step(adapter, optimizer, scheduler) for _ in range(3)]

    seed_everything(1)
    adapter, optimizer, scheduler, accelerator = _parts()
    assert load_checkpoint(tmp_path, adapter, optimizer, scheduler, accelerator) == 3
    assert scheduler.get_last_lr() == [0.1 / 4]
    got = [_step(adapter, optimizer, scheduler) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_checkpoint_before_the_first_step(tmp_path):
    parts = _parts()
    save_checkpoint(tmp_path, 0, *parts)
    assert load_checkpoint(tmp_path, *parts) == 0


def test_no_checkpoint_changes_nothing(tmp_path):
    parts = _parts()
    assert load_checkpoint(tmp_path / "missing", *parts) == 0
    assert parts[2].last_epoch == 0


def test_only_the_adapter_and_only_the_newest_are_kept(tmp_path):
    parts = _parts()
    (tmp_path / ".step-00000001-abc.safetensors.x.tmp").write_text("left by a killed run")
    for step in (5, 40, 300):
        save_checkpoint(tmp_path, step, *parts)
    (path,) = tmp_path.iterdir()
    assert path == newest_checkpoint(tmp_path)
    assert step_of(path) == 300
    assert path.stat().st_size < 40_000
    assert not any("backbone" in name for name in read_tensors(path))


def test_newest_is_by_number_and_foreign_files_do_not_count(tmp_path):
    for name in ("step-9-0123456789abcdef", "step-10-0123456789abcdef", "step-99", "step-11-xyz"):
        (tmp_path / f"{name}.safetensors").write_text("")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name.startswith("step-10-")
    with pytest.raises(TrainingError, match="not named like a checkpoint"):
        step_of(tmp_path / "step-99.safetensors")


@pytest.mark.parametrize("failing", ["fsync", "replace", "open"])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    parts = _parts()
    save_checkpoint(tmp_path, 1, *parts)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    owner = {"fsync": "os.fsync", "replace": "pathlib.Path.replace", "open": "os.open"}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(owner, fail)
        with pytest.raises(StorageError, match="No space left on device"):
            save_checkpoint(tmp_path, 2, *parts)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_checkpoint(tmp_path, *parts) == 1


def test_ctrl_c_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    parts = _parts()
    save_checkpoint(tmp_path, 1, *parts)
    before = list(tmp_path.iterdir())

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, *parts)
    assert list(tmp_path.iterdir()) == before
    assert load_checkpoint(tmp_path, *parts) == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, *_parts())


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty"])
def test_damaged_checkpoint_is_named_with_a_way_on(tmp_path, damage):
    parts = _parts()
    save_checkpoint(tmp_path, 7, *parts)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped byte": content, "truncated": content[:50], "empty": b""}[damage])
    with pytest.raises(TrainingError, match=f"{path.name} is damaged.*--overwrite"):
        load_checkpoint(tmp_path, *parts)


def test_checkpoint_of_another_adapter(tmp_path):
    save_checkpoint(tmp_path, 7, *_parts(width=3))
    with pytest.raises(TrainingError, match=r"does not fit this adapter: .*size"):
        load_checkpoint(tmp_path, *_parts(width=4))


def test_checkpoint_of_another_number_of_processes(tmp_path):
    adapter, optimizer, scheduler, accelerator = _parts()
    save_checkpoint(tmp_path, 7, adapter, optimizer, scheduler, accelerator)

    class TwoProcesses:
        num_processes = 2

    with pytest.raises(TrainingError, match="written by 1 processes and there are 2 now"):
        load_checkpoint(tmp_path, adapter, optimizer, scheduler, TwoProcesses())  # type: ignore[arg-type]


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_an_undisturbed_one(tmp_path):
    script = Path(__file__).with_name("killed_runs.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=environment, timeout=300)
    assert int((tmp_path / "num_kills").read_text()) >= 4
    undisturbed, killed = (
        {
            str(p.relative_to(folder)): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file() and p.name != "run.lock.json"  # says which process wrote
        }
        for folder in (tmp_path / "undisturbed", tmp_path / "killed")
    )
    # The name of a checkpoint holds the digest of weights, optimizer, schedule and generators.
    assert killed.keys() == undisturbed.keys()
    assert killed == undisturbed
    assert len(undisturbed["metrics.jsonl"].splitlines()) == 60
