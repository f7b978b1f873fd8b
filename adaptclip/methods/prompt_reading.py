# SPDX-License-Identifier: Apache-2.0
"""What a learnt context says: the words of the vocabulary whose embeddings lie nearest to its vectors.

CoOp's paper reads its prompts so (arXiv:2109.01134, sec. 4.4) and warns that the words explain little: a vector need
not lie near any word, and the nearest one need not mean to the tower what the vector does. The distances help to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor

from adaptclip.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.methods.cocoop import CoCoOp
    from adaptclip.methods.coop import CoOp

_WORD_END = "</w>"
_VECTORS_AT_ONCE = 256


@dataclass(frozen=True)
class NearWord:
    r"""A token of the vocabulary and how far it is from a context vector.

    Attributes:
        word: a whole word as it is written; a piece that more must follow ends in "…"; bytes that are no text by
            themselves stand as \xNN; special tokens stand as <…>.
        token: its id.
        distance: Euclidean, between the vector and the token's embedding.
    """

    word: str
    token: int
    distance: float


@torch.no_grad()
def nearest_words(backbone: ClipBackbone, context: Tensor, k: int = 5) -> list[Any]:
    """Returns the k vocabulary words nearest to each context vector, nearest first (CoOp, sec. 4.4).

    All tokens of the vocabulary take part, pieces of words and special tokens too, as in the paper.

    Args:
        backbone: the model whose text tower the context was learnt for.
        context: (M, T) vectors, or (C, M, T) where each class has its own.
        k: words per vector, from 1 to the size of the vocabulary.

    Returns:
        M lists of k `NearWord`; for (C, M, T), C of these.

    Raises:
        ConfigError: the context has another shape, or `k` is out of range.
        BackboneError: the tokenizer cannot tell its tokens' text.
    """
    width = backbone.text.width
    if context.ndim not in (2, 3) or context.shape[-1] != width:
        raise ConfigError(f"the context should be (M, {width}) or (C, M, {width}), got {tuple(context.shape)}")
    num_tokens, spell = _vocabulary(backbone.tokenizer)
    if not 1 <= k <= num_tokens:
        raise ConfigError(f"k must lie between 1 and the {num_tokens} tokens of the vocabulary, got {k}")
    device = next(backbone.parameters()).device
    # Apple's GPUs have no float64: the numbers go to the CPU first, here and wherever it is wanted.
    table = backbone.text.embed_tokens(torch.arange(num_tokens, device=device)).cpu().double()
    vectors = context.detach().cpu().double().flatten(0, -2)
    distances, ids = _nearest(vectors, table, k)
    read = [
        [NearWord(spell(i), i, d) for i, d in zip(row, near, strict=True)]
        for row, near in zip(ids.tolist(), distances.tolist(), strict=True)
    ]
    if context.ndim == 2:
        return read
    size = context.shape[1]
    return [read[start : start + size] for start in range(0, len(read), size)]


def read_prompt(adapter: CoOp | CoCoOp, k: int = 3, *, max_classes: int = 20) -> list[Any] | dict[str, Any]:
    """Returns the words nearest to an adapter's context, as short text for a report.

    Args:
        adapter: CoOp or CoCoOp (the context that all images start from).
        k: words per vector.
        max_classes: where each class has a context of its own, only those of the first classes are read.

    Returns:
        M lists of k texts such as "photo (0.52)", the distance in brackets; by class name where each class has its own.
    """
    if adapter.context.ndim == 3:
        read = nearest_words(adapter.backbone, adapter.context[:max_classes], k)
        return {name: _as_text(words) for name, words in zip(adapter.class_names, read, strict=False)}
    return _as_text(nearest_words(adapter.backbone, adapter.context, k))


def _as_text(read: Sequence[Sequence[NearWord]]) -> list[list[str]]:
    return [[f"{near.word} ({near.distance:.2f})" for near in words] for words in read]


def _nearest(vectors: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and numbers, (n, k) each, of the rows of (V, T) `table` nearest to (n, T) `vectors`, in float64."""
    sizes = table.square().sum(-1)
    distances, ids = [], []
    for part in vectors.split(_VECTORS_AT_ONCE):
        # The square of the vector itself does not change the order.
        near = (sizes - 2 * part @ table.T).topk(k, largest=False).indices
        # Computed once more from the differences: the expanded form does not give 0 for a word itself.
        exact, order = (part[:, None] - table[near]).norm(dim=-1).sort(stable=True)
        distances.append(exact)
        ids.append(near.gather(1, order))
    return torch.cat(distances), torch.cat(ids)


def _vocabulary(tokenizer: Any) -> tuple[int, Callable[[int], str]]:
    """The number of tokens, and what writes one of them as `NearWord.word` says."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return tokenizer.vocab_size, lambda token: _spelled_by_bytes(tokenizer, token)
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None or not hasattr(inner, "convert_ids_to_tokens"):
        raise BackboneError(
            f"a {type(tokenizer).__name__} does not tell the text of its tokens; contexts can be read with open_clip's "
            "SimpleTokenizer and with Hugging Face tokenizers"
        )
    # Their ways to mark where a word begins or ends differ; what is not known stays as it is.
    return inner.vocab_size, lambda token: inner.convert_ids_to_tokens(token).removesuffix(_WORD_END)


def _spelled_by_bytes(tokenizer: open_clip.SimpleTokenizer, token: int) -> str:
    """Undoes CLIP's byte-pair encoding: one replacement character per byte, and a mark at the end of a word."""
    kept = tokenizer.decoder[token]
    if token in tokenizer.all_special_ids:
        return kept
    body = kept.removesuffix(_WORD_END)
    text = bytes(tokenizer.byte_decoder[char] for char in body).decode("utf-8", errors="backslashreplace")
    return text if kept.endswith(_WORD_END) else f"{text}…"
