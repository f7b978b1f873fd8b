# SPDX-License-Identifier: Apache-2.0
"""MaPLe: prompts in the blocks of both towers, those of the image tower made from those of the text tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.methods.deep_prompts import DeepPrompts, drawn, image_parts
from adaptclip.methods.method import Schedule, Variant
from adaptclip.seeding import derive_seed

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.training.support import Loop, Support


@dataclass(frozen=True)
class MaPLeSchedule(Schedule):
    """How MaPLe learns (sec. 4.1 and configs/trainers/MaPLe of the published code).

    SGD with momentum 0.9 and weight decay 5e-4, a first epoch at 1e-5 and a cosine per epoch, fresh crops in each.

    Attributes:
        epochs: passes over the training images.
        lr: peak learning rate.
        batch_size: images per process and step.
    """

    epochs: int = 5
    lr: float = 3.5e-3
    batch_size: int = 4


class MaPLe(DeepPrompts):
    """MaPLe (Khattak et al., "Multi-modal Prompt Learning", CVPR 2023, arXiv:2210.03117).

    In each of the first J = 9 blocks, M = 2 text prompts p_j (M, T_text) learn, and through a Linear layer of the block
    the image prompts follow (eq. 6 to 8):

        q_j = F_j p_j + b_j,    logit_c = scale · cos(image(x; q_1 … q_J), text(c; p_1 … p_J))

    p_1 is the embedding of the first M tokens of `ctx_init`; the later p_j are drawn from N(0, 0.02²), and the layers
    start as torch's do, those of all blocks but the first alike. So it does not start at zero-shot.

    What differs from the published code: weights keep their precision (there half), crops are those of the card, and a
    tower of fewer than J blocks has prompts in all of them.

    Args:
        backbone: frozen CLIP in fp32, not changed; its image tower a ViT of open_clip or timm, its text
            tower open_clip's own transformer.
        class_names: C names in the order of the label ids.
        n_ctx: M.
        depth: J.
        ctx_init: what stands before a name; its tokens behind the first M stay words.
        seed: of what is drawn.

    Raises:
        ConfigError: a number out of range, fewer words than M, or the backbone is in half precision.
        BackboneError: a tower is of a kind whose blocks cannot carry prompts.
    """

    name = "maple"
    variants = {"maple": Variant(14, search={"lr": (3e-4, 3e-2), "depth": [3, 6, 9]})}
    schedule_type = MaPLeSchedule
    smoke = {"epochs": 5, "batch_size": 8}

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        n_ctx: int = 2,
        depth: int = 9,
        ctx_init: str = "a photo of a",
        seed: int = 0,
    ) -> None:
        super().__init__()
        context = self._take_prompts(backbone, class_names, ctx_init, n_ctx, depth, seed)
        device, width = context.device, context.shape[1]
        self.context = nn.Parameter(context)
        self.deep = nn.Parameter(drawn((self._blocks - 1, n_ctx, width), seed, "maple prompts", device))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "maple layers"))
            layers = [nn.Linear(width, image_parts(backbone.model.visual).width) for _ in range(2)]
        layers = [layers[0], *[layers[1]] * (self._blocks - 1)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]).to(device))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]).to(device))

    @property
    def _learnt(self) -> tuple[str, ...]:
        return ("context", *(("deep",) if self._blocks > 1 else ()), "weight", "bias")

    def image_prompts(self) -> Sequence[Tensor]:
        """Returns the (M, T) image prompts of each of the first blocks."""
        return [F.linear(*each) for each in zip(self.text_prompts(), self.weight, self.bias, strict=True)]

    def _learn(self, support: Support, schedule: MaPLeSchedule, loop: Loop) -> dict[str, Any]:
        training = support.training_by_epochs(self, schedule)
        loop(training)
        return {
            "schedule": f"SGD {schedule.lr:g}, cosine per epoch, {schedule.epochs} epochs ({training.num_steps} steps)"
        }
