"""The tuned towers at one state of their parameters, frozen, for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptclip.backbone import ClipBackbone
from adaptclip.methods.base import batch_features
from adaptclip.methods.class_prompts import ClassPrompts
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
        """Returns (B, D) features: those of the batch, which the encoder made, or of its pictures."""
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
