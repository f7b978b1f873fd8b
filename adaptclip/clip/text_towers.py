# SPDX-License-Identifier: Apache-2.0
"""open_clip's text towers: how a tokenizer lays out a prompt, and how each kind of tower reads it.

Every tokenizer writes `start words end fill…`: CLIP's BPE `SOS words EOT 0…`, WordPiece `[CLS] words [SEP] [PAD]…`, T5
and SigLIP `words </s> fill…`, NLLB a language before the words. CLIPS puts one more token behind the fill.

SigLIP, CLIPA and MobileCLIP-S have no causal mask, so that every token sees the fill behind the prompt, and SigLIP and
CLIPA pool the last of all positions. Nothing can be left out: all positions of the context are computed.

CoCa appends a class token to the whole context and pools that. Its mask hides the fill from the class token, but one
place late in the published weights: the first token of the fill is seen, and the class token does not see itself. The
tokens are causal, so the shortest exact form is the prompt, one token of fill and the class token at its own position.

Hugging Face text encoders inside open_clip models (BERT, RoBERTa, XLM-R, mT5, NLLB) mask what the prompt is filled
with, so prompts are computed only up to the longest of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.errors import BackboneError

if TYPE_CHECKING:
    from open_clip.hf_model import HFTextEncoder

_PROBE = "a"
_ROOM = 12


class PromptTokens:
    """The layout of one tokenizer's prompts, found by asking it, and the tokens of words.

    Args:
        tokenizer: of open_clip, for CLIP's vocabulary or around one of Hugging Face's.

    Raises:
        BackboneError: the tokenizer is of another kind, or writes prompts in another order (left padding, for example).

    Attributes:
        start_ids: special tokens before the words.
        end_ids: special tokens after the words.
        fill_id: what the rest of the context is filled with; may be the same as an end token.
        last_ids: special tokens behind the fill, at the end of the context; nearly always none.
        context_length: tokens that the tokenizer writes by itself.
        highest_id: largest id of its vocabulary.
        unknown_id: what is written for a word that it does not have; None where every word can be spelt.
    """

    def __init__(self, tokenizer: Any) -> None:
        import open_clip
        from open_clip.tokenizer import HFTokenizer, SigLipTokenizer

        if not isinstance(tokenizer, open_clip.SimpleTokenizer | HFTokenizer | SigLipTokenizer):
            raise BackboneError(
                f"prompts cannot be taken apart with a {type(tokenizer).__name__}; known are open_clip's "
                "SimpleTokenizer and HFTokenizer"
            )
        self._tokenizer: Any = tokenizer
        self.context_length = int(self._tokenizer.context_length)
        simple = isinstance(tokenizer, open_clip.SimpleTokenizer)
        self.highest_id: int = (tokenizer.vocab_size if simple else len(tokenizer.tokenizer)) - 1
        self.unknown_id: int | None = None if simple else tokenizer.tokenizer.unk_token_id
        words = self._words(_PROBE)
        row = self._row(_PROBE, len(words) + _ROOM)
        start = next((i for i in range(len(row)) if words and row[i : i + len(words)] == words), None)
        if start is None:
            raise self._unknown_layout(row)
        after = row[start + len(words) :]
        num_end = 1 if simple else self._num_specials() - start
        if not 0 <= num_end < len(after) - 1:
            raise self._unknown_layout(row)
        self.start_ids, self.end_ids = tuple(row[:start]), tuple(after[:num_end])
        self.fill_id = after[num_end]
        self.last_ids = () if after[-1] == self.fill_id else (after[-1],)
        if row != self.filled(words, len(row)):
            raise self._unknown_layout(row)

    def word_ids(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut.

        Args:
            texts: what to tokenize.
            after: what stands before each text in the prompt. Some tokenizers write a word otherwise at the start of a
                text than after a space ("rose" and "▁rose" in Gemma's, "rose" and "Ġrose" in RoBERTa's), and a full
                stop otherwise after a space than after a word.
        """
        lead = self._words(after.rstrip()) if after else []
        found = []
        for text in texts:
            ids = self._words(after + text) if lead else []
            # Where the text melts into what stands before it, its tokens cannot be told apart.
            found.append(ids[len(lead) :] if lead and ids[: len(lead)] == lead else self._words(text))
        return found

    def filled(self, words: Sequence[int], length: int) -> list[int]:
        """Returns the `length` ids that the tokenizer writes for a prompt of these words."""
        own = [*self.start_ids, *words, *self.end_ids]
        return [*own, *[self.fill_id] * (length - len(own) - len(self.last_ids)), *self.last_ids]

    def end_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions of the last token before the fill in (C, L) prompts."""
        if self.last_ids:
            ids = ids[:, :-1]
        is_fill = ids == self.fill_id
        own = ids.shape[1] - is_fill.int().flip(-1).cumprod(dim=-1).sum(dim=-1)
        # An end token that looks like the fill belongs to the prompt all the same.
        alike = sum(1 for end in self.end_ids if end == self.fill_id)
        return (own + alike).clamp(max=ids.shape[1]) - 1

    def _words(self, text: str) -> list[int]:
        import open_clip
        from open_clip.tokenizer import SigLipTokenizer, basic_clean, canonicalize_text

        tokenizer = self._tokenizer
        if isinstance(tokenizer, open_clip.SimpleTokenizer):
            return list(tokenizer.encode(text))
        if isinstance(tokenizer, SigLipTokenizer):
            cleaned = canonicalize_text(basic_clean(text))
        else:
            cleaned = tokenizer.clean_fn(text)
        return list(tokenizer.tokenizer(cleaned, add_special_tokens=False).input_ids)

    def _row(self, text: str, length: int) -> list[int]:
        return self._tokenizer([text], context_length=length)[0].tolist()

    def _num_specials(self) -> int:
        """How many special tokens a prompt has before the fill."""
        if getattr(self._tokenizer, "tokenizer_mode", ""):
            return 2  # CLIPS: open_clip itself writes a start and an end token
        return len(self._tokenizer.tokenizer(_PROBE).input_ids) - len(self._words(_PROBE))

    def _unknown_layout(self, row: list[int]) -> BackboneError:
        return BackboneError(
            f"prompts cannot be learnt with this tokenizer: it writes {_PROBE!r} as {row[:_ROOM]}…, which is not "
            "`start words end fill…`. If it pads on the left, set padding_side to right in its tokenizer_config.json."
        )


def add_positions(parts: Any, embeddings: Tensor, start: int, limit: int) -> Tensor:
    """Adds the positions from `start` on to (..., l, T) embeddings, in the dtype the blocks compute in.

    Args:
        parts: the module that has `positional_embedding` and `transformer`.
        embeddings: tokens without positions.
        start: position of the first.
        limit: most positions that a prompt may take.

    Raises:
        BackboneError: the embeddings reach beyond the limit.
    """
    end = start + embeddings.shape[-2]
    if end > limit:
        raise BackboneError(f"a prompt of {end} tokens does not fit this text tower's {limit}")
    dtype = parts.transformer.get_cast_dtype()
    return embeddings.to(dtype) + parts.positional_embedding[start:end].to(dtype)


def project_text(parts: Any, pooled: Tensor) -> Tensor:
    """Final LayerNorm and projection of (C, T) pooled tokens to (C, D)."""
    x = parts.ln_final(pooled)
    projection = parts.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def block_bytes(parts: Any, tokens: int, attended: int) -> int:
    """Estimate of what the backward pass keeps of `tokens` tokens that each see at most `attended` tokens.

    Per token and block: the inputs of both LayerNorms (2 T), query, key and value (3 T), the hidden layer before its
    activation (about 4 T, twice that where the activation is written in several operations, as QuickGELU is), and one
    probability per head and attended token. Frozen linear layers keep nothing; one with an adapter keeps what its own
    dropout made of its input. The values are at most float32; a quarter is added for what is alive only for a moment.
    """
    blocks = parts.transformer.resblocks
    block, width = blocks[0], parts.positional_embedding.shape[1]
    hidden = block.mlp.c_fc.out_features * (1 if isinstance(block.mlp.gelu, nn.GELU) else 2)
    adapted = sum(layer.in_features for b in blocks for layer in b.modules() if hasattr(layer, "lora_A"))
    floats = 5 * width + hidden + block.attn.num_heads * attended
    return int(1.25 * 4 * (floats * len(blocks) + 1.25 * adapted)) * tokens


POOLS = ("first", "last", "argmax", "eos")
"""Ways of open_clip's text transformer to choose the pooled token."""


class PaddedTextTower:
    """A text transformer whose result depends on all positions of its context; see `TextTower` for the operations.

    Args:
        parts: the module that has `token_embedding`, `transformer`, `ln_final`, … (the CLIP itself, or its `.text`).
        pool_type: one of POOLS.
        tokens: of the checkpoint's tokenizer.

    Raises:
        BackboneError: the tokenizer fills another number of positions than the tower has.
    """

    supports_prefix = False

    def __init__(self, parts: nn.Module, *, pool_type: str, tokens: PromptTokens) -> None:
        self._parts: Any = parts
        self._pool_type = pool_type
        self._tokens = tokens
        self._num_positions, self.width = map(int, self._parts.positional_embedding.shape)
        if tokens.context_length != self._num_positions:
            raise BackboneError(
                f"this text tower sees all of its {self._num_positions} positions, but its tokenizer writes "
                f"{tokens.context_length}; correct context_length in the model's configuration"
            )
        self.context_length = self._num_positions - len(tokens.last_ids)
        self.start_ids, self.end_ids = tokens.start_ids, tokens.end_ids

    def word_ids(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut."""
        return self._tokens.word_ids(texts, after)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Returns (..., T) token embeddings of (...) ids."""
        return self._parts.token_embedding(ids)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions of the last token before the fill in (C, L) prompts."""
        return self._tokens.end_position(ids)

    def computed_length(self, length: int) -> int:
        """Returns the number of positions: all are computed."""
        return self._num_positions

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """(C, L, T) embeddings up to positions eot (C,), filled up to the whole context, to (C, D) features.

        Raises:
            BackboneError: a prompt is longer than the context.
        """
        fits = min(embeddings.shape[1], self.context_length)
        if int(eot.max()) >= fits:
            raise BackboneError(f"a prompt of {int(eot.max()) + 1} tokens does not fit this text tower's {fits}")
        fill = [self._tokens.fill_id] * (self._num_positions - len(self._tokens.last_ids)) + [*self._tokens.last_ids]
        rest = self.embed_tokens(torch.tensor(fill, device=embeddings.device)).to(embeddings.dtype)
        own = F.pad(embeddings[:, :fits], (0, 0, 0, self._num_positions - fits))
        is_own = torch.arange(self._num_positions, device=eot.device) <= eot[:, None]
        x = add_positions(self._parts, torch.where(is_own[..., None], own, rest), 0, self._num_positions)
        x = self._through_blocks(x)
        if self._pool_type in ("first", "last"):
            pooled = x[:, 0 if self._pool_type == "first" else -1]
        else:
            pooled = x[torch.arange(len(x), device=x.device), eot]
        return project_text(self._parts, pooled)

    @property
    def _blocks(self) -> Sequence[Any]:
        return self._parts.transformer.resblocks

    def _through_blocks(self, x: Tensor) -> Tensor:
        """Takes (C, L, T) tokens through all blocks."""
        return self._parts.transformer(x, attn_mask=self._parts.attn_mask)

    def activation_bytes(self, tokens: int, attended: int) -> int:
        """Estimate of what the backward pass keeps of `tokens` tokens (`text_parts.block_bytes`)."""
        return block_bytes(self._parts, tokens, attended)


class ClassTokenTextTower:
    """A causal text transformer that appends and pools a class token (CoCa); see `TextTower` for the operations.

    Args:
        text: the text transformer.
        tokens: of the checkpoint's tokenizer.
    """

    supports_prefix = False

    def __init__(self, text: nn.Module, *, tokens: PromptTokens) -> None:
        self._text: Any = text
        self._tokens = tokens
        num_positions, self.width = map(int, self._text.positional_embedding.shape)
        self.context_length = num_positions - 1
        self.start_ids, self.end_ids = tokens.start_ids, tokens.end_ids

    def word_ids(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut.

        Raises:
            BackboneError: a word holds the token that the tower takes for fill and hides.
        """
        found = self._tokens.word_ids(texts, after)
        hidden = next((text for text, ids in zip(texts, found, strict=True) if self._text.pad_id in ids), None)
        if hidden is not None:
            raise BackboneError(
                f"{hidden!r} holds the token {self._text.pad_id}, which this text tower takes for the end of the "
                "prompt and hides; write it without that character (`aliases` in the card)"
            )
        return found

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Returns (..., T) token embeddings of (...) ids."""
        return self._text.token_embedding(ids)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions of the last token before the fill in (C, L) prompts."""
        return self._tokens.end_position(ids)

    def computed_length(self, length: int) -> int:
        """Returns the number of tokens computed for a prompt: one of fill and the class token are added."""
        return min(length + 1, self.context_length) + 1

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """(C, L, T) embeddings up to positions eot (C,), with the class token behind them, to (C, D) features.

        Raises:
            BackboneError: a prompt is longer than the context.
        """
        text = self._text
        longest = int(eot.max()) + 1
        length = min(longest + 1, max(self.context_length, longest))
        own = F.pad(embeddings[:, :length], (0, 0, 0, max(0, length - embeddings.shape[1])))
        is_own = torch.arange(length, device=eot.device) <= eot[:, None]
        fill = text.token_embedding(torch.tensor(text.pad_id, device=embeddings.device)).to(embeddings.dtype)
        x = add_positions(text, torch.where(is_own[..., None], own, fill), 0, self.context_length)
        last = (text.cls_emb + text.positional_embedding[-1]).to(x.dtype)
        x = torch.cat([x, last.expand(len(x), 1, -1)], dim=1)
        # open_clip reads off the ids which keys are hidden; any id but the fill's stands for a token.
        ids = torch.where(is_own, text.pad_id + 1, text.pad_id)
        mask = text.attn_mask[: length + 1, : length + 1] + text._build_additive_mask(ids, length + 1, x.dtype)
        return project_text(text, text.transformer(x, attn_mask=mask)[:, -1])

    def activation_bytes(self, tokens: int, attended: int) -> int:
        """Estimate of what the backward pass keeps of `tokens` tokens (`text_parts.block_bytes`)."""
        return block_bytes(self._text, tokens, attended)


class HuggingFaceTextTower:
    """A Hugging Face encoder with open_clip's pooler and projection; see `TextTower` for the operations.

    Args:
        text: open_clip's wrapper around the encoder.
        tokens: of the checkpoint's tokenizer.

    Raises:
        BackboneError: the encoder hides another token than the one its tokenizer fills prompts with.
    """

    supports_prefix = False

    def __init__(self, text: HFTextEncoder, *, tokens: PromptTokens) -> None:
        self._text: Any = text
        self._tokens = tokens
        hidden = self._text.config.pad_token_id
        if hidden != tokens.fill_id:
            raise BackboneError(
                f"the text tower hides the token {hidden} (pad_token_id), but its tokenizer fills prompts with "
                f"{tokens.fill_id}; correct pad_token_id in its config.json, or the tokenizer"
            )
        self.width = int(self._embedding.weight.shape[1])
        self.context_length = min(tokens.context_length, self._num_positions())
        self.start_ids, self.end_ids = tokens.start_ids, tokens.end_ids

    @property
    def _embedding(self) -> Any:
        return self._text.transformer.get_input_embeddings()

    def _num_positions(self) -> int:
        """Most tokens the encoder has positions for; where they are relative (T5), as many as the tokenizer writes."""
        config = self._text.config
        count = getattr(config, "max_position_embeddings", None) or self._tokens.context_length
        # RoBERTa counts positions from behind its padding id.
        shifted = config.model_type in ("roberta", "xlm-roberta")
        return count - (config.pad_token_id + 1 if shifted else 0)

    def word_ids(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut."""
        return self._tokens.word_ids(texts, after)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Returns (..., T) token embeddings of (...) ids, scaled where the encoder scales them (NLLB)."""
        return self._embedding(ids)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions of the last token before the fill in (C, L) prompts."""
        return self._tokens.end_position(ids)

    def computed_length(self, length: int) -> int:
        """Returns `length`: what follows a prompt is hidden, and left out."""
        return length

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """(C, L, T) embeddings, of which those up to positions eot (C,) count, to (C, D) features.

        Raises:
            BackboneError: a prompt is longer than the context.
        """
        length = int(eot.max()) + 1
        if length > self.context_length:
            raise BackboneError(f"a prompt of {length} tokens does not fit this text tower's {self.context_length}")
        mask = (torch.arange(length, device=eot.device) <= eot[:, None]).long()
        out = self._text.transformer(inputs_embeds=embeddings[:, :length], attention_mask=mask)
        return self._text.proj(self._text.pooler(out, mask))

    def activation_bytes(self, tokens: int, attended: int) -> int:
        """Estimate of what the backward pass keeps of `tokens` tokens that each see at most `attended` tokens.

        As `text_parts.block_bytes`, with the sizes that the encoder's configuration names.
        """
        config = self._text.config
        layers = first_size(config, "num_hidden_layers", "num_layers")
        hidden = first_size(config, "intermediate_size", "d_ff", "encoder_ffn_dim")
        heads = first_size(config, "num_attention_heads", "num_heads", "encoder_attention_heads")
        adapted = sum(m.in_features for m in self._text.transformer.modules() if hasattr(m, "lora_A"))
        floats = 5 * self.width + 2 * hidden + heads * attended
        return int(1.25 * 4 * (floats * layers + 1.25 * adapted)) * tokens


def first_size(config: Any, *names: str) -> int:
    """The first of several spellings of a size that a configuration has."""
    return next(int(value) for name in names if (value := getattr(config, name, None)) is not None)
