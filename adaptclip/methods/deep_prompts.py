# SPDX-License-Identifier: Apache-2.0
"""Prompts in the blocks of both towers, for MaPLe and PromptSRC: learnt embeddings beside the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from open_clip import CLIP, CustomTextCLIP
from torch import Tensor, cat, nn

from adaptclip.clip.attention import share_weights
from adaptclip.clip.image_blocks import Parts, encode_in_parts, vit_parts
from adaptclip.clip.text import CausalTextTower, make_text_tower, shares_prefix
from adaptclip.clip.text_towers import PaddedTextTower
from adaptclip.errors import BackboneError, ConfigError, DataError
from adaptclip.methods.base import check_state
from adaptclip.methods.class_encoder import ClassEncoder
from adaptclip.methods.coop import suffix_ids
from adaptclip.methods.tuned_towers import TunedTowers, check_full_precision
from adaptclip.prompts import tell_of_names
from adaptclip.seeding import derive_seed

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.methods.method import Method
    from adaptclip.types import Batch


class CausalDeepPrompts(CausalTextTower):
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


class PaddedDeepPrompts(PaddedTextTower):
    """The same of a tower that reads its whole context (SigLIP, CLIPA, MobileCLIP), where there may be no start token.

    Args:
        tower: the tower; its weights are looked up, not copied.
        prompts: returns (n, T) embeddings for each block from the second on, as far as there are any.
    """

    def __init__(self, tower: PaddedTextTower, prompts: Callable[[], Sequence[Tensor]]) -> None:
        vars(self).update(vars(tower))
        self._prompts = prompts

    def _through_blocks(self, x: Tensor) -> Tensor:
        first, later = len(self.start_ids), [None, *self._prompts()]
        for block, own in zip_longest(self._blocks, later[: len(self._blocks)]):
            if own is not None:
                own = own.to(x.dtype).expand(x.shape[0], -1, -1)
                x = cat([x[:, :first], own, x[:, first + own.shape[1] :]], dim=1)
            x = block(x, attn_mask=self._parts.attn_mask)
        return x


class PromptedImageTower(nn.Module):
    """An image tower with fixed prompts in its blocks, called as the tower itself.

    Args:
        visual: a ViT, see `vit_parts`.
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
        return encode_in_parts(image_parts(self.tower), images, self.prompts.unbind())


def with_image_prompts(model: nn.Module, prompts: Tensor) -> Any:
    """Returns a copy of a model, with shared weights, whose image tower carries (J, n, T) prompts."""
    copied: Any = share_weights(model)
    copied.visual = PromptedImageTower(copied.visual, prompts)
    return copied


def image_parts(visual: nn.Module) -> Parts:
    """Returns the parts of an image tower that was found to be a ViT (`check_towers`)."""
    parts = vit_parts(visual)
    assert parts is not None
    return parts


def check_towers(backbone: ClipBackbone) -> CausalTextTower | PaddedTextTower:
    """Returns the text tower of a model both of whose towers can carry prompts in their blocks.

    Raises:
        BackboneError: a tower cannot; the message says which and what works.
    """
    model = backbone.model
    if type(model) not in (CLIP, CustomTextCLIP):
        raise _unfit(backbone, "image", type(model).__name__)
    if vit_parts(model.visual) is None:
        raise _unfit(backbone, "image", type(getattr(model.visual, "trunk", model.visual)).__name__)
    tower = make_text_tower(model, backbone.tokenizer)
    if isinstance(tower, PaddedTextTower) or shares_prefix(tower):
        return tower
    raise _unfit(backbone, "text", type(tower).__name__)


def _unfit(backbone: ClipBackbone, tower: str, kind: str) -> BackboneError:
    return BackboneError(
        "prompts in the blocks need a ViT of open_clip, or timm's VisionTransformer (SigLIP), and open_clip's own text "
        f"transformer; the {tower} tower of {backbone.name} is another ({kind}). CoOp learns prompts before the text "
        "tower of any model, LoRA adapts the blocks of all."
    )


class PromptedClasses:
    """The classes' prompts `start context words name . end`, by a text tower with prompts in its blocks.

    It stands where `ClassPrompts` does for methods that tune the towers.

    Args:
        backbone: gives text tower and tokenizer.
        class_names: C names.
        words: what stands before a name; its first M tokens learn, the others stay.
        prompts: returns the prompts of the first J blocks, (M, T) each: the context before the first one.

    Raises:
        ConfigError: a name does not fit.
        BackboneError: a tower cannot carry prompts.
    """

    def __init__(self, backbone: ClipBackbone, class_names: Sequence[str], words: str, prompts: Any) -> None:
        tower = check_towers(backbone)
        self._prompts = prompts
        kind: Any = PaddedDeepPrompts if isinstance(tower, PaddedTextTower) else CausalDeepPrompts
        self._tower: CausalTextTower | PaddedTextTower = kind(tower, lambda: self._prompts()[1:])
        (self._word_ids,) = tower.word_ids([words])
        tell_of_names(backbone, class_names)
        suffixes, _ = suffix_ids(tower, class_names, len(self._word_ids))
        self._encoder = ClassEncoder(self._tower, suffixes, prefix_length=len(tower.start_ids) + len(self._word_ids))

    def embeddings(self, device: torch.device) -> Tensor:
        """Returns the (start + words, T) embeddings of what stands before a name, as the tower has them."""
        return self._tower.embed_tokens(torch.tensor([*self._tower.start_ids, *self._word_ids], device=device))

    def encoder(self, model: nn.Module) -> ClassEncoder:
        """Returns what encodes the prompts; of any copy of the model, as its weights are the same."""
        return self._encoder

    def features(self, encoder: ClassEncoder, device: torch.device, *, share: bool = False) -> Tensor:
        """Returns (C, D) unit-norm features of the classes, with gradients; see `ClassEncoder.encode`."""
        before, context = self.embeddings(device), self._prompts()[0]
        first = len(self._tower.start_ids)
        prefix = torch.cat([before[:first], context.to(before.dtype), before[first + len(context) :]])
        return encoder.encode(prefix, share=share)


class DeepPrompts(TunedTowers):
    """A frozen CLIP with M text and N image prompts in each of its first J blocks; a subclass says what they are.

    The tokens of a block are its own prompts beside what the block before made of words and patches; what it made of
    its prompts is dropped. Image prompts stand behind the patches, have no position and are not pooled: where a tower
    pools the mean of its patches or an attention over them (SigLIP), the published codes, whose towers pool a class
    token, say nothing, and prompts are no part of the image.
    """

    is_clip = False
    stock_image_tower = False
    context: nn.Parameter
    deep: nn.Parameter

    def _take_prompts(
        self, backbone: ClipBackbone, class_names: Sequence[str], words: str, n_ctx: int, depth: int, seed: int
    ) -> Tensor:
        """Sets what the other functions use; returns the (M, T) embeddings of the first M words.

        Raises:
            ConfigError: a number out of range, fewer words than M, or the backbone is in half precision.
            BackboneError: a tower cannot carry prompts.
        """
        if n_ctx < 1 or depth < 1:
            raise ConfigError(f"n_ctx and depth must be 1 or more, got {n_ctx} and {depth}")
        names = self._sit_on(backbone, class_names)
        check_full_precision(backbone, type(self).__name__)
        words = words.replace("_", " ").strip()
        classes: Any = PromptedClasses(backbone, names, words, self.text_prompts)
        self.ctx_init, self.n_ctx, self.depth, self.seed = words, n_ctx, depth, seed
        tower, image = check_towers(backbone), image_parts(backbone.model.visual)
        self._blocks = min(depth, len(image.blocks), len(tower._blocks))
        self._take_towers(backbone, names, (), "both", backbone.model, prompts=classes)
        with torch.no_grad():
            context = classes.embeddings(backbone.device)[len(tower.start_ids) :][:n_ctx].float().clone()
        if len(context) < n_ctx:
            raise ConfigError(f"ctx_init {words!r} has {len(context)} tokens, and n_ctx={n_ctx} of them are to learn")
        return context

    def text_prompts(self) -> Sequence[Tensor]:
        """Returns the (M, T) text prompts of each of the first blocks, with gradients; the context is the first."""
        return [self.context, *self.deep.unbind()]

    def image_prompts(self) -> Sequence[Tensor]:
        """Returns the (N, T) image prompts of each of the first blocks, with gradients."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {"n_ctx": self.n_ctx, "depth": self.depth, "ctx_init": self.ctx_init, "seed": self.seed}

    @property
    def _decides(self) -> str:
        return f"{type(self).__name__} {self._blocks}"

    @property
    def _made_with(self) -> str:
        return type(self).__name__

    def _image_features(self, batch: Batch) -> Tensor:
        if batch.images is None:
            raise DataError(f"{type(self).__name__} learns from pixels, but the batch has none; take PixelLoader")
        features = encode_in_parts(image_parts(self.backbone.model.visual), batch.images, self.image_prompts())
        return nn.functional.normalize(features.float(), dim=-1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the prompts, and what makes them."""
        return [p for name, p in self.named_parameters() if name in self._learnt]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the prompts, and what makes them, by name."""
        return {name: self.get_parameter(name).detach() for name in self._learnt}

    def _load_state(self, state: Any) -> None:
        own = self.adapter_state()
        check_state(state, {name: value.shape for name, value in own.items()}, type(self).__name__)
        for name, value in own.items():
            value.copy_(state[name])

    @property
    def _learnt(self) -> tuple[str, ...]:
        """Names of the parameters that learn."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_model(self) -> Any:
        """Returns the model with the prompts fixed in its image tower, which is no stock one; its text tower is."""
        return with_image_prompts(self.backbone.model, torch.stack(list(self.image_prompts())).clone())

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Method:
        """Returns the same prompts on other classes; templates are not read."""
        moved = type(self)(self.backbone, class_names, **self.settings)
        moved.load_adapter_state({name: value.clone() for name, value in self.adapter_state().items()})
        return moved.eval()


def drawn(shape: Sequence[int], seed: int, what: str, device: torch.device) -> Tensor:
    """Returns embeddings drawn from N(0, 0.02²) on the CPU, as the published codes start with."""
    draws = torch.Generator().manual_seed(derive_seed(seed, what))
    return torch.empty(*shape).normal_(std=0.02, generator=draws).to(device)
