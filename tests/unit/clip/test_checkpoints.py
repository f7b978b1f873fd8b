# SPDX-License-Identifier: Apache-2.0
"""Weights in other people's wrappers: the same model comes out, or the error says which models there are."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import load_file, save_file
from tiny_clip import ARCHITECTURE, tiny_config, write_tiny_checkpoint
from torch._utils import _rebuild_tensor_v2

from adaptclip.clip import load_backbone
from adaptclip.clip.checkpoints import read_weights, split_choice
from adaptclip.clip.fitting import nearest
from adaptclip.errors import BackboneError

State = dict[str, torch.Tensor]


@pytest.fixture
def tensors(weights) -> State:
    return load_file(weights)


def prefixed(prefix: str, tensors: State) -> State:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def load(file: Path | str) -> Any:
    return load_backbone(ARCHITECTURE, str(file), quick_gelu=True)


# -- wrappers ----------------------------------------------------------------------------------------------------------

WRAPPERS = {
    "DDP": lambda t: prefixed("module.", t),
    "torch.compile": lambda t: prefixed("_orig_mod.", t),
    "compiled under DDP": lambda t: prefixed("module._orig_mod.", t),
    "a compiled image tower": lambda t: {k.replace("visual.", "visual._orig_mod."): v for k, v in t.items()},
    "FSDP": lambda t: {k.replace(".resblocks.", "._fsdp_wrapped_module.resblocks."): v for k, v in t.items()},
    "an attribute": lambda t: prefixed("clip_model.", t),
    "attributes in attributes": lambda t: prefixed("model.module.net.clip.", t),
    "state_dict": lambda t: {"state_dict": t, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": t["ln_final.bias"]}}}},
    "model": lambda t: {"model": t, "optimizer": {"state": {}, "param_groups": []}, "args": {"lr": 1e-4}},
    "model_state_dict": lambda t: {"model_state_dict": prefixed("module.", t)},
    "an average alone": lambda t: {"ema": t},
    "torch's averaged model": lambda t: {"n_averaged": torch.tensor(5), **prefixed("module.", t)},
    "Lightning": lambda t: {
        "state_dict": prefixed("model.", t), "pytorch-lightning_version": "2.0", "epoch": 1, "callbacks": {},
        "optimizer_states": [{"state": {}}],
    },
    "nested twice": lambda t: {"checkpoint": {"model": prefixed("_orig_mod.", t)}},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_weights_are_the_same_model(kind, tensors, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(WRAPPERS[kind](tensors), file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = read_weights(file, what="it")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_open_clip_builds_its_model_of_them(architecture, weights, tensors, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(WRAPPERS["Lightning"](tensors), file)
    assert load(file).digest == load(weights).digest


def test_what_lies_outside_of_the_clip_is_left_out_and_said(tensors, tmp_path):
    save_file({**prefixed("model.", tensors), "loss.weight": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors of .* outside of the CLIP in it \(model\.\*\).*loss\.weight"):
        assert set(read_weights(tmp_path / "w.safetensors", what="it")) == set(tensors)


def test_where_there_are_two_models_one_has_to_be_named(architecture, weights, tensors, tmp_path):
    def bias(choice: str) -> float:
        return float(read_weights(file, what="it", choice=choice)["ln_final.bias"][0])

    averaged = {name: value + 0.01 for name, value in tensors.items()}
    file = tmp_path / "two.pt"
    torch.save({"model": tensors, "ema": prefixed("module.", averaged)}, file)
    with pytest.raises(BackboneError, match=r"holds 2 models: model, ema\. Say which: `--pretrained two\.pt#model`"):
        load(file)
    assert load(f"{file}#model").digest == load(weights).digest
    assert bias("ema") == pytest.approx(bias("model") + 0.01)
    with pytest.raises(BackboneError, match=r"holds no model \'emma\'\. Did you mean \"ema\"\?"):
        load(f"{file}#emma")
    torch.save({**prefixed("student.", tensors), **prefixed("teacher.", averaged)}, file)
    with pytest.raises(BackboneError, match="holds 2 models: student, teacher"):
        read_weights(file, what="it")
    assert bias("teacher") == pytest.approx(bias("student") + 0.01)


def test_a_file_may_have_the_mark_in_its_name(tmp_path):
    file = tmp_path / "run#3.pt"
    assert split_choice(str(file)) == (tmp_path / "run", "3.pt")
    file.touch()
    assert split_choice(str(file)) == (file, "")
    assert split_choice(f"{file}#ema") == (file, "ema")


def test_adapters_that_are_not_merged_and_names_that_come_twice(tensors, tmp_path):
    file = tmp_path / "w.pt"
    torch.save({**tensors, "visual.transformer.resblocks.0.attn.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(BackboneError, match=r"LoRA adapters that are not merged.*merge_and_unload"):
        read_weights(file, what="it")
    torch.save({**tensors, "module.ln_final.bias": torch.zeros(64)}, file)
    with pytest.raises(BackboneError, match=r"has ln_final\.bias twice, once as module\.ln_final\.bias"):
        read_weights(file, what="it")


def test_shards(architecture, weights, tensors, tmp_path):
    names = sorted(tensors)
    halves = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in halves.items() for name in own}}))
    assert load(index).digest == load(weights).digest
    for text, message in (
        ('{"weight_map": {"a": "../x.safetensors"}}', "not one in this folder"),
        ('{"weight_map": {"a": "none.safetensors"}}', "no such file"),
        ('{"weight_map": {"a": "a-00001-of-00002.safetensors"}}', "lacks a, which"),
        ('{"weight_map": []}', "a weight_map of tensors to files"),
        ("{", "cannot be read"),
    ):
        index.write_text(text)
        with pytest.raises(BackboneError, match=message):
            load(index)


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_one_tower_alone_is_named(architecture, tensors, tmp_path):
    image = {name: value for name, value in tensors.items() if name.startswith("visual.")}
    parts = {
        "image": image,
        "bare": {name.removeprefix("visual."): value for name, value in image.items()},
        "text": {name: value for name, value in tensors.items() if name not in image},
    }
    for name, own in parts.items():
        save_file(own, tmp_path / "part.safetensors")
        message = "holds the text tower alone" if name == "text" else r"holds the image tower alone.*wrap_clip"
        with pytest.raises(BackboneError, match=message):
            load(tmp_path / "part.safetensors")


def test_the_nearest_architecture_is_named(architecture, monkeypatch, tmp_path):
    other = {**tiny_config(width=128), "embed_dim": 32}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny-Other", other)
    file = write_tiny_checkpoint(tmp_path / "m", width=128, embed_dim=32) / "open_clip_model.safetensors"
    with pytest.raises(BackboneError, match=r"does not fit the architecture.*By its shapes it is of Tiny-Other\. Name"):
        load(file)
    file = write_tiny_checkpoint(tmp_path / "n", width=128) / "open_clip_model.safetensors"
    with pytest.raises(
        BackboneError, match=r"The nearest .* is Tiny-T-8, which differs in: text width 128 here\. Name"
    ):
        load(file)


@pytest.mark.parametrize(
    "name", ["ViT-B-16", "ViT-L-14-336", "RN50x4", "ViT-B-16-SigLIP2-256", "EVA02-B-16", "ViT-H-14"]
)
def test_published_architectures_are_known_by_their_shapes(name):
    with torch.device("meta"):
        config = {key: value for key, value in (open_clip.get_model_config(name) or {}).items() if key != "custom_text"}
        custom = (open_clip.get_model_config(name) or {}).get("custom_text")
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    sentence = nearest(model.state_dict())
    assert sentence.startswith("By its shapes it is of ")
    assert name in sentence.partition("of ")[2].rstrip(". ").split(", ")


def test_a_bias_of_the_logits_where_the_architecture_has_none(architecture, tensors, tmp_path):
    save_file({**tensors, "logit_bias": torch.tensor(-10.0)}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"has a logit_bias, as SigLIP has.*By its shapes it is of Tiny-T-8"):
        load(tmp_path / "w.safetensors")


def test_a_checkpoint_of_own_training_with_objects_says_how_to_save_it(architecture, tensors, tmp_path):
    import argparse

    torch.save({"state_dict": tensors, "args": argparse.Namespace(lr=1)}, tmp_path / "run.pt")
    with pytest.raises(BackboneError, match=r"would run code.*argparse\.Namespace.*save_file\(model\.state_dict"):
        load(tmp_path / "run.pt")


# -- TorchScript -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """An archive as OpenAI published CLIP: traced, in half precision, with three sizes among its buffers."""
    folder = tmp_path_factory.mktemp("program")
    model: Any = open_clip.CLIP(**tiny_config()).eval()
    state = load_file(write_tiny_checkpoint(folder / "m") / "open_clip_model.safetensors")
    model.load_state_dict({name: value.half().float() for name, value in state.items()})
    for name, size in {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(
            model, (torch.zeros(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long)), check_trace=False
        )
        torch.jit.save(traced.half(), str(folder / "ViT-tiny.pt"))
    return folder / "ViT-tiny.pt"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_openais_archives_are_read_without_their_program(program, architecture, tmp_path):
    ours = read_weights(program, what="it")
    theirs = torch.jit.load(str(program)).state_dict()
    assert set(ours) == set(theirs) - {"input_resolution", "context_length", "vocab_size", "attn_mask"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    half = load_file(program.parent / "m" / "open_clip_model.safetensors")
    save_file({name: value.half() for name, value in half.items()}, tmp_path / "half.safetensors")
    assert load(program).digest == load(tmp_path / "half.safetensors").digest


class _Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def damaged(program: Path, target: Path, change) -> Path:
    """A copy of an archive with another list of modules."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info, change(content) if info.filename.endswith("/data.pkl") else content)
    return target


def test_hostile_programs(program, architecture, tmp_path):
    witness = tmp_path / "executed"
    evil = damaged(program, tmp_path / "evil.pt", lambda content: pickle.dumps(_Hostile(witness)))
    with pytest.raises(BackboneError, match=r"would run code .*Path.*nothing in it was run"):
        load(evil)
    assert not witness.exists()
    # Modules that hold each other, twice each: names without end in a few bytes.
    part, loop = b"c__torch__.A\nB\n)\x81", b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u"
    endless = damaged(program, tmp_path / "endless.pt", lambda _: b"\x80\x02" + part + b"q\x00" + loop + b"b.")
    with pytest.raises(BackboneError, match="damaged, or a pickle of more than weights"):
        load(endless)
    for number, change in enumerate((lambda c: c[: len(c) // 2], lambda _: b"", lambda _: b"\x80\x02K\x01.")):
        with pytest.raises(BackboneError, match=r"damaged|does not fit|pickle of more"):
            load(damaged(program, tmp_path / f"{number}.pt", change))


def test_a_tensor_cannot_be_larger_than_what_is_stored(program, tmp_path):
    """A view with strides of 0 costs nothing until somebody copies it."""
    buffer = io.BytesIO()

    class Writer(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 1) if obj is storage else None

    storage, view = io.StringIO(), _rebuild_tensor_v2

    class Large:
        def __reduce__(self):
            return view, (storage, 0, (10**6, 10**6), (0, 0), False, None)

    Writer(buffer, protocol=2).dump(Large())
    bomb = damaged(program, tmp_path / "bomb.pt", lambda _: buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError, match=r"more numbers than its storage|as torch writes it"):
        read_weights(bomb, what="it")


def test_folders_take_wrapped_weights_too(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    state = load_file(tmp_path / "m" / "open_clip_model.safetensors")
    (tmp_path / "m" / "open_clip_model.safetensors").unlink()
    torch.save({"model": prefixed("_orig_mod.", state)}, tmp_path / "m" / "epoch_9.pth")
    assert load_backbone(f"local-dir:{tmp_path / 'm'}").digest == load_backbone(f"local-dir:{folder}").digest
