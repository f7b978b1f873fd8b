# SPDX-License-Identifier: Apache-2.0
"""A CLIP of which only features are known: image and text features that somebody computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.errors import BackboneError, DataError, agree, did_you_mean, listed
from adaptclip.files import digest

OPENAI_SCALE = 100.0
"""exp(logit_scale) of the models that OpenAI trained, and of most after them (Radford et al. 2021, sec. 2.5)."""


class FeatureClip(nn.Module):
    """A CLIP without towers: the text features of fixed classes, beside image features that come as they are.

    Whatever learns from features alone sits on it as on any other model: linear heads, Tip-Adapter, GDA, SS-Text. What
    reads words or pixels (CoOp, LoRA) is refused with a `BackboneError`.

    Args:
        text_features: (C, D), or (C, P, D) for P prompts of each class, whose unit-norm features are averaged. Of any
            norm: only their directions are compared with images.
        class_names: C names, in the order of the rows; "class 0", "class 1" … where not given.
        logit_scale: exp() of the model's own temperature; 100 is OpenAI's.
        logit_bias: what the model adds to its logits (SigLIP), or None.
        source: digest or name of the model that made the features, where it is known.

    Raises:
        DataError: the features are of another shape, not finite or zero, or names do not fit them.
    """

    name = "features"
    pretrained = None
    precision = "fp32"
    asked_size = 0
    image_size = 0
    """There are no pixels."""
    text_features: Tensor

    def __init__(
        self,
        text_features: Tensor | np.ndarray | Sequence[Any],
        class_names: Sequence[str] | None = None,
        *,
        logit_scale: float = OPENAI_SCALE,
        logit_bias: float | None = None,
        source: str = "",
    ) -> None:
        super().__init__()
        text = as_features(text_features, "text features", "(C, D) or (C, P, D)")
        if text.ndim == 3:
            text = F.normalize(text, dim=-1).mean(dim=1)
        text = unit_rows(text)
        if isinstance(logit_scale, str) or not 0 < logit_scale < float("inf"):
            raise DataError(
                f"logit_scale is exp() of the model's temperature, a finite number above 0, got {logit_scale!r}"
            )
        own = None if class_names is None else in_order(class_names, "class_names")
        names = own or tuple(f"class {c}" for c in range(len(text)))
        if len(names) != len(text) or len(set(names)) != len(names):
            raise DataError(
                f"there are text features of {len(text)} classes, and {len(names)} class names, {len(set(names))} of "
                "them different; give a name of its own for each row"
            )
        self.class_names = names
        self.source = source
        self.register_buffer("text_features", text, persistent=False)
        self.register_buffer("_scale", torch.tensor(float(logit_scale)), persistent=False)
        self._bias = None if logit_bias is None else float(logit_bias)
        self.digest: str = digest(
            [f"{tuple(text.shape)} {float(logit_scale)!r} {logit_bias!r} {source}", *names],
            self.text_features.numpy().tobytes(),
        )
        self.image_digest = ""

    def __repr__(self) -> str:
        """One line: what is known of it."""
        return f"<FeatureClip of {listed(self.class_names, 'classes')}, {self.embed_dim} wide, without towers>"

    @property
    def embed_dim(self) -> int:
        """D, width of the features."""
        return self.text_features.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the text features are."""
        return self.text_features.device

    @property
    def logit_scale(self) -> Tensor:
        """Scalar float32, the factor of the logits."""
        scale: Tensor = self._scale  # type: ignore[assignment]
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """Scalar float32 added to the logits, or None."""
        return None if self._bias is None else torch.tensor(self._bias, device=self.device)

    @property
    def transform_spec(self) -> dict[str, Any]:
        """Empty: there are no pixels."""
        return {}

    def class_features(self, class_names: Sequence[str]) -> Tensor:
        """Returns (C', D) unit-norm text features of classes by their names.

        Raises:
            DataError: a class has none.
        """
        row_of = {name: row for row, name in enumerate(self.class_names)}
        for name in class_names:
            if name not in row_of:
                raise DataError(
                    f"there are no text features of the class {name!r}, only of {len(row_of)} others. "
                    f"{did_you_mean(name, row_of, lead='There are')}"
                )
        return self.text_features[[row_of[name] for name in class_names]]

    @property
    def text(self) -> NoReturn:
        """Raises BackboneError: there is no text tower."""
        self._lacks("a text tower, whose prompts could be learnt or read")

    @property
    def model(self) -> NoReturn:
        """Raises BackboneError: there are no towers."""
        self._lacks("towers, which could be adapted")

    @property
    def transform(self) -> NoReturn:
        """Raises BackboneError: there are no pixels."""
        self._lacks("an image tower, which could take pixels")

    def encode_image(self, images: Tensor) -> NoReturn:
        """Raises BackboneError: there is no image tower."""
        self._lacks("an image tower, which could take pixels")

    def encode_text(self, tokens: Tensor) -> NoReturn:
        """Raises BackboneError: there is no text tower."""
        self._lacks("a text tower, which could read prompts")

    def tokenize(self, texts: Sequence[str]) -> NoReturn:
        """Raises BackboneError: there is no text tower."""
        self._lacks("a text tower, which could read prompts")

    def _lacks(self, what: str) -> NoReturn:
        raise BackboneError(
            f"features computed elsewhere come without {what}. Methods that learn from features alone work here, such "
            "as linear heads, Tip-Adapter, GDA, SS-Text; the others need a model (`load_clip`) and images"
        )


def in_order(names: Any, what: str) -> tuple[str, ...]:
    """Returns names that come in an order. Raises DataError for a text or a set, which have none of their own."""
    if isinstance(names, str) or (not isinstance(names, Sequence | np.ndarray) and not hasattr(names, "tolist")):
        raise DataError(f"{what} should be a list of names in the order of the class ids, got {type(names).__name__}")
    return tuple(map(str, names))


def unit_rows(rows: Tensor) -> Tensor:
    """Returns rows at unit norm; what has it already keeps its last bits, so that saved rows load as they were."""
    norms = rows.norm(dim=-1, keepdim=True)
    return torch.where((norms - 1).abs() < 1e-6, rows, rows / norms)


def as_features(values: Any, what: str, shape: str) -> Tensor:
    """Returns features as a float32 tensor on the CPU, without gradients.

    Args:
        values: tensor, array or nested list of numbers.
        what: what to call them in a message.
        shape: the shapes that are allowed, in words: "(N, D) or (V, N, D)".

    Raises:
        DataError: they are no numbers, of another number of dimensions, empty, not finite, or a row is zero and has no
            direction.
    """
    try:
        tensor = torch.as_tensor(values).detach().cpu().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} should be {shape} numbers, got {type(values).__name__}: {error}") from error
    allowed = {part.count(",") + 1 for part in shape.split(" or ")}
    if tensor.ndim not in allowed or not tensor.numel():
        raise DataError(f"{what} should be {shape}, got {tuple(tensor.shape)}")
    bad = ~torch.isfinite(tensor).all(dim=-1)
    if bad.any():
        raise DataError(f"{_rows(bad, what)} {agree(int(bad.sum()), 'has', 'have')} values that are not finite")
    zero = tensor.abs().amax(dim=-1) == 0
    if zero.any():
        raise DataError(
            f"{_rows(zero, what)} {agree(int(zero.sum()), 'is', 'are')} all zero, and so without a direction"
        )
    return tensor


def _rows(which: Tensor, what: str) -> str:
    number = int(which.sum())
    return f"{number:,} {agree(number, 'row', 'rows')} of {what}"
