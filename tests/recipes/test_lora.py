# SPDX-License-Identifier: Apache-2.0
"""CLIP-LoRA as a user runs it: artifact, interruption, the scale, new classes, towers, precision, two processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from recipe_files import CPU, ROOT, load_recipe
from tiny_clip import write_tiny_checkpoint

import adaptclip as ac
from adaptclip.cli.report import report as report_command
from adaptclip.errors import AdaptclipError
from adaptclip.files import read_tensors, read_yaml
from adaptclip.methods import LoRA
from adaptclip.methods.predicting import predict
from adaptclip.predictions import Predictions
from adaptclip.training.pixels import PixelLoader

TEST_IMAGES = 60

lora = load_recipe("lora")


@contextmanager
def small_test_split() -> Iterator[None]:
    """The digits with few test images: judging is not what takes the time here."""
    open_data = ac.open_data

    def few(*args, **kwargs):
        data = open_data(*args, **kwargs)
        # Every twelfth image, so that all classes are there.
        return replace(data, test=data.test.select(range(0, len(data.test), len(data.test) // TEST_IMAGES)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ac, "open_data", few)
        yield


def main(cfg) -> int:
    """One run as in a process of its own: Accelerate remembers its settings for as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with small_test_split():
            return lora.main(cfg)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One shot of digits, a random tiny model, 4 steps with dropout."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "none.yaml").write_text("gates: []\n")
    return lora.Config(
        backbone=f"local-dir:{write_tiny_checkpoint(folder / 'tiny')}", shots=1, steps=4, lr=0.02, batch_size=4,
        gates=str(folder / "none.yaml"), cache=folder / "cache", out=folder / "run",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(base) -> Path:
    """The folder of an undisturbed run; not to be changed."""
    assert main(base) == 0
    return base.out


@pytest.fixture(scope="module")
def without_dropout(base, tmp_path_factory) -> Path:
    """The same without dropout, which makes it comparable with other ways of computing it."""
    out = tmp_path_factory.mktemp("dropout") / "run"
    assert main(replace(base, dropout=0.0, out=out)) == 0
    return out


@pytest.fixture
def cfg(base, tmp_path):
    return replace(base, out=tmp_path / "run")


@pytest.fixture
def finished(cfg, whole):
    """Settings of a run that is over, in a folder of its own."""
    shutil.copytree(whole, cfg.out)
    return replace(cfg, resume=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "artifact" / "adapter_model.safetensors")


def same(first: dict, second: dict) -> bool:
    assert list(first) == list(second)
    return all(torch.equal(first[name], second[name]) for name in first)


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def judged(run: Path, name: str = "predictions") -> Predictions:
    return Predictions.load(run / f"{name}.parquet")


def from_artifact(run: Path, count: int = 20) -> torch.Tensor:
    """Probabilities of the first judged images by the loaded artifact."""
    with small_test_split():
        test = ac.open_data(ac.load_card("digits"), check=False).test
    model = ac.load(run, allow_failed_gates=True)
    position = {id_: i for i, id_ in enumerate(test.ids)}
    return model.probabilities([test.image(position[id_]) for id_ in judged(run).ids[:count]])


def loaded_equals_live(run: Path, count: int = 20) -> None:
    live = torch.as_tensor(judged(run).probs[:count])
    torch.testing.assert_close(from_artifact(run, count), live, atol=1e-5, rtol=0)


def test_a_run_from_card_to_artifact(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.yaml", "split.json", "metrics.jsonl", "predictions.parquet", "report.md", "artifact"}
    live = judged(whole)
    assert len(live) == TEST_IMAGES
    loaded_equals_live(whole)
    assert abs(live.probs - judged(whole, "zero_shot_predictions").probs).max() > 1e-2
    training = report(whole)["training"]
    assert training["trainable_parameters"] == 12 * 2 * (64 + 64)  # q, k, v of two blocks of two towers, rank 2
    assert training["schedule"] == "AdamW 0.02, cosine, 4 steps of 4"
    assert training["chosen"] == {"lora_scale": 1.0}
    assert training["validation_used_for"] == "nothing"
    assert not [p for p in whole.rglob("*") if p.suffix in (".pkl", ".pt", ".pth", ".bin", ".tmp")]


def test_interrupted_and_resumed_equals_undisturbed(cfg, whole, monkeypatch):
    """Bit for bit, dropout included; checkpoints after steps 2 and 4, interrupted in step 4."""
    cfg = replace(cfg, save_every=2)
    batch, seen = PixelLoader.batch, []

    def interrupted(self, micro_step):
        seen.append(micro_step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return batch(self, micro_step)

    monkeypatch.setattr(PixelLoader, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    assert [path.name[:13] for path in (cfg.out / "checkpoints").iterdir()] == ["step-00000002"]
    torch.manual_seed(99)  # another process has another random state
    assert main(replace(cfg, resume=True)) == 0
    assert seen == [0, 1, 2, 3, 2, 3]
    assert same(weights(cfg.out), weights(whole))
    assert (judged(cfg.out).probs == judged(whole).probs).all()
    assert (cfg.out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text() != ""


def test_the_dropout_of_the_comparison_is_active(whole, without_dropout):
    assert not same(weights(without_dropout), weights(whole))


def test_scale_0_is_zero_shot_and_1_is_as_trained(finished, whole):
    assert main(replace(finished, lora_scale=0.0)) == 0
    zero_shot = judged(finished.out, "zero_shot_predictions")
    assert abs(judged(finished.out).probs - zero_shot.probs).max() < 1e-6
    assert (judged(finished.out).pred == zero_shot.pred).all()
    assert main(finished) == 0
    assert (judged(finished.out).probs == judged(whole).probs).all()
    assert same(weights(finished.out), weights(whole))


def test_a_finished_run_is_judged_again_at_another_scale(finished, whole, base):
    assert main(replace(finished, lora_scale=0.5)) == 0
    assert report(finished.out)["training"]["chosen"] == {"lora_scale": 0.5}
    assert read_yaml(finished.out / "config.yaml")["lora_scale"] == 0.5
    half = judged(finished.out).probs
    assert abs(half - judged(whole).probs).max() > 1e-3
    loaded_equals_live(finished.out)
    # The same by hand: the weights of the finished run, half of the update added to the frozen model.
    assert same(weights(finished.out), weights(whole))
    with small_test_split():
        data = ac.open_data(ac.load_card("digits"), check=False)
    backbone = ac.load_backbone(base.backbone)
    adapter = LoRA(backbone, data.prompt_names, templates=data.card.templates)
    adapter.load_adapter(whole / "artifact")
    adapter.set_scale(0.5)
    encoder = replace_model(backbone, adapter.merged_model())
    stock = ac.ZeroShotClassifier(encoder, data.prompt_names, data.card.templates)
    by_hand = predict(stock, ac.FeatureCache(None).get(encoder, data.test), data.test)
    assert by_hand.probs == pytest.approx(half, abs=1e-5)
    with pytest.raises(AdaptclipError, match="other settings: lr"):
        main(replace(finished, lr=0.1))


def replace_model(backbone, model):
    return type(backbone)(model, backbone.tokenizer, name="merged")


def test_the_scale_is_chosen_on_validation_images(finished):
    assert main(replace(finished, lora_scale="validation")) == 0
    training = report(finished.out)["training"]
    curve = training["scale_curve"]
    assert [row["scale"] for row in curve] == [i / 10 for i in range(11)]
    assert {row["n"] for row in curve} == {10}
    best = max(row["accuracy"] for row in curve)
    chosen = min(row["scale"] for row in curve if row["accuracy"] == best)
    assert training["chosen"] == {"lora_scale": chosen}
    assert training["validation_used_for"] == "the scale of the update, 11 values (10 images)"
    assert report(finished.out)["split"]["validation_used_for"] == training["validation_used_for"]
    loaded_equals_live(finished.out)


def test_base_to_new(cfg):
    assert main(replace(cfg, base_to_new=True, lora_scale="validation", steps=2)) == 0
    live = judged(cfg.out)
    assert live.class_names == ("zero", "one", "two", "three", "four")
    assert report(cfg.out)["split"]["num_train"] == 5
    training = report(cfg.out)["training"]
    assert "(5 images and 5 of new classes)" in training["validation_used_for"]
    assert {row["new_n"] for row in training["scale_curve"]} == {5}
    info = report(cfg.out)["shift"]["base_new"]
    zero_shot = judged(cfg.out, "zero_shot_predictions")
    for key, base, new in (("model", live, ""), ("zero_shot", zero_shot, "zero_shot_")):
        of_new = judged(cfg.out, f"new_classes_{new}predictions")
        assert of_new.class_names == ("five", "six", "seven", "eight", "nine")
        assert len(base) + len(of_new) == TEST_IMAGES
        a, b = ((p.pred == p.labels).mean() for p in (base, of_new))
        assert info["base"][key]["value"] == pytest.approx(a)
        assert info["new"][key]["value"] == pytest.approx(b)
        assert info["harmonic_mean"][key]["value"] == pytest.approx(2 * a * b / (a + b) if a + b else 0)
    # The page shows it among what adaptation changed, and `adaptclip report` finds it in the run folder.
    shift = (cfg.out / "report.md").read_text().partition("## What adaptation changed")[2].partition("\n## ")[0]
    assert "| new classes |" in shift
    assert report_command(cfg.out, out=cfg.out.parent / "again.json") == 0
    assert json.loads((cfg.out.parent / "again.json").read_text())["shift"]["base_new"] == info


def test_the_text_tower_alone_trains_on_cached_features(cfg, tmp_path, monkeypatch):
    def no_pixels(*args, **kwargs):
        raise AssertionError("pixels were read for training")

    monkeypatch.setattr(PixelLoader, "__init__", no_pixels)
    assert main(replace(cfg, towers="text", cache=tmp_path / "cache")) == 0
    keys = [json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("key.json")]
    assert sorted(key.get("view", -1) for key in keys) == [-1, *range(10)]
    assert all(".visual." not in name for name in weights(cfg.out))
    loaded_equals_live(cfg.out)
    assert abs(judged(cfg.out).probs - judged(cfg.out, "zero_shot_predictions").probs).max() > 1e-3


def test_checkpointing_computes_the_same(cfg, without_dropout):
    assert main(replace(cfg, dropout=0.0, compute="checkpointing")) == 0
    nearly_the_same(weights(cfg.out), weights(without_dropout), lr=cfg.lr, steps=4)


def nearly_the_same(first: dict, second: dict, *, lr: float, steps: int) -> None:
    """Adam divides by the gradient's own size: where that is nearly 0, rounding decides the direction of a step."""
    assert list(first) == list(second)
    difference = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert len(difference) == 12 * 2 * 128
    assert (difference > 1e-5).double().mean() < 0.01
    assert difference.max() < 2 * lr * steps


def test_bf16_dora_on_chosen_layers(cfg):
    """Trained in bf16, judged in full precision, as the artifact is."""
    changed = {"variant": "dora", "projections": ("q", "v", "mlp"), "blocks": "top-1", "towers": "image", "alpha": 4.0}
    assert main(replace(cfg, mixed_precision="bf16", steps=2, **changed)) == 0
    learnt = weights(cfg.out)
    assert len(learnt) == 4 * 3
    assert all(".visual.transformer.resblocks.1." in name for name in learnt)
    assert all(value.dtype == torch.float32 for value in learnt.values())
    config = json.loads((cfg.out / "artifact" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"], config["lora_alpha"]) == (True, True, 4.0)
    loaded_equals_live(cfg.out)


def test_the_starter(cfg):
    assert main(replace(cfg, backbone="starter", steps=2, batch_size=10)) == 0
    loaded_equals_live(cfg.out, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projections": ("q", "kk")}, "unknown projection 'kk'. Did you mean"),
        ({"projections": ("conv",)}, "no 1x1 convolutions; name q, k, v, out, mlp"),
        ({"rank": 0}, "rank of LoRA must be a whole number from 1 up, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout at least 0 and below 1"),
        ({"blocks": "2"}, "it has 2, numbered from 0"),
        ({"blocks": "last"}, '"all", "top-4" or numbers'),
        ({"towers": "images"}, 'Did you mean "image"'),
        ({"lora_scale": 1.5}, "from 0 (zero-shot) to 1 (as trained), got 1.5"),
        ({"lora_scale": "valid"}, "number from 0 to 1"),
        ({"shots": -1}, "shots must be a whole number"),
        ({"mixed_precision": "fp16"}, "GPU"),
        ({"gates": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_wrong_input_is_said_before_there_is_a_run(cfg, changes, message):
    with pytest.raises(AdaptclipError) as error:
        main(replace(cfg, **changes))
    assert message in str(error.value)
    assert not cfg.out.exists()


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"lr": -1.0}, {"steps": -1}])
def test_wrong_numbers_of_training(cfg, changes):
    ((name, value),) = changes.items()
    with pytest.raises(AdaptclipError, match=rf"{name} .*must be .*got {value}"):
        main(replace(cfg, **changes))
    assert not (cfg.out / "artifact").exists()


def test_two_processes_equal_one(cfg, without_dropout):
    """The classes' prompts are shared out, so the gradients of both towers cross the processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = [
        "--backbone", cfg.backbone, "--shots", "1", "--steps", "4", "--lr", "0.02", "--batch-size", "2",
        "--dropout", "0", "--gates", cfg.gates, "--cache", str(cfg.cache), "--out", str(cfg.out), "--lora-scale", "1",
        "--projections", "q", "k", "v",
    ]  # fmt: skip
    command = [sys.executable, *launcher, str(ROOT / "recipes" / "lora.py"), *flags]
    result = subprocess.run(command, env={**CPU, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((cfg.out / "run.json").read_text())["num_processes"] == 2
    nearly_the_same(weights(cfg.out), weights(without_dropout), lr=cfg.lr, steps=4)
    one, two = judged(without_dropout), judged(cfg.out)
    rows = [two.ids.index(id_) for id_ in one.ids]
    assert len(rows) == TEST_IMAGES
    assert two.probs[rows] == pytest.approx(one.probs, abs=1e-5)
