"""What the towers around open_clip's own text transformer have in common: positions, projection, memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptclip.errors import BackboneError


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
