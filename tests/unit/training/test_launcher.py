# SPDX-License-Identifier: Apache-2.0
"""What the launcher asks for is done, contradictions and what cannot be done are refused by name."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from recipe_files import CPU, RECIPES, ROOT, load_recipe
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import ConfigError
from adaptclip.methods import CoCoOp, CoOp, LoRA, TipAdapter, TwoStage
from adaptclip.seeding import seed_everything
from adaptclip.training.mitigation import Mitigation
from adaptclip.training.optim import build_optimizer, build_scheduler
from adaptclip.training.steps import FeatureLoader
from adaptclip.training.support import Training, train_by_steps
from adaptclip.training.tracking import make_accelerator, settled, start_run
from adaptclip.types import Features

PRECISION, STEPS = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the process, with one precision
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("asked", "flag", "expected"),
    [
        (None, "auto", "no"),
        ("no", "auto", "no"),
        ("bf16", "auto", "bf16"),
        ("BF16", "auto", "bf16"),
        ("bf16", "bf16", "bf16"),
        ("no", "bf16", "bf16"),  # the launcher says "no" when it was told nothing
        ("", "bf16", "bf16"),
        ("bf16", "no", "the launcher asks for mixed precision 'bf16'.*to use 'no'"),
        ("fp16", "bf16", "the launcher asks for mixed precision 'fp16'.*to use 'bf16'"),
        ("fp16", "auto", '"fp16" needs a GPU'),
        ("fp8", "auto", "mixed precision 'fp8'.*do not compute in; allowed: no, fp16, bf16"),
        ("fp8", "bf16", "mixed precision 'fp8'.*do not compute in"),
    ],
)
def test_mixed_precision(asked, flag, expected, monkeypatch):
    if asked is not None:
        monkeypatch.setenv(PRECISION, asked)
    if " " in expected:
        with pytest.raises(ConfigError, match=expected):
            make_accelerator(flag, cpu=True)
    else:
        assert make_accelerator(flag, cpu=True).mixed_precision == expected


@pytest.mark.parametrize(
    ("asked", "flag", "expected"),
    [
        (None, 0, 1), ("1", 0, 1), ("4", 0, 4), ("4", 4, 4), ("1", 3, 3), (None, 3, 3),
        ("4", 1, "asks for 4 gradient accumulation steps.*--accumulate for 1"),
        ("4", 2, "asks for 4 gradient accumulation steps.*--accumulate for 2"),
        ("auto", 0, "asks for 'auto' gradient accumulation steps"),
        ("0", 0, "asks for '0' gradient accumulation steps"),
        (None, -1, "accumulate must be 1 or more, or 0 .*; got -1"),
    ],
)  # fmt: skip
def test_gradient_accumulation(asked, flag, expected, monkeypatch):
    if asked is not None:
        monkeypatch.setenv(STEPS, asked)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            make_accelerator(accumulate=flag, cpu=True)
    else:
        assert make_accelerator(accumulate=flag, cpu=True).gradient_accumulation_steps == expected


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for a parallelism configuration"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch.compile with 'inductor'.*--compute compile"),
        ("ACCELERATE_USE_FSDP", "false", ""),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", ""),
    ],
)
def test_what_the_recipes_do_not_do(variable, value, message, monkeypatch):
    monkeypatch.setenv(variable, value)
    if message:
        with pytest.raises(ConfigError, match=message):
            make_accelerator(cpu=True)
    else:
        make_accelerator(cpu=True)


def test_the_run_records_what_was_decided(tmp_path, monkeypatch):
    monkeypatch.setenv(PRECISION, "bf16")
    monkeypatch.setenv(STEPS, "2")
    accelerator = make_accelerator(cpu=True)
    given = {"mixed_precision": "auto", "accumulate": 0, "lr": 0.1}
    assert settled(given, accelerator) == {"mixed_precision": "bf16", "accumulate": 2, "lr": 0.1}
    assert settled({"lr": 0.1}, accelerator) == {"lr": 0.1}
    start_run(tmp_path / "run", config=given, accelerator=accelerator)
    assert "bf16" in (tmp_path / "run" / "config.yaml").read_text()


def test_every_gradient_recipe_has_both_flags():
    looped = [path for path in RECIPES if "ac.train_steps(" in path.read_text() and path.stem != "starter"]
    assert {path.stem for path in looped} == {
        "adapt",
        "cocoop",
        "contrastive",
        "coop",
        "lora",
        "tip_adapter",
        "two_stage",
    }
    for path in looped:
        fields = {field.name: field.default for field in dataclasses.fields(load_recipe(path.stem).Config)}
        assert fields["accumulate"] == 0, path.name
        precision = "cfg.mixed_precision"
        if path.stem == "tip_adapter":
            precision = '"no"'  # its keys are learnt in full precision, and a setting that says otherwise is refused
        assert fields["mixed_precision"] == "auto", path.name
        assert f"make_accelerator({precision}, cfg.accumulate" in path.read_text(), path.name
    others = [path for path in RECIPES if path not in looped]
    for path in others:
        (call,) = re.findall(r"make_accelerator\((.*)\)", path.read_text())
        assert call.startswith(('"no", 1', "cfg.mixed_precision, 1")), path.name
    assert len(others) >= 4


def test_accelerate_launch_is_honoured_by_a_recipe(tmp_path):
    """The launcher itself: what it was asked for reaches the recipe, and a contradiction ends it with code 1."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [*launch, "--mixed_precision", "bf16", str(ROOT / "recipes" / "coop.py"), "--mixed-precision", "no"]
    env = {**CPU, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    assert "the launcher asks for mixed precision 'bf16'" in " ".join(done.stderr.split())
    assert not (Path(tmp_path) / "runs").exists()


LABELS = torch.tensor([0, 1, 2] * 4)
RECIPES_WITH_A_LOOP = {"adapt", "cocoop", "contrastive", "coop", "lora", "tip_adapter", "two_stage"}

METHODS: dict[str, Any] = {
    "coop": lambda b, names: CoOp(b, names, n_ctx=2),
    "cocoop": lambda b, names: CoCoOp(b, names, n_ctx=2),
    "lora": lambda b, names: LoRA(b, names, towers="text", dropout=0.0),
    "two_stage": lambda b, names: TwoStage(b, names),
    "tip_adapter": lambda b, names: TipAdapter(b, names, learn_keys=True),
}


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone(width=32, context_length=16)


@pytest.mark.parametrize("name", METHODS)
def test_two_micro_batches_are_one_of_twice_the_size(name, backbone):
    """Where the loss is a mean over images and nothing is drawn: the same steps, up to rounding."""
    values = F.normalize(torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = Features(values, LABELS, tuple(map(str, range(12))), backbone.image_digest)
    learnt = []
    for accumulate, batch_size in ((1, 6), (2, 3)):
        seed_everything(0)
        accelerator = make_accelerator("no", accumulate, cpu=True)
        adapter: Any = METHODS[name](backbone, ("rose", "dog", "cat"))
        if name == "tip_adapter":
            adapter.fit_features(features)
        loader = FeatureLoader(features, batch_size=batch_size, seed=0, accelerator=accelerator)
        optimizer = build_optimizer(adapter.trainable_parameters(), name="sgd", lr=0.1, weight_decay=0.0)
        scheduler = build_scheduler(optimizer, total_steps=4, steps_per_epoch=loader.steps_per_epoch)
        before = [p.detach().clone() for p in adapter.trainable_parameters()]
        train_by_steps(Training(adapter, loader, optimizer, scheduler, 4, Mitigation()), accelerator)
        learnt.append([p.detach() for p in adapter.trainable_parameters()])
        assert any(not torch.equal(old, new) for old, new in zip(before, learnt[-1], strict=True))
    for whole, parts in zip(*learnt, strict=True):
        torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)
