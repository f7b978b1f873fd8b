# SPDX-License-Identifier: Apache-2.0
"""Classes are encoded in order, in chunks, on shares of processes, and always to what the model itself answers."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import BackboneError, ConfigError
from adaptclip.methods.class_encoder import ClassEncoder, encode_within_budget, split_by_cost

# Not sorted by length, and one twice.
NAMES = ("northern hairy-nosed wombat", "dog", "lily of the valley", "cat", "dog", "Größe 42", "a red fox")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["clip", "custom_text"])
def backbone(request):
    return make_tiny_backbone(request.param)


def make(backbone, prefix_length, **settings):
    """An encoder of `a photo of a NAME.` that shares the first `prefix_length` tokens, and their embeddings."""
    tower = backbone.text
    words = tower.word_ids([f"a photo of a {name}." for name in NAMES])
    prompts = [[*tower.start_ids, *ids, *tower.end_ids] for ids in words]
    suffixes = [ids[prefix_length:] for ids in prompts]
    prefix = tower.embed_tokens(torch.tensor(prompts[0][:prefix_length], dtype=torch.long))
    return ClassEncoder(tower, suffixes, prefix_length=prefix_length, **settings), prefix


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("budget", [2**32, 200_000, 1])
@pytest.mark.parametrize("prefix_length", [0, 1, 5])
def test_it_is_encode_text(backbone, prefix_length, budget, fast):
    encoder, prefix = make(backbone, prefix_length, memory_budget_bytes=budget, fast=fast)
    expected = backbone.encode_text(backbone.tokenize([f"a photo of a {name}." for name in NAMES]))
    torch.testing.assert_close(encoder.encode(prefix), expected, atol=1e-5, rtol=0)
    num_chunks = len(encoder.plan(0, 1, CPU).chunks)
    assert {2**32: num_chunks == 1, 200_000: 1 < num_chunks < len(NAMES), 1: num_chunks == len(NAMES)}[budget]


def shifted(tower, shift):
    """Suffix embeddings with a class-dependent vector put before the last token."""

    def embed(classes, ids):
        tokens = tower.embed_tokens(ids)
        return torch.cat([tokens[:, :-1], shift[classes][:, None], tokens[:, -1:]], dim=1)

    return embed


@pytest.mark.parametrize("budget", [2**32, 200_000, 1])
def test_inserted_embeddings_reach_their_class(backbone, budget):
    tower = backbone.text
    shift = torch.randn(len(NAMES), tower.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for fast in (True, False):
        encoder, prefix = make(backbone, 1, num_inserted=1, fast=fast, memory_budget_bytes=budget)
        features = encoder.encode(prefix, embed=shifted(tower, shift))
        (gradient,) = torch.autograd.grad(features[:, 0].sum(), shift)
        results.append((features.detach(), gradient))
    # By hand: one whole prompt after the other.
    for c, name in enumerate(NAMES):
        (ids,) = tower.word_ids([f"a photo of a {name}."])
        tokens = tower.embed_tokens(torch.tensor([*tower.start_ids, *ids, *tower.end_ids]))
        whole = torch.cat([tokens[:-1], shift[c : c + 1], tokens[-1:]])[None]
        expected = F.normalize(tower.encode_embeddings(whole, torch.tensor([len(whole[0]) - 1]))[0], dim=-1)
        (own,) = torch.autograd.grad(expected[0], shift)
        for features, gradient in results:
            torch.testing.assert_close(features[c], expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(gradient[c], own[c], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("budget", [2**32, 200_000, 1])
def test_each_prefix_as_if_alone(backbone, budget, fast):
    encoder, prefix = make(backbone, 5, memory_budget_bytes=budget, fast=fast)
    noise = torch.randn(3, *prefix.shape, generator=torch.Generator().manual_seed(1))
    prefixes = (prefix + 0.05 * noise).detach().requires_grad_()
    features = encoder.encode_each(prefixes)
    assert features.shape == (3, len(NAMES), backbone.embed_dim)
    alone = torch.stack([encoder.encode(own) for own in prefixes])
    torch.testing.assert_close(features, alone, atol=1e-6, rtol=0)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (got,) = torch.autograd.grad((features * weight).sum(), prefixes)
    (expected,) = torch.autograd.grad((alone * weight).sum(), prefixes)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_prefixes_share_one_budget(backbone, monkeypatch):
    """What is kept, summed over the prefixes, stays within the budget: the rest is encoded twice."""
    cost = sum(make(backbone, 5)[0].plan(0, 1, CPU).costs_bytes)
    encoded = []
    original = type(backbone.text).encode_packed
    monkeypatch.setattr(type(backbone.text), "encode_packed", lambda *args: (encoded.append(1), original(*args))[1])
    for budget, twice in ((3 * cost, 0), (2 * cost, 1), (cost, 2)):
        encoder, prefix = make(backbone, 5, memory_budget_bytes=budget)
        prefixes = prefix.detach().expand(3, -1, -1).clone().requires_grad_()
        encoded.clear()
        encoder.encode_each(prefixes).sum().backward()
        assert len(encoded) == 3 + twice


@pytest.mark.parametrize("preserve", [True, False])
def test_random_numbers_of_a_chunk_computed_twice(backbone, preserve):
    encoder, _ = make(backbone, 0, memory_budget_bytes=1)
    tower, drawn = backbone.text, []
    scale = torch.ones(tower.width, requires_grad=True)

    def embed(classes, ids):
        noise = torch.rand(*ids.shape, tower.width)
        drawn.append((classes.tolist(), noise))
        return tower.embed_tokens(ids) * scale * noise

    torch.manual_seed(0)
    empty = torch.zeros(0, tower.width)
    encoder.encode(empty, embed=embed, preserve_rng_state=preserve).sum().backward()
    first, again = drawn[: len(NAMES)], drawn[len(NAMES) :]
    assert [c for c, _ in first] == [c for c, _ in again[::-1]]
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(first, again[::-1], strict=True)]
    assert all(same) if preserve else not any(same)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_cover_every_class_once(backbone, world):
    encoder, _ = make(backbone, 5, memory_budget_bytes=60_000)
    plans = [encoder.plan(rank, world, CPU) for rank in range(world)]
    rows = [int(c) for plan in plans for chunk in plan.chunks for group in chunk for c in group.classes]
    assert sorted(rows) == list(range(len(NAMES)))
    assert [rows[i] for i in plans[0].inverse] == list(range(len(NAMES)))
    counts = [sum(len(group.classes) for chunk in plan.chunks for group in chunk) for plan in plans]
    assert all(plan.counts == tuple(counts) for plan in plans)
    assert max(counts) - min(counts) <= 1
    assert encoder.plan(0, world, CPU) is plans[0], "a plan is made once"


def test_copies_are_independent(backbone):
    both = copy.deepcopy({"encoder": make(backbone, 5)[0], "backbone": backbone})
    encoder, prefix = make(backbone, 5)
    before = encoder.encode(prefix)
    with torch.no_grad():
        both["backbone"].text._parts.text_projection.mul_(-1)
    torch.testing.assert_close(both["encoder"].encode(prefix), -before, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.encode(prefix), before, atol=0, rtol=0)


def test_bad_input(backbone):
    with pytest.raises(ConfigError, match="at least one prompt"):
        ClassEncoder(backbone.text, [], prefix_length=1)
    with pytest.raises(ConfigError, match="memory_budget_bytes must be positive, got 0"):
        make(backbone, 1, memory_budget_bytes=0)
    encoder, prefix = make(backbone, 5)
    with pytest.raises(ConfigError, match="should have 5 embeddings, got 4"):
        encoder.encode(prefix[:4])
    with pytest.raises(ConfigError, match="should have 5 embeddings, got 6"):
        encoder.encode_each(torch.zeros(2, 6, backbone.text.width))
    long = ClassEncoder(backbone.text, [[320] * 72], prefix_length=6)
    with pytest.raises(BackboneError, match=r"a prompt of 78 tokens does not fit .* 77"):
        long.encode(torch.zeros(6, backbone.text.width))


# Chunks


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_split_by_cost(costs, limit):
    runs = split_by_cost(costs, limit)
    assert [i for run in runs for i in run] == list(range(len(costs)))
    for run, following in zip(runs, [*runs[1:], None], strict=False):
        total = sum(costs[i] for i in run)
        assert total <= limit or len(run) == 1
        if following is not None:
            assert total + costs[following.start] > limit, "a run is as long as it can be"


@pytest.mark.parametrize(("budget", "twice"), [(1, {0, 1, 2, 3}), (30, {0, 1, 2}), (59, {0, 1}), (100, set())])
def test_the_last_chunks_that_fit_are_kept(budget, twice):
    x = torch.linspace(-1, 1, 4, requires_grad=True)
    calls = []

    def encode(chunk):
        calls.append(chunk)
        return x[chunk : chunk + 1].exp().sin()

    encode_within_budget(encode, [10, 20, 30, 25], budget).sum().backward()
    assert calls[:4] == [0, 1, 2, 3]
    assert set(calls[4:]) == twice
    torch.testing.assert_close(x.grad, x.detach().exp() * x.detach().exp().cos())


def test_nothing_is_computed_twice_without_gradients():
    calls = []
    with torch.no_grad():
        encode_within_budget(lambda chunk: (calls.append(chunk), torch.ones(1, 2))[1], [10, 10], 1)
    assert calls == [0, 1]
