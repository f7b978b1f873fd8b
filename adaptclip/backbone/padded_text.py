"""open_clip text towers whose result hangs on more than the prompt: on the fill behind it, or on a class token.

SigLIP, CLIPA and MobileCLIP-S have no causal mask, so that every token sees the fill behind the prompt, and SigLIP and
CLIPA pool the last of all positions. Nothing can be left out: all positions of the context are computed.

CoCa appends a class token to the whole context and pools that. Its mask hides the fill from the class token, but one
place late in the published weights: the first token of the fill is seen, and the class token does not see itself. The
tokens are causal, so the shortest exact form is the prompt, one token of fill and the class token at its own position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.backbone.prompt_tokens import PromptTokens
from adaptclip.backbone.text_parts import add_positions, block_bytes, project_text
from adaptclip.errors import BackboneError

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
        x = self._parts.transformer(x, attn_mask=self._parts.attn_mask)
        if self._pool_type in ("first", "last"):
            pooled = x[:, 0 if self._pool_type == "first" else -1]
        else:
            pooled = x[torch.arange(len(x), device=x.device), eot]
        return project_text(self._parts, pooled)

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
