"""Image features of a ViT whose last block is computed for the class token alone.

Where the class token is what is pooled, all other outputs of the last block are thrown away: of the other tokens it
needs keys and values, and neither their queries nor what follows the attention. It is the same function and the same
gradients; it spares about ten twelfths of that block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import Attention, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptclip.backbone.attention import SplitAttention


def encode_image(model: Any, images: Tensor) -> Tensor:
    """What `model.encode_image` returns, by the shorter path where the tower has it.

    Args:
        model: an open_clip model, with split or fused attention, adapted or not.
        images: (B, 3, H, W) in the dtype of the tower.

    Returns:
        (B, D) features as the model gives them, not normalised.
    """
    if type(model) not in (CLIP, CustomTextCLIP) or not pools_class_token(model.visual):
        return model.encode_image(images)
    return encode_visual(model.visual, images)


def encode_visual(visual: Any, images: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """What an image tower returns that pools its class token, with prompts beside the patches if there are any.

    Args:
        visual: the tower, see `pools_class_token`.
        images: (B, 3, H, W) in the dtype of the tower.
        prompts: (n, T) embeddings for each of the first blocks. The first stand behind the patches, normalised with
            them; those of a later block take the place of what the block before made of its own.

    Returns:
        (B, D) features, not normalised.
    """
    again = visual.transformer.grad_checkpointing
    x = visual._embeds(images)
    *blocks, last = visual.transformer.resblocks
    for block, own in zip_longest(blocks, prompts[: len(blocks)]):
        x = x if own is None else _with_prompts(visual, x, own, first=own is prompts[0])
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    if len(prompts) > len(blocks):
        x = _with_prompts(visual, x, prompts[-1], first=not blocks)
    x = checkpoint(_last_block, last, x, use_reentrant=False) if again else _last_block(last, x)
    pooled, _ = visual._pool(x)
    return pooled if visual.proj is None else pooled @ visual.proj


def _with_prompts(visual: Any, x: Tensor, own: Tensor, *, first: bool) -> Tensor:
    """(B, L, T) tokens with a block's own (n, T) prompts at their end: behind the others, or instead of the last n."""
    own = own.to(x.dtype)
    kept, added = (x, visual.ln_pre(own)) if first else (x[:, : -len(own)], own)
    return torch.cat([kept, added.expand(x.shape[0], -1, -1)], dim=1)


def pools_class_token(visual: nn.Module) -> bool:
    """Whether an image tower is open_clip's own ViT of default blocks that pools its class token and nothing else."""
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


def _last_block(block: Any, x: Tensor) -> Tensor:
    """(B, L, T) to (B, 1, T): a default block's output at the first token."""
    first, normed = x[:, :1], block.ln_1(x)
    first = first + block.ls_1(block.attention(normed[:, :1], normed, normed))
    return first + block.ls_2(block.mlp(block.ln_2(first)))
