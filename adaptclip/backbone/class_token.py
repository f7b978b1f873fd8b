"""Image features of a ViT whose last block is computed for the class token alone.

Where the class token is what is pooled, all other outputs of the last block are thrown away: of the other tokens it
needs keys and values, and neither their queries nor what follows the attention. It is the same function and the same
gradients; it spares about ten twelfths of that block.
"""

from __future__ import annotations

from typing import Any

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
    visual = model.visual
    if type(model) not in (CLIP, CustomTextCLIP) or not pools_class_token(visual):
        return model.encode_image(images)
    again = visual.transformer.grad_checkpointing
    x = visual._embeds(images)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    x = checkpoint(_last_block, last, x, use_reentrant=False) if again else _last_block(last, x)
    pooled, _ = visual._pool(x)
    return pooled if visual.proj is None else pooled @ visual.proj


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
