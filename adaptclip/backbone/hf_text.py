"""Hugging Face text encoders inside open_clip models (BERT, RoBERTa, XLM-R, mT5, NLLB): embeddings in, feature out.

They mask what the prompt is filled with, so prompts are computed only up to the longest of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor

from adaptclip.backbone.prompt_tokens import PromptTokens
from adaptclip.errors import BackboneError


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
