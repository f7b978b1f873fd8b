# SPDX-License-Identifier: Apache-2.0
"""Text towers: embeddings in, pooled text feature out, by the plain path or by an exact path that shares the prefix.

In a causal tower a token sees only itself and what stands before it. Prompts that differ only from some token on, such
as `SOS context name . EOT`, therefore have the same keys and values in every block for their common prefix: they are
computed once, and each class's short suffix attends to them. Tokens after the EOT cannot reach the pooled feature and
are left out. The suffixes of all classes form one packed list of tokens for everything that acts per token, and the
last block works only at the pooled positions. The result is the same function as the plain path, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from adaptclip.clip.packed import (
    KeyValue,
    PrefixState,
    Run,
    attend,
    attend_last,
    finish_block,
    last_tokens,
    plan_runs,
)
from adaptclip.clip.text_towers import (
    POOLS,
    ClassTokenTextTower,
    HuggingFaceTextTower,
    PaddedTextTower,
    PromptTokens,
    add_positions,
    block_bytes,
    project_text,
)
from adaptclip.errors import BackboneError

SUPPORTED = (
    "open_clip's own text transformer, causal or not (CLIP, CLIPA, CoCa, EVA, MobileCLIP, SigLIP and the embedded "
    "starter), and Hugging Face encoders (BERT, RoBERTa, mT5, NLLB)"
)


class TextTower(Protocol):
    """What prompt learning needs of a text tower. Embeddings are given without positions; the tower adds them.

    Attributes:
        width: T, width of the transformer.
        context_length: L, the most tokens of a prompt, specials included.
        supports_prefix: whether it is a causal one whose prompts can share a prefix (`shares_prefix`).
        start_ids: special tokens before the words of a prompt (SOS); none in some.
        end_ids: special tokens after the words (EOT), up to the pooled one where one of them is pooled.
    """

    width: int
    context_length: int
    supports_prefix: bool
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]

    def word_ids(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut, as they are written behind `after`."""
        ...

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Returns (..., T) token embeddings of (...) ids."""
        ...

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions of the last tokens of (C, L) prompts, the pooled ones in a causal tower."""
        ...

    def computed_length(self, length: int) -> int:
        """Returns for how many tokens the plain path computes a prompt of `length` tokens."""
        ...

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """Plain path: (C, L, T) embeddings, looked at up to positions eot (C,), to (C, D) features, not normalised."""
        ...

    def activation_bytes(self, tokens: int, attended: int) -> int:
        """Estimate of what the backward pass keeps of `tokens` tokens that each see at most `attended` tokens."""
        ...


class CausalTextTower:
    """The causal text transformer of open_clip's CLIP and CustomTextCLIP; see `TextTower` for the operations.

    It holds no weights of its own: the parts are looked up in the model at every call, so that a model moved to another
    device or precision, or with adapted blocks, is followed.

    Args:
        parts: the module that has `token_embedding`, `transformer`, `ln_final`, … (the CLIP itself, or its `.text`).
        pool_type: "argmax" (highest id) or "eos".
        eos_id: the id pooled by "eos".
        tokens: of the checkpoint's tokenizer.

    Raises:
        BackboneError: the tokenizer does not write the token that the tower pools.
    """

    def __init__(self, parts: nn.Module, *, pool_type: str, eos_id: int, tokens: PromptTokens) -> None:
        self._parts: Any = parts
        self._pool_type = pool_type
        self._eos_id = eos_id
        self._tokens = tokens
        self.context_length, self.width = map(int, self._parts.positional_embedding.shape)
        self.supports_prefix = all(_is_default_block(block) for block in self._blocks)
        pooled = eos_id if pool_type == "eos" else tokens.highest_id
        if pooled not in tokens.end_ids:
            empty = [*tokens.start_ids, *tokens.end_ids, tokens.fill_id, tokens.fill_id]
            raise BackboneError(
                f"the text tower pools the token {pooled}, but its tokenizer ends a text with {empty[:4]}…; "
                "correct pool_type, eos_id or the tokenizer in the model's configuration"
            )
        self.start_ids, self.end_ids = tokens.start_ids, tokens.end_ids[: tokens.end_ids.index(pooled) + 1]

    @property
    def _blocks(self) -> Sequence[Any]:
        return self._parts.transformer.resblocks

    def word_ids(self, texts: Sequence[str], after: str = "") -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut."""
        return self._tokens.word_ids(texts, after)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions at which (C, L) prompts are pooled."""
        return (ids if self._pool_type == "argmax" else (ids == self._eos_id).int()).argmax(dim=-1)

    def computed_length(self, length: int) -> int:
        """Returns `length`: nothing behind the EOT is computed."""
        return length

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Returns (..., T) token embeddings of (...) ids."""
        return self._parts.token_embedding(ids)

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """Plain path: (C, L, T) embeddings pooled at positions eot (C,) to (C, D) features, not normalised.

        Raises:
            BackboneError: L is more than the context.
        """
        length = embeddings.shape[1]
        x = self._with_positions(embeddings, 0)
        x = self._parts.transformer(x, attn_mask=self._parts.attn_mask[:length, :length])
        return self._project(x[torch.arange(len(x), device=x.device), eot])

    def encode_prefix(self, prefix: Tensor) -> PrefixState:
        """Keys and values, per block, of a (P, T) prefix that all prompts share.

        Raises:
            BackboneError: the blocks are not the default ones, or P is more than the context.
        """
        return self._through_blocks(self._with_positions(prefix, 0), len(prefix), (), None)[1]

    def encode_suffixes(self, state: PrefixState, suffixes: Sequence[Tensor]) -> Tensor:
        """Features of prompts that go on from a prefix.

        Args:
            state: what `encode_prefix` returned for the P prefix tokens.
            suffixes: one tensor (G, l, T) per suffix length l; the last of the l tokens is the pooled EOT.

        Returns:
            (sum of G, D) features, not normalised, in the order of `suffixes`.

        Raises:
            BackboneError: P + l is more than the context.
        """
        start = 0 if state[0] is None else state[0][0].shape[1]
        tokens, runs = self._pack(suffixes, start)
        return self._project(self._through_blocks(tokens, 0, runs, state)[0])

    def encode_packed(self, prefix: Tensor, suffixes: Sequence[Tensor]) -> Tensor:
        """Features of prompts with a common (P, T) prefix and (G, l, T) suffixes, as `encode_suffixes` in one pass.

        Prefix and suffixes go through the blocks side by side, so that the weights are read once. With P = 0 the
        prompts share nothing, as they must where dropout inside the tower should differ between them.
        """
        tokens, runs = self._pack(suffixes, len(prefix))
        together = torch.cat([self._with_positions(prefix, 0), tokens])
        return self._project(self._through_blocks(together, len(prefix), runs, None)[0])

    def _pack(self, suffixes: Sequence[Tensor], start: int) -> tuple[Tensor, tuple[Run, ...]]:
        """Tensors (G, l, T) to one list of tokens (n, T) with positions from `start` on, and their runs."""
        tokens = torch.cat([self._with_positions(s, start).flatten(0, 1) for s in suffixes])
        return tokens, plan_runs([(s.shape[0], s.shape[1]) for s in suffixes], tokens.device)

    def _through_blocks(
        self, x: Tensor, prefix: int, runs: tuple[Run, ...], state: PrefixState | None
    ) -> tuple[Tensor, PrefixState]:
        """Takes packed tokens through all blocks.

        Args:
            x: (P + n, T) tokens: those of the prefix where it is not known yet, then the suffixes'.
            prefix: P; 0 where `state` is given.
            runs: the suffixes.
            state: keys and values of the prefix, or None to compute them.

        Returns:
            (sum of G, T) tokens at the pooled positions, and the prefix's keys and values.
        """
        if not self.supports_prefix:
            raise BackboneError(
                "the shared-prefix path needs open_clip's default text blocks (ResidualAttentionBlock), got "
                f"{type(self._blocks[0]).__name__}; use the plain path (encode_embeddings; CoOp takes it by itself)"
            )
        first = plan_runs([(1, prefix)], x.device)[0] if prefix else None
        pairs: list[KeyValue | None] = []
        for i, block in enumerate(self._blocks):
            x = self._before_block(i, x, prefix)
            known = None if state is None else state[i]
            if i + 1 < len(self._blocks):
                attended, pair = attend(block, block.ln_1(x), first, runs, known)
            else:
                # The last block's output counts only at the pooled positions; of all else, only keys and values.
                attended, pair = attend_last(block, block.ln_1(x), first, runs, known)
                x = last_tokens(x[prefix:], runs) if runs else x[:0]
            pairs.append(pair)
            if len(attended):
                x = finish_block(block, x, attended)
        return x, tuple(pairs)

    def _before_block(self, number: int, x: Tensor, prefix: int) -> Tensor:
        """What block `number` computes with, of (P + n, T) tokens: those that there are."""
        return x

    def activation_bytes(self, tokens: int, attended: int) -> int:
        """Estimate of what the backward pass keeps of `tokens` tokens (`text_parts.block_bytes`)."""
        return block_bytes(self._parts, tokens, attended)

    def _with_positions(self, embeddings: Tensor, start: int) -> Tensor:
        """Adds the positions from `start` on to (..., l, T) embeddings."""
        return add_positions(self._parts, embeddings, start, self.context_length)

    def _project(self, pooled: Tensor) -> Tensor:
        """Final LayerNorm and projection of (C, T) pooled tokens to (C, D)."""
        return project_text(self._parts, pooled)


def shares_prefix(tower: TextTower) -> TypeGuard[CausalTextTower]:
    """Whether a tower has `encode_prefix`, `encode_suffixes` and `encode_packed`, which share a common prefix."""
    return tower.supports_prefix


def _is_default_block(block: nn.Module) -> bool:
    """Whether a block is open_clip's own with fused projections, so that it can be computed part by part."""
    from open_clip.transformer import ResidualAttentionBlock

    from adaptclip.clip.attention import is_plain_attention

    return type(block) is ResidualAttentionBlock and is_plain_attention(block.attn)


def make_text_tower(model: nn.Module, tokenizer: Callable[..., Tensor]) -> TextTower:
    """Returns the text tower of an open_clip model.

    Args:
        model: a CLIP, CustomTextCLIP or CoCa of open_clip.
        tokenizer: the checkpoint's tokenizer: texts and `context_length=` to (C, L) ids.

    Raises:
        BackboneError: the model's text tower or tokenizer is of a kind that is not known, or they do not fit each
            other.
    """
    import open_clip
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer

    whole = isinstance(model, open_clip.CLIP)
    text = model if whole else getattr(model, "text", None)
    if isinstance(text, HFTextEncoder):
        return HuggingFaceTextTower(text, tokens=PromptTokens(tokenizer))
    if not isinstance(text, open_clip.CLIP | TextTransformer):
        raise _unsupported(type(text if isinstance(text, nn.Module) else model).__name__, "is not known")
    parts: Any = text
    tokens = PromptTokens(tokenizer)
    causal = _is_causal(parts.attn_mask)
    if getattr(parts, "cls_emb", None) is not None and causal:
        return ClassTokenTextTower(parts, tokens=tokens)
    pool_type, eos_id = (parts.text_pool_type, parts.text_eos_id) if whole else (parts.pool_type, parts.eos_id)
    if getattr(parts, "cls_emb", None) is not None:
        raise _unsupported("bidirectional class-token", "is of no published model")
    if getattr(parts, "use_pad_mask", False):
        raise _unsupported("pad-masked", "is of no published model")
    if pool_type not in POOLS or (causal and pool_type == "first"):
        raise _unsupported(f"{pool_type!r}-pooling", "does not pool a token that has seen the prompt")
    if causal and pool_type in ("argmax", "eos"):
        return CausalTextTower(parts, pool_type=pool_type, eos_id=eos_id, tokens=tokens)
    return PaddedTextTower(parts, pool_type=pool_type, tokens=tokens)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether an additive (L, L) mask hides exactly the tokens that come later."""
    return mask is not None and torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))


def _unsupported(kind: str, why: str) -> BackboneError:
    return BackboneError(
        f"prompts cannot be learnt with this model: its {kind} text tower {why}. What works: {SUPPORTED}. "
        "Zero-shot classification works with every model."
    )
