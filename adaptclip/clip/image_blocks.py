# SPDX-License-Identifier: Apache-2.0
"""ViTs block by block: with learnt prompts in their blocks, and the last block for the class token alone.

Prompts stand behind the patches, where the positions have been added, and each block reads its own: what the block
before made of its prompts is dropped, and behind the last block all are. So nothing but the tower's own tokens is
pooled: the class token, as in the published codes, or the mean or an attention over the patches, in which prompts would
count as if they were parts of the image.

Where open_clip's ViT pools its class token, all other outputs of its last block are thrown away: of the other tokens it
needs keys and values, and neither their queries nor what follows the attention. It is the same function and the same
gradients; it spares about ten twelfths of that block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptclip.clip.attention import SplitAttention


class Parts(NamedTuple):
    """A ViT in parts, which together are its forward pass.

    Attributes:
        width: T.
        embed: (B, 3, H, W) to (B, L, T): patches, class and register tokens, with positions and normalised.
        norm: how they were normalised; an identity where they were not.
        blocks: the blocks; the last may give the pooled token alone.
        pool: (B, L, T) of the last block to (B, D).
        again: whether activations are computed again in the backward pass.
    """

    width: int
    embed: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]
    blocks: Sequence[Callable[[Tensor], Tensor]]
    pool: Callable[[Tensor], Tensor]
    again: bool


def encode_image(model: Any, images: Tensor) -> Tensor:
    """What `model.encode_image` returns, by the shorter path where the tower has it.

    Args:
        model: an open_clip model, with split or fused attention, adapted or not.
        images: (B, 3, H, W) in the dtype of the tower.

    Returns:
        (B, D) features as the model gives them, not normalised.
    """
    from open_clip import CLIP, CustomTextCLIP

    if type(model) not in (CLIP, CustomTextCLIP) or not pools_class_token(model.visual):
        return model.encode_image(images)
    return encode_in_parts(_open_clip_parts(model.visual), images)


def encode_in_parts(parts: Parts, images: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """What an image tower returns, with prompts beside its tokens if there are any.

    Args:
        parts: of the tower, see `vit_parts`.
        images: (B, 3, H, W) in the dtype of the tower.
        prompts: (n, T) embeddings for each of the first blocks, at most as many as there are. The first are normalised
            as the patches are; those of a later block take the place of what the block before made of its own.

    Returns:
        (B, D) features, not normalised.
    """
    x = parts.embed(images)
    length = x.shape[1]
    for number, block in enumerate(parts.blocks):
        if number < len(prompts):
            own = prompts[number].to(x.dtype)
            own = own if number else parts.norm(own)
            x = torch.cat([x[:, :length], own.expand(x.shape[0], -1, -1)], dim=1)
        x = checkpoint(block, x, use_reentrant=False) if parts.again else block(x)
    return parts.pool(x[:, :length])


def vit_parts(visual: nn.Module) -> Parts | None:
    """Returns a ViT's parts, or None for a tower of another kind, whose blocks need not take more tokens than theirs.

    Known are open_clip's own ViT and timm's `VisionTransformer` of default blocks, whatever they pool. Not known are
    convolutions, windows (Swin) and blocks that turn or shift tokens by their place in the image (EVA, relative
    positions).
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if type(visual) is VisionTransformer and _is_plain(visual):
        return _open_clip_parts(visual)
    return _timm_parts(visual) if type(visual) is TimmModel else None


def pools_class_token(visual: nn.Module) -> bool:
    """Whether an image tower is open_clip's own ViT of default blocks that pools its class token and nothing else."""
    from open_clip.transformer import Attention, ResidualAttentionBlock, VisionTransformer

    return (
        type(visual) is VisionTransformer
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
        # open_clip 4 has it no longer: there, everything is.
        and getattr(visual.transformer, "batch_first", True)
        and type(visual.transformer.resblocks[-1]) is ResidualAttentionBlock
        and isinstance(visual.transformer.resblocks[-1].attn, SplitAttention | nn.MultiheadAttention | Attention)
    )


def _is_plain(visual: Any) -> bool:
    """Whether open_clip's ViT returns one vector for an image, by blocks of its own."""
    from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock

    known = (ResidualAttentionBlock, CustomResidualAttentionBlock)
    return (
        not visual.output_tokens
        and getattr(visual.transformer, "batch_first", True)
        and all(type(block) in known for block in visual.transformer.resblocks)
    )


def _open_clip_parts(visual: Any) -> Parts:
    *blocks, last = visual.transformer.resblocks
    if pools_class_token(visual):
        last = partial(_last_block, last)
    width, again = visual.class_embedding.shape[-1], visual.transformer.grad_checkpointing
    return Parts(width, visual._embeds, visual.ln_pre, [*blocks, last], partial(_pool, visual), again)


def _pool(visual: Any, x: Tensor) -> Tensor:
    pooled, _ = visual._pool(x)
    return pooled if visual.proj is None else pooled @ visual.proj


def _last_block(block: Any, x: Tensor) -> Tensor:
    """(B, L, T) to (B, 1, T): a default block's output at the first token."""
    first, normed = x[:, :1], block.ln_1(x)
    first = first + block.ls_1(block.attention(normed[:, :1], normed, normed))
    return first + block.ls_2(block.mlp(block.ln_2(first)))


def _timm_parts(visual: Any) -> Parts | None:
    from timm.models.vision_transformer import Block, VisionTransformer

    trunk = visual.trunk
    if type(trunk) is not VisionTransformer or any(type(block) is not Block for block in trunk.blocks):
        return None

    def embed(images: Tensor) -> Tensor:
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def pool(x: Tensor) -> Tensor:
        return visual.head(trunk.forward_head(trunk.norm(x)))

    return Parts(trunk.embed_dim, embed, trunk.norm_pre, list(trunk.blocks), pool, trunk.grad_checkpointing)
