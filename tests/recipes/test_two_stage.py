# SPDX-License-Identifier: Apache-2.0
"""2SFS as a user runs it: both stages, interruption in either, artifact, new classes, two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from recipe_files import CPU, ROOT, load_recipe
from tiny_clip import write_tiny_checkpoint

import adaptclip as ac
from adaptclip.errors import AdaptclipError
from adaptclip.files import read_tensors
from adaptclip.methods import LoRA
from adaptclip.predictions import Predictions
from adaptclip.training.pixels import PixelLoader
from adaptclip.training.steps import FeatureLoader

TEST_IMAGES = 60

two_stage = load_recipe("two_stage")


@contextmanager
def small_test_split() -> Iterator[None]:
    """The digits with few test images: judging is not what takes the time here."""
    open_data = ac.open_data

    def few(*args, **kwargs):
        data = open_data(*args, **kwargs)
        return replace(data, test=data.test.select(range(0, len(data.test), len(data.test) // TEST_IMAGES)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ac, "open_data", few)
        yield


def main(cfg) -> int:
    """One run as in a process of its own: Accelerate remembers its settings for as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with small_test_split():
            return two_stage.main(cfg)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One shot of digits, a random tiny model, 3 steps of LoRA with dropout and 3 of the head."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "none.yaml").write_text("gates: []\n")
    return two_stage.Config(
        backbone=f"local-dir:{write_tiny_checkpoint(folder / 'tiny')}", shots=1, tune="lora", steps=6, tower_share=0.5,
        views=2,
        lr=0.02, head_lr=0.01, batch_size=4, gates=str(folder / "none.yaml"), cache=folder / "cache",
        out=folder / "run",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(base) -> Path:
    """The folder of an undisturbed run; not to be changed."""
    assert main(base) == 0
    return base.out


@pytest.fixture
def cfg(base, tmp_path):
    return replace(base, out=tmp_path / "run")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All that was learnt: the head, and A and B of every layer."""
    artifact = run / "artifact"
    return {**read_tensors(artifact / "adapter.safetensors"), **read_tensors(artifact / "adapter_model.safetensors")}


def judged(run: Path, name: str = "predictions") -> Predictions:
    return Predictions.load(run / f"{name}.parquet")


def training(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())["training"]


def loaded_equals_live(run: Path, count: int = 20) -> None:
    with small_test_split():
        test = ac.open_data(ac.load_card("digits"), check=False).test
    live = judged(run)
    position = {id_: i for i, id_ in enumerate(test.ids)}
    pictures = [test.image(position[id_]) for id_ in live.ids[:count]]
    loaded = ac.load(run).probabilities(pictures)
    torch.testing.assert_close(loaded, torch.as_tensor(live.probs[:count]), atol=1e-5, rtol=0)


def test_a_run_from_card_to_artifact(whole, base):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.yaml", "split.json", "metrics.jsonl", "predictions.parquet", "report.md", "artifact"}
    assert len(judged(whole)) == TEST_IMAGES
    loaded_equals_live(whole)
    info = training(whole)
    assert info["trainable_parameters"] == 12 * 2 * (64 + 64) + 10 * 48
    assert info["schedule"].endswith(", 3 steps of lora, 3 of the head, batches of 4")
    assert (info["chosen"], info["validation_used_for"]) == ({}, "nothing")
    assert sum(p.numel() for p in weights(whole).values()) == info["trainable_parameters"]
    # Both stages learnt: the towers left the frozen model, the head left the adapted text features.
    backbone = ac.load_backbone(base.backbone)
    model = ac.load(whole).adapter
    assert isinstance(model, ac.TwoStage)
    assert any(value.any() for name, value in weights(whole).items() if "lora_B" in name)
    lora = LoRA(backbone, model.class_names, templates=ac.load_card("digits").templates)
    frozen = lora.class_weights()
    lora.load_adapter(whole / "artifact")
    assert (lora.class_weights() - frozen).abs().max() > 1e-3
    assert (model.class_weights() - lora.class_weights()).abs().max() > 1e-3


def test_layernorms_are_what_the_first_stage_tunes_by_default(cfg):
    assert two_stage.Config().tune == "layernorm"
    assert main(replace(cfg, tune="layernorm")) == 0
    info, state = training(cfg.out), read_tensors(cfg.out / "artifact" / "adapter.safetensors")
    assert info["schedule"].endswith(", 3 steps of layernorm, 3 of the head, batches of 4")
    assert info["trainable_parameters"] == sum(tensor.numel() for tensor in state.values())
    assert all("ln_" in name for name in state if name != "head")
    assert not (cfg.out / "artifact" / "adapter_config.json").exists()
    loaded_equals_live(cfg.out, 5)


@pytest.mark.parametrize(("loader", "stage"), [(PixelLoader, "towers"), (FeatureLoader, "head")])
def test_interrupted_in_either_stage_and_resumed_equals_undisturbed(cfg, whole, monkeypatch, loader, stage):
    """Bit for bit, dropout included; a checkpoint after every step, interrupted in the third of the stage."""
    cfg = replace(cfg, save_every=1)
    batch, seen = loader.batch, []

    def interrupted(self, micro_step):
        seen.append(micro_step)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return batch(self, micro_step)

    monkeypatch.setattr(loader, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    assert (cfg.out / "head").exists() == (stage == "head")
    torch.manual_seed(99)  # another process has another random state
    assert main(replace(cfg, resume=True)) == 0
    assert seen == [0, 1, 2, 2]
    first, second = weights(cfg.out), weights(whole)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (judged(cfg.out).probs == judged(whole).probs).all()
    for part in (".", "head"):
        lines = (cfg.out / part / "metrics.jsonl").read_text()
        assert lines == (whole / part / "metrics.jsonl").read_text() != ""


def test_a_finished_run_is_left_as_it_is_and_can_be_replaced(cfg):
    main(replace(cfg, steps=2))
    before = weights(cfg.out)
    with pytest.raises(AdaptclipError, match="--resume"):
        main(replace(cfg, steps=2))
    with pytest.raises(AdaptclipError, match="head_lr"):
        main(replace(cfg, steps=2, resume=True, head_lr=0.5))
    assert main(replace(cfg, steps=2, resume=True)) == 0
    assert all(torch.equal(before[name], value) for name, value in weights(cfg.out).items())
    assert main(replace(cfg, steps=2, overwrite=True, seed=2)) == 0
    assert not torch.equal(before["head"], weights(cfg.out)["head"])


def test_base_to_new(cfg, base):
    assert main(replace(cfg, base_to_new=True, towers="text", mixed_precision="bf16")) == 0
    live = judged(cfg.out)
    assert live.class_names == ("zero", "one", "two", "three", "four")
    info = json.loads((cfg.out / "report.json").read_text())["shift"]["base_new"]
    assert info["base"]["model"]["value"] == pytest.approx((live.pred == live.labels).mean())
    assert info["base"]["model"]["n"] + info["new"]["model"]["n"] == TEST_IMAGES
    # The new classes are judged by the adapted text tower, not by the head: here by the loaded artifact's.
    model = ac.load(cfg.out).adapter
    assert isinstance(model, ac.TwoStage)
    with small_test_split():
        data = ac.open_data(ac.load_card("digits"), check=False)
    rows = np.flatnonzero(data.test.labels >= 5)
    with torch.no_grad():
        pixels = torch.stack([model.backbone.transform(data.test.image(i)) for i in rows.tolist()])
        values = model.encoder.encode_image(pixels)
    pred = (values @ model.class_weights_of(data.prompt_names[5:]).T).argmax(dim=1).numpy() + 5
    assert info["new"]["model"]["value"] == pytest.approx((pred == data.test.labels[rows]).mean(), abs=1e-9)


def test_the_starter(cfg):
    assert main(replace(cfg, backbone="starter", steps=2, batch_size=10)) == 0
    loaded_equals_live(cfg.out, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projections": ("q", "kk")}, "unknown projection 'kk'. Did you mean"),
        ({"projections": ("conv",)}, "no 1x1 convolutions; name q, k, v, out, mlp"),
        ({"rank": 0}, "rank of LoRA must be a whole number from 1 up, got 0"),
        ({"dropout": 1.0}, "dropout at least 0 and below 1"),
        ({"tune": "norms"}, 'Did you mean "layernorm"'),
        (
            {"tune": "layernorm", "rank": 3, "dropout": 0.0},
            "layernorm has no dropout, rank: these belong to lora",
        ),
        ({"towers": "images"}, 'Did you mean "image"'),
        ({"tower_share": 1.0}, "1 step or more for each stage, got 6 and 1"),
        ({"tower_share": 0.0}, "1 step or more for each stage, got 6 and 0"),
        ({"steps": 1}, "1 step or more for each stage, got 1 and 0.5"),
        ({"steps": -4}, "steps must be 1 or more, got -4"),
        ({"shots": -1}, "shots must be a whole number"),
        ({"gates": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_wrong_input_is_said_before_there_is_a_run(cfg, changes, message):
    with pytest.raises(AdaptclipError) as error:
        main(replace(cfg, **changes))
    assert message in str(error.value)
    assert not cfg.out.exists()


def test_the_published_length(tiny):
    """300 steps per shot, six tenths of them for the towers; all images count as their number per class."""
    made = ac.TwoStage(ac.load_backbone(tiny), ["cat", "dog"])
    for how, towers, total in (((16, 16), 2880, 4800), ((0, 20), 3600, 6000)):
        plan = made.schedule(how[0], images_per_class=how[1])
        assert (plan.first_steps(), plan.steps, plan.lr, plan.head_lr) == (towers, total, 2e-4, 2e-4)
    assert made.schedule(16, preset="smoke").steps <= 100
    assert made.schedule(16, preset="smoke", steps=1000).first_steps() == 600


def test_two_processes_equal_one(cfg, tmp_path):
    one = replace(cfg, dropout=0.0, out=tmp_path / "one")
    assert main(one) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = [
        "--backbone", cfg.backbone, "--shots", "1", "--steps", "6", "--tower-share", "0.5", "--views", "2",
        "--tune", "lora",
        "--lr", "0.02", "--head-lr", "0.01", "--batch-size", "2", "--dropout", "0", "--gates", cfg.gates,
        "--cache", str(cfg.cache), "--out", str(cfg.out),
    ]  # fmt: skip
    command = [sys.executable, *launcher, str(ROOT / "recipes" / "two_stage.py"), *flags]
    result = subprocess.run(command, env={**CPU, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((cfg.out / "head" / "run.json").read_text())["num_processes"] == 2
    # Adam divides by the gradient's own size: where that is nearly 0, rounding decides the direction of a step.
    first, second = weights(one.out), weights(cfg.out)
    assert list(first) == list(second)
    difference = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert (difference > 1e-5).double().mean() < 0.01
    assert difference.max() < 2 * 3 * cfg.lr
    alone, together = judged(one.out), judged(cfg.out)
    rows = [together.ids.index(id_) for id_ in alone.ids]
    assert len(rows) == TEST_IMAGES
    assert together.probs[rows] == pytest.approx(alone.probs, abs=1e-5)
