# SPDX-License-Identifier: Apache-2.0
"""Whether weights are those of an architecture, in words: what they lack, and which architecture they would fit.

open_clip resizes position embeddings without a word where a checkpoint has more or fewer than its model, and the
features become others: with text weights of 248 positions under an architecture of 77, the cosine to the true features
is 0.71. They are compared here.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from adaptclip.errors import BackboneError

# How torch words that a pickle names a function or class beyond those that make tensors.
_CODE = ("Unsupported global", "Unsupported class", "reduce for unrecognized function")

# An empty pickle ends in StopIteration, the head of a torch archive in OSError.
_UNREADABLE = (SafetensorError, OSError, EOFError, StopIteration)


def explain(error: Exception, what: str, state: Mapping[str, Tensor] | None = None) -> str:
    """Words what went wrong while weights were loaded, and what to do about it.

    Args:
        error: what was raised.
        what: the checkpoint, for messages.
        state: its tensors where they could be read, by which the nearest architecture is found.
    """
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text is not repeated: it advises to load the file again without the protection.
        code = next((line.strip() for line in text.splitlines() if any(word in line for word in _CODE)), "")
        code = code.removeprefix("WeightsUnpickler error: ").partition(" was not an allowed")[0]
        found = f"a pickle that would run code ({code})" if code else "damaged, or a pickle of more than weights"
        return (
            f"{what} is {found}; it was refused and nothing in it was run. Copy it again, or ask for safetensors. "
            "Where it is a checkpoint of your own training, save the weights alone: "
            "`safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`."
        )
    # open_clip asserts the widths of position embeddings before it compares the rest.
    if "Error(s) in loading state_dict" in text or isinstance(error, AssertionError):
        lines = [line.strip() for line in text.splitlines() if line.strip() and "loading state_dict" not in line]
        shown = "; ".join(line if len(line) < 200 else line[:200] + " …" for line in lines[:3])
        return (
            f"{what} does not fit the architecture ({len(lines)} complaints; first: {shown}). {nearest(state or {})}"
            "Name the architecture it was trained with; an adapter alone is not a backbone."
        )
    if isinstance(error, _UNREADABLE) or "PytorchStreamReader" in text or "EOF" in text:
        return f"{what} is damaged, unreadable or not a checkpoint ({first_line(error)}). Copy or download it again."
    return f"{what} cannot be loaded: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its text, cut to 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no details'}"


_TEXT = ("positional_embedding", "text.positional_embedding", "text_encoder.positional_embedding.pos_embed.pos_embed")
_IMAGE = "visual.positional_embedding"


def check_parts(state: Mapping[str, Tensor], config: Mapping[str, Any], *, what: str) -> None:
    """Refuses one tower alone, and weights with a bias of the logits for a model that has none.

    Raises:
        BackboneError: naming what is missing.
    """
    image = any(name.startswith(_IMAGE_TOWER) for name in state)
    text = any(name.startswith(_TEXT_TOWER) for name in state)
    bare = not image and any(name.startswith(_BARE_IMAGE_TOWER) for name in state)
    if (image or bare) and not text:
        raise BackboneError(
            f"{what} holds the image tower alone: the text tower is missing, and no prompt can be read without it. "
            "Take the whole checkpoint. An image tower that was tuned beside an unchanged text tower goes into that "
            "model: `clip = ac.load_clip(…)`, `clip.model.visual.load_state_dict(…)`, `ac.wrap_clip(clip.model, "
            "clip.tokenizer)`."
        )
    if text and not image and not bare:
        raise BackboneError(
            f"{what} holds the text tower alone: the image tower is missing. Take the whole checkpoint."
        )
    if "logit_bias" in state and config.get("init_logit_bias") is None:
        raise BackboneError(
            f"{what} does not fit the architecture: it has a logit_bias, as SigLIP has, and the architecture has none. "
            f"{nearest(state)}Name the architecture it was trained with."
        )


_IMAGE_TOWER, _TEXT_TOWER = (
    ("visual.", "image_encoder."),
    ("text.", "text_encoder.", "token_embedding."),
)
_BARE_IMAGE_TOWER = ("conv1.", "patch_embed.", "embeddings.patch_embedding", "trunk.")


def nearest(state: Mapping[str, Tensor]) -> str:
    """A sentence that names the architectures of open_clip whose sizes these tensors have, or come nearest to."""
    import open_clip

    own = _sizes_of_weights(state)
    if len(own) < 4:  # an adapter, or another kind of model
        return ""
    configs = {name: _sizes_of_config(open_clip.get_model_config(name) or {}) for name in open_clip.list_models()}
    wrong = {
        name: [size for size in own | sizes if own.get(size) != sizes.get(size)]
        for name, sizes in configs.items()
        if sizes
    }
    fewest = min(map(len, wrong.values()))
    names = [name for name, sizes in wrong.items() if len(sizes) == fewest]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if not fewest:
        return f"By its shapes it is of {shown}. "
    differing = ", ".join(f"{size} {own.get(size, 'none')}" for size in wrong[names[0]])
    return f"The nearest architecture by its shapes is {names[0]}, which differs in: {differing} here. "


def _sizes_of_weights(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes that tensors show, by the words of messages."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    text = {name.removeprefix("text."): shape for name, shape in shapes.items()}
    sizes: dict[str, Any] = {}
    tokens, positions, patches = (
        text.get("token_embedding.weight"), text.get("positional_embedding"), shapes.get("visual.conv1.weight"),
    )  # fmt: skip
    projection = next(
        (shapes[name][-1] for name in ("text_projection", "text.text_projection") if name in shapes), None
    )
    if projection is not None or "text.text_projection.weight" in shapes:
        sizes["embed_dim"] = projection or shapes["text.text_projection.weight"][0]
    if tokens and len(tokens) == 2:
        sizes |= {
            "vocabulary": tokens[0],
            "text width": tokens[1],
            "text layers": _layers(text, "transformer.resblocks."),
        }
    if positions and len(positions) == 2:
        sizes["context"] = positions[0]
    if _layers(shapes, "visual.transformer.resblocks.") and patches:
        sizes |= {"image width": patches[0], "patch": patches[-1], "image tower": "ViT"}
        sizes["image layers"] = _layers(shapes, "visual.transformer.resblocks.")
        sizes["patches a side"] = math.isqrt(shapes.get(_IMAGE, (1,))[0] - 1)
    elif any(name.startswith("visual.layer1.") for name in shapes) and patches:
        sizes |= {"image width": 2 * patches[0], "image tower": "ResNet"}
        sizes["image layers"] = [_layers(shapes, f"visual.layer{stage}.") for stage in range(1, 5)]
    elif any(name.startswith("visual.trunk.") for name in shapes):
        sizes["image tower"] = "timm"
    return sizes


def _sizes_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of an architecture."""
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not vision or not text:
        return {}
    sizes: dict[str, Any] = {"embed_dim": config["embed_dim"]}
    if not text.get("hf_model_name"):
        width, context = text.get("width", 512), text.get("context_length", 77) + bool(text.get("embed_cls"))
        sizes |= {"vocabulary": text.get("vocab_size", 49408), "text width": width, "context": context}
        sizes["text layers"] = text.get("layers", 12)
    if vision.get("timm_model_name"):
        return {**sizes, "image tower": "timm"}
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    if isinstance(layers, list | tuple):
        return {**sizes, "image tower": "ResNet", "image width": width, "image layers": list(layers)}
    patch = vision.get("patch_size", 16)
    sizes |= {"image tower": "ViT", "image width": width, "image layers": layers, "patch": patch}
    return {**sizes, "patches a side": vision.get("image_size", 224) // patch}


def _layers(names: Mapping[str, Any], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)})


def check_positions(model: Any, state: Mapping[str, Tensor], *, what: str, image_size: int) -> None:
    """Refuses a model whose position embeddings are not the checkpoint's own.

    Args:
        model: as open_clip built it.
        state: the tensors that it was built from.
        what: the checkpoint, for messages.
        image_size: the side of the images that was asked for by name, which allows the image tower's to be resized
            and says so; 0 where nobody asked.

    Raises:
        BackboneError: there are more or fewer of them in the checkpoint.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
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
            "them, and the features would be others. Name the architecture it was trained with, or ask for images of "
            "that size by name: --image-size (image_size=)."
        )
    warnings.warn(
        f"the image positions of {what} were resized from {old} to {new} patches, as images of {image_size} pixels "
        "were asked for; the features are not those that the weights were trained for",
        stacklevel=4,
    )
