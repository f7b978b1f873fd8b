# SPDX-License-Identifier: Apache-2.0
"""Pretrained CLIP models, frozen, behind one interface whatever architecture they have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.loading import PRECISIONS, STARTER
from adaptclip.clip.text import TextTower
from adaptclip.data.dataset import DomainData, FeatureRows
from adaptclip.errors import BackboneError, did_you_mean
from adaptclip.feature_clip import FeatureClip
from adaptclip.progress import progress_bar

__all__ = [
    "ClipBackbone",
    "clip_of",
    "image_weights_digest",
    "load_backbone",
    "load_clip",
    "weights_digest",
    "wrap_clip",
]


class ClipBackbone(nn.Module):
    """A frozen CLIP: always in evaluation mode, no parameter asks for a gradient, features are unit-norm float32.

    Attributes:
        model: the open_clip model.
        tokenizer: its open_clip tokenizer.
        name: the spelling it was loaded by.
        pretrained: its tag or checkpoint file; None where the name says it all.
        precision: fp32, bf16 or fp16.
        digest: SHA-256 of all weights and of the activation, 64 hexadecimal digits: which model this is.
        image_digest: the same of what `encode_image` computes with alone: whose image features these are.
        embed_dim: D, width of the joint embedding space.
        image_size: side of the square input image in pixels.
        asked_size: the side that `load_backbone` was asked for; 0 where it is the model's own.
        context_length: L, tokens in a prompt with its start and end tokens.
        transform: PIL image -> (3, H, W) float32, the checkpoint's own evaluation transform.
        transform_spec: the same as plain values: size, mean, std, interpolation, resize_mode, fill.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        pretrained: str | None = None,
        precision: str = "fp32",
        digest: str | None = None,
        image_digest: str | None = None,
        asked_size: int = 0,
        transform: Any = None,
    ) -> None:
        """Freezes `model`, reads its evaluation transform and hashes its weights, unless `digest` names them already.

        A given `digest` stands for the image weights too, unless `image_digest` names those. A given `transform` takes
        the place of the model's own.

        Raises:
            BackboneError: the images are not square, or weights are not finite.
        """
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        super().__init__()
        # Some tokenizers shorten long prompts by dropping words at random; here nothing is ever shortened.
        if getattr(tokenizer, "reduction_fn", None) is not None:
            tokenizer.reduction_fn = None
        self.model: Any = model
        self.tokenizer = tokenizer
        self.name, self.pretrained, self.precision = name, pretrained, precision
        config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
        height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
        if height != width:
            raise BackboneError(f"{name} takes images of {height} x {width} pixels; only square ones are supported")
        self.image_size: int = height
        self.asked_size = asked_size
        self.transform: Any = image_transform_v2(config, is_train=False)
        self.transform_spec = {
            "size": height,
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize_mode,
            "fill": config.fill_color,
        }
        if transform is not None:
            self._take_transform(transform)
        self._to_tensor = self.transform.transforms[-2:]
        self.context_length: int = tokenizer.context_length
        self.image_digest = image_digest or digest or image_weights_digest(model)
        self.digest = digest or weights_digest(model)
        self.requires_grad_(False)
        self.train(False)

    def __repr__(self) -> str:
        """One line; `print(clip.model)` has the layers."""
        weights = f" ({self.pretrained})" if self.pretrained else ""
        return (
            f"<{self.name}{weights}: images of {self.image_size} pixels, features {self.embed_dim} wide, "
            f"{self.precision} on {self.device}>"
        )

    def with_model(
        self, model: nn.Module, *, name: str, digest: str, image_digest: str, embed_dim: int = 0
    ) -> ClipBackbone:
        """Returns a backbone of a model that was made from this one, with the same tokenizer and transform.

        Args:
            model: the other model.
            name: what to call it.
            digest: which model it is.
            image_digest: whose image features it makes.
            embed_dim: width of its image features where that is not the width of its text features.
        """
        own = self.transform if "transform" in self.transform_spec else None
        made = ClipBackbone(
            model, self.tokenizer, name=name, pretrained=self.pretrained, precision=self.precision, digest=digest,
            image_digest=image_digest, asked_size=self.asked_size, transform=own,
        )  # fmt: skip
        if embed_dim:
            vars(made)["embed_dim"] = embed_dim
        return made

    def _take_transform(self, transform: Any) -> None:
        """Replaces the model's own evaluation transform by one that ends in ToTensor and Normalize."""
        steps: Any = getattr(transform, "transforms", ())
        kinds = [type(step).__name__ for step in steps]
        if kinds[-2:] not in (["ToTensor", "Normalize"], ["MaybeToTensor", "Normalize"]):
            raise BackboneError(
                "a transform should be torchvision's Compose that ends in ToTensor and Normalize, as open_clip makes "
                f"it (`create_model_and_transforms`), got {' → '.join(kinds) or type(transform).__name__}"
            )
        side = self.image_size
        try:
            shape = tuple(transform(Image.new("RGB", (2 * side, side + 3))).shape)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BackboneError(f"the transform fails on an RGB image: {error}") from error
        if shape != (3, side, side):
            raise BackboneError(f"the transform gives pixels of {shape}, and the image tower takes (3, {side}, {side})")
        mean, std = ([float(value) for value in getattr(steps[-1], name)] for name in ("mean", "std"))
        info = " ".join(str(transform).split())
        self.transform = transform
        self.transform_spec = {**self.transform_spec, "mean": mean, "std": std, "transform": info}

    def train(self, mode: bool = True) -> ClipBackbone:
        """Stays in evaluation mode whatever is asked: dropout and batch statistics are off in a frozen model."""
        return super().train(False)

    def made(self, digest: str, *, early: bool) -> bool:
        """Whether what names its model by `digest` was made with these weights; `early` is of version 0.1."""
        return digest == self.digest or (early and digest == weights_digest(self.model, settings=False))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    @cached_property
    def embed_dim(self) -> int:
        """D, width of the joint embedding space."""
        with torch.no_grad():
            return self.encode_text(self.tokenize(["a"])).shape[1]

    @property
    def logit_scale(self) -> Tensor:
        """Scalar float32, the factor of the logits: exp() is applied already."""
        return self.model.logit_scale.detach().float().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        """Scalar float32 added to the logits (SigLIP), or None."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.detach().float().reshape(())

    @cached_property
    def text(self) -> TextTower:
        """The text tower taken apart for prompt learning.

        Raises:
            BackboneError: prompts of this kind of tower cannot be learnt.
        """
        from adaptclip.clip.text import make_text_tower

        return make_text_tower(self.model, self.tokenizer)

    def normalize(self, picture: Image.Image | np.ndarray) -> Tensor:
        """Turns an image that has its final size into the towers' input, as the last steps of `transform` do.

        Args:
            picture: RGB picture, or (image_size, image_size, 3) uint8 array; an augmented view for example.

        Returns:
            (3, image_size, image_size) float32.

        Raises:
            BackboneError: another size, mode or dtype.
        """
        side = self.image_size
        if isinstance(picture, Image.Image):
            got, fits = f"{picture.mode} {picture.size}", picture.mode == "RGB" and picture.size == (side, side)
        else:
            got, fits = (
                f"{picture.dtype} {picture.shape}",
                picture.dtype == np.uint8 and picture.shape == (side, side, 3),
            )
        if not fits:
            raise BackboneError(f"normalize takes 8-bit RGB images of {side} x {side} pixels, got {got}")
        value: Any = picture
        for step in self._to_tensor:
            value = step(value)
        return value

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turns C prompts into (C, L) int64 token ids on the CPU; a prompt is never cut.

        Raises:
            BackboneError: a prompt has more tokens than the context; the message names it.
        """
        for text in texts:
            num_tokens = self.count_tokens(text)
            if num_tokens > self.context_length:
                raise BackboneError(
                    f"the prompt {text!r} has {num_tokens} tokens with its start and end; the context of {self.name} "
                    f"is {self.context_length}. Shorten the class name (`aliases` in the card) or the template."
                )
        return self.tokenizer(list(texts), context_length=self.context_length)

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a prompt, with the start and end tokens, before any cut."""
        import open_clip

        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            return len(self.tokenizer.encode(text)) + 2
        inner, cleaned = self.tokenizer.tokenizer, self.tokenizer.clean_fn(text)
        if getattr(self.tokenizer, "tokenizer_mode", ""):
            # CLIPS writes start, end and class tokens itself.
            return len(inner(cleaned, add_special_tokens=False).input_ids) + 3
        return len(inner(cleaned).input_ids)

    def encode_image(self, images: Tensor) -> Tensor:
        """Encodes (B, 3, H, W) transformed images as (B, D) unit-norm float32 features."""
        import open_clip

        dtype = open_clip.get_input_dtype(self.precision) or torch.float32
        return F.normalize(self.model.encode_image(images.to(self.device, dtype)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encodes (C, L) token ids as (C, D) unit-norm float32 features."""
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)


def load_backbone(
    name: str = STARTER,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    quick_gelu: bool | None = None,
    preprocess: Mapping[str, Any] | None = None,
    text_weights: Path | None = None,
    image_size: int = 0,
) -> ClipBackbone:
    """Loads a pretrained CLIP by any of open_clip's spellings; a model without its weights is an error.

    Args:
        name: an architecture (`ViT-B-16`), `hf-hub:ORG/NAME`, `local-dir:FOLDER` (of open_clip, or a CLIP or SigLIP of
            transformers), or `starter`, which comes with the package.
        pretrained: a tag of the architecture (`openai`) or a checkpoint file (`weights.pt#ema` where it holds several
            models); None for the other spellings.
        device: where the weights go.
        precision: fp32, bf16 or fp16: dtype of the weights, as open_clip casts them.
        quick_gelu: activation of a checkpoint file, which does not state it; None takes the architecture's. Tags
            know theirs.
        preprocess: `mean`, `std`, `interpolation`, `resize_mode`, `fill_color` of a checkpoint file; None takes what
            all published weights of the architecture share, or OpenAI's with a warning.
        text_weights: other weights for the text tower of `starter`.
        image_size: side of the images in pixels; 0 is the architecture's own. Where the weights were trained at
            another one, the image tower's position embeddings are resized, with a warning: features change.

    Raises:
        BackboneError: unknown name or tag, missing, damaged or unfit weights (position embeddings of another length
            among them), no way to download them, or no such device here.
    """
    import open_clip

    from adaptclip.clip.loading import create, find_source
    from adaptclip.clip.starter import create_starter

    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 0:
        raise BackboneError(f"image_size should be the side of the images in pixels, or 0, got {image_size}")
    check_device(device)
    if precision not in PRECISIONS:
        raise BackboneError(f"unknown precision {precision!r}. {did_you_mean(precision, PRECISIONS)}")
    if name != STARTER:
        if text_weights is not None:
            raise BackboneError(f"text_weights are for {STARTER!r} only, got name={name!r}")
        source = find_source(name, pretrained, quick_gelu=quick_gelu, preprocess=preprocess)
        model, tokenizer = create(source, device=device, precision=precision, image_size=image_size)
    else:
        if pretrained is not None or quick_gelu is not None or preprocess is not None:
            raise BackboneError(f"{STARTER!r} brings its weights and transform; leave pretrained and the others out")
        model, tokenizer = create_starter(text_weights, device=device, precision=precision)
    side = open_clip.get_model_preprocess_cfg(model)["size"]
    if image_size and side != image_size and side != (image_size, image_size):
        raise BackboneError(f"{name} cannot take images of {image_size} pixels, only of {side}; leave image_size out")
    return ClipBackbone(model, tokenizer, name=name, pretrained=pretrained, precision=precision, asked_size=image_size)


def check_device(device: str | torch.device) -> None:
    """Raises BackboneError unless there is such a device here."""
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BackboneError(f"no device {device!r}; devices are called cpu, cuda, cuda:1, mps") from error
    if asked.type == "cpu":
        return
    backend: Any = torch.backends.mps if asked.type == "mps" else getattr(torch, asked.type, None)
    if not (hasattr(backend, "is_available") and backend.is_available()):
        raise BackboneError(
            f"there is no device {str(device)!r} on this machine (or torch was built without it); use cpu"
        )
    count = backend.device_count() if hasattr(backend, "device_count") else 1
    if (asked.index or 0) >= count:
        raise BackboneError(f"there is no device {str(device)!r} on this machine: it has {count}, counted from 0")


load_clip = load_backbone
"""The same by the name that the front door has for it."""


def wrap_clip(model: nn.Module, tokenizer: Any, transform: Any = None, *, name: str = "wrapped") -> ClipBackbone:
    """Takes an open_clip model that is loaded already: your own, fine-tuned in memory, or built by hand.

    The model is frozen and stays in evaluation mode; it is not copied.

    Args:
        model: an open_clip model.
        tokenizer: its open_clip tokenizer.
        transform: its evaluation transform, torchvision's Compose that ends in ToTensor and Normalize; None takes the
            one that the model says of itself.
        name: what to call it. A run or an artifact names it so; to load an artifact again, give the model:
            `load(PATH, backbone=clip)`.

    Raises:
        BackboneError: weights are not finite, images are not square, or the transform does not fit the tower.
    """
    if isinstance(model, ClipBackbone):
        raise BackboneError("this model is wrapped already; use it as it is")
    lacking = [name for name in ("encode_image", "encode_text", "visual") if not hasattr(model, name)]
    if lacking or not callable(tokenizer) or not hasattr(tokenizer, "context_length"):
        theirs = ""
        if hasattr(model, "vision_model"):
            theirs = (
                ". A model of transformers goes by a folder: save_pretrained of the model, its tokenizer and its image "
                "processor, then load_clip('local-dir:FOLDER')"
            )
        raise BackboneError(
            f"wrap_clip takes an open_clip model and its tokenizer (`open_clip.get_tokenizer`), got "
            f"{type(model).__name__} and {type(tokenizer).__name__}{theirs}"
        )
    return ClipBackbone(model, tokenizer, name=name, transform=transform)


def clip_of(
    data: DomainData,
    name: str = STARTER,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    image_size: int = 0,
) -> Any:
    """Loads the CLIP for a card: `load_backbone`, or where the card holds features, what is known of their model.

    Args:
        data: an opened card.
        name: as for `load_backbone`; a card of features takes `features`, which its own default stands for too.
        pretrained: as for `load_backbone`.
        device: where the weights go.
        image_size: as for `load_backbone`.

    Returns:
        A `ClipBackbone`, or a `FeatureClip`.

    Raises:
        BackboneError: see `load_backbone`; or another model is named than the one that made the card's features.
    """
    store = data.test.store
    if not isinstance(store, FeatureRows):
        if name == FeatureClip.name:
            raise BackboneError(f"card {data.card.name} holds images; name the model that should read them")
        return load_backbone(name, pretrained, device=device, image_size=image_size)
    if name not in (STARTER, FeatureClip.name) or pretrained or image_size:
        raise BackboneError(
            f"card {data.card.name} holds features, which one model made and no other can read; leave --backbone, "
            "--pretrained and --image-size out"
        )
    clip = FeatureClip(
        torch.from_numpy(store.text), store.class_names, logit_scale=store.logit_scale, logit_bias=store.logit_bias
    )
    return clip.to(device)


def weights_digest(model: nn.Module, *, settings: bool = True) -> str:
    """Returns the SHA-256 of a model's weights: sorted names, dtypes, shapes and bytes, and of its activation.

    The activation counts because the same weights give other features under QuickGELU, and it leaves no trace in them.
    So do other settings of the architecture (heads, pooling, causal mask, …), where they are not the usual ones; the
    digests of version 0.1 were made without those (`settings` false).

    Raises:
        BackboneError: a weight is NaN or infinite.
    """
    return _digest_of(model, model.state_dict(), settings=settings)


def image_weights_digest(model: nn.Module) -> str:
    """Returns the SHA-256 of what image features depend on, so that another text tower changes nothing.

    It is that of the image tower where `encode_image` is open_clip's own, which reads `model.visual` and nothing else;
    any other model counts as a whole.

    Raises:
        BackboneError: a weight is NaN or infinite.
    """
    import open_clip

    known = (open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa)
    # Compared as functions: a subclass, or an object with a method of its own, may read more than the image tower.
    own = getattr(getattr(model, "encode_image", None), "__func__", None)
    if not any(own is kind.encode_image for kind in known):
        return weights_digest(model)
    visual = model.get_submodule("visual")
    return _digest_of(visual, {f"visual.{name}": value for name, value in visual.state_dict().items()})


_USUAL: Mapping[str, tuple[Any, ...]] = {
    "head_dim": (64,),
    "pool_type": ("tok", "argmax"),
    "text_pool_type": ("argmax",),
    "global_pool": ("", "token", "map"),
    "final_ln_after_pool": (False,),
    "approximate": ("none",),
}
"""What a module may be told that changes features and leaves no trace in weights -> the values of most models."""


def _unusual(module: nn.Module) -> list[str]:
    """Settings of a model that its weights do not show and that are not those of most models."""
    info = []
    for name, part in module.named_modules():
        # timm's pooling modules use the same names for other things, and what contains them says it too.
        keys = _USUAL if "pool" not in type(part).__name__.lower() else ()
        values = {key: getattr(part, key) for key in keys if isinstance(getattr(part, key, None), bool | int | str)}
        info += [f"{name}.{key}={value}" for key, value in values.items() if value not in _USUAL[key]]
        info += [f"{name}.eps={part.eps}"] if isinstance(part, nn.LayerNorm) and part.eps not in (1e-5, 1e-6) else []
        info += [f"{name}.attn_mask=None"] if getattr(part, "attn_mask", 0) is None else []
    return info


def _digest_of(module: nn.Module, state: Mapping[str, Tensor], *, settings: bool = True) -> str:
    """SHA-256 of a state, of the activation in a module, and of what else is unusual in it."""
    from open_clip.transformer import QuickGELU

    sha = hashlib.sha256(f"quick_gelu={any(isinstance(m, QuickGELU) for m in module.modules())}".encode())
    sha.update("".join(f" {setting}" for setting in _unusual(module) if settings).encode())
    for key in progress_bar(sorted(state), desc="Weights digest", leave=False, delay=2):
        tensor = state[key].detach().cpu().contiguous()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BackboneError(f"the weights are damaged: {key} has values that are not finite")
        sha.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
