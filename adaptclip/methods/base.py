"""The few lines that the methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptclip.errors import ArtifactError, DataError
from adaptclip.types import Batch, Features

if TYPE_CHECKING:
    from adaptclip.backbone import ClipBackbone


def batch_features(batch: Batch, width: int) -> Tensor:
    """Returns the batch's (B, D) image features.

    Raises:
        DataError: the batch carries none, or of another width than the backbone's.
    """
    if batch.features is None:
        raise DataError("this adapter consumes image features, but the batch has none; compute them with FeatureCache")
    if batch.features.ndim != 2 or batch.features.shape[1] != width:
        raise DataError(
            f"image features should be (B, {width}) for this backbone, got {tuple(batch.features.shape)}; "
            "they come from another backbone"
        )
    return batch.features


def check_features(features: Features, encoder: ClipBackbone) -> None:
    """Refuses features that another model made.

    Raises:
        DataError: their width or the digest of the image weights they come from is not the encoder's.
    """
    width = features.values.shape[-1]
    if width != encoder.embed_dim:
        raise DataError(
            f"image features should be {encoder.embed_dim} wide for {encoder.name}, got {width}; they come from "
            "another backbone. Compute them with FeatureCache.get and this one."
        )
    if features.weights and features.weights != encoder.image_digest:
        raise DataError(
            f"these image features were made by the image weights {features.weights[:12]}…, {encoder.name} has "
            f"{encoder.image_digest[:12]}…: they come from another backbone. Compute them with FeatureCache.get and "
            "this one."
        )


def scaled_logits(features: Tensor, weights: Tensor, logit_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cosine similarities times the scale, plus a (C,) bias: (B, D) and (C, D), both unit norm, to (B, C) float32.

    A half-precision product would round logits near 100 to steps of 0.06 (fp16) or 0.5 (bf16), hence no autocast. A
    bias that is the same for every class (SigLIP's) does not change the softmax, which goes without.
    """
    with torch.autocast(device_type=features.device.type, enabled=False):
        logits = logit_scale.float() * (features.float() @ weights.float().T)
        return logits if bias is None else logits + bias


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Compares a loaded state with the shapes an adapter expects.

    Raises:
        ArtifactError: a tensor is missing, not expected, of another shape, or not finite.
    """
    if set(state) != set(shapes):
        raise ArtifactError(f"a state of {what} should hold {sorted(shapes)}, got {sorted(state)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != tuple(shape):
            raise ArtifactError(
                f"{name!r} in this state of {what} has shape {tuple(state[name].shape)}, expected {tuple(shape)}; "
                "it was trained with another backbone, other classes or other settings"
            )
        if not torch.isfinite(state[name]).all():
            raise ArtifactError(f"{name!r} in this state of {what} has values that are not finite")
