"""Towers that carry prompts in their blocks: in each of the first blocks, learnt embeddings beside the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from open_clip import CLIP, CustomTextCLIP
from torch import Tensor, cat, nn

from adaptclip.backbone import ClipBackbone
from adaptclip.backbone.attention import share_weights
from adaptclip.backbone.class_token import encode_visual, pools_class_token
from adaptclip.backbone.text import CausalTextTower, make_text_tower, shares_prefix
from adaptclip.errors import BackboneError


class DeepPromptTower(CausalTextTower):
    """A causal text tower whose later blocks have prompts of their own in the places behind the start token.

    Args:
        tower: the tower; its weights are looked up, not copied.
        prompts: returns (n, T) embeddings for each block from the second on, as far as there are any.
    """

    def __init__(self, tower: CausalTextTower, prompts: Callable[[], Sequence[Tensor]]) -> None:
        vars(self).update(vars(tower))
        self._prompts = prompts

    def _before_block(self, number: int, x: Tensor, prefix: int) -> Tensor:
        prompts = self._prompts()
        if not prefix or not 0 < number <= len(prompts):
            return x
        own, first = prompts[number - 1].to(x.dtype), len(self.start_ids)
        return cat([x[:first], own, x[first + len(own) :]])


class PromptedImageTower(nn.Module):
    """An image tower with fixed prompts in its blocks, called as the tower itself.

    Args:
        visual: open_clip's ViT, see `pools_class_token`.
        prompts: (J, n, T) embeddings of the first J blocks.
    """

    prompts: Tensor

    def __init__(self, visual: Any, prompts: Tensor) -> None:
        super().__init__()
        self.tower = visual
        self.register_buffer("prompts", prompts)
        for name in ("preprocess_cfg", "image_size", "output_dim"):
            if hasattr(visual, name):
                setattr(self, name, getattr(visual, name))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D) features, not normalised."""
        return encode_visual(self.tower, images, self.prompts.unbind())


def with_image_prompts(model: nn.Module, prompts: Tensor) -> Any:
    """Returns a copy of a model, with shared weights, whose image tower carries (J, n, T) prompts."""
    copied: Any = share_weights(model)
    copied.visual = PromptedImageTower(copied.visual, prompts)
    return copied


def promptable_tower(backbone: ClipBackbone) -> CausalTextTower:
    """Returns the text tower of a model both of whose towers can carry prompts in their blocks.

    Raises:
        BackboneError: a tower cannot; the message says which and what works.
    """
    model = backbone.model
    if type(model) not in (CLIP, CustomTextCLIP) or not pools_class_token(model.visual):
        raise _unfit(backbone, "image", type(model.visual).__name__)
    tower = make_text_tower(model, backbone.tokenizer)
    if not shares_prefix(tower):
        raise _unfit(backbone, "text", type(tower).__name__)
    return tower


def _unfit(backbone: ClipBackbone, tower: str, kind: str) -> BackboneError:
    return BackboneError(
        "prompts in the blocks need open_clip's own ViT that pools its class token, and a causal text tower; "
        f"the {tower} tower of {backbone.name} is another ({kind}). CoOp learns prompts before the text tower of any "
        "model, LoRA adapts the blocks of all."
    )
