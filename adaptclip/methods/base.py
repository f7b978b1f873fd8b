# SPDX-License-Identifier: Apache-2.0
"""The few lines that methods share: logits, biases, what logits are for, and what a trained method comes to.

A trained method comes to an image tower with its weights settled and a fixed head on its features (`Head`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptclip.errors import ArtifactError, BackboneError, ConfigError, DataError, listed
from adaptclip.feature_clip import FeatureClip

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.criterion import ObjectiveName
    from adaptclip.types import Batch, Features


@dataclass(frozen=True)
class Head:
    """Tensors that turn unit-norm image features f into logits, the logit scale included.

        logit_c = f·weight_c + bias_c  [+ sum over j of exp(-sharpness · (1 - f·keys_j)) · votes_jc]

    Attributes:
        encoder: the model that makes the features: the frozen CLIP, or the adapted one.
        weight: (C, D), times the logit scale.
        bias: (C,).
        scale: the logit scale that is in the weights.
        keys: (K, D) of a cache model, else None.
        votes: (K, C) of a cache model, else None.
        sharpness: beta of a cache model.
        sigmoid: whether a probability is of its class by itself; otherwise they are of one class, by the softmax.
    """

    encoder: Any
    weight: Tensor
    bias: Tensor
    scale: float
    keys: Tensor | None = None
    votes: Tensor | None = None
    sharpness: float = 0.0
    sigmoid: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of all that there are; `sharpness` is one of them where there are keys."""
        named = {"weight": self.weight, "bias": self.bias}
        if self.keys is not None and self.votes is not None:
            named |= {"keys": self.keys, "votes": self.votes, "sharpness": torch.tensor(self.sharpness)}
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in named.items()}

    def logits(self, features: Tensor) -> Tensor:
        """Returns (B, C) logits of (B, D) unit-norm features."""
        logits = features @ self.weight.T + self.bias
        if self.keys is not None and self.votes is not None:
            logits = logits + torch.exp(-self.sharpness * (1 - features @ self.keys.T)) @ self.votes
        return logits


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


_MOST_LOGITS = 2**22
"""Logits whose mean is brought to its place at a time, to bound the memory."""


def objective_of(adapter: Any) -> ObjectiveName:
    """What an adapter's logits are for; adapters that know no objective are for the softmax."""
    return getattr(adapter, "objective", "softmax")


class ClassBias(nn.Module):
    """What the sigmoid objective adds to the logits of each class: a fixed start and a learnt offset from it.

    SigLIP models start at their own bias (Zhai et al. 2023, sec. 3.2), so that the first logits are their own. Others
    have none, and cosines of 0.2 times a scale of 100 would call every class certain; `begin` sets the start from the
    training images. Weight decay draws the offset to 0, and so to the start.

    Args:
        backbone: gives the start where it has a bias; otherwise it is that of the probability 1/C at a cosine of 0.
        num_classes: C.
    """

    start: Tensor

    def __init__(self, backbone: ClipBackbone | FeatureClip, num_classes: int) -> None:
        super().__init__()
        own = backbone.logit_bias
        start = -math.log(max(num_classes - 1, 1)) if own is None else float(own)
        self.from_model = own is not None
        self.register_buffer("start", torch.full((num_classes,), start, device=backbone.device), persistent=False)
        self.offset = nn.Parameter(torch.zeros(num_classes, device=backbone.device))

    def forward(self, scale: float = 1.0) -> Tensor:
        """Returns (C,) biases, with `scale` (0 to 1) of the learnt offset."""
        return self.start + scale * self.offset

    @torch.no_grad()
    def begin(self, features: Features, class_weights: Tensor, logit_scale: Tensor) -> None:
        """Sets the start so that each class's mean probability on the training images is its share of them.

        It is the most likely bias for the logits as they are. A model's own bias stays.

        Args:
            features: of the training images, of which the first view is read.
            class_weights: (C, D) unit-norm text features of the classes.
            logit_scale: scalar.
        """
        if self.from_model:
            return
        if not len(features):
            raise DataError("the bias of each class is set by images, and there are none")
        values, step = features.values[0], max(1, _MOST_LOGITS // max(1, len(features)))
        for low in range(0, len(class_weights), step):
            weights = class_weights[low : low + step]
            logits = scaled_logits(values.to(weights.device), weights, logit_scale).cpu().double()
            self.match(logits, features, low)

    @torch.no_grad()
    def match(self, logits: Tensor, features: Features, low: int = 0) -> None:
        """Sets the start of the classes from `low` on by their (N, G) float64 logits without bias, see `begin`."""
        count = logits.shape[1]
        if features.multi_hot is None:
            positive, known = features.labels.cpu()[:, None] == torch.arange(low, low + count), None
        else:
            marks = features.multi_hot.cpu()[:, low : low + count]
            positive, known = marks == 1, marks >= 0
        self.start[low : low + count] = matching_bias(logits, positive, known).float().to(self.start.device)

    def state(self) -> dict[str, Tensor]:
        """Returns "bias_start" and "bias_offset", (C,) each."""
        return {"bias_start": self.start, "bias_offset": self.offset.detach()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` returned, checked before."""
        self.start.copy_(state["bias_start"])
        self.offset.copy_(state["bias_offset"])


def matching_bias(logits: Tensor, positive: Tensor, known: Tensor | None = None) -> Tensor:
    """The bias at which each class's mean probability is its share of positives, by bisection.

    At it the binary cross-entropy has no slope along the bias, so it is the most likely one. A class with no positive
    image, or with nothing else, counts as half an image away from that: its most likely bias would be infinite. One of
    which nothing is known gets the share 1/C.

    Args:
        logits: (N, C) float64 without bias.
        positive: (N, C) bool.
        known: (N, C) bool, whether that is known; None where all is. The rest counts for nothing.

    Returns:
        (C,) float64.
    """
    if known is None:
        known = torch.ones_like(positive)
    untold = ~known.any(dim=0)
    known = known | untold
    count = known.sum(dim=0)
    half = 0.5 / count
    share = ((positive & known).double().sum(dim=0) / count).clamp(half, 1 - half)
    share = torch.where(untold, 1 / max(logits.shape[1], 2), share)
    # The mean of the probabilities lies between those of the lowest and of the highest logit.
    low, high = torch.logit(share) - logits.amax(dim=0), torch.logit(share) - logits.amin(dim=0)
    for _ in range(60):
        middle = (low + high) / 2
        above = (torch.sigmoid(logits + middle) * known).sum(dim=0) / count > share
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def check_backbone(method: Any, given: Mapping[str, Any]) -> None:
    """Refuses a model that is features alone where there have to be towers, and a model without class names.

    Args:
        method: a subclass of `Method`.
        given: the arguments of its constructor, by name.

    Raises:
        BackboneError: it needs towers; the message names the methods that do without.
        ConfigError: there are no class names.
    """
    if given.get("backbone") is None or method.sits_on_features():
        return
    if isinstance(given["backbone"], FeatureClip):
        from adaptclip.methods.registry import methods

        able = ", ".join(sorted(one.__name__ for one in methods().values() if one.sits_on_features()))
        raise BackboneError(
            f"{method.__name__} needs a model with its towers (load_clip, wrap_clip) and images: features computed "
            f"elsewhere come without towers, which it could adapt. On features alone work {able}"
        )
    if "class_names" not in given:
        raise ConfigError(f"{method.__name__} needs at least one class name, got none: {method.__name__}(clip, names)")


def in_one_line(method: Any) -> str:
    """Says of a method what it is, on which model, what was set, and whether it has learnt."""
    given = {**method._given, **method._planned}
    own = [
        f"{name}={value!r}" for name, value in given.items()
        if name not in ("backbone", "class_names") and isinstance(value, bool | int | float | str)
    ]  # fmt: skip
    if method.__sklearn_is_fitted__():
        state = getattr(method, "info_", {}).get("schedule", "has learnt")
    else:
        state = "learns nothing" if method.learns_from == "nothing" else "has not learnt yet"
    parts = (f"{method.backbone!r}"[1:-1], listed(method.class_names, "classes"), *own, state)
    return f"<{type(method).__name__} on {'; '.join(parts)}>"
