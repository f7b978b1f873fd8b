# SPDX-License-Identifier: Apache-2.0
"""PromptSRC: prompts in the blocks of both towers, held near what the frozen model says, averaged over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.image_blocks import encode_image
from adaptclip.errors import ConfigError
from adaptclip.methods.base import check_state, scaled_logits
from adaptclip.methods.deep_prompts import DeepPrompts, drawn, image_parts
from adaptclip.methods.method import Schedule, Variant
from adaptclip.prompts import zero_shot_weights

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch

TEACHER_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
"""CLIP's 80 prompts of ImageNet, by which the frozen text tower teaches."""


@dataclass(frozen=True)
class PromptSRCSchedule(Schedule):
    """How PromptSRC learns (configs/trainers/PromptSRC of the published code, few-shot).

    SGD with momentum 0.9 and weight decay 5e-4, a first epoch at 1e-5 and a cosine per epoch, fresh crops in each.

    Attributes:
        epochs: passes over the training images; 20 in base-to-new.
        lr: peak learning rate.
        batch_size: images per process and step.
        text_weight: of the distance from the frozen text features.
        image_weight: of the distance from the frozen image features.
        mean: where the weight of an epoch in the average is largest, as a share of all; published are 30 of 50 epochs,
            on five sets 45, and 15 of 20 in base-to-new.
        std: width of these weights as a share of all epochs; published are 30 of 50, on five sets 5, and 1 of 20.
    """

    epochs: int = 50
    lr: float = 2.5e-3
    batch_size: int = 4
    text_weight: float = 25.0
    image_weight: float = 10.0
    mean: float = 0.6
    std: float = 0.6


class PromptSRC(DeepPrompts):
    """PromptSRC (Khattak et al., "Self-regulating Prompts", ICCV 2023, arXiv:2307.06948).

    In each of the first J = 9 blocks, M = 4 text prompts and as many image prompts learn, independent of each other.
    With the features f and t_c of the prompted towers, f' of the frozen one and t'_c of the frozen one for 80
    templates, the loss is (eq. 3 to 6)

        cross-entropy + 25 · mean|t - t'| + 10 · mean|f - f'| + KL(softmax(scale · f' t') | softmax(scale · f t)) / C

    with means over all entries and the mean over images of KL, divided by C as in the published code. What is kept is
    the mean of the prompts at the end of every epoch, weighted by a Gaussian of its number (eq. 7). The context starts
    from the words of `ctx_init`, all other prompts from N(0, 0.02²), so that it does not start at zero-shot.

    What differs from the published code: weights keep their precision (there half); the teacher averages unit-norm
    features of CLIP's 80 templates (there raw ones of 60 of them); crops are the card's; a tower of fewer than J blocks
    has prompts in all of them. A run that was killed goes on with its average.

    Args:
        backbone: frozen CLIP in fp32, not changed; its image tower a ViT of open_clip or timm, its text
            tower open_clip's own transformer.
        class_names: C names in the order of the label ids.
        n_ctx: M.
        depth: J.
        ctx_init: what stands before a name; its tokens behind the first M stay words.
        seed: of what is drawn.
        teacher_templates: prompts of the frozen text tower.

    Raises:
        ConfigError: a number out of range, fewer words than M, or the backbone is in half precision.
        BackboneError: a tower is of a kind whose blocks cannot carry prompts.
    """

    name = "prompt_src"
    variants = {"prompt_src": Variant(15, search={"lr": (3e-4, 3e-2), "depth": [3, 6, 9]})}
    schedule_type = PromptSRCSchedule
    smoke = {"epochs": 5, "batch_size": 8}

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        n_ctx: int = 4,
        depth: int = 9,
        ctx_init: str = "a photo of a",
        seed: int = 0,
        teacher_templates: Sequence[str] = TEACHER_TEMPLATES,
    ) -> None:
        super().__init__()
        context = self._take_prompts(backbone, class_names, ctx_init, n_ctx, depth, seed)
        self.teacher_templates = tuple(teacher_templates)
        device, width = context.device, context.shape[1]
        image_width = image_parts(backbone.model.visual).width
        self.context = nn.Parameter(context)
        self.deep = nn.Parameter(drawn((self._blocks - 1, n_ctx, width), seed, "promptsrc text", device))
        self.image = nn.Parameter(drawn((self._blocks, n_ctx, image_width), seed, "promptsrc image", device))
        self._teacher: Tensor | None = None
        self._sums: dict[str, Tensor] | None = None
        self._progress = torch.zeros(2)
        self._weights = (PromptSRCSchedule.text_weight, PromptSRCSchedule.image_weight)
        self._penalty: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {**super().settings, "teacher_templates": list(self.teacher_templates)}

    @property
    def _learnt(self) -> tuple[str, ...]:
        return ("context", *(("deep",) if self._blocks > 1 else ()), "image")

    def image_prompts(self) -> Sequence[Tensor]:
        """Returns the (M, T) image prompts of each of the first blocks."""
        return self.image.unbind()

    def forward(self, batch: Batch) -> Tensor:
        """See `TunedTowers.forward`; in training it also computes how far all is from the frozen model."""
        if not self.training:
            return super().forward(batch)
        images, text = self._image_features(batch), self.text_features()
        pixels: Any = batch.images
        scale = self.backbone.logit_scale
        logits = scaled_logits(images, text, scale)
        own_text = self._teacher_features()
        with torch.no_grad():
            own_images = F.normalize(encode_image(self.backbone.model, pixels).float(), dim=-1)
            taught = scaled_logits(own_images, own_text, scale)
        self._penalty = (
            self._weights[0] * (text - own_text).abs().mean()
            + self._weights[1] * (images - own_images).abs().mean()
            + F.kl_div(logits.log_softmax(1), taught.log_softmax(1), reduction="sum", log_target=True) / logits.numel()
        )
        return logits

    def _teacher_features(self) -> Tensor:
        """(C, D) unit-norm features of the templates by the frozen text tower, computed once, in full precision."""
        if self._teacher is None or self._teacher.device != self.backbone.device:
            with torch.inference_mode(False), torch.autocast(self.backbone.device.type, enabled=False):
                self._teacher = zero_shot_weights(self.backbone, self.class_names, self.teacher_templates)
        return self._teacher

    def penalty(self) -> Tensor:
        """Returns the three distances of the last forward in training, weighted; 0 outside."""
        return super().penalty() if self._penalty is None else self._penalty

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the prompts by name, and while it learns the sums of their average."""
        state = super().adapter_state()
        if self._sums is None:
            return state
        return {**state, **{f"sum of {name}": value for name, value in self._sums.items()}, "progress": self._progress}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        check_state(state, {name: value.shape for name, value in own.items()}, "PromptSRC")
        for name, value in own.items():
            value.copy_(state[name])

    def _learn(self, support: Support, schedule: PromptSRCSchedule, loop: Loop) -> dict[str, Any]:
        if not schedule.std > 0:
            raise ConfigError(f"std, the width of the average, must be above 0, got {schedule.std}")
        self._weights = (schedule.text_weight, schedule.image_weight)
        self._sums = {name: torch.zeros_like(value) for name, value in super().adapter_state().items()}
        self._progress = torch.zeros(2)
        training = support.training_by_epochs(self, schedule)
        steps = training.loader.steps_per_epoch
        gauss = _gauss(schedule)
        # The optimizer itself tells when a step was taken, whoever's loop it is.
        hook = training.optimizer.register_step_post_hook(lambda *_: self._add_epoch(steps, gauss))
        try:
            loop(training)
        finally:
            hook.remove()
        total = float(self._progress[1])
        with torch.no_grad():
            for name, value in self._sums.items():
                self.get_parameter(name).copy_(value / total)
        self._sums = self._penalty = None
        length = f"{schedule.epochs} epochs ({training.num_steps} steps)"
        return {"schedule": f"SGD {schedule.lr:g}, cosine per epoch, mean of {length}"}

    @torch.no_grad()
    def _add_epoch(self, steps_per_epoch: int, gauss: Sequence[float]) -> None:
        """Counts a step, and at the end of an epoch adds the prompts with its weight."""
        assert self._sums is not None
        self._progress[0] += 1
        epoch, rest = divmod(int(self._progress[0]), steps_per_epoch)
        if not rest:
            self._progress[1] += gauss[epoch - 1]
            for name, value in self._sums.items():
                value.add_(self.get_parameter(name), alpha=gauss[epoch - 1])


def _gauss(schedule: PromptSRCSchedule) -> list[float]:
    """The weights of the epochs in the average, before they are divided by their sum."""
    mean, std = schedule.mean * schedule.epochs, schedule.std * schedule.epochs
    return [math.exp(-0.5 * ((epoch - mean) / std) ** 2) for epoch in range(1, schedule.epochs + 1)]
