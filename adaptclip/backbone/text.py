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
from torch.nn import functional as F

from adaptclip.errors import BackboneError

PrefixState = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of the shared prefix, one pair per block, each (heads, P, T / heads) for P prefix tokens."""

Shapes = tuple[tuple[int, int], ...]
"""(G, l) of every run of packed suffixes: G of them with l tokens each."""

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
        return self._run(self._with_positions(prefix, 0), len(prefix), (), None)[1]

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
        tokens, shapes = self._pack(suffixes, state[0][0].shape[1])
        return self._project(self._run(tokens, 0, shapes, state)[0])

    def encode_packed(self, prefix: Tensor, suffixes: Sequence[Tensor]) -> Tensor:
        """Features of prompts with a common (P, T) prefix and (G, l, T) suffixes, as `encode_suffixes` in one pass.

        Prefix and suffixes go through the blocks side by side, so that the weights are read once.
        """
        tokens, shapes = self._pack(suffixes, len(prefix))
        together = torch.cat([self._with_positions(prefix, 0), tokens])
        return self._project(self._run(together, len(prefix), shapes, None)[0])

    def _pack(self, suffixes: Sequence[Tensor], start: int) -> tuple[Tensor, Shapes]:
        """Tensors (G, l, T) to one list of tokens (n, T) with positions from `start` on, and their shapes (G, l)."""
        tokens = torch.cat([self._with_positions(s, start).flatten(0, 1) for s in suffixes])
        return tokens, tuple((s.shape[0], s.shape[1]) for s in suffixes)

    def _run(self, x: Tensor, prefix: int, shapes: Shapes, state: PrefixState | None) -> tuple[Tensor, PrefixState]:
        """Takes packed tokens through all blocks.

        Args:
            x: (P + n, T) tokens: those of the prefix where it is not known yet, then the suffixes'.
            prefix: P; 0 where `state` is given.
            shapes: (G, l) of each run of suffixes.
            state: keys and values of the prefix, or None to compute them.

        Returns:
            (sum of G, T) tokens at the pooled positions, and the prefix's keys and values.
        """
        if not self.supports_prefix:
            raise BackboneError(
                "the shared-prefix path needs open_clip's default text blocks (ResidualAttentionBlock), got "
                f"{type(self._blocks[0]).__name__}; use the plain path (encode_embeddings; CoOp takes it by itself)"
            )
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self._blocks):
            normed = block.ln_1(x)
            known = None if state is None else state[i]
            if i + 1 < len(self._blocks):
                attended, pair = _attend(block, normed, prefix, shapes, known)
            else:
                # The last block's output counts only at the pooled positions; of all else, only keys and values.
                attended, pair = _attend_last(block, normed, prefix, shapes, known)
                x = _last_tokens(x[prefix:], shapes)
            pairs.append(pair)
            if len(attended):
                x = _finish_block(block, x, attended)
        return x, tuple(pairs)

    def activation_bytes(self, tokens: int, attended: int) -> int:
        """Estimate of what the backward pass keeps of `tokens` tokens that each see at most `attended` tokens.

        Per token and block: the inputs of both LayerNorms (2 T), query, key and value (3 T), the hidden layer before
        its activation (about 4 T, twice that where the activation is written in several operations, as QuickGELU is),
        and one probability per head and attended token. Frozen linear layers keep nothing. The values are at most
        float32; a quarter is added for what is alive only for a moment.
        """
        block = self._blocks[0]
        hidden = block.mlp.c_fc.out_features * (1 if isinstance(block.mlp.gelu, nn.GELU) else 2)
        floats = 5 * self.width + hidden + block.attn.num_heads * attended
        return int(1.25 * 4 * floats * len(self._blocks)) * tokens

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
    if type(block) is not ResidualAttentionBlock or type(block.attn) is not nn.MultiheadAttention:
        return False
    attn = block.attn
    return attn.in_proj_weight is not None and attn.bias_k is None and attn.dropout == 0 and not attn.add_zero_attn


def _full_precision(device: torch.device) -> torch.autocast:
    """Attention scores are computed in float32 whatever the autocast: they are few, and half precision hurts them."""
    return torch.autocast(device_type=device.type, enabled=False)


def _in_proj(block: Any, x: Tensor, parts: slice = slice(0, 3)) -> Tensor:
    """Query, key and value of (..., T) tokens side by side; `parts` picks some of the three."""
    width = x.shape[-1]
    rows = slice(parts.start * width, parts.stop * width)
    bias = block.attn.in_proj_bias
    return F.linear(x, block.attn.in_proj_weight[rows], None if bias is None else bias[rows])


def _heads_first(packed: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """Splits (n, parts T) projections into tensors (heads, n, T / heads) in float32, each in memory order."""
    split = packed.float().unflatten(-1, (parts, heads, -1)).permute(1, 2, 0, 3)
    return split.contiguous().unbind(0)


def _finish_block(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention in a default block: (n, T) residual stream and attention output to (n, T)."""
    x = x + block.ls_1(block.attn.out_proj(attended.to(x.dtype)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _last_tokens(x: Tensor, shapes: Shapes) -> Tensor:
    """The last token of every suffix: packed (n, T) to (sum of G, T)."""
    parts = x.split([groups * length for groups, length in shapes])
    last = [part.unflatten(0, shape)[:, -1] for part, shape in zip(parts, shapes, strict=True)]
    return torch.cat(last) if last else x[:0]


def _attend(
    block: Any, x: Tensor, prefix: int, shapes: Shapes, known: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of every packed token: (P + n, T) normalised tokens to the same shape, with the prefix's key, value."""
    heads = block.attn.num_heads
    first, *parts = _in_proj(block, x).split([prefix, *(groups * length for groups, length in shapes)])
    outputs = []
    if known is None:
        q, *known = _heads_first(first, heads, 3)
        outputs.append(_attend_group(q, *known, prefix, prefix, None))
    for part, (_, length) in zip(parts, shapes, strict=True):
        outputs.append(_attend_group(*_heads_first(part, heads, 3), length, length, known))
    return torch.cat(outputs), (known[0], known[1])


def _attend_last(
    block: Any, x: Tensor, prefix: int, shapes: Shapes, known: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of the last token of each suffix only: (P + n, T) to (sum of G, T), with the prefix's key, value."""
    heads = block.attn.num_heads
    first, *parts = _in_proj(block, x, slice(1, 3)).split([prefix, *(groups * length for groups, length in shapes)])
    if known is None:
        known = _heads_first(first, heads, 2)
    queries = _in_proj(block, _last_tokens(x[prefix:], shapes), slice(0, 1)).split([groups for groups, _ in shapes])
    outputs = []
    for query, part, (_, length) in zip(queries, parts, shapes, strict=True):
        outputs.append(_attend_group(*_heads_first(query, heads, 1), *_heads_first(part, heads, 2), 1, length, known))
    return torch.cat(outputs) if outputs else x[:0], (known[0], known[1])


def _attend_group(
    q: Tensor, k: Tensor, v: Tensor, num_queries: int, length: int, known: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Causal attention of G sequences of one length to themselves and, before that, to a prefix they share.

    The two kinds of scores are computed apart and share one softmax, so the prefix is never copied per class: its part
    is one matrix product per head over the tokens of all classes.

    Args:
        q: (heads, G m, w) queries of the last m tokens of each sequence.
        k: (heads, G l, w) keys.
        v: (heads, G l, w) values.
        num_queries: m.
        length: l.
        known: keys and values of the prefix, each (heads, P, w), or None.

    Returns:
        (G m, heads w) in float32.
    """
    heads, rows, head_width = q.shape
    groups, scale = rows // num_queries, head_width**-0.5
    with _full_precision(q.device):
        hidden = torch.full((num_queries, length), float("-inf"), device=q.device).triu_(1 + length - num_queries)
        own_q, own_k, own_v = (t.view(heads * groups, -1, head_width) for t in (q, k, v))
        scores = torch.baddbmm(hidden.expand(heads * groups, -1, -1), own_q, own_k.mT, alpha=scale)
        if known is None:
            out = scores.softmax(-1) @ own_v
        else:
            keys, values = known
            prefix = keys.shape[1]
            to_prefix = (q @ (keys * scale).mT).view(heads * groups, num_queries, prefix)
            weights = torch.cat([to_prefix, scores], dim=-1).softmax(-1)
            from_prefix = weights[..., :prefix].view(heads, rows, prefix) @ values
            out = torch.baddbmm(from_prefix.view_as(own_q), weights[..., prefix:], own_v)
        return out.view(heads, rows, head_width).transpose(0, 1).reshape(rows, heads * head_width)


def make_text_tower(model: nn.Module, tokenizer: Callable[..., Tensor]) -> TextTower:
    """Returns the text tower of an open_clip model.

    Args:
        model: a CLIP or CustomTextCLIP of open_clip.
        tokenizer: the checkpoint's tokenizer: texts and `context_length=` to (C, L) ids.

    Raises:
        BackboneError: the model's text tower is of a kind whose prompts cannot be learnt yet.
    """
    if isinstance(model, open_clip.CoCa):
        raise _unsupported("CoCa", "appends a class token and pools it")
    parts = model if isinstance(model, open_clip.CLIP) else getattr(model, "text", None)
    if isinstance(parts, HFTextEncoder):
        raise _unsupported("Hugging Face", "is not open_clip's own transformer")
    if not isinstance(parts, open_clip.CLIP | TextTransformer):
        raise _unsupported(type(model).__name__, "is not known")
    pool_type = parts.text_pool_type if isinstance(parts, open_clip.CLIP) else parts.pool_type
    eos_id = parts.text_eos_id if isinstance(parts, open_clip.CLIP) else parts.eos_id
    if getattr(parts, "cls_emb", None) is not None:
        raise _unsupported("class-token", "appends a class token and pools it")
    if not _is_causal(parts.attn_mask):
        raise _unsupported("bidirectional", "has no causal mask (as SigLIP and MobileCLIP-S)")
    if pool_type not in ("argmax", "eos"):
        raise _unsupported(f"{pool_type!r}-pooling", "does not pool the EOT token")
    return CausalTextTower(parts, pool_type=str(pool_type), eos_id=int(eos_id), tokenizer=tokenizer)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether an additive (L, L) mask hides exactly the tokens that come later."""
    return mask is not None and torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))


def _unsupported(kind: str, why: str) -> BackboneError:
    return BackboneError(
        f"prompts cannot be learnt with this model: its {kind} text tower {why}. What works: {SUPPORTED}. "
        "Zero-shot classification works with every model."
    )
