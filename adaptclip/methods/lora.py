"""LoRA on the towers of a CLIP: CLIP-LoRA by default, any tower, projection, block, rank or DoRA as settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.backbone import ClipBackbone
from adaptclip.backbone.attention import share_weights
from adaptclip.backbone.class_token import encode_image
from adaptclip.backbone.lora_targets import Towers
from adaptclip.errors import BackboneError, DataError
from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.class_encoder import DEFAULT_MEMORY_BUDGET_BYTES
from adaptclip.methods.class_prompts import ClassPrompts
from adaptclip.methods.lora_layers import (
    check_scale,
    inject_lora,
    lora_layers,
    lora_parameters,
    magnitudes,
    merge_lora,
    read_peft,
    save_peft,
    set_lora_scale,
)
from adaptclip.methods.method import Method, Variant
from adaptclip.methods.objective import ClassBias
from adaptclip.methods.snapshots import Snapshot, take_snapshot
from adaptclip.methods.tuned_towers import TowerSchedule, tune_towers
from adaptclip.methods.zero_shot import ZeroShotClassifier
from adaptclip.storage import read_tensors, write_tensors
from adaptclip.training.criterion import ObjectiveName, check_objective
from adaptclip.training.support import Loop, Support
from adaptclip.types import Batch

BIAS_FILE = "class_bias.safetensors"
"""What the sigmoid objective learns beside PEFT's own files."""


class LoRA(Method):
    """Low-rank adapters on a frozen CLIP (CLIP-LoRA, Zanella and Ben Ayed 2024, arXiv:2405.18541).

    The prompts stay the card's own; what is compared with the pictures are the text features of the adapted text tower.
    Where the image tower is adapted the method trains on pixels, otherwise on cached features. In training, prompts end
    at their EOT and the classes are shared out over the processes; without dropout in the text tower they also share
    the tokens they have in common, which is exact. Where dropout is active they do not: each class then has its own.

    Args:
        backbone: frozen CLIP, not changed.
        class_names: C names in the order of the label ids.
        towers: which towers are adapted: image, text or both.
        rank: see `inject_lora`, as for the next ones up to `seed`.
        alpha: numerator of the update's scale.
        dropout: of the layers' inputs, in training.
        projections: which projections, any of q, k, v, out, mlp, conv.
        blocks: "all", "top-N" or numbers such as "0,5,11".
        targets: endings of layer names, instead of `projections`.
        rslora: scale by the root of the rank.
        dora: learn magnitudes apart from directions.
        seed: of the initial A.
        templates: prompts with one `{}` for the class name; their unit-norm features are averaged.
        scale: how much of the trained update is used, from 0 (zero-shot) to 1; below 1 only for evaluation.
        objective: "sigmoid" learns a bias for each class beside the update, see `ClassBias`.
        memory_budget_bytes: most bytes of the text tower's activations kept for the backward pass.
        checkpointing: computes the image tower's blocks a second time in the backward pass instead of keeping them.
        fast: False encodes whole prompts up to their EOT.

    Raises:
        ConfigError: a setting is out of range, or names layers that do not exist.
        BackboneError: a prompt is too long, or a tower is of a kind that cannot be adapted.
    """

    name = "lora"
    variants = {"lora": Variant(12, ladder=True, search={"lr": (1e-4, 2e-2), "rank": [2, 4, 8]})}
    schedule_type = TowerSchedule
    smoke = {"steps": 60, "lr": 1e-2}
    learns_by_steps = True
    takes_new_names = True
    is_clip = True

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        towers: Towers = "both",
        rank: int = 2,
        alpha: float = 1.0,
        dropout: float = 0.25,
        projections: Sequence[str] = ("q", "k", "v"),
        blocks: str = "all",
        targets: Sequence[str] = (),
        rslora: bool = True,
        dora: bool = False,
        seed: int = 0,
        templates: Sequence[str] = ("a photo of a {}.",),
        scale: float = 1.0,
        objective: ObjectiveName = "softmax",
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        checkpointing: bool = False,
        fast: bool = True,
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        check_objective(objective)
        self._prompts = ClassPrompts(
            backbone, class_names, templates, memory_budget_bytes=memory_budget_bytes, fast=fast
        )
        self._layers: dict[str, Any] = {
            "towers": towers, "rank": rank, "alpha": float(alpha), "dropout": float(dropout), "blocks": blocks,
            "projections": list(projections), "targets": list(targets), "rslora": rslora, "dora": dora, "seed": seed,
        }  # fmt: skip
        check_scale(scale)
        self.templates, self.scale = tuple(templates), float(scale)
        self.objective: ObjectiveName = objective
        self.bias = ClassBias(backbone, len(class_names)) if objective == "sigmoid" else None
        self.model: Any = inject_lora(backbone.model, **self._layers)
        self.adapts_text, self.adapts_image = towers != "image", towers != "text"
        self.consumes: Literal["features", "pixels"] = "pixels" if self.adapts_image else "features"
        self._start_magnitudes = magnitudes(self.model)
        self._encode_image: Callable[[nn.Module, Tensor], Tensor] = encode_image
        self._snapshot: Snapshot | None = None
        if self.adapts_text:
            self._whole = self._prompts.encoder(self.model, share_prefix=False)
            self._shared = self._prompts.encoder(self.model)
        if checkpointing and self.adapts_image:
            _checkpoint_image_tower(self.model)
        self.train(False)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        objective = {} if self.bias is None else {"objective": self.objective}
        return {**self._layers, "templates": list(self.templates), "scale": self.scale, **objective}

    def train(self, mode: bool = True) -> LoRA:
        """Wakes up LoRA's own dropout and magnitudes; the towers stay in evaluation mode, batch statistics included."""
        super().train(False)
        self.training = mode
        for _, layer in lora_layers(self.model):
            layer.lora_dropout.train(mode)
            layer.lora_magnitude_vector.train(mode)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of pictures, or outside of training of features that `encoder` made.

        Raises:
            DataError: the batch has what the method does not learn from.
        """
        if not self.training and not torch.is_grad_enabled():
            snapshot = self._take_snapshot()
            return scaled_logits(
                snapshot.features(batch), snapshot.class_weights, self.backbone.logit_scale, self.class_bias()
            )
        if self.adapts_image and batch.images is None:
            raise DataError(
                "LoRA on the image tower learns from pixels, but the batch has none; take PixelLoader, or adapt the "
                'text tower alone (towers="text")'
            )
        if self.adapts_image:
            assert batch.images is not None
            dtype = open_clip.get_input_dtype(self.backbone.precision) or torch.float32
            features = F.normalize(self._encode_image(self.model, batch.images.to(dtype)).float(), dim=-1)
        else:
            features = batch_features(batch, self.backbone.embed_dim)
        bias = None if self.bias is None else self.bias()
        return scaled_logits(features, self.text_features(), self.backbone.logit_scale, bias)

    def class_bias(self) -> Tensor | None:
        """Returns the (C,) bias of the sigmoid objective at the present scale; None under softmax."""
        return None if self.bias is None else self.bias(self.scale).detach()

    def published(self, shots: int, images_per_class: int) -> TowerSchedule:
        """Returns the paper's 500 steps per shot (sec. 4)."""
        return TowerSchedule(steps=500 * (shots or images_per_class))

    def _learn(self, support: Support, schedule: TowerSchedule, loop: Loop) -> dict[str, Any]:
        if self.bias is not None and not self.bias.from_model:
            self.bias.begin(support.features(), self.class_weights(), self.backbone.logit_scale)
        return tune_towers(self, support, schedule, schedule.steps, loop)

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        """Returns a classifier of other classes by the adapted towers."""
        return ZeroShotClassifier(self.encoder, class_names, self.templates if templates is None else templates)

    def text_features(self) -> Tensor:
        """Returns (C, D) unit-norm float32 features of the classes by the text tower as it is, with gradients."""
        if not self.adapts_text:
            return self._prompts.frozen()
        # With dropout, what the prompts have in common would also share its random draws.
        dropped = self.training and self._layers["dropout"] > 0
        encoder = self._whole if dropped else self._shared
        return self._prompts.features(encoder, self.backbone.device, share=self.training, preserve_rng_state=dropped)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns A and B of every layer, with DoRA the magnitudes, and under sigmoid the offset of the bias."""
        return [*lora_parameters(self.model).values(), *([] if self.bias is None else [self.bias.offset])]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns A and B of every adapted layer, with DoRA the magnitudes, by name, and under sigmoid the bias."""
        return {**self._update(), **({} if self.bias is None else self.bias.state())}

    def _update(self) -> dict[str, Tensor]:
        """What changes the towers."""
        return {name: parameter.detach() for name, parameter in lora_parameters(self.model).items()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {name: value.shape for name, value in self.adapter_state().items()}, "LoRA")
        with torch.no_grad():
            for name, parameter in lora_parameters(self.model).items():
                parameter.copy_(state[name])
        if self.bias is not None:
            self.bias.load_state(state)

    def save_adapter(self, folder: Path) -> list[Path]:
        """Writes a PEFT folder: adapter_config.json and adapter_model.safetensors. Returns the written files.

        Under sigmoid the bias is a file beside them, which PEFT does not read.
        """
        files = save_peft(self.model, folder, base=self.backbone.name)
        if self.bias is not None:
            write_tensors(folder / BIAS_FILE, self.bias.state())
            files.append(folder / BIAS_FILE)
        return files

    def load_adapter(self, folder: Path) -> None:
        """Reads what `save_adapter` wrote. Raises StorageError or ArtifactError when it is damaged or does not fit."""
        bias = {} if self.bias is None else read_tensors(folder / BIAS_FILE)
        self.load_adapter_state({**read_peft(folder, self.model), **bias})

    def compile_image_tower(self) -> None:
        """Builds the image tower's forward and backward in training with torch.compile, when it is first called.

        Raises:
            BackboneError: the image tower is not adapted, or there is no C++ compiler on a machine without GPU.
        """
        if not self.adapts_image:
            raise BackboneError('there is no image tower to compile: towers="text" trains on cached features')
        names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
        if self.backbone.device.type == "cpu" and not any(name and shutil.which(name) for name in names):
            raise BackboneError(
                "torch.compile needs a C++ compiler on a CPU, and none was found (CXX, c++, g++, clang++); install "
                "one, or leave compilation off"
            )
        self._encode_image = torch.compile(encode_image)

    @property
    def encoder(self) -> ClipBackbone:
        """The adapted towers at the present scale, frozen as they are now: makes features that `forward` takes."""
        return self._take_snapshot().encoder

    def class_weights(self) -> Tensor:
        """Returns (C, D) unit-norm text features of the adapted text tower, without gradients."""
        return self._take_snapshot().class_weights

    def set_scale(self, scale: float) -> None:
        """Turns the trained update down, for evaluation: 0 is zero-shot, 1 as trained (see `set_lora_scale`).

        Raises:
            ConfigError: the scale is not from 0 to 1.
        """
        check_scale(scale)
        self.scale, self._snapshot = float(scale), None

    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model with the update, at the present scale, added to its weights."""
        return merge_lora(self._scaled_copy())

    def _scaled_copy(self) -> nn.Module:
        """The adapted model at the present scale: frozen weights shared, adapters copied."""
        copied = share_weights(self.model, also_trainable=False)
        set_lora_scale(copied, self.scale, self._start_magnitudes)
        return copied

    @torch.inference_mode(False)
    def _take_snapshot(self) -> Snapshot:
        """Returns the snapshot of the present parameters, made anew only when one of them changed."""
        state = self._update()
        if self._snapshot is None or not self._snapshot.is_of(state, self.backbone.device):
            self._snapshot = take_snapshot(
                state, self.backbone, made_with="LoRA", settings=f"{self.scale} {self._layers}",
                model=self._scaled_copy, prompts=self._prompts, adapts_text=self.adapts_text,
                adapts_image=self.adapts_image,
            )  # fmt: skip
        return self._snapshot


def _checkpoint_image_tower(model: Any) -> None:
    """Switches on gradient checkpointing of the image tower. Raises BackboneError where it has none."""
    try:
        model.visual.set_grad_checkpointing(True)
    except Exception as error:
        raise BackboneError(
            f"this image tower has no gradient checkpointing ({error}); leave checkpointing off"
        ) from error
