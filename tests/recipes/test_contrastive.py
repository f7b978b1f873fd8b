# SPDX-License-Identifier: Apache-2.0
"""Contrastive tuning as a user runs it: class prompts, captions, the saved model, WiSE-FT, resume, two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from recipe_files import CPU, ROOT, load_recipe
from safetensors.torch import load_file

import adaptclip as ac
from adaptclip.errors import AdaptclipError
from adaptclip.predictions import Predictions

contrastive = load_recipe("contrastive")
coop = load_recipe("coop")


@pytest.fixture
def cfg(tiny, cache, tmp_path):
    """Two shots of digits, a random tiny model whose text tower learns, 6 steps."""
    return contrastive.Config(
        backbone=tiny, shots=2, epochs=3, batch_size=10, lr=1e-3, train="text", gates="report", save_every=2,
        cache=cache, out=tmp_path / "run",
    )  # fmt: skip


@pytest.fixture
def described(tmp_path) -> str:
    """A card of 24 plain images with two captions each and no classes."""
    shades = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 210), "grey": (120, 120, 120)}
    rows = []
    for i, (name, colour) in enumerate(list(shades.items()) * 6):
        picture = Image.effect_noise((40, 36), 60 + i).convert("RGB")
        Image.blend(picture, Image.new("RGB", picture.size, colour), 0.6).save(tmp_path / f"{i}.png")
        part = "train" if i < 12 else "validation" if i < 16 else "test"
        rows.append({"image": f"{i}.png", "split": part, "captions": [f"a {name} image", f"number {i}, {name}"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "described.md").write_text(
        "---\nadaptclip:\n  source: {kind: manifest, files: rows.jsonl}\n  splits: {column: split}\n"
        "  columns: {captions: captions}\n  allow: [similar_images]\n---\n"
    )
    return str(tmp_path / "described.md")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "open_clip_model.safetensors")


def test_class_prompts_leave_a_model_that_every_recipe_starts_from(cfg):
    assert contrastive.main(replace(cfg, train="both", lr=3e-3)) == 0
    names = {path.name for path in cfg.out.iterdir()}
    assert names >= {"run.json", "config.yaml", "split.json", "metrics.jsonl", "predictions.parquet", "report.md",
                     "zero_shot_predictions.parquet", "wise_ft.json", "model", "artifact"}  # fmt: skip
    assert not [p for p in cfg.out.rglob("*") if p.suffix in (".pkl", ".pt", ".pth", ".bin", ".tmp")]

    stock = open_clip.create_model(f"local-dir:{cfg.out / 'model'}", require_pretrained=True)
    saved = weights(cfg.out)
    assert all(torch.equal(value, saved[name]) for name, value in stock.state_dict().items())
    original = load_file(Path(cfg.backbone.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    assert sum(not torch.equal(saved[name], original[name]) for name in original) >= len(original) - 2

    model = ac.load(cfg.out, allow_failed_gates=True)
    judged = Predictions.load(cfg.out / "predictions.parquet")
    test = ac.open_data(ac.load_card("digits")).test
    live = model.probabilities([test.image(i) for i in range(20)]).numpy()
    assert live == pytest.approx(judged.probs[:20], abs=1e-5)

    curve = json.loads((cfg.out / "wise_ft.json").read_text())["curve"]
    assert [point["alpha"] for point in curve] == pytest.approx([i / 10 for i in range(11)])
    assert all(point["validation"]["accuracy"]["n"] == 20 for point in curve)
    report = json.loads((cfg.out / "report.json").read_text())
    assert report["training"]["chosen"] == {"wise_ft": 1.0}
    assert report["training"]["trainable_parameters"] == sum(v.numel() for v in original.values())

    onward = coop.Config(
        card="digits", backbone=f"local-dir:{cfg.out / 'model'}", shots=1, epochs=1, views=1, n_ctx=2, gates="report",
        cache=cfg.cache, out=cfg.out.parent / "coop",
    )  # fmt: skip
    assert coop.main(onward) == 0


def test_with_nothing_of_the_tuned_weights_the_model_is_the_one_before(cfg):
    assert contrastive.main(replace(cfg, wise_ft=0.0)) == 0
    original = load_file(Path(cfg.backbone.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    saved = weights(cfg.out)
    assert all(torch.equal(saved[name], value) for name, value in original.items())
    tuned, before = (Predictions.load(cfg.out / f"{n}predictions.parquet") for n in ("", "zero_shot_"))
    assert (tuned.probs == before.probs).all()
    ends = json.loads((cfg.out / "wise_ft.json").read_text())["curve"]
    assert ends[0] != ends[-1] | {"alpha": 0.0}, "the curve goes to the tuned model all the same"


@pytest.mark.parametrize(("train", "how"), [("text", "full"), ("both", "lora"), ("image", "full")])
def test_captions(cfg, described, train, how, capsys):
    # Low-rank additions start at 0 and a few steps must be seen in the ranks.
    lr = 0.1 if how == "lora" else cfg.lr
    caps = replace(cfg, card=described, shots=0, train=train, how=how, epochs=8, batch_size=6, lr=lr, wise_ft=0.5)
    assert contrastive.main(caps) == 0
    assert "12 images, 24 texts (0 of them cut" in capsys.readouterr().out
    found = json.loads((cfg.out / "retrieval.json").read_text())
    assert found["alpha"] == 0.5
    for model in ("before", "after"):
        assert found[model]["image_to_text"]["num_queries"] == 8
        assert found[model]["image_to_text"]["num_candidates"] == 16
        assert found[model]["text_to_image"]["R@10"] == {
            "value": 1.0, "low": pytest.approx(0.6756, abs=1e-4), "high": 1.0, "correct": 16, "n": 16,
        }  # fmt: skip
    assert found["before"] != found["after"]
    text = (cfg.out / "retrieval.md").read_text()
    assert "after, alpha = 0.5" in text
    assert "text to image R@5 (n = 16)" in text
    assert not (cfg.out / "predictions.parquet").exists()
    original = load_file(Path(cfg.backbone.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    changed = {
        name.split(".")[0] == "visual" for name, value in weights(cfg.out).items() if (value != original[name]).any()
    }
    assert changed - {False} == (set() if train == "text" else {True})
    if train == "text":
        curve = json.loads((cfg.out / "wise_ft.json").read_text())["curve"]
        assert curve[0]["validation"]["image_to_text"]["num_queries"] == 4
        (half,) = (p for p in curve if p["alpha"] == 0.5)
        assert half["validation"] != curve[0]["validation"]


def test_a_second_card_shows_what_was_forgotten(cfg, described):
    caps = replace(cfg, card=described, shots=0, zero_shot_card="digits", epochs=1)
    contrastive.main(caps)
    curve = json.loads((cfg.out / "wise_ft.json").read_text())["curve"]
    assert {point["digits"]["accuracy"]["n"] for point in curve} == {720}
    assert "## WiSE-FT: digits" in (cfg.out / "wise_ft.md").read_text()


def test_interrupted_and_resumed_equals_undisturbed(cfg, described, monkeypatch):
    caps = replace(cfg, card=described, shots=0, train="both", epochs=3, batch_size=4)
    contrastive.main(replace(caps, out=cfg.out.parent / "whole"))
    save = ac.save_checkpoint
    with monkeypatch.context() as patch:

        def save_and_stop(folder, step, *rest):
            save(folder, step, *rest)
            if step == 4:
                raise KeyboardInterrupt

        patch.setattr(ac, "save_checkpoint", save_and_stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            contrastive.main(caps)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert contrastive.main(replace(caps, resume=True)) == 0
    whole, resumed = weights(cfg.out.parent / "whole"), weights(cfg.out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_equal_one(cfg, described):
    caps = replace(cfg, card=described, shots=0, batch_size=4, epochs=2)
    contrastive.main(replace(caps, out=cfg.out.parent / "one"))
    values = {k: v for k, v in vars(replace(caps, batch_size=2)).items() if v not in (None, False, "")}
    flags = [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(ROOT / "recipes" / "contrastive.py"), *flags],
        env={**CPU, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((cfg.out / "run.json").read_text())["num_processes"] == 2
    one, two = weights(cfg.out.parent / "one"), weights(cfg.out)
    original = load_file(Path(cfg.backbone.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    assert any(not torch.allclose(one[name], original[name], atol=1e-4) for name in one), "it learnt"
    # Adam divides by the gradient's own size, so where that is nearly 0 rounding decides the direction of a step.
    steps = 2 * 3 * cfg.lr
    for name in one:
        difference = (one[name] - two[name]).abs()
        assert difference.max() <= 2 * steps, name
        assert difference.float().mean() < 0.01 * steps, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wise_ft": 1.5}, "between 0"),
        ({"loss": "siglip"}, "logit bias"),
        ({"zero_shot_card": "imagenet"}, "imagenet"),
        ({"shots": -1}, "shots"),
        ({"batch_size": -1}, "batch_size"),
        ({"lr": 0.0}, "lr must be"),
        ({"how": "lora", "rank": 0}, "rank"),
    ],
)
def test_wrong_input_is_said_at_once_and_leaves_nothing(cfg, changes, message):
    with pytest.raises(AdaptclipError, match=message):
        contrastive.main(replace(cfg, **changes))
    assert not (cfg.out / "model").exists()


def test_a_card_without_classes_cannot_be_classified(cfg, described):
    with pytest.raises(AdaptclipError, match="captions and no classes"):
        coop.main(coop.Config(card=described, backbone=cfg.backbone, cache=cfg.cache, out=cfg.out))
