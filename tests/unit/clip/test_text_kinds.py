# SPDX-License-Identifier: Apache-2.0
"""Text towers of every kind against open_clip's own `encode_text`, and the tokens of words in every tokenizer."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from tiny_kinds import KINDS, MORE_KINDS, SENTENCES, byte_level, gemma, make_kind, sentencepiece, wordpiece
from torch import Tensor
from torch.nn import functional as F

from adaptclip.clip import ClipBackbone
from adaptclip.clip.text import make_text_tower
from adaptclip.clip.text_towers import PromptTokens
from adaptclip.errors import BackboneError
from adaptclip.methods import CoOp
from adaptclip.methods.coop import suffix_ids

# Image towers of these differ, their text towers do not.
TEXT_KINDS = [k for k in (*KINDS, *MORE_KINDS) if k not in ("RN50", "convnext_base", "efficientnet", "EVA01-g-14")]
PADDED = ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2-256", "MobileCLIP-S1", "ViT-H-14-CLIPA")
TEXTS = [*SENTENCES[:3], "a rose.", "rose"]
NAMES = ("rose", "lily of the valley", "blue whale", "red fox")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=TEXT_KINDS)
def kind(request) -> tuple[str, ClipBackbone]:
    return request.param, make_kind(request.param)


def prompts(backbone: ClipBackbone, texts: list[str], beyond: int = 0) -> tuple[Tensor, Tensor]:
    """Ids of whole prompts and where they end; what stands behind the ends, `beyond` more ids, must not matter."""
    tower = backbone.text
    rows = [[*tower.start_ids, *ids, *tower.end_ids] for ids in tower.word_ids(texts)]
    longest = max(map(len, rows)) + beyond
    ids = torch.tensor([row + [9] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([len(row) - 1 for row in rows])


def encode_text(backbone: ClipBackbone, texts: list[str]) -> Tensor:
    return backbone.model.encode_text(backbone.tokenize(texts))


def own_scale(name: str, features: Tensor) -> Tensor:
    """CoCa's `encode_text` is unit norm already; the towers' features are not."""
    return F.normalize(features, dim=-1) if name.startswith("coca") else features


@torch.no_grad()
@pytest.mark.parametrize("beyond", [0, 3])
def test_real_embeddings_reproduce_encode_text(kind, beyond):
    name, backbone = kind
    tower = backbone.text
    ids, ends = prompts(backbone, TEXTS, beyond)
    features = tower.encode_embeddings(tower.embed_tokens(ids), ends)
    expected = encode_text(backbone, TEXTS)
    assert expected.std(dim=0).mean() > 0.02, "the texts differ for the tower"
    torch.testing.assert_close(own_scale(name, features), expected, atol=1e-5, rtol=0)
    # Alone, a prompt is computed at its own length.
    for row, end in enumerate(ends.tolist()):
        alone = tower.encode_embeddings(tower.embed_tokens(ids[row : row + 1, : end + 1]), ends[row : row + 1])
        torch.testing.assert_close(own_scale(name, alone), expected[row : row + 1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_whole_context_can_be_used(kind):
    name, backbone = kind
    tower = backbone.text
    (word,) = tower.word_ids(["a"], after="a ")
    text = " ".join(["a"] * ((tower.context_length - len(tower.start_ids) - len(tower.end_ids)) // len(word)))
    ids, ends = prompts(backbone, [text])
    assert tower.context_length - len(word) < int(ends) + 1 <= tower.context_length
    features = tower.encode_embeddings(tower.embed_tokens(ids), ends)
    torch.testing.assert_close(own_scale(name, features), encode_text(backbone, [text]), atol=1e-5, rtol=0)
    room = tower.context_length + 1
    with pytest.raises(BackboneError, match=f"of {room} tokens does not fit this text tower's {tower.context_length}"):
        tower.encode_embeddings(torch.zeros(1, room, tower.width), torch.tensor([room - 1]))


def test_lengths_and_positions(kind):
    name, backbone = kind
    tower = backbone.text
    _, ends = prompts(backbone, TEXTS)
    assert torch.equal(tower.pooled_position(backbone.tokenize(TEXTS)), ends)
    expected = {"padded": backbone.context_length, "coca": 9, "else": 7}
    group = "padded" if name in PADDED else "coca" if name == "coca_ViT-B-32" else "else"
    assert tower.computed_length(7) == expected[group]
    assert tower.supports_prefix == (name in ("ViT-B-16", "EVA02-B-16", "ViT-H-14-worldwide"))
    assert 0 < tower.activation_bytes(1, 8) < tower.activation_bytes(1, 64)
    assert tower.activation_bytes(10, 8) == 10 * tower.activation_bytes(1, 8)


def test_gradients_reach_the_embeddings_of_the_prompt_alone(kind):
    _, backbone = kind
    tower = backbone.text
    ids, ends = prompts(backbone, TEXTS, beyond=2)
    embeddings = tower.embed_tokens(ids).detach().requires_grad_()
    features = tower.encode_embeddings(embeddings, ends)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    assert embeddings.grad is not None
    reached = embeddings.grad.abs().sum(-1) > 0
    own = torch.arange(ids.shape[1]) <= ends[:, None]
    assert not (reached & ~own).any()
    assert reached[own].all()


@torch.no_grad()
def test_a_context_of_real_words_is_the_real_prompt(kind):
    """CoOp that starts from words and does not learn is zero-shot: name positions and specials are right."""
    _, backbone = kind
    adapter = CoOp(backbone, NAMES, ctx_init="a photo of a").eval()
    texts = [f"a photo of a {name}." for name in NAMES]
    torch.testing.assert_close(
        adapter.class_weights(), backbone.encode_text(backbone.tokenize(texts)), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_names_at_the_front_are_tokenized_as_first_words(kind):
    _, backbone = kind
    adapter = CoOp(backbone, NAMES, ctx_init="a photo of a", position="front").eval()
    weights = adapter.class_weights()
    tower = backbone.text
    for name, row in zip(NAMES, weights, strict=True):
        ids = [*tower.word_ids([name])[0], *tower.word_ids(["a photo of a"])[0], *tower.word_ids(["."], after="a")[0]]
        whole = torch.tensor([[*tower.start_ids, *ids, *tower.end_ids]])
        feature = tower.encode_embeddings(tower.embed_tokens(whole), torch.tensor([whole.shape[1] - 1]))
        torch.testing.assert_close(row, F.normalize(feature, dim=-1)[0], atol=1e-5, rtol=0)


def test_the_budget_changes_nothing(kind):
    _, backbone = kind
    gradients = []
    for budget in (2**30, 2**10):
        adapter = CoOp(backbone, NAMES, n_ctx=2, seed=1, memory_budget_bytes=budget)
        features = adapter.text_features()
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        assert adapter.context.grad is not None
        gradients.append(adapter.context.grad)
    assert gradients[0].abs().max() > 1e-4
    difference = (gradients[0] - gradients[1]).abs().max()
    assert difference < 1e-4 * gradients[0].abs().max()


# -- tokenizers --------------------------------------------------------------------------------------------------------


def hf(inner: Any, folder: Any, **kwargs: Any) -> HFTokenizer:
    inner.save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=24, **kwargs)


LAYOUTS: dict[str, tuple[Any, dict[str, Any], tuple[Any, ...]]] = {
    "wordpiece": (wordpiece, {}, ((2,), (3,), 0, ())),
    "clipa": (wordpiece, {"strip_sep_token": True}, ((2,), (0,), 0, ())),
    "siglip": (lambda: sentencepiece(pad="</s>"), {"clean": "canonicalize"}, ((), (1,), 1, ())),
    "t5": (lambda: sentencepiece(pad="<pad>"), {}, ((), (1,), 0, ())),
    "siglip2": (gemma, {"clean": "canonicalize"}, ((), (1,), 0, ())),
    "roberta": (byte_level, {}, ((0,), (2,), 1, ())),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    make, kwargs, expected = LAYOUTS[name]
    tokenizer = hf(make(), tmp_path, **kwargs)
    tokens = PromptTokens(tokenizer)
    assert (tokens.start_ids, tokens.end_ids, tokens.fill_id, tokens.last_ids) == expected
    words = tokens.word_ids(["a rose", "fox"])
    assert [tokens.filled(ids, 24) for ids in words] == tokenizer(["a rose", "fox"]).tolist()
    assert tokens.word_ids([""]) == [[]]
    assert len(tokens.word_ids(["rose " * 60])[0]) >= 60, "never cut"


@pytest.mark.parametrize(
    ("make", "first", "later"),
    [
        (gemma, "rose", "▁rose"),  # no space is put before the first word
        (byte_level, "rose", "Ġrose"),
        (lambda: sentencepiece(pad="<pad>"), "▁rose", "▁rose"),
        (wordpiece, "rose", "rose"),
    ],
)
def test_a_word_inside_a_prompt_has_the_tokens_it_has_there(make, first, later, tmp_path):
    inner = make()
    tokens = PromptTokens(hf(inner, tmp_path))

    def spelled(ids: list[int]) -> str:
        return "".join(inner.convert_ids_to_tokens(ids)).replace("##", "")

    assert spelled(tokens.word_ids(["rose"])[0]) == first
    assert spelled(tokens.word_ids(["rose"], after="a ")[0]) == later
    assert spelled(tokens.word_ids(["."], after="a")[0]) == ".", "no space before a full stop"
    whole = tokens.word_ids(["a photo of a rose."])[0]
    parts = tokens.word_ids(["a photo of a"])[0] + tokens.word_ids(["rose."], after="a ")[0]
    assert whole == parts


def test_clip_tokens_are_the_same_anywhere():
    tokens = PromptTokens(open_clip.SimpleTokenizer())
    assert (tokens.start_ids, tokens.end_ids, tokens.fill_id, tokens.last_ids) == ((49406,), (49407,), 0, ())
    assert tokens.word_ids(["rose."], after="a ") == tokens.word_ids(["rose."])


def test_a_class_token_behind_the_fill(tmp_path):
    """CLIPS writes start, end, fill and one more token, and pools that; here in a tower without a mask."""
    inner = byte_level()
    inner.cls_token = "<unk>"
    tokenizer = hf(inner, tmp_path, tokenizer_mode="clips")
    tokens = PromptTokens(tokenizer)
    # open_clip writes the special tokens itself, the fill included, which is 0 where the tokenizer's own is shorter.
    assert (tokens.start_ids, tokens.end_ids, tokens.last_ids) == ((0,), (2,), (3,))
    text: Any = {"context_length": 24, "vocab_size": 360, "width": 32, "heads": 2, "layers": 2}
    text |= {"pool_type": "last", "no_causal_mask": True}
    vision: Any = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(24, vision, text).eval()
    tower = make_text_tower(model, tokenizer)
    assert tower.context_length == 23
    ids = torch.tensor([[0, *tower.word_ids(["a rose"])[0], 2]])
    features = tower.encode_embeddings(tower.embed_tokens(ids), torch.tensor([ids.shape[1] - 1]))
    torch.testing.assert_close(features, model.encode_text(tokenizer(["a rose"])), atol=1e-5, rtol=0)


# -- what does not go --------------------------------------------------------------------------------------------------


def test_left_padding_is_refused(tmp_path):
    inner = wordpiece()
    inner.padding_side = "left"
    tokenizer = hf(inner, tmp_path)
    if tokenizer.tokenizer.padding_side == "right":  # open_clip 4 sets it itself
        assert PromptTokens(tokenizer).start_ids
        return
    with pytest.raises(BackboneError, match="set padding_side to right"):
        PromptTokens(tokenizer)


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(BackboneError, match="taken apart with a function"):
        PromptTokens(lambda texts, context_length: torch.zeros(len(texts), context_length))


def test_a_tokenizer_of_another_length_is_refused():
    backbone = make_kind("MobileCLIP-S1")
    with pytest.raises(BackboneError, match="sees all of its 77 positions, but its tokenizer writes 64"):
        make_text_tower(backbone.model, open_clip.SimpleTokenizer(context_length=64))


def test_another_fill_than_the_hidden_one_is_refused():
    backbone = make_kind("BiomedCLIP")
    backbone.model.text.config.pad_token_id = 4
    with pytest.raises(BackboneError, match=r"hides the token 4 .*fills prompts with 0"):
        make_text_tower(backbone.model, backbone.tokenizer)


def test_argmax_pooling_needs_an_end_token_of_the_highest_id(tmp_path):
    backbone = make_kind("ViT-B-16")
    with pytest.raises(BackboneError, match=r"pools the token \d+, but its tokenizer ends a text with \[2, 3, 0, 0\]"):
        make_text_tower(backbone.model, hf(wordpiece(), tmp_path))


def test_coca_hides_a_token_that_looks_like_fill():
    tower = make_kind("coca_ViT-B-32").text
    # The token 0 of CLIP's vocabulary is "!" where no word ends.
    assert open_clip.SimpleTokenizer().encode("!;x")[0] == 0
    with pytest.raises(BackboneError, match=r"'!;x\.' holds the token 0, which this text tower takes for the end"):
        suffix_ids(tower, ["rose", "!;x"], 2)
