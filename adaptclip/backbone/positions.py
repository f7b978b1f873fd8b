"""Position embeddings of a checkpoint against those of its model, whose number open_clip changes without a word.

It resizes them where the checkpoint has more or fewer, and the features become others: with text weights of 248
positions under an architecture of 77, the cosine to the true features is 0.71.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from adaptclip.errors import BackboneError

_TEXT = ("positional_embedding", "text.positional_embedding", "text_encoder.positional_embedding.pos_embed.pos_embed")
_IMAGE = "visual.positional_embedding"


def check_positions(model: Any, weights: Path, *, what: str, image_size: int) -> None:
    """Refuses a model whose position embeddings are not the checkpoint's own.

    Args:
        model: as open_clip built it.
        weights: the checkpoint that it was built from.
        what: the checkpoint, for messages.
        image_size: the side of the pictures that was asked for by name, which allows the image tower's to be resized
            and says so; 0 where nobody asked.

    Raises:
        BackboneError: there are more or fewer of them in the checkpoint.
    """
    shapes = _shapes(weights)
    text = getattr(model, "positional_embedding", getattr(getattr(model, "text", None), "positional_embedding", None))
    held = next((shapes[name] for name in _TEXT if name in shapes), None)
    if isinstance(text, nn.Parameter) and held is not None and held[-2] != text.shape[0]:
        raise BackboneError(
            f"{what} has {held[-2]} text positions and the architecture {text.shape[0]}; open_clip would resize them, "
            "and the features would be others. Name the architecture it was trained with, or put it into a local-dir: "
            f"folder whose open_clip_config.json has the right context_length ({held[-2]} where no class token counts)."
        )
    image, held = getattr(model.visual, "positional_embedding", None), shapes.get(_IMAGE)
    if not isinstance(image, nn.Parameter) or held is None or held[0] == image.shape[0]:
        return
    if len(set(getattr(model.visual, "image_size", ()))) > 1:
        return  # not square: refused elsewhere, whatever its positions
    old, new = (f"{math.isqrt(count - 1)} x {math.isqrt(count - 1)}" for count in (held[0], image.shape[0]))
    if not image_size:
        raise BackboneError(
            f"{what} has image positions for {old} patches and the architecture for {new}; open_clip would resize "
            "them, and the features would be others. Name the architecture it was trained with, or ask for pictures of "
            "that size by name: --image-size (image_size=)."
        )
    warnings.warn(
        f"the image positions of {what} were resized from {old} to {new} patches, as pictures of {image_size} pixels "
        "were asked for; the features are not those that the weights were trained for",
        stacklevel=4,
    )


def _shapes(weights: Path) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors; its numbers are not read."""
    if weights.suffix == ".safetensors":
        with safe_open(weights, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    elif weights.suffix in (".npz", ".npy"):  # of big_vision; open_clip reads those in its own way
        found = {}
    else:
        state = torch.load(weights, map_location="meta", weights_only=True)
        state = state.get("state_dict", state)
        found = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name.removeprefix("module."): shape for name, shape in found.items()}
