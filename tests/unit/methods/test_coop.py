# SPDX-License-Identifier: Apache-2.0
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.clip import ClipBackbone
from adaptclip.errors import AdaptclipError, ArtifactError, ConfigError, DataError
from adaptclip.methods import CoOp
from adaptclip.methods.registry import methods
from adaptclip.prompts import zero_shot_weights
from adaptclip.types import Batch

NAMES = ("rose", "lily_of the valley", "Größe 42", "dog", "cat", "northern hairy-nosed wombat", "fox")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models are faster on one thread, by far when other work runs beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["clip", "custom_text"])
def backbone(request):
    return make_tiny_backbone(request.param, quick_gelu=request.param == "clip")


def batch_of(backbone, size=6, classes=7, seed=0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(size, backbone.embed_dim, generator=generator), dim=-1)
    labels = torch.randint(0, classes, (size,), generator=generator)
    return Batch(labels=labels, index=torch.arange(size), features=features)


def context_gradient(coop, batch):
    coop.zero_grad()
    loss = F.cross_entropy(coop(batch), batch.labels)
    (loss + coop.penalty()).backward()
    return coop.context.grad.clone()


# What it computes


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("words", ["a photo of a", "an_X-ray of the"])
def test_real_words_give_encode_text(backbone, words, fast):
    coop = CoOp(backbone, NAMES, ctx_init=words, fast=fast)
    clean = [name.replace("_", " ") for name in NAMES]
    prompts = backbone.tokenize([f"{words.replace('_', ' ')} {name}." for name in clean])
    torch.testing.assert_close(coop.text_features(), backbone.encode_text(prompts), atol=1e-5, rtol=0)
    assert (
        coop.settings["n_ctx"] == len(coop.context) == len(open_clip.SimpleTokenizer().encode(words.replace("_", " ")))
    )


def test_word_initialisation_is_zero_shot(backbone):
    batch = batch_of(backbone)
    logits = CoOp(backbone, NAMES, ctx_init="a photo of a").eval()(batch)
    expected = methods()["zero_shot"](backbone, NAMES, ["a photo of a {}."])(batch)
    # Logits carry the factor of the logit scale, about 14 here.
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(backbone.logit_scale), rtol=0)


def test_logits_are_scaled_cosines(backbone):
    coop, batch = CoOp(backbone, NAMES, n_ctx=3, seed=4), batch_of(backbone)
    cosines = F.cosine_similarity(batch.features.unsqueeze(1), coop.text_features()[None], dim=-1)
    torch.testing.assert_close(coop(batch), cosines * backbone.model.logit_scale.exp(), atol=1e-4, rtol=0)


def test_initial_context(backbone):
    first, again, other = (CoOp(backbone, NAMES, n_ctx=40, seed=seed).context for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(first.mean().item()) < 2e-3


def test_only_the_context_learns(backbone):
    coop = CoOp(backbone, NAMES, n_ctx=4)
    assert [p is coop.context for p in coop.trainable_parameters()] == [True]
    assert [name for name, p in coop.named_parameters() if p.requires_grad] == ["context"]
    assert context_gradient(coop, batch_of(backbone)).abs().max() > 0
    assert all(p.grad is None for p in backbone.parameters())


def test_it_learns(backbone):
    target = CoOp(backbone, NAMES, n_ctx=4, seed=7).class_weights()
    batch = Batch(labels=torch.arange(len(NAMES)), index=torch.arange(len(NAMES)), features=target)
    coop = CoOp(backbone, NAMES, n_ctx=4, seed=0)
    optimizer = torch.optim.SGD(coop.trainable_parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(coop(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


# One function, several ways


def test_fast_is_plain(backbone):
    fast, plain = (CoOp(backbone, NAMES, n_ctx=5, fast=fast, kg_weight=8.0) for fast in (True, False))
    batch = batch_of(backbone)
    torch.testing.assert_close(fast.text_features(), plain.text_features(), atol=1e-5, rtol=0)
    expected = context_gradient(plain, batch)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(context_gradient(fast, batch), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("budget", [1, 60_000])
def test_chunked_is_whole(backbone, fast, budget):
    whole = CoOp(backbone, NAMES, n_ctx=5, fast=fast)
    chunked = CoOp(backbone, NAMES, n_ctx=5, fast=fast, memory_budget_bytes=budget)
    batch = batch_of(backbone)
    torch.testing.assert_close(chunked.text_features(), whole.text_features(), atol=1e-5, rtol=0)
    expected = context_gradient(whole, batch)
    torch.testing.assert_close(context_gradient(chunked, batch), expected, atol=1e-5, rtol=1e-4)
    assert len(whole._classes.plan(0, 1, whole.context.device).chunks) == 1
    assert len(chunked._classes.plan(0, 1, chunked.context.device).chunks) > 1


def kept_bytes(coop, batch, frozen):
    """Bytes that autograd keeps at the end of the forward pass."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        coop(batch)
    return sum(size for size, _ in kept.values())


def test_budget_bounds_what_is_kept(backbone):
    names = [f"{name} {number}" for name in NAMES for number in range(40)]
    frozen = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    sizes = {}
    for budget in (2**19, 2**21, 2**40):
        coop = CoOp(backbone, names, n_ctx=3, memory_budget_bytes=budget)
        sizes[budget] = kept_bytes(coop, batch_of(backbone, classes=len(names)), frozen)
    # What is not an activation of the classes (prefix, features, logits) comes on top of the budget.
    assert sizes[2**19] < 2**19 + 1_000_000 < sizes[2**40]
    assert sizes[2**19] < sizes[2**21] < sizes[2**40]


def test_custom_blocks_fall_back_to_whole_prompts():
    text: Any = {"context_length": 77, "width": 32, "heads": 2, "layers": 2, "qk_norm": True}
    vision: Any = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    model = open_clip.CustomTextCLIP(24, vision, text)
    backbone = ClipBackbone(model, open_clip.SimpleTokenizer(), name="custom-blocks")
    coop = CoOp(backbone, NAMES, ctx_init="a photo of a")
    assert coop._classes._shared is None
    expected = zero_shot_weights(backbone, NAMES, ["a photo of a {}."])
    torch.testing.assert_close(coop.text_features(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near(backbone, dtype):
    coop, batch = CoOp(backbone, NAMES, n_ctx=4, memory_budget_bytes=60_000), batch_of(backbone)
    expected = context_gradient(coop, batch)
    with torch.autocast("cpu", dtype=dtype):
        logits = coop(batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, coop(batch), atol=0.1, rtol=0)
    coop.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(coop(batch), batch.labels)
    (gradient,) = torch.autograd.grad(loss, coop.context)
    assert F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.98


# KgCoOp


def test_penalty_is_kgcoops(backbone):
    templates = ("a photo of a {}.", "art of the {}.")
    coop, batch = CoOp(backbone, NAMES, n_ctx=4, kg_weight=8.0, templates=templates), batch_of(backbone)
    assert coop.penalty().item() == 0, "nothing was computed yet"
    coop(batch)
    cosines = F.cosine_similarity(coop.text_features(), zero_shot_weights(backbone, NAMES, templates), dim=-1)
    assert coop.penalty().item() == pytest.approx(8 * (1 - cosines).mean().item(), rel=1e-5)
    expected = torch.autograd.grad(8 * (1 - cosines).mean(), coop.context)[0]
    torch.testing.assert_close(torch.autograd.grad(coop.penalty(), coop.context)[0], expected, atol=1e-5, rtol=1e-4)


def test_penalty_vanishes_at_the_template_and_without_weight(backbone):
    near = CoOp(backbone, NAMES, ctx_init="a photo of a", kg_weight=8.0)
    near(batch_of(backbone))
    assert near.penalty().item() == pytest.approx(0, abs=1e-5)
    plain = CoOp(backbone, NAMES, n_ctx=4)
    plain(batch_of(backbone))
    assert plain.penalty().item() == 0


# Evaluation


@pytest.fixture
def counted(backbone, monkeypatch):
    """Counts how often the text tower runs."""
    calls = []
    original = CoOp.text_features
    monkeypatch.setattr(CoOp, "text_features", lambda self: (calls.append(1), original(self))[1])
    return calls


def test_text_is_encoded_once_for_evaluation(backbone, counted):
    coop, batch = CoOp(backbone, NAMES, n_ctx=4), batch_of(backbone)
    training_logits = coop(batch).detach()
    assert len(counted) == 1
    coop.eval()
    with torch.no_grad():
        logits = [coop(batch) for _ in range(3)]
    assert len(counted) == 2
    assert coop.class_weights() is coop.class_weights()
    assert len(counted) == 2
    torch.testing.assert_close(logits[2], training_logits, atol=1e-5, rtol=1e-5)


def step_sgd(coop, **settings):
    coop.context.grad = torch.randn(coop.context.shape, generator=torch.Generator().manual_seed(1))
    torch.optim.SGD([coop.context], lr=0.1, **settings).step()


@pytest.mark.parametrize(
    "change",
    [
        step_sgd,
        lambda coop: step_sgd(coop, fused=True),
        lambda coop: step_sgd(coop, foreach=True),
        lambda coop: coop.load_adapter_state({"context": coop.context.detach().flip(0)}),
        lambda coop: setattr(coop.context, "data", coop.context.detach().flip(0)),
    ],
    ids=["sgd", "fused", "foreach", "load", "data"],
)
def test_a_changed_context_is_encoded_again(backbone, change):
    coop = CoOp(backbone, NAMES, n_ctx=4).eval()
    before = coop.class_weights()
    change(coop)
    after = coop.class_weights()
    assert not torch.allclose(before, after, atol=1e-4)
    torch.testing.assert_close(after, coop.text_features(), atol=1e-6, rtol=0)


def test_gradients_in_evaluation_mode(backbone):
    coop, batch = CoOp(backbone, NAMES, n_ctx=4).eval(), batch_of(backbone)
    assert coop.class_weights().requires_grad is False
    assert context_gradient(coop, batch).abs().max() > 0
    with torch.inference_mode():
        coop(batch)
    with torch.no_grad():
        coop(batch)


def test_evaluation_after_inference_mode_can_train(backbone):
    coop, batch = CoOp(backbone, NAMES, n_ctx=4), batch_of(backbone)
    with torch.inference_mode():
        coop.eval()(batch)
    assert context_gradient(coop.train(), batch).abs().max() > 0


# State and settings


def test_state_and_settings_rebuild_the_adapter(backbone):
    coop = CoOp(backbone, NAMES, n_ctx=4, seed=3, kg_weight=2.0, templates=("art of the {}.",))
    step_sgd(coop)
    settings = json.loads(json.dumps(coop.settings))
    again = methods()["coop"](backbone, NAMES, **settings)
    again.load_adapter_state({name: tensor.clone() for name, tensor in coop.adapter_state().items()})
    assert again.settings == coop.settings
    assert torch.equal(again.class_weights(), coop.class_weights())


def test_rebuilt_from_words(backbone):
    coop = CoOp(backbone, NAMES, ctx_init="a photo of a")
    again = CoOp(backbone, NAMES, **coop.settings)
    assert torch.equal(again.context, coop.context)


def test_copies_are_independent(backbone):
    coop = CoOp(backbone, NAMES, n_ctx=4).eval()
    coop.class_weights()
    twin = copy.deepcopy(coop)
    step_sgd(coop)
    assert not torch.allclose(twin.class_weights(), coop.class_weights(), atol=1e-4)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"should hold \['context'\], got \[\]"),
        ({"context": torch.zeros(4, 64), "more": torch.zeros(1)}, r"got \['context', 'more'\]"),
        ({"context": torch.zeros(5, 64)}, r"'context' .* has shape \(5, 64\), expected \(4, 64\)"),
        ({"context": torch.full((4, 64), float("nan"))}, "not finite"),
    ],
)
def test_state_that_does_not_fit(backbone, state, message):
    coop = CoOp(backbone, NAMES, n_ctx=4)
    before = coop.context.clone()
    with pytest.raises(ArtifactError, match=message):
        coop.load_adapter_state(state)
    assert torch.equal(coop.context, before)


# Bad input


def test_class_name_longer_than_the_context():
    backbone = make_tiny_backbone(context_length=16)
    names, name = ["rose", "northern hairy-nosed wombat", "dog"], "northern hairy-nosed wombat"
    tokens = len(open_clip.SimpleTokenizer().encode(f"{name}."))
    room = 16 - 2 - tokens
    with pytest.raises(
        ConfigError, match=rf"class '{name}' takes {tokens} tokens .* 16 tokens\. At most {room} context tokens"
    ):
        CoOp(backbone, names, n_ctx=room + 1)
    assert len(CoOp(backbone, names, n_ctx=room).context) == room
    with pytest.raises(ConfigError, match=r"class 'very .* …' takes 101 .* 16 tokens\. Give the class a shorter"):
        CoOp(backbone, [*names, "very " * 100], n_ctx=1)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, "at least one class name"),
        (["rose", "  _ "], {}, "has no words"),
        (NAMES, {"n_ctx": 0}, "n_ctx must be at least 1, got 0"),
        (NAMES, {"n_ctx": 0, "class_specific": True}, "n_ctx must be at least 1, got 0"),
        (NAMES, {"position": "centre"}, "unknown position 'centre' .* Allowed: end, front, middle"),
        (NAMES, {"position": "midle"}, 'Did you mean "middle"'),
        (NAMES, {"kg_weight": -1.0}, "kg_weight must be at least 0"),
        (NAMES, {"memory_budget_bytes": 0}, "memory_budget_bytes positive"),
        (NAMES, {"kg_weight": 8.0, "templates": ("a photo",)}, "should have {} exactly once"),
        (NAMES, {"kg_weight": 8.0, "templates": ("very " * 99 + "{}",)}, "has 102 tokens"),
    ],
)
def test_bad_settings(backbone, names, settings, message):
    with pytest.raises(AdaptclipError, match=message):
        CoOp(backbone, names, **settings)


def test_bad_batches(backbone):
    coop, batch = CoOp(backbone, NAMES, n_ctx=4), batch_of(backbone)
    with pytest.raises(DataError, match="consumes image features, but the batch has none"):
        coop(Batch(labels=batch.labels, index=batch.index))
    wide = torch.zeros(6, backbone.embed_dim + 1)
    with pytest.raises(
        DataError, match=rf"should be \(B, {backbone.embed_dim}\) .* got \(6, {backbone.embed_dim + 1}\)"
    ):
        coop(Batch(labels=batch.labels, index=batch.index, features=wide))


# Several processes


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    script = Path(__file__).with_name("sharded_coop.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["num_processes"] for report in reports] == [2, 2]
    assert [report["classes_encoded"] for report in reports] == [4, 3], "each process encodes its share"
    for report in reports:
        names = {"plain", "kg", "chunked", "one_class", "class_specific", "sigmoid", "cocoop"}
        assert set(report["logits"]) == set(report["gradient"]) == names
        assert max(report["logits"].values()) < 1e-5, report
        assert max(report["gradient"].values()) < 1e-5, report
        assert min(size for name, size in report["gradient_size"].items() if name != "one_class") > 1e-3
    assert reports[0]["evaluated_alone"]
