# SPDX-License-Identifier: Apache-2.0
"""Reading contexts: against a search over the whole vocabulary in numpy, and against words that are known."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from tiny_clip import make_tiny_backbone

from adaptclip.errors import BackboneError, ConfigError
from adaptclip.methods import CoCoOp, CoOp
from adaptclip.methods.prompt_reading import NearWord, nearest_words, read_prompt

NAMES = ("rose", "dog", "cat")
ENCODER = open_clip.SimpleTokenizer().encoder


@pytest.fixture(scope="module", params=["clip", "custom_text"])
def backbone(request):
    return make_tiny_backbone(request.param)


@pytest.fixture(scope="module")
def table(backbone) -> np.ndarray:
    parts: Any = backbone.model if isinstance(backbone.model, open_clip.CLIP) else backbone.model.text
    return parts.token_embedding.weight.double().numpy()


def test_the_nearest_of_all_words(backbone, table):
    context = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    # One vector very near to a word, and one half way between two.
    context[1] = torch.from_numpy(table[1125] * 1.001)
    context[2] = torch.from_numpy((table[1929] + 2 * table[2368]) / 3)
    read = nearest_words(backbone, context, k=4)
    assert len(read) == 3
    for vector, words in zip(context.double().numpy(), read, strict=True):
        distances = np.sqrt(((table - vector) ** 2).sum(1))
        order = np.argsort(distances)[:4]
        assert [near.token for near in words] == order.tolist()
        assert [near.distance for near in words] == pytest.approx(distances[order].tolist(), abs=1e-7)
    assert read[1][0].token == 1125
    assert read[2][0].token == 2368


def test_words_read_back_as_themselves(backbone):
    coop = CoOp(backbone, NAMES, ctx_init="a photo of a")
    read = nearest_words(backbone, coop.context)
    assert [words[0].word for words in read] == ["a", "photo", "of", "a"]
    assert [words[0].distance for words in read] == [0, 0, 0, 0]
    assert all(len(words) == 5 for words in read)
    assert all(words[1].distance > 0 for words in read)


def test_contexts_of_classes(backbone):
    coop = CoOp(backbone, NAMES, n_ctx=2, class_specific=True)
    with torch.no_grad():
        coop.context[1] = CoOp(backbone, NAMES, ctx_init="red roses").context
    read = nearest_words(backbone, coop.context, k=2)
    assert [len(of_class) for of_class in read] == [2, 2, 2]
    assert [words[0].word for words in read[1]] == ["red", "roses"]
    for of_class, context in zip(read, coop.context, strict=True):
        assert of_class == nearest_words(backbone, context, k=2)


@pytest.mark.parametrize(
    ("token", "word"),
    [
        ("photo</w>", "photo"),
        ("te", "te…"),
        ("!</w>", "!"),
        ("<start_of_text>", "<start_of_text>"),
        ("<end_of_text>", "<end_of_text>"),
        ("cafÃ©</w>", "café"),
        ("ðŁĺĤ</w>", "😂"),
        ("Ń", "\\xad…"),
    ],
)
def test_how_a_token_is_written(backbone, table, token, word):
    vector = torch.from_numpy(table[ENCODER[token]]).float()[None]
    assert nearest_words(backbone, vector, k=1) == [[NearWord(word, ENCODER[token], 0.0)]]


def test_text_for_a_report(backbone):
    shared = read_prompt(CoOp(backbone, NAMES, ctx_init="a photo"), k=2)
    assert isinstance(shared, list)
    assert [words[0] for words in shared] == ["a (0.00)", "photo (0.00)"]
    assert [len(words) for words in shared] == [2, 2]
    assert read_prompt(CoCoOp(backbone, NAMES, ctx_init="a photo"), k=2) == shared
    own = CoOp(backbone, NAMES, ctx_init="a photo", class_specific=True)
    assert read_prompt(own, k=2) == dict.fromkeys(NAMES, shared)
    assert list(read_prompt(own, max_classes=2)) == ["rose", "dog"]


@pytest.mark.parametrize(
    ("context", "k", "message"),
    [
        (torch.zeros(4, 64), 0, "k must lie between 1 and the 49408 tokens"),
        (torch.zeros(4, 64), 49409, "got 49409"),
        (torch.zeros(4, 63), 5, r"should be \(M, 64\) or \(C, M, 64\), got \(4, 63\)"),
        (torch.zeros(64), 5, r"got \(64,\)"),
    ],
)
def test_bad_input(backbone, context, k, message):
    with pytest.raises(ConfigError, match=message):
        nearest_words(backbone, context, k)


class Silent:
    """A tokenizer that only tokenizes."""

    context_length = 77
    tokenizer: Any

    def __call__(self, texts, context_length=77):
        return open_clip.SimpleTokenizer()(texts, context_length=context_length)


class Words:
    """The part of a Hugging Face tokenizer that is asked for."""

    vocab_size = 49408

    def convert_ids_to_tokens(self, token):
        return open_clip.SimpleTokenizer().decoder[token]


def test_other_tokenizers():
    backbone: Any = make_tiny_backbone()
    assert backbone.text.width == 64  # taken apart by its own tokenizer
    backbone.tokenizer = Silent()
    with pytest.raises(BackboneError, match="a Silent does not tell the text of its tokens"):
        nearest_words(backbone, torch.zeros(1, 64))
    backbone.tokenizer.tokenizer = Words()
    own = backbone.model.token_embedding.weight[[ENCODER["photo</w>"]]]
    assert [near.word for near in nearest_words(backbone, own, k=1)[0]] == ["photo"]
