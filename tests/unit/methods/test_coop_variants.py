# SPDX-License-Identifier: Apache-2.0
"""CoOp with the class name in other places and with a context for every class; the rest is in test_coop.py."""

import json
from typing import Any

import open_clip
import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import ArtifactError, ConfigError
from adaptclip.methods import CoOp
from adaptclip.methods.registry import methods
from adaptclip.types import Batch

NAMES = ("rose", "lily_of the valley", "Größe 42", "dog", "cat", "northern hairy-nosed wombat", "fox")
PROMPTS = {"end": "a photo of a {}.", "middle": "a photo {} of a.", "front": "{} a photo of a."}
COMBINATIONS = [
    pytest.param({"position": position, "class_specific": csc}, id=f"{position}-{'csc' if csc else 'shared'}")
    for position in PROMPTS
    for csc in (False, True)
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["clip", "custom_text"])
def backbone(request):
    return make_tiny_backbone(request.param, quick_gelu=request.param == "clip")


@pytest.fixture(scope="module")
def batch(backbone) -> Any:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(6, backbone.embed_dim, generator=generator), dim=-1)
    labels = torch.randint(0, len(NAMES), (6,), generator=generator)
    return Batch(labels=labels, index=torch.arange(6), features=features)


def context_gradient(coop, batch):
    loss = F.cross_entropy(coop(batch), batch.labels) + coop.penalty()
    return torch.autograd.grad(loss, coop.context)[0]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("settings", COMBINATIONS)
def test_real_words_in_every_place_give_encode_text(backbone, settings, fast):
    coop = CoOp(backbone, NAMES, ctx_init="a photo of a", fast=fast, **settings)
    prompts = [PROMPTS[settings["position"]].format(name.replace("_", " ")) for name in NAMES]
    expected = backbone.encode_text(backbone.tokenize(prompts))
    torch.testing.assert_close(coop.text_features(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [2**32, 60_000])
@pytest.mark.parametrize("settings", COMBINATIONS)
def test_fast_is_plain_in_every_place(backbone, batch, settings, budget):
    fast = CoOp(backbone, NAMES, n_ctx=5, kg_weight=8.0, memory_budget_bytes=budget, **settings)
    plain = CoOp(backbone, NAMES, n_ctx=5, kg_weight=8.0, fast=False, **settings)
    assert (len(fast._classes.plan(0, 1, fast.context.device).chunks) > 1) == (budget == 60_000)
    torch.testing.assert_close(fast.text_features(), plain.text_features(), atol=1e-5, rtol=0)
    expected = context_gradient(plain, batch)
    # Every vector of every class learns.
    assert expected.abs().amax(-1).min() > 1e-5
    torch.testing.assert_close(context_gradient(fast, batch), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", PROMPTS)
def test_equal_contexts_of_all_classes_are_a_shared_one(backbone, batch, position):
    shared = CoOp(backbone, NAMES, n_ctx=5, position=position)
    own = CoOp(backbone, NAMES, n_ctx=5, position=position, class_specific=True)
    own.load_adapter_state({"context": shared.context.detach().expand(len(NAMES), -1, -1)})
    torch.testing.assert_close(own.text_features(), shared.text_features(), atol=1e-5, rtol=0)
    # What moves all classes alike is the sum of what moves each.
    expected = context_gradient(shared, batch)
    torch.testing.assert_close(context_gradient(own, batch).sum(0), expected, atol=1e-5, rtol=1e-4)


def test_a_class_moves_only_its_own_context(backbone):
    coop = CoOp(backbone, NAMES, n_ctx=3, class_specific=True)
    (gradient,) = torch.autograd.grad(coop.text_features()[2].sum(), coop.context)
    touched = gradient.abs().amax((1, 2)) > 0
    assert touched.tolist() == [c == 2 for c in range(len(NAMES))]


def test_initial_contexts_of_classes(backbone):
    coop = CoOp(backbone, NAMES, n_ctx=10, class_specific=True, seed=1)
    assert coop.context.shape == (len(NAMES), 10, 64)
    assert coop.context.std().item() == pytest.approx(0.02, rel=0.05)
    assert len({tuple(own[0].tolist()) for own in coop.context}) == len(NAMES), "each class has its own draws"
    words = CoOp(backbone, NAMES, ctx_init="a photo of a", class_specific=True)
    assert torch.equal(words.context, CoOp(backbone, NAMES, ctx_init="a photo of a").context.expand_as(words.context))


@pytest.mark.parametrize("settings", COMBINATIONS)
def test_every_variant_is_rebuilt(backbone, settings):
    coop = CoOp(backbone, NAMES, n_ctx=5, seed=3, **settings)
    with torch.no_grad():
        coop.context.mul_(-3)
    again = methods()["coop"](backbone, NAMES, **json.loads(json.dumps(coop.settings)))
    again.load_adapter_state({name: tensor.clone() for name, tensor in coop.adapter_state().items()})
    assert again.settings == coop.settings
    assert again.settings.items() >= settings.items()
    assert torch.equal(again.class_weights(), coop.class_weights())


def test_settings_from_before_the_variants(backbone):
    old = {"n_ctx": 4, "ctx_init": "", "templates": ["a photo of a {}."], "kg_weight": 0.0, "seed": 3}
    expected = CoOp(backbone, NAMES, n_ctx=4, seed=3, position="end", class_specific=False)
    assert torch.equal(CoOp(backbone, NAMES, **old).class_weights(), expected.class_weights())


def test_a_name_that_ends_in_a_full_stop(backbone):
    tokenizer = open_clip.SimpleTokenizer()
    apart = CoOp(backbone, ["St. Bernard Jr."], ctx_init="a photo of a", position="middle")
    ids = [tokenizer.encode(part) for part in ("a photo", "St. Bernard Jr.", "of a", ".")]
    whole = [49406, *(i for part in ids for i in part), 49407]
    prompt = torch.tensor([whole + [0] * (77 - len(whole))])
    torch.testing.assert_close(apart.text_features(), backbone.encode_text(prompt), atol=1e-5, rtol=0)
    joined = CoOp(backbone, ["St. Bernard Jr."], ctx_init="a photo of a")
    expected = backbone.encode_text(backbone.tokenize(["a photo of a St. Bernard Jr.."]))
    torch.testing.assert_close(joined.text_features(), expected, atol=1e-5, rtol=0)


def test_a_name_that_leaves_no_room_in_any_place():
    backbone = make_tiny_backbone(context_length=16)
    names, name = ["rose", "northern hairy-nosed wombat", "dog"], "northern hairy-nosed wombat"
    tokens = len(open_clip.SimpleTokenizer().encode(f"{name}."))
    room = 16 - 2 - tokens
    for position in ("middle", "front"):
        for csc in (False, True):
            whole = CoOp(backbone, names, n_ctx=room, position=position, class_specific=csc)
            assert torch.isfinite(whole.text_features()).all()
            with pytest.raises(ConfigError, match=rf"takes {tokens} tokens .* At most {room} context tokens"):
                CoOp(backbone, names, n_ctx=room + 1, position=position, class_specific=csc)


def test_contexts_of_other_classes(backbone):
    coop = CoOp(backbone, NAMES, n_ctx=4, class_specific=True)
    state = CoOp(backbone, NAMES[:5], n_ctx=4, class_specific=True).adapter_state()
    with pytest.raises(ArtifactError, match=r"has shape \(5, 4, 64\), expected \(7, 4, 64\)"):
        coop.load_adapter_state(state)
