"""Text towers: embeddings in, pooled text feature out, by the plain path or by an exact path that shares the prefix.

In a causal tower a token sees only itself and what stands before it. Prompts that differ only from some token on, such
as `SOS context name . EOT`, therefore have the same keys and values in every block for their common prefix: they are
computed once, and each class's short suffix attends to them. Tokens after the EOT cannot reach the pooled feature and
are left out. The suffixes of all classes form one packed list of tokens for everything that acts per token, and the
last block works only at the pooled positions. The result is the same function as the plain path, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from adaptclip.backbone.attention import SplitAttention
from adaptclip.backbone.packed import KeyValue, Run, attend, attend_last, finish_block, last_tokens, plan_runs
from adaptclip.errors import BackboneError

PrefixState = tuple[KeyValue | None, ...]
"""Keys and values of the shared prefix, one pair per block; None in every block where there is no prefix."""

SUPPORTED = (
    "open_clip's CLIP and CustomTextCLIP with a causal TextTransformer that pools the EOT token, for example ViT-B-32, "
    "ViT-B-16, ViT-L-14, RN50 or the embedded starter"
)


class TextTower(Protocol):
    """What prompt learning needs of a text tower. Embeddings are given without positions; the tower adds them.

    Attributes:
        width: T, width of the transformer.
        context_length: L, the most tokens of a prompt, specials included.
        supports_prefix: whether `encode_prefix`, `encode_suffixes` and `encode_packed` can be used.
        start_ids: special tokens before the words of a prompt (SOS).
        end_ids: special tokens after the words, up to the pooled one (EOT).
    """

    width: int
    context_length: int
    supports_prefix: bool
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]

    def word_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut."""
        ...

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Returns (..., T) token embeddings of (...) ids."""
        ...

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions at which (C, L) prompts are pooled."""
        ...

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """Plain path: (C, L, T) embeddings pooled at positions eot (C,) to (C, D) features, not normalised."""
        ...

    def encode_prefix(self, prefix: Tensor) -> PrefixState:
        """Keys and values of a (P, T) prefix that all prompts share."""
        ...

    def encode_suffixes(self, state: PrefixState, suffixes: Sequence[Tensor]) -> Tensor:
        """Features of prompts that go on from a prefix: each suffix tensor is (G, l, T) and ends at its EOT."""
        ...

    def encode_packed(self, prefix: Tensor, suffixes: Sequence[Tensor]) -> Tensor:
        """`encode_prefix` then `encode_suffixes`: (P, T) and tensors (G, l, T) to (sum of G, D) features."""
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
        tokenizer: the checkpoint's tokenizer.

    Raises:
        BackboneError: the tokenizer does not write the token that the tower pools.
    """

    def __init__(self, parts: nn.Module, *, pool_type: str, eos_id: int, tokenizer: Callable[..., Tensor]) -> None:
        self._parts: Any = parts
        self._pool_type = pool_type
        self._eos_id = eos_id
        self._tokenizer = tokenizer
        self.width = int(self._parts.positional_embedding.shape[1])
        self.context_length = int(self._parts.positional_embedding.shape[0])
        self.supports_prefix = all(_is_default_block(block) for block in self._blocks)
        empty = tokenizer([""])[0]
        eot = int(self.pooled_position(empty[None]))
        if pool_type == "eos" and int(empty[eot]) != eos_id:
            raise BackboneError(
                f"the text tower pools the token {eos_id}, but its tokenizer ends a text with {empty.tolist()[:4]}…; "
                "correct eos_id or the tokenizer in the model's configuration"
            )
        self.start_ids = tuple(empty[:eot].tolist())
        self.end_ids = (int(empty[eot]),)

    @property
    def _blocks(self) -> Sequence[Any]:
        return self._parts.transformer.resblocks

    def word_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's token ids without the special tokens, never cut."""
        # A tokenizer cuts silently; with room for every byte there is nothing to cut.
        room = 2 * max((len(text.encode()) for text in texts), default=0) + len(self.start_ids) + len(self.end_ids)
        ids = self._tokenizer(list(texts), context_length=max(room, self.context_length))
        ends = self.pooled_position(ids).tolist()
        return [row[len(self.start_ids) : end].tolist() for row, end in zip(ids, ends, strict=True)]

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Returns the (C,) positions at which (C, L) prompts are pooled."""
        return (ids if self._pool_type == "argmax" else (ids == self._eos_id).int()).argmax(dim=-1)

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

    def activation_bytes(self, tokens: int, attended: int) -> int:
        """Estimate of what the backward pass keeps of `tokens` tokens that each see at most `attended` tokens.

        Per token and block: the inputs of both LayerNorms (2 T), query, key and value (3 T), the hidden layer before
        its activation (about 4 T, twice that where the activation is written in several operations, as QuickGELU is),
        and one probability per head and attended token. Frozen linear layers keep nothing; one with an adapter keeps
        what its own dropout made of its input. The values are at most float32; a quarter is added for what is alive
        only for a moment.
        """
        block = self._blocks[0]
        hidden = block.mlp.c_fc.out_features * (1 if isinstance(block.mlp.gelu, nn.GELU) else 2)
        adapted = sum(layer.in_features for b in self._blocks for layer in b.modules() if hasattr(layer, "lora_A"))
        floats = 5 * self.width + hidden + block.attn.num_heads * attended
        return int(1.25 * 4 * (floats * len(self._blocks) + 1.25 * adapted)) * tokens

    def _with_positions(self, embeddings: Tensor, start: int) -> Tensor:
        """Adds the positions from `start` on to (..., l, T) embeddings, in the dtype the blocks compute in."""
        end = start + embeddings.shape[-2]
        if end > self.context_length:
            raise BackboneError(f"a prompt of {end} tokens does not fit this text tower's {self.context_length}")
        dtype = self._parts.transformer.get_cast_dtype()
        return embeddings.to(dtype) + self._parts.positional_embedding[start:end].to(dtype)

    def _project(self, pooled: Tensor) -> Tensor:
        """Final LayerNorm and projection of (C, T) pooled tokens to (C, D)."""
        x = self._parts.ln_final(pooled)
        projection = self._parts.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _is_default_block(block: nn.Module) -> bool:
    """Whether a block is open_clip's own with fused projections, so that it can be computed part by part."""
    if type(block) is not ResidualAttentionBlock:
        return False
    if isinstance(block.attn, SplitAttention):
        return block.attn.dropout == 0
    if type(block.attn) is not nn.MultiheadAttention:
        return False
    attn = block.attn
    return attn.in_proj_weight is not None and attn.bias_k is None and attn.dropout == 0 and not attn.add_zero_attn


def make_text_tower(model: nn.Module, tokenizer: Callable[..., Tensor]) -> TextTower:
    """Returns the text tower of an open_clip model.

    Args:
        model: a CLIP or CustomTextCLIP of open_clip.
        tokenizer: the checkpoint's tokenizer: texts and `context_length=` to (C, L) ids.

    Raises:
        BackboneError: the model's text tower is of a kind whose prompts cannot be learnt yet, or does not fit its
            tokenizer.
    """
    if isinstance(model, open_clip.CoCa):
        raise _unsupported("CoCa", "appends a class token and pools it")
    whole = isinstance(model, open_clip.CLIP)
    text = model if whole else getattr(model, "text", None)
    if isinstance(text, HFTextEncoder):
        raise _unsupported("Hugging Face", "is not open_clip's own transformer")
    if not isinstance(text, open_clip.CLIP | TextTransformer):
        raise _unsupported(type(model).__name__, "is not known")
    parts: Any = text
    pool_type, eos_id = (parts.text_pool_type, parts.text_eos_id) if whole else (parts.pool_type, parts.eos_id)
    if getattr(parts, "cls_emb", None) is not None:
        raise _unsupported("class-token", "appends a class token and pools it")
    if not _is_causal(parts.attn_mask):
        raise _unsupported("bidirectional", "has no causal mask (as SigLIP and MobileCLIP-S)")
    if pool_type not in ("argmax", "eos"):
        raise _unsupported(f"{pool_type!r}-pooling", "does not pool the EOT token")
    return CausalTextTower(parts, pool_type=pool_type, eos_id=eos_id, tokenizer=tokenizer)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether an additive (L, L) mask hides exactly the tokens that come later."""
    return mask is not None and torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))


def _unsupported(kind: str, why: str) -> BackboneError:
    return BackboneError(
        f"prompts cannot be learnt with this model: its {kind} text tower {why}. What works: {SUPPORTED}. "
        "Zero-shot classification works with every model."
    )
