# SPDX-License-Identifier: Apache-2.0
"""Every text path against open_clip's own `encode_text`, on models with random weights."""

import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from adaptclip.clip.packed import _plan_runs, plan_runs
from adaptclip.clip.text import CausalTextTower, make_text_tower
from adaptclip.clip.text_towers import PaddedTextTower
from adaptclip.errors import BackboneError

TOKENIZER = open_clip.SimpleTokenizer()
VISION: Any = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT: Any = {"context_length": 77, "width": 32, "heads": 4, "layers": 3}
SENTENCES = [
    "a photo of a rose.",
    "a photo of a lily of the valley.",
    "a photo of a Größe, 2.",
    "a photo of a dog.",
    "a photo of a cat.",
    "a photo of a northern hairy-nosed wombat.",
]
PREFIX = 5
"""SOS and the four words that all the sentences begin with."""

VARIANTS = {
    "default": ({}, False),
    "quick_gelu": ({}, True),
    "layer_scale": ({"ls_init_value": 0.4}, False),
    "eos": ({"pool_type": "eos", "eos_id": TOKENIZER.eot_token_id}, False),
    "projection_with_bias": ({"proj_bias": True}, False),
    "no_projection": ({"proj_type": "none"}, False),
    "one_layer": ({"layers": 1}, False),
    "short_context": ({"context_length": 20}, True),
}
CLASSES = {"clip": open_clip.CLIP, "custom_text": open_clip.CustomTextCLIP}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models are faster on one thread, by far when other work runs beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind="clip", text=None, quick_gelu=False, cast_dtype=None, tower=True) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TEXT | (text or {})
        model = CLASSES[kind](24, VISION, config, quick_gelu=quick_gelu, cast_dtype=cast_dtype).eval()
        for parameter in model.requires_grad_(False).parameters():
            # open_clip starts biases at 0 and gains at 1, which would hide a mistake in them.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return (model, make_text_tower(model, TOKENIZER)) if tower else model


def packed(tower, ids):
    """Suffixes grouped by length, and the rows of `ids` they belong to."""
    lengths = tower.pooled_position(ids) + 1 - PREFIX
    rows = [torch.nonzero(lengths == length).flatten() for length in lengths.unique()]
    suffixes = [tower.embed_tokens(ids[r][:, PREFIX : PREFIX + int(lengths[r[0]])]) for r in rows]
    return suffixes, torch.cat(rows)


@pytest.fixture(scope="module", params=[(kind, variant) for kind in CLASSES for variant in VARIANTS], ids="-".join)
def model_and_tower(request):
    kind, variant = request.param
    text, quick_gelu = VARIANTS[variant]
    return build(kind, text, quick_gelu)


def test_plain_path_is_encode_text(model_and_tower):
    model, tower = model_and_tower
    ids = TOKENIZER(SENTENCES, context_length=tower.context_length)
    features = tower.encode_embeddings(tower.embed_tokens(ids), tower.pooled_position(ids))
    torch.testing.assert_close(features, model.encode_text(ids), atol=1e-5, rtol=0)


def test_nothing_behind_the_eot_counts(model_and_tower):
    model, tower = model_and_tower
    ids = TOKENIZER(SENTENCES, context_length=tower.context_length)
    eot = tower.pooled_position(ids)
    cut = tower.embed_tokens(ids[:, : int(eot.max()) + 1])
    torch.testing.assert_close(tower.encode_embeddings(cut, eot), model.encode_text(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("together", [True, False])
def test_packed_path_is_encode_text(model_and_tower, together):
    model, tower = model_and_tower
    ids = TOKENIZER(SENTENCES, context_length=tower.context_length)
    suffixes, rows = packed(tower, ids)
    assert len(suffixes) > 2, "several lengths"
    prefix = tower.embed_tokens(ids[0, :PREFIX])
    features = (
        tower.encode_packed(prefix, suffixes)
        if together
        else tower.encode_suffixes(tower.encode_prefix(prefix), suffixes)
    )
    torch.testing.assert_close(features, model.encode_text(ids)[rows], atol=1e-5, rtol=0)


def context_gradient(tower, ids, path):
    suffixes, rows = packed(tower, ids)
    prefix = tower.embed_tokens(ids[0, :PREFIX]).clone().requires_grad_()
    if path == "plain":
        rest = tower.embed_tokens(ids[rows][:, PREFIX:])
        whole = torch.cat([prefix.expand(len(rows), -1, -1), rest], dim=1)
        features = tower.encode_embeddings(whole, tower.pooled_position(ids[rows]))
    elif path == "together":
        features = tower.encode_packed(prefix, suffixes)
    else:
        features = tower.encode_suffixes(tower.encode_prefix(prefix), suffixes)
    goal = torch.linspace(-1, 1, features.numel()).view_as(features)
    torch.cosine_similarity(features, goal).mean().backward()
    return prefix.grad


@pytest.mark.parametrize("path", ["together", "apart"])
def test_packed_path_has_the_plain_gradient(model_and_tower, path):
    _, tower = model_and_tower
    ids = TOKENIZER(SENTENCES, context_length=tower.context_length)
    expected = context_gradient(tower, ids, "plain")
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(context_gradient(tower, ids, path), expected, atol=1e-5, rtol=0)


def test_runs_are_planned_once_and_serve_training_after_inference():
    _plan_runs.cache_clear()
    _, tower = build()
    ids = TOKENIZER(SENTENCES)
    suffixes, _ = packed(tower, ids)
    with torch.inference_mode():
        tower.encode_packed(tower.embed_tokens(ids[0, :PREFIX]), suffixes)
    planned = _plan_runs.cache_info().misses
    assert planned == 2  # the prefix and the suffixes
    assert context_gradient(tower, ids, "together").any()
    assert _plan_runs.cache_info().misses == planned
    shapes = [tuple(suffix.shape[:2]) for suffix in suffixes]
    assert plan_runs(shapes, suffixes[0].device) is plan_runs(shapes, suffixes[0].device)


def test_one_class_and_equal_lengths():
    model, tower = build()
    for sentences in (SENTENCES[:1], ["a photo of a dog.", "a photo of a cat."]):
        ids = TOKENIZER(sentences)
        suffixes, rows = packed(tower, ids)
        features = tower.encode_packed(tower.embed_tokens(ids[0, :PREFIX]), suffixes)
        torch.testing.assert_close(features, model.encode_text(ids)[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near(dtype):
    model, tower = build("custom_text")
    ids = TOKENIZER(SENTENCES)
    suffixes, rows = packed(tower, ids)
    prefix = tower.embed_tokens(ids[0, :PREFIX]).clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        features = tower.encode_packed(prefix, suffixes)
    (gradient,) = torch.autograd.grad(features.float().sum(), prefix)
    assert torch.isfinite(gradient).all()
    similarity = torch.cosine_similarity(features.float(), model.encode_text(ids)[rows])
    assert similarity.min() > 0.999


@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision_weights(kind):
    model = build(kind, cast_dtype=torch.bfloat16, tower=False)
    full, full_tower = build(kind)
    open_clip.convert_weights_to_lp(model, torch.bfloat16)
    tower = make_text_tower(model, TOKENIZER)
    assert isinstance(tower, CausalTextTower)
    ids = TOKENIZER(SENTENCES)
    suffixes, rows = packed(tower, ids)
    features = tower.encode_packed(tower.embed_tokens(ids[0, :PREFIX]), suffixes)
    assert features.dtype == torch.bfloat16
    expected = full_tower.encode_packed(full_tower.embed_tokens(ids[0, :PREFIX]), packed(full_tower, ids)[0])
    assert torch.cosine_similarity(features.float(), expected).min() > 0.999
    assert torch.cosine_similarity(features.float(), full.encode_text(ids)[rows]).min() > 0.999


def test_tower_follows_its_model():
    model, tower = build()
    ids = TOKENIZER(SENTENCES)
    with torch.no_grad():
        model.text_projection.mul_(2)
        model.transformer.resblocks[1].mlp.c_fc.weight.mul_(0.5)
    suffixes, rows = packed(tower, ids)
    features = tower.encode_packed(tower.embed_tokens(ids[0, :PREFIX]), suffixes)
    torch.testing.assert_close(features, model.encode_text(ids)[rows], atol=1e-5, rtol=0)


def test_specials_and_words():
    _, tower = build(text={"context_length": 8})
    assert tower.start_ids == (TOKENIZER.sot_token_id,)
    assert tower.end_ids == (TOKENIZER.eot_token_id,)
    long = " ".join(["İstanbul"] * 30)
    assert tower.word_ids(["a dog.", "", long]) == [TOKENIZER.encode("a dog."), [], TOKENIZER.encode(long)]
    assert tower.word_ids([]) == []


def test_prompt_longer_than_the_context():
    _, tower = build(text={"context_length": 8})
    prefix, suffix = torch.zeros(5, 32), torch.zeros(2, 4, 32)
    with pytest.raises(BackboneError, match="9 tokens does not fit this text tower's 8"):
        tower.encode_packed(prefix, [suffix])
    with pytest.raises(BackboneError, match="9 tokens"):
        tower.encode_embeddings(torch.zeros(2, 9, 32), torch.tensor([8, 8]))


def test_custom_blocks_take_the_plain_path():
    model, tower = build(text={"qk_norm": True})
    ids = TOKENIZER(SENTENCES)
    assert not tower.supports_prefix
    features = tower.encode_embeddings(tower.embed_tokens(ids), tower.pooled_position(ids))
    torch.testing.assert_close(features, model.encode_text(ids), atol=1e-5, rtol=0)
    with pytest.raises(BackboneError, match=r"default text blocks .* got CustomResidualAttentionBlock"):
        tower.encode_prefix(torch.zeros(5, 32))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_activation_estimate(quick_gelu):
    _, tower = build(text={"width": 64, "layers": 3}, quick_gelu=quick_gelu)
    frozen = {p.untyped_storage().data_ptr() for p in tower._parts.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    prefix, length, classes = torch.randn(9, 64, requires_grad=True), 5, 200
    state = tower.encode_prefix(prefix)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = tower.encode_suffixes(state, [torch.randn(classes, length, 64)])
    measured = sum(size for size, _ in kept.values())
    assert features.requires_grad
    assert 0.85 < tower.activation_bytes(classes * length, 9 + length) / measured < 1.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"no_causal_mask": True, "embed_cls": True}, r"its bidirectional class-token text tower"),
        ({"pool_type": "first"}, r"its 'first'-pooling text tower does not pool a token that has seen"),
        ({"pool_type": "none"}, r"its 'none'-pooling text tower"),
    ],
)
def test_unsupported_text_transformers(text, message):
    with pytest.raises(BackboneError, match=message + r".*What works: .*SigLIP.*starter"):
        build("custom_text", text)


def test_unsupported_models():
    with pytest.raises(BackboneError, match="its Linear text tower is not known"):
        make_text_tower(nn.Linear(1, 1), TOKENIZER)


def test_tokenizer_without_the_pooled_token():
    with pytest.raises(BackboneError, match=r"pools the token 2, but its tokenizer ends a text with \[49406, 49407"):
        build("custom_text", {"pool_type": "eos", "eos_id": 2})


def test_a_changed_mask_is_noticed():
    model = build(tower=False)
    model.attn_mask = torch.zeros_like(model.attn_mask)
    tower = make_text_tower(model, TOKENIZER)
    assert isinstance(tower, PaddedTextTower)
    ids = TOKENIZER(SENTENCES)
    features = tower.encode_embeddings(tower.embed_tokens(ids), tower.pooled_position(ids))
    torch.testing.assert_close(features, model.encode_text(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool_type", ["last", "first", "eos"])
@pytest.mark.parametrize("causal", [True, False])
def test_every_pooling(pool_type, causal):
    if causal and pool_type == "first":
        pytest.skip("the first token of a causal tower has not seen the prompt")
    text = {"pool_type": pool_type, "eos_id": TOKENIZER.eot_token_id, "no_causal_mask": not causal}
    model, tower = build("custom_text", text)
    ids = TOKENIZER(SENTENCES)
    features = tower.encode_embeddings(tower.embed_tokens(ids), tower.pooled_position(ids))
    torch.testing.assert_close(features, model.encode_text(ids), atol=1e-5, rtol=0)
    assert isinstance(tower, CausalTextTower) == (causal and pool_type == "eos")


def test_copies_are_independent():
    model, tower = build()
    holder = copy.deepcopy({"model": model, "tower": tower})
    assert isinstance(holder["tower"], CausalTextTower)
    assert holder["tower"]._parts is holder["model"]
