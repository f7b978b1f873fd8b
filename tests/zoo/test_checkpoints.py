# SPDX-License-Identifier: Apache-2.0
"""Weights and artifacts as people have them on disk: what becomes of each kind is written beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import write_tiny_checkpoint

from adaptclip.artifact import load
from adaptclip.clip import load_backbone
from adaptclip.errors import AdaptclipError, ArtifactError, BackboneError

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("zoo") / "tiny")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def replaced(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Puts the weights into a file of another name, changed."""

    def make(folder: Path) -> None:
        tensors = state(folder)
        (folder / WEIGHTS).unlink()
        made = change(tensors)
        if name.endswith(".safetensors"):
            assert isinstance(made, dict)
            save_file(made, folder / name)
        else:
            torch.save(made, folder / name)

    return make


def config(**changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / "open_clip_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return make


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


SAME: dict[str, Callable[[Path], object]] = {
    "open_clip's own folder": lambda folder: None,
    "the pickle of older versions": replaced("open_clip_pytorch_model.bin", dict),
    "a file of another name": replaced("my_weights.safetensors", dict),
    "a training checkpoint": replaced("epoch_30.pth", lambda t: {"epoch": 30, "state_dict": t, "optimizer": {}}),
    "a checkpoint of several GPUs": replaced("epoch_1.pth", lambda t: {f"module.{k}": v for k, v in t.items()}),
    "a compiled model": replaced("epoch_1.pt.pth", lambda t: {"model": {f"_orig_mod.{k}": v for k, v in t.items()}}),
    "a checkpoint of Lightning": replaced(
        "last.pth", lambda t: {"state_dict": {f"clip_model.{k}": v for k, v in t.items()}}
    ),
    "an average alone": replaced("ema.pth", lambda t: {"ema": {f"module.{k}": v for k, v in t.items()}, "step": 9}),
    "more files beside it": lambda folder: (folder / "README.md").write_text("words") and None,
    "optimizer state beside it": lambda folder: torch.save({"step": 1}, folder / "optimizer.pt"),
    "a hidden file beside it": lambda folder: (folder / "._open_clip_model.safetensors").write_bytes(b"x") and None,
}
"""Kind -> how it is made of a folder whose model it must still be."""

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no weights"),
    "no configuration": (lambda f: (f / "open_clip_config.json").unlink(), "has no open_clip_config.json"),
    "configuration of another library": (
        lambda f: (f / "open_clip_config.json").write_text('{"model_type": "clip"}'), "needs a model_cfg",
    ),
    "a folder of transformers that is no CLIP": (
        lambda f: (f / "open_clip_config.json").rename(f / "config.json").write_text('{"model_type": "bert"}'),
        "of the kind 'bert'",
    ),
    "configuration that is no JSON": (
        lambda f: (f / "open_clip_config.json").write_text("model:"), "cannot|not JSON|JSON",
    ),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "."),
    "cut-off file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:9999]), "."),
    "Git LFS pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), ".",
    ),
    "saved web page": (lambda f: (f / WEIGHTS).write_text("<!doctype html>" * 99), "."),
    "an adapter alone": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.safetensors"), "is an adapter"),
    "two candidates": (
        lambda f: (shutil.copy(f / WEIGHTS, f / "a.safetensors"), (f / WEIGHTS).rename(f / "b.safetensors")),
        "several files that could be the weights",
    ),
    "image tower alone": (
        replaced(WEIGHTS, lambda t: {k: v for k, v in t.items() if k.startswith("visual.")}),
        "image tower alone: the text tower is missing",
    ),
    "the weights and their average": (
        replaced("both.pth", lambda t: {"model": t, "ema": dict(t)}), "holds 2 models: model, ema",
    ),
    "adapters that are not merged": (
        replaced("lora.pth", lambda t: {**t, "visual.proj.lora_A.weight": torch.zeros(2)}), "not merged",
    ),
    "shards of which one is missing": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
        and (f / WEIGHTS).unlink(), "shards of .* no such file",
    ),
    "one tensor of another size": (
        replaced(WEIGHTS, lambda t: {**t, "text_projection": t["text_projection"][:, :-1].contiguous()}), "size|shape",
    ),
    "more tensors than the model has": (
        replaced(WEIGHTS, lambda t: {**t, "extra.weight": torch.zeros(2)}), "[Uu]nexpected|unknown|extra",
    ),
    "a folder that is not there": (shutil.rmtree, "is not a folder"),
}  # fmt: skip
"""Kind -> how it is made, and what the error says ("." where the words are those of the library that reads)."""


@pytest.mark.parametrize("kind", SAME)
def test_the_same_model_comes_out(kind, original, tmp_path):
    shutil.copytree(original, tmp_path / "m")
    SAME[kind](tmp_path / "m")
    assert load_backbone(f"local-dir:{tmp_path / 'm'}").digest == load_backbone(f"local-dir:{original}").digest


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, original, tmp_path):
    shutil.copytree(original, tmp_path / "m")
    make, message = REFUSED[kind]
    make(tmp_path / "m")
    with pytest.raises(BackboneError, match=message):
        load_backbone(f"local-dir:{tmp_path / 'm'}")


def test_half_precision_is_read_as_the_numbers_it_holds(original, tmp_path):
    shutil.copytree(original, tmp_path / "m")
    replaced(WEIGHTS, half)(tmp_path / "m")
    model, whole = (load_backbone(f"local-dir:{path}") for path in (tmp_path / "m", original))
    assert next(model.parameters()).dtype == torch.float32
    x = torch.zeros(1, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(x), whole.encode_image(x), atol=5e-3, rtol=0)
    assert model.digest != whole.digest


def test_a_folder_without_preprocessing_warns(original, tmp_path):
    shutil.copytree(original, tmp_path / "m")
    config(preprocess_cfg={})(tmp_path / "m")
    with pytest.warns(UserWarning, match="has no preprocess_cfg: OpenAI's mean"):
        load_backbone(f"local-dir:{tmp_path / 'm'}")


NO_ARTIFACT: dict[str, Callable[[Path], object]] = {
    "an empty folder": lambda f: f.mkdir(),
    "no folder": lambda f: None,
    "a file": lambda f: f.write_text("x"),
    "a run that did not finish": lambda f: ((f / "checkpoints").mkdir(parents=True), (f / "run.json").write_text("{}")),
    "a PEFT folder": lambda f: (f.mkdir(), (f / "adapter_config.json").write_text("{}")),
    "a backbone": lambda f: (f.mkdir(), (f / "open_clip_config.json").write_text("{}")),
    "an empty manifest": lambda f: (f.mkdir(), (f / "manifest.json").write_text("{}")),
    "a web page for a manifest": lambda f: (f.mkdir(), (f / "manifest.json").write_text("<html>")),
}
"""Kind -> what lies where an artifact should be."""


@pytest.mark.parametrize("kind", NO_ARTIFACT)
def test_what_is_no_artifact(kind, tmp_path):
    NO_ARTIFACT[kind](tmp_path / "a")
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path / "a")
    assert isinstance(caught.value, AdaptclipError)
    assert str(tmp_path / "a") in str(caught.value)


def test_the_zoo_is_large_enough():
    assert len(SAME) + len(REFUSED) + len(NO_ARTIFACT) + 2 >= 30
