# SPDX-License-Identifier: Apache-2.0
"""Contrastive tuning: CLIP's own loss on pairs of images and texts; all of its weights or LoRA, one tower or both.

The texts are captions of the images, or the prompts of their classes: then it is FLYP, "Finetune like you pretrain"
(Goyal et al., CVPR 2023, arXiv:2212.00638). With the image tower locked it is LiT (Zhai et al., CVPR 2022,
arXiv:2111.07991). `interpolate` is WiSE-FT (Wortsman et al., CVPR 2022, arXiv:2109.01903): a weighted mean of the
weights before and after, which gives back much of what tuning makes a model forget.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from adaptclip.clip.text import CausalTextTower, make_text_tower, shares_prefix
from adaptclip.data.captions import CaptionTokens
from adaptclip.errors import ArtifactError, BackboneError, ConfigError, DataError, did_you_mean
from adaptclip.methods.base import batch_features, check_state
from adaptclip.prompts import class_tokens

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import DomainData, ImageDataset
    from adaptclip.types import Batch

Towers = Literal["both", "image", "text"]
How = Literal["full", "lora"]
Loss = Literal["clip", "siglip"]

MAX_LOG_SCALE = math.log(100.0)
"""Largest logarithm of the logit scale (Radford et al. 2021, sec. 2.5)."""

_SCALES = ("logit_scale", "logit_bias")


class ContrastiveTuning(nn.Module):
    """A copy of a CLIP that learns from pairs; its `forward` returns the contrastive loss.

    The loss is open_clip's, with negatives from all processes. Each process computes the part of its own images and
    texts against those of all; wrap the module in DistributedDataParallel (Accelerate's `prepare`), whose averaged
    gradient is then that of one process with the joint batch. Accumulated micro-batches are not joined that way: each
    contrasts its own pairs. As in FLYP, pairs of one batch may have the same text and are still negatives of each
    other.

    Batch statistics stay frozen, and so does a locked tower; the backbone given is not changed.

    Args:
        backbone: the model to start from, in fp32.
        train: the towers that learn; the other one is locked. With the image tower locked, batches carry cached
            `features`, else `images`.
        how: "full" learns all weights of the towers and the logit scale, which is kept at 100 or below; "lora" learns
            low-rank additions to the attention (Hu et al., arXiv:2106.09685) and nothing else.
        loss: "clip" (softmax over both directions) or "siglip" (sigmoid; Zhai et al., arXiv:2303.15343), for models
            with a logit bias.
        rank: of LoRA.
        seed: of LoRA's initial weights.
        process_index: number of this process.
        num_processes: how many share a batch.

    Raises:
        ConfigError: a setting is not one of those named.
        BackboneError: the model is not in fp32, or lacks the logit bias of the sigmoid loss.
    """

    def __init__(
        self,
        backbone: ClipBackbone,
        *,
        train: Towers = "both",
        how: How = "full",
        loss: Loss = "clip",
        rank: int = 2,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("train", train, Towers), ("how", how, How), ("loss", loss, Loss)):
            if value not in get_args(allowed):
                raise ConfigError(f"unknown {name} {value!r}. {did_you_mean(str(value), get_args(allowed))}")
        if backbone.precision != "fp32":
            raise BackboneError(
                f"{backbone.name} was loaded in {backbone.precision}, in which small steps are lost to rounding; load "
                "it in fp32 and train with mixed_precision"
            )
        if loss == "siglip" and backbone.logit_bias is None:
            raise BackboneError(f"{backbone.name} has no logit bias, which the sigmoid loss needs; use --loss clip")
        self.train_towers: Towers = train
        self.how, self.loss_name = how, loss
        self.consumes: Literal["features", "pixels"] = "features" if train == "text" else "pixels"
        self.embed_dim = backbone.embed_dim
        self.model: Any = _lora_copy(backbone, train, rank, seed) if how == "lora" else _copy(backbone, train)
        if how == "full":
            _choose_parameters(self.model, train, learn_bias=loss == "siglip")
            _freeze_unused(self.model, backbone)
        self.learned = tuple(name for name, p in self.model.named_parameters() if p.requires_grad)
        self._tower = _packed_tower(self.model, backbone)
        kind: Any = {"clip": ClipLoss, "siglip": SigLipLoss}[loss]
        ways = {"local_loss": True, "gather_with_grad": True} if loss == "clip" else {}
        self._loss = kind(rank=process_index, world_size=num_processes, **ways)
        self.train()

    def train(self, mode: bool = True) -> ContrastiveTuning:
        """Sets the mode of the towers that learn; locked towers and batch statistics stay in evaluation mode."""
        super().train(mode)
        for name, module in self.model.named_modules():
            locked = name and _tower_of(name) not in _chosen(self.train_towers)
            if locked or isinstance(module, _BatchNorm):
                module.training = False
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Returns the scalar loss of B pairs: `features` (B, D) or `images` (B, 3, H, W), and `tokens` (B, L).

        Raises:
            DataError: the batch lacks one of them.
        """
        if batch.tokens is None:
            raise DataError("contrastive tuning needs a text beside each image; wrap the loader in CaptionLoader")
        if self.consumes == "features":
            images = batch_features(batch, self.embed_dim)
        elif batch.images is not None:
            images = F.normalize(self.model.encode_image(batch.images).float(), dim=-1)
        else:
            raise DataError("the image tower learns, so batches must carry pixels (PixelLoader), and this one has none")
        texts = F.normalize(self.encode_tokens(batch.tokens).float(), dim=-1)
        self._clamp_scale()
        # Half-precision products would round logits near 100 to steps of 0.06 (fp16) or 0.5 (bf16).
        with torch.autocast(device_type=images.device.type, enabled=False):
            bias = self.model.logit_bias if self.loss_name == "siglip" else None
            return self._loss(images.float(), texts, self.model.logit_scale.exp(), bias)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encodes (B, L) token ids as (B, D) text features, not normalised, without work on what follows the EOT."""
        return self.model.encode_text(tokens) if self._tower is None else encode_packed(self._tower, tokens)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns what learns."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the tensors that learn, by their names in the tuned model."""
        own = dict(self.model.named_parameters())
        return {name: own[name].detach() for name in self.learned}

    def counts(self) -> tuple[int, int]:
        """Returns how many numbers it learns, and how many its state holds."""
        learnt, stored = self.trainable_parameters(), self.adapter_state().values()
        return sum(p.numel() for p in learnt), sum(t.numel() for t in stored)

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `adapter_state` returned. Raises ArtifactError when names or shapes differ."""
        own = self.adapter_state()
        check_state(state, {name: value.shape for name, value in own.items()}, "contrastive tuning")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def penalty(self) -> Tensor:
        """Returns 0: there is no regulariser."""
        return torch.zeros((), device=self.model.logit_scale.device)

    def tuned_state(self) -> dict[str, Tensor]:
        """Returns all weights after tuning under the names of a stock open_clip model, LoRA merged into them."""
        self._clamp_scale()
        model = self.model
        if self.how == "lora":
            from adaptclip.methods.lora import merge_lora

            model = merge_lora(model)
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    def _clamp_scale(self) -> None:
        if "logit_scale" in self.learned:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, MAX_LOG_SCALE)


def interpolate(before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Weight-space ensemble (1 - alpha) before + alpha after (Wortsman et al. 2022, eq. 1), exact at 0 and at 1.

    Args:
        before: weights of the model that tuning started from.
        after: the same tensors after it.
        alpha: 0 (before) to 1 (after); the paper recommends 0.5 where nothing else is known.

    Returns:
        New tensors. Those that tuning did not touch, and whole numbers, are the first model's.

    Raises:
        ConfigError: alpha is out of range.
        ArtifactError: the two have other names or shapes.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"the weight of WiSE-FT must be between 0 (before) and 1 (after tuning), got {alpha}")
    differing = sorted(set(before) ^ set(after))
    differing += [name for name in before if name in after and before[name].shape != after[name].shape]
    if differing:
        raise ArtifactError(
            f"two models can be averaged only where they have the same tensors; {len(differing)} differ, for example "
            f"{differing[0]!r}"
        )
    mixed = {}
    for name, start in before.items():
        end = after[name].to(start.device)
        if alpha == 1 or alpha == 0 or not start.is_floating_point() or torch.equal(start, end):
            mixed[name] = (end if alpha == 1 else start).detach().clone()
        else:
            mixed[name] = ((1 - alpha) * start.float() + alpha * end.float()).to(start.dtype)
    return mixed


def caption_tokens(backbone: ClipBackbone, captions: Sequence[Sequence[str]]) -> tuple[CaptionTokens, int]:
    """Tokenises the captions of N images; one that is too long is cut, as is usual in retrieval.

    Args:
        backbone: its tokenizer and context.
        captions: one or more texts per image.

    Returns:
        The tokens, and how many captions were cut: after the last token that fits, with the end token kept.

    Raises:
        DataError: an image has no caption.
    """
    without = [i for i, own in enumerate(captions) if not own]
    if without or not captions:
        raise DataError(f"{len(without)} of {len(captions)} images have no caption; each needs one or more")
    texts = [text for own in captions for text in own]
    cut = sum(backbone.count_tokens(text) > backbone.context_length for text in texts)
    count = torch.tensor([len(own) for own in captions])
    return CaptionTokens(_tokenise(backbone, texts), count.cumsum(0) - count, count), cut


def prompt_tokens(
    backbone: ClipBackbone, templates: Sequence[str], prompt_names: Sequence[str], labels: Iterable[int]
) -> CaptionTokens:
    """Gives each image the prompts of its class as captions (FLYP); a prompt is never cut.

    Args:
        backbone: its tokenizer and context.
        templates: P prompts with one `{}` each.
        prompt_names: C class names.
        labels: N class ids.

    Raises:
        BackboneError: a prompt is longer than the context.
    """
    tokens = class_tokens(backbone, prompt_names, templates)
    first = torch.as_tensor(list(labels), dtype=torch.int64) * len(templates)
    return CaptionTokens(tokens, first, torch.full_like(first, len(templates)))


def pair_texts(backbone: ClipBackbone, images: ImageDataset, data: DomainData) -> tuple[CaptionTokens, int]:
    """Returns what the images are paired with, and how many texts were cut: their captions, or else class prompts."""
    if images.captions is not None:
        return caption_tokens(backbone, images.captions)
    images.require_one_class("a prompt of its class for each image (FLYP)")
    return prompt_tokens(backbone, data.card.templates, data.prompt_names, images.labels.tolist()), 0


def encode_packed(tower: CausalTextTower, tokens: Tensor) -> Tensor:
    """Encodes (B, L) token ids up to their EOT as (B, D) features, not normalised, by the tower's packed path.

    It is the same function as open_clip's `encode_text`: in a causal tower nothing after the EOT reaches the result.
    """
    ends = tower.pooled_position(tokens)
    order = ends.argsort(stable=True)
    suffixes = [
        tower.embed_tokens(tokens[rows, : int(ends[rows[0]]) + 1])
        for rows in order.split(torch.unique_consecutive(ends[order], return_counts=True)[1].tolist())
    ]
    rows = tower.encode_packed(tower.embed_tokens(tokens[0, :0]), suffixes)
    return rows[order.argsort()]


def packed_tower(backbone: ClipBackbone) -> CausalTextTower | None:
    """Returns the backbone's text tower where `encode_packed` can be used, else None."""
    return _packed_tower(backbone.model, backbone)


def _packed_tower(model: nn.Module, backbone: ClipBackbone) -> CausalTextTower | None:
    try:
        tower = make_text_tower(model, backbone.tokenizer)
    except BackboneError:
        return None
    return tower if shares_prefix(tower) else None


def _tokenise(backbone: ClipBackbone, texts: Sequence[str]) -> Tensor:
    return backbone.tokenizer(list(texts), context_length=backbone.context_length)


def _chosen(train: Towers) -> tuple[str, ...]:
    return ("image", "text") if train == "both" else (train,)


def _tower_of(name: str) -> str:
    """Tower of a module or parameter by its open_clip name: CLIP keeps the text tower's parts at its top level."""
    return "image" if name.split(".")[0] == "visual" else "text"


def _copy(backbone: ClipBackbone, train: Towers) -> nn.Module:
    """A copy of the model whose locked image tower is the original's own."""
    keep = {id(backbone.model.visual): backbone.model.visual} if train == "text" else {}
    return copy.deepcopy(backbone.model, keep)


def _lora_copy(backbone: ClipBackbone, train: Towers, rank: int, seed: int) -> nn.Module:
    from adaptclip.methods.lora import inject_lora

    return inject_lora(backbone.model, train, rank=rank, seed=seed)


def _choose_parameters(model: nn.Module, train: Towers, *, learn_bias: bool) -> None:
    for name, parameter in model.named_parameters():
        tower = _tower_of(name) in _chosen(train)
        learns = name == "logit_scale" or learn_bias if name in _SCALES else tower
        parameter.requires_grad_(learns)


def _freeze_unused(model: Any, backbone: ClipBackbone) -> None:
    """Freezes what the loss cannot reach, such as a captioning decoder, for which processes would wait forever."""
    model.eval()
    learning = [p for p in model.parameters() if p.requires_grad]
    size = backbone.image_size
    # A probe: values do not matter, only what the result depends on.
    images = torch.zeros(1, 3, size, size, device=backbone.device)
    tokens = _tokenise(backbone, ["a"]).to(backbone.device)
    with torch.enable_grad():
        probe = model.encode_image(images).sum() + model.encode_text(tokens).sum()
        probe = probe + sum(getattr(model, name).sum() for name in _SCALES if getattr(model, name, None) is not None)
        gradients = torch.autograd.grad(probe, learning, allow_unused=True)
    for parameter, gradient in zip(learning, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
