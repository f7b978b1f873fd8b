# SPDX-License-Identifier: Apache-2.0
"""The main job as a user runs it: the recipes as scripts, killed, resumed, on two processes, and with wrong input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_files import CPU, ROOT, load_recipe
from safetensors.torch import load_file

import adaptclip as ac
from adaptclip.cli import main
from adaptclip.entrypoint import run_and_exit
from adaptclip.errors import AdaptclipError
from adaptclip.predictions import Predictions
from adaptclip.seals import check_run

coop = load_recipe("coop")
cocoop = load_recipe("cocoop")
zero_shot = load_recipe("zero_shot")


@pytest.fixture
def cfg(tiny, cache, tmp_path):
    """Two shots of digits, a random tiny model, 10 steps."""
    return coop.Config(
        backbone=tiny, shots=2, epochs=10, views=2, batch_size=20, n_ctx=4, lr=0.02, gates="report", save_every=3,
        cache=cache, out=tmp_path / "run",
    )  # fmt: skip


def flags(cfg, **changes) -> list[str]:
    """The command-line flags of a configuration."""
    values = {k: v for k, v in vars(replace(cfg, **changes)).items() if v not in (None, False)}
    pairs = [[f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)]) for k, v in values.items()]
    return [part for pair in pairs for part in pair]


def script(cfg, *launcher: str, **changes) -> list[str]:
    return [sys.executable, *launcher, str(ROOT / "recipes" / "coop.py"), *flags(cfg, **changes)]


def context(run: Path) -> torch.Tensor:
    return load_file(run / "artifact" / "adapter.safetensors")["context"]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_folder_that_explains_itself(cfg, capsys):
    assert coop.main(cfg) == 0
    shown = capsys.readouterr().out
    names = {path.name for path in cfg.out.iterdir()}
    assert names >= {
        "config.yaml", "split.json", "metrics.jsonl", "checkpoints", "predictions.parquet", "report.json", "report.md",
        "zero_shot_predictions.parquet", "gates.yaml", "artifact", "run.json",
    }  # fmt: skip
    judged = Predictions.load(cfg.out / "predictions.parquet")
    report = json.loads((cfg.out / "report.json").read_text())
    judged_files = {name for name in names if name.endswith("predictions.parquet")}
    assert set(report["files"]) == {*judged_files, "gates.yaml", "artifact/manifest.json"}
    check_run(cfg.out, report["files"])
    accuracy = report["overall"]["accuracy"]["model"]
    assert accuracy["n"] == len(judged) > 500
    assert accuracy["value"] == pytest.approx((judged.pred == judged.labels).mean())
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert set(judged.groups) == {"stroke_weight"}
    assert report["split"]["shots"] == 2
    assert report["split"]["num_train"] == 20
    assert "stroke_weight" in shown
    assert lines(cfg.out)[-1]["step"] == 10
    assert not [p for p in cfg.out.rglob("*") if p.suffix in (".pkl", ".pt", ".pth", ".bin", ".tmp")]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_artifact_predicts_as_the_run_did(cfg, tmp_path, mixed_precision):
    coop.main(replace(cfg, mixed_precision=mixed_precision))
    judged = Predictions.load(cfg.out / "predictions.parquet")
    test = ac.open_data(ac.load_card("digits")).test
    images = [test.image(i) for i in range(40)]
    model = ac.load(cfg.out, allow_failed_gates=True)
    live = model.probabilities(images).numpy()
    assert live == pytest.approx(judged.probs[:40], abs=1e-5)
    images[0].save(tmp_path / "one.png")
    (prediction,) = model.predict([tmp_path / "one.png"])
    assert prediction.label == judged.class_names[judged.pred[0]]
    assert prediction.confidence == pytest.approx(judged.probs[0].max(), abs=1e-5)
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert model.predict([images[0]])[0].probabilities == pytest.approx(prediction.probabilities, abs=1e-6)


def loaded_and_live(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of 20 test images: from the artifact, and as the run judged them."""
    test = ac.open_data(ac.load_card("digits")).test
    model = ac.load(run, allow_failed_gates=True)
    judged = Predictions.load(run / "predictions.parquet").probs[:20]
    return model.probabilities([test.image(i) for i in range(20)]).numpy(), judged


@pytest.mark.parametrize("position", ["csc-middle", "front"])
def test_variants_of_the_prompt(cfg, position):
    assert coop.main(replace(cfg, position=position)) == 0
    loaded, live = loaded_and_live(cfg.out)
    assert loaded == pytest.approx(live, abs=1e-5)
    shape = (10, 4, 64) if position == "csc-middle" else (4, 64)
    assert context(cfg.out).shape == shape
    training = json.loads((cfg.out / "report.json").read_text())["training"]
    assert training["trainable_parameters"] == np.prod(shape)
    assert training["validation_used_for"] == "nothing"
    assert training["schedule"].startswith("10 steps (10 epochs)")
    assert training["seconds"] > 0
    words = training["nearest_words"]
    read = words["seven"] if position == "csc-middle" else words
    assert [len(of_vector) for of_vector in read] == [3] * 4


def test_cocoop_runs_and_its_artifact_predicts_as_it_did(cfg):
    settings = {
        k: v for k, v in vars(cfg).items() if k not in ("position", "kg_weight", "n_ctx", "objective", "preset")
    }
    own = cocoop.Config(**{**settings, "ctx_init": "a photo of a", "epochs": 2, "batch_size": 4, "accumulate": 2})
    assert cocoop.main(own) == 0
    loaded, live = loaded_and_live(own.out)
    assert loaded == pytest.approx(live, abs=1e-5)
    report = json.loads((own.out / "report.json").read_text())
    # 20 images, 8 of them at a time, twice; context, and D -> D / 16 -> T for D = 48 and T = 64.
    assert report["training"]["schedule"].startswith("4 steps (2 epochs)")
    assert report["training"]["trainable_parameters"] == 4 * 64 + 48 * 3 + 3 + 3 * 64 + 64
    assert [words[0].split()[0] for words in report["training"]["nearest_words"]] == ["a", "photo", "of", "a"]
    state = load_file(own.out / "artifact" / "adapter.safetensors")
    assert set(state) >= {"context", "meta_net.0.weight", "meta_net.2.bias"}


def test_two_processes_equal_one(cfg, tmp_path):
    one = replace(cfg, out=tmp_path / "one")
    two = replace(cfg, out=tmp_path / "two", batch_size=10)
    subprocess.run(script(one), env=CPU, check=True, capture_output=True)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = subprocess.run(
        script(two, *launcher), env={**CPU, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((two.out / "run.json").read_text())["num_processes"] == 2
    assert torch.allclose(context(one.out), context(two.out), atol=1e-5)
    a, b = (Predictions.load(run.out / "predictions.parquet") for run in (one, two))
    assert a.ids == b.ids
    assert a.probs == pytest.approx(b.probs, abs=1e-5)
    alone = subprocess.run(script(two, *launcher, overwrite=True), env=CPU, capture_output=True, text=True)
    assert alone.returncode != 0
    assert "ACCELERATE_USE_CPU=true" in alone.stderr


def test_ctrl_c_leaves_a_checkpoint_and_a_hint(cfg):
    long = replace(cfg, epochs=5000)
    # A job in the background inherits that Ctrl-C is ignored; the process under test must not.
    process = subprocess.Popen(
        script(long), env=CPU, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list((cfg.out / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert list((cfg.out / "checkpoints").glob("step-*.safetensors"))


def test_an_occupied_run_folder(cfg):
    coop.main(cfg)
    before = context(cfg.out)
    with pytest.raises(AdaptclipError, match="--resume"):
        coop.main(cfg)
    with pytest.raises(AdaptclipError, match="seed"):
        coop.main(replace(cfg, resume=True, seed=2))
    assert torch.equal(before, context(cfg.out))
    assert coop.main(replace(cfg, resume=True)) == 0
    assert torch.equal(before, context(cfg.out))
    assert coop.main(replace(cfg, overwrite=True, seed=2)) == 0
    assert not torch.equal(before, context(cfg.out))


def test_a_loss_that_is_not_finite_names_the_step(cfg):
    with pytest.raises(AdaptclipError, match=r"step \d+ is not finite"):
        coop.main(replace(cfg, lr=1e30))
    assert (cfg.out / "metrics.jsonl").exists()
    assert not (cfg.out / "artifact").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"card": "digit"}, 'Did you mean "digits"'),
        ({"backbone": "ViT-B-61", "pretrained": "openai"}, 'Did you mean "ViT-B-16"'),
        ({"backbone": "ViT-B-16", "pretrained": "opena"}, 'Did you mean "openai"'),
        ({"backbone": "ViT-B-16", "pretrained": "openai"}, "HF_HUB_OFFLINE"),
        ({"card": "oxford_pets"}, "HF_HUB_OFFLINE"),
        ({"backbone": "local-dir:nowhere"}, "nowhere"),
        ({"shots": -1}, "shots"),
        ({"n_ctx": 90}, "context"),
        ({"position": "csc-midle"}, 'Did you mean "middle"'),
        ({"gates": "nowhere.yaml"}, "nowhere.yaml"),
        ({"mixed_precision": "fp16"}, "GPU"),
        ({"trackers": "tensorbord"}, 'Did you mean "tensorboard"'),
        ({"batch_size": -1}, "batch_size"),
        ({"data_root": Path("nowhere"), "card": "flowers17"}, "nowhere"),
    ],
)
def test_wrong_input_is_said_at_once_and_leaves_nothing(cfg, changes, message):
    started = time.monotonic()
    with pytest.raises(AdaptclipError, match=message) as caught:
        coop.main(replace(cfg, **changes))
    assert time.monotonic() - started < 20
    assert len(str(caught.value)) < 1200
    assert not (cfg.out / "artifact").exists()


def test_a_folder_of_images_is_a_card(cfg, tmp_path, capsys):
    colours = {"żółty": (230, 210, 40), "grün": (30, 160, 60), "blue": (40, 60, 200)}
    for name, colour in colours.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            shade = tuple(min(255, c + 3 * i) for c in colour)
            picture = Image.effect_noise((40, 36), 40 + i).convert("RGB")
            Image.blend(picture, Image.new("RGB", picture.size, shade), 0.5).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    folder = replace(cfg, card=str(tmp_path / "images"))
    assert coop.main(folder) == 0
    assert set(Predictions.load(cfg.out / "predictions.parquet").class_names) == set(colours)
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(cfg.out), str(tmp_path / "images" / "blue"), "--format", "jsonl"])
    assert stop.value.code == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) == 12
    assert {row["label"] for row in rows} <= set(colours)


def test_gates_decide_the_exit_code(cfg, tmp_path):
    (tmp_path / "strict.yaml").write_text("gates:\n- {metric: accuracy, at_least: 0.999}\n")
    (tmp_path / "loose.yaml").write_text("gates:\n- {metric: accuracy, at_least: 0.001}\n")
    assert coop.main(replace(cfg, gates=str(tmp_path / "loose.yaml"))) == 0
    assert coop.main(replace(cfg, gates=str(tmp_path / "strict.yaml"), overwrite=True)) == 2
    with pytest.raises(AdaptclipError, match="allow_failed_gates"):
        ac.load(cfg.out)
    assert ac.load(cfg.out, allow_failed_gates=True).class_names
    for gates, code in (("loose", 0), ("strict", 2)):
        with pytest.raises(SystemExit) as stop:
            main(["gate", str(cfg.out), "--gates", str(tmp_path / f"{gates}.yaml")])
        assert stop.value.code == code


def test_zero_shot_recipe_equals_the_baseline_of_coop(cfg):
    coop.main(cfg)
    alone = zero_shot.Config(backbone=cfg.backbone, cache=cfg.cache, out=cfg.out.parent / "zero")
    assert zero_shot.main(alone) == 0
    a = Predictions.load(cfg.out / "zero_shot_predictions.parquet")
    b = Predictions.load(alone.out / "predictions.parquet")
    assert a.ids == b.ids
    assert (a.probs == b.probs).all()


def test_errors_end_in_one_message_and_code_1(capsys):
    def fails() -> int:
        raise AdaptclipError("what, got, allowed")

    with pytest.raises(SystemExit) as stop:
        run_and_exit(fails)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "\nerror: what, got, allowed\n"


def test_the_published_lengths(tiny):
    """CoOp's epochs by shots, in batches of 32; with its weight KgCoOp's 100, of 128; what is given stays."""
    backbone = ac.load_backbone(tiny)
    plain, kg = (ac.CoOp(backbone, ["cat", "dog"], n_ctx=2, kg_weight=weight) for weight in (0.0, 8.0))
    for shots, epochs in ((1, 50), (4, 100), (16, 200), (0, 50)):
        assert asdict(plain.schedule(shots)) == {"epochs": epochs, "views": None, "lr": 2e-3, "batch_size": 32}
        assert asdict(kg.schedule(shots)) == {"epochs": 100, "views": None, "lr": 2e-3, "batch_size": 128}
    given = kg.schedule(16, epochs=7, views=3, batch_size=16)
    assert (given.epochs, given.views, given.batch_size) == (7, 3, 16)
    short = kg.schedule(16, preset="smoke")
    assert (short.epochs, short.views, short.batch_size) == (50, 5, 128)  # smoke, but for the batch
