# SPDX-License-Identifier: Apache-2.0
"""What methods share that change the towers themselves: they learn in a copy, which is frozen for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.image_blocks import encode_image
from adaptclip.errors import ConfigError, DataError
from adaptclip.methods.base import batch_features, scaled_logits
from adaptclip.methods.class_encoder import ClassPrompts
from adaptclip.methods.method import Method, Schedule
from adaptclip.methods.zero_shot import ZeroShotClassifier

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.clip.lora_targets import Towers
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch


@dataclass(frozen=True)
class Snapshot:
    """A tuned model at one state of its parameters.

    Attributes:
        state: the parameters it was taken at.
        encoder: both towers as a backbone of their own.
        class_weights: (C, D) text features.
    """

    state: dict[str, Tensor]
    encoder: ClipBackbone
    class_weights: Tensor

    def is_of(self, state: Mapping[str, Tensor], device: torch.device) -> bool:
        """Whether it was taken at these parameters, on this device."""
        return self.encoder.device == device and all(
            value.device == self.state[name].device and torch.equal(self.state[name], value)
            for name, value in state.items()
        )

    def features(self, batch: Batch) -> Tensor:
        """Returns (B, D) features: those of the batch, which the encoder made, or of its images."""
        if batch.images is None:
            return batch_features(batch, self.encoder.embed_dim)
        return self.encoder.encode_image(batch.images)


def take_snapshot(
    state: Mapping[str, Tensor],
    base: ClipBackbone,
    *,
    made_with: str,
    settings: str,
    model: Callable[[], nn.Module],
    prompts: ClassPrompts,
    adapts_text: bool,
    adapts_image: bool,
) -> Snapshot:
    """Freezes a tuned model as it is now.

    Args:
        state: the parameters that decide, with the settings, what it computes.
        base: the backbone that was tuned.
        made_with: names the tuning, in the encoder's name.
        settings: what else decides what the tuned towers compute.
        model: makes the stock open_clip model at these parameters.
        prompts: of the classes.
        adapts_text: whether text features are others than the backbone's.
        adapts_image: whether image features are others than the backbone's.
    """
    state = {name: value.clone() for name, value in state.items()}
    sha = hashlib.sha256(f"{base.digest} {settings}".encode())
    for name in sorted(state):
        sha.update(name.encode() + state[name].cpu().contiguous().numpy().tobytes())
    digest = sha.hexdigest()
    encoder = base.with_model(
        model(), name=f"{base.name} with {made_with}", digest=digest,
        image_digest=digest if adapts_image else base.image_digest,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(device_type=base.device.type, enabled=False):
        text = prompts.features(prompts.encoder(encoder.model), base.device) if adapts_text else prompts.frozen()
    return Snapshot(state, encoder, text)


@dataclass(frozen=True)
class TowerSchedule(Schedule):
    """How towers are tuned: AdamW with weight decay 0.01, a cosine per step down to 1e-6, fresh crops in every epoch.

    Attributes:
        steps: optimizer steps; for the published ones see the methods' `published`.
        lr: peak learning rate.
        batch_size: images per process and step.
        views: sets of crops, where the text tower alone is tuned and cached features are learnt from.
    """

    steps: int = 500
    lr: float = 2e-4
    batch_size: int = 32
    views: int = 10


def tune_towers(
    method: Any, support: Support, schedule: Any, num_steps: int, loop: Loop, *, name: str = ""
) -> dict[str, Any]:
    """Trains an adapter of the towers for a number of steps, and says how."""
    loader = support.loader_for(method, batch_size=schedule.batch_size, views=schedule.views)
    loop(
        support.training(
            method, loader, num_steps, optimizer="adamw", lr=schedule.lr, weight_decay=1e-2,
            schedule="cosine_per_step", final_lr=1e-6, name=name,
        )
    )  # fmt: skip
    return {"schedule": f"AdamW {schedule.lr:g}, cosine, {num_steps} steps of {schedule.batch_size}"}


class TunedTowers(Method):
    """A CLIP with a few numbers of its towers tuned; a subclass says which, and gives them as `model`.

    The prompts stay the card's own; what is compared with the images are the text features of the tuned text tower.
    Where the image tower is tuned the method trains on pixels, otherwise on cached features. Before training it is the
    zero-shot classifier.

    Attributes:
        model: the copy of the backbone's model that learns.
        towers: which towers are tuned.
        templates: prompts with one `{}`.
    """

    schedule_type = TowerSchedule
    learns_by_steps = True
    takes_new_names = True
    is_clip = True
    objective: Literal["softmax"] = "softmax"

    def _take_towers(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        templates: Sequence[str],
        towers: Towers,
        model: Any,
        *,
        prompts: Any = None,
    ) -> None:
        """Sets what the other functions use.

        Args:
            backbone: frozen CLIP in fp32, not changed.
            class_names: C names.
            templates: prompts with one `{}` for the class name; their unit-norm features are averaged.
            towers: which towers are tuned: image, text or both.
            model: the copy that learns.
            prompts: of the classes, as `ClassPrompts`; None makes those of the templates.

        Raises:
            BackboneError: a prompt is too long.
        """
        self.templates, self.towers = tuple(templates), towers
        self._prompts: Any = ClassPrompts(backbone, class_names, templates) if prompts is None else prompts
        self.adapts_text, self.adapts_image = towers != "image", towers != "text"
        self.consumes: Literal["features", "pixels"] = "pixels" if self.adapts_image else "features"
        self.model: Any = model
        self._text = self._prompts.encoder(model) if self.adapts_text else None
        self._snapshot: Snapshot | None = None
        self.train(False)

    @property
    def _made_with(self) -> str:
        """Names the tuning, in the name of the tuned towers."""
        raise NotImplementedError

    @property
    def _decides(self) -> str:
        """What beside the state decides what the tuned towers compute."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Changes the mode; the towers stay in evaluation mode, batch statistics and dropout included."""
        super().train(False)
        self.training = mode
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of images, or outside of training of features that `encoder` made.

        Raises:
            DataError: the batch has what the method does not learn from.
        """
        if not self.training and not torch.is_grad_enabled():
            snapshot = self._take_snapshot()
            return scaled_logits(snapshot.features(batch), snapshot.class_weights, self.backbone.logit_scale)
        return scaled_logits(self._image_features(batch), self.text_features(), self.backbone.logit_scale)

    def _image_features(self, batch: Batch) -> Tensor:
        """(B, D) unit-norm features of a batch in training, with gradients."""
        if not self.adapts_image:
            return batch_features(batch, self.backbone.embed_dim)
        if batch.images is None:
            raise DataError(
                "tuning the image tower learns from pixels, but the batch has none; take PixelLoader, or tune the text "
                'tower alone (towers="text")'
            )
        return F.normalize(encode_image(self.model, batch.images).float(), dim=-1)

    def text_features(self) -> Tensor:
        """Returns (C, D) unit-norm float32 features of the classes by the text tower as it is, with gradients."""
        if self._text is None:
            return self._prompts.frozen()
        return self._prompts.features(self._text, self.backbone.device, share=self.training)

    def _learn(self, support: Support, schedule: TowerSchedule, loop: Loop) -> dict[str, Any]:
        return tune_towers(self, support, schedule, schedule.steps, loop)

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        """Returns a classifier of other classes by the tuned towers."""
        return ZeroShotClassifier(self.encoder, class_names, self.templates if templates is None else templates)

    @property
    def encoder(self) -> ClipBackbone:
        """The tuned towers, frozen as they are now: makes features that `forward` takes."""
        return self._take_snapshot().encoder

    def class_weights(self) -> Tensor:
        """Returns (C, D) unit-norm text features of the tuned text tower, without gradients."""
        return self._take_snapshot().class_weights

    @torch.inference_mode(False)
    def _take_snapshot(self) -> Snapshot:
        """Returns the snapshot of the present numbers, made anew only when one of them changed."""
        state = self.adapter_state()
        if self._snapshot is None or not self._snapshot.is_of(state, self.backbone.device):
            self._snapshot = take_snapshot(
                state, self.backbone, made_with=self._made_with, settings=self._decides, model=self.merged_model,
                prompts=self._prompts, adapts_text=self.adapts_text, adapts_image=self.adapts_image,
            )  # fmt: skip
        return self._snapshot


def check_full_precision(backbone: ClipBackbone, what: str) -> None:
    """Raises ConfigError unless a backbone is in fp32, as numbers of its own are to learn."""
    if backbone.precision != "fp32":
        raise ConfigError(
            f"{what} learns inside the towers and takes a backbone in fp32, got {backbone.precision}; train with "
            "autocast (--mixed-precision) instead"
        )
