"""Tuning a few of the towers' own numbers: the scales and shifts of their norms, or their biases (BitFit)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.backbone import ClipBackbone
from adaptclip.backbone.attention import share_weights
from adaptclip.backbone.class_token import encode_image
from adaptclip.backbone.lora_targets import Towers
from adaptclip.errors import ConfigError, DataError, did_you_mean
from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.class_prompts import ClassPrompts
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.methods.snapshots import Snapshot, take_snapshot
from adaptclip.methods.zero_shot import ZeroShotClassifier
from adaptclip.training.support import Loop, Support
from adaptclip.types import Batch

Tune = Literal["layernorm", "bitfit"]


_TOWERS = {"image": ("visual.",), "text": ("transformer.", "ln_final.", "text.")}
"""Tower -> how the names of its parts begin; CoCa's decoder of captions is in neither."""


_NORMS: tuple[Callable[[nn.Module], bool], ...] = (
    lambda module: isinstance(module, nn.LayerNorm),
    lambda module: type(module).__name__.endswith(("LayerNorm", "RMSNorm")),
    lambda module: isinstance(module, nn.modules.batchnorm._BatchNorm),
)
"""Kinds of norms in the order of choice: a tower's own LayerNorms, root-mean-square ones as T5 has, BatchNorms."""


def tuned_names(model: nn.Module, tune: Tune, towers: Towers) -> list[str]:
    """Returns the parameters of a model that are tuned, by name.

    - "layernorm": weights and biases of every LayerNorm (2SFS, Farina et al. 2025, arXiv:2503.11609). A tower without
      any, which the published code refuses, has its root-mean-square norms tuned (T5), or its BatchNorms (ResNets),
      whose statistics stay.
    - "bitfit": every parameter named `bias` (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199). As in 2SFS's code that
      leaves out the fused `in_proj_bias` of queries, keys and values.

    Raises:
        ConfigError: an unknown kind or tower, or one tower has nothing of the kind.
    """
    if tune not in get_args(Tune):
        raise ConfigError(f"no kind of tuning {tune!r}. {did_you_mean(str(tune), get_args(Tune))}")
    if towers not in get_args(Towers):
        raise ConfigError(f"no towers {towers!r}. {did_you_mean(str(towers), get_args(Towers))}")
    names: list[str] = []
    for tower, prefixes in _TOWERS.items():
        if towers not in (tower, "both"):
            continue
        found = _of_kind(model, tune, prefixes)
        if not found:
            raise ConfigError(f"the {tower} tower has nothing for {tune} to tune; tune the other tower, or take LoRA")
        names += found
    return names


def _of_kind(model: nn.Module, tune: Tune, prefixes: tuple[str, ...]) -> list[str]:
    if tune == "bitfit":
        names = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
        return [name for name in names if name.startswith(prefixes)]
    own = {name: module for name, module in model.named_modules() if f"{name}.".startswith(prefixes)}
    for is_norm in _NORMS:
        norms = {name: module for name, module in own.items() if is_norm(module)}
        if norms:
            return [f"{name}.{part}" for name, norm in norms.items() for part, _ in norm.named_parameters()]
    return []


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


class TowerTuning(Method):
    """A CLIP whose norms or biases are tuned in place, everything else frozen.

    LayerNorm tuning is the first stage of 2SFS (Farina et al. 2025, arXiv:2503.11609), BitFit is Ben Zaken et al. 2022
    (arXiv:2106.10199) in that paper's ablation; by themselves both learn for the 300 steps per shot of both stages.

    The prompts stay the card's own; what is compared with the pictures are the text features of the tuned text tower.
    Where the image tower is tuned the method trains on pixels, otherwise on cached features. Before training it is the
    zero-shot classifier.

    Args:
        backbone: frozen CLIP in fp32, not changed.
        class_names: C names in the order of the label ids.
        tune: "layernorm" or "bitfit", see `tuned_names`.
        towers: which towers are tuned: image, text or both.
        templates: prompts with one `{}` for the class name; their unit-norm features are averaged.

    Raises:
        ConfigError: see `tuned_names`, or the backbone is in half precision.
        BackboneError: a prompt is too long, or a tower is of a kind that cannot be adapted.
    """

    name = "tower_tuning"
    variants = {
        "layernorm": Variant(11.7, {"tune": "layernorm"}, search={"lr": (1e-4, 2e-2)}),
        "bitfit": Variant(11.8, {"tune": "bitfit"}, search={"lr": (1e-4, 2e-2)}),
    }
    schedule_type = TowerSchedule
    smoke = {"steps": 60, "lr": 1e-2}
    learns_by_steps = True
    takes_new_names = True
    is_clip = True
    objective: Literal["softmax"] = "softmax"

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        tune: Tune = "layernorm",
        towers: Towers = "both",
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        names = tuned_names(backbone.model, tune, towers)
        if backbone.precision != "fp32":
            raise ConfigError(
                f"{tune} tunes the towers' own numbers and takes a backbone in fp32, got {backbone.precision}; train "
                "with autocast (--mixed-precision) instead"
            )
        self.templates = tuple(templates)
        self.tune, self.towers = tune, towers
        self._prompts = ClassPrompts(backbone, class_names, templates)
        self.adapts_text, self.adapts_image = towers != "image", towers != "text"
        self.consumes: Literal["features", "pixels"] = "pixels" if self.adapts_image else "features"
        self.model: Any = share_weights(backbone.model)
        for name in names:
            parent, _, part = name.rpartition(".")
            tuned = nn.Parameter(backbone.model.get_parameter(name).detach().clone())
            setattr(self.model.get_submodule(parent), part, tuned)
        self._names = tuple(names)
        self._text = self._prompts.encoder(self.model) if self.adapts_text else None
        self._snapshot: Snapshot | None = None
        self.train(False)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {"tune": self.tune, "towers": self.towers, "templates": list(self.templates)}

    def train(self, mode: bool = True) -> TowerTuning:
        """Changes the mode; the towers stay in evaluation mode, batch statistics and dropout included."""
        super().train(False)
        self.training = mode
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of pictures, or outside of training of features that `encoder` made.

        Raises:
            DataError: the batch has what the method does not learn from.
        """
        if not self.training and not torch.is_grad_enabled():
            snapshot = self._take_snapshot()
            return scaled_logits(snapshot.features(batch), snapshot.class_weights, self.backbone.logit_scale)
        if not self.adapts_image:
            features = batch_features(batch, self.backbone.embed_dim)
        elif batch.images is None:
            raise DataError(
                "tuning the image tower learns from pixels, but the batch has none; take PixelLoader, or tune the text "
                'tower alone (towers="text")'
            )
        else:
            features = F.normalize(encode_image(self.model, batch.images).float(), dim=-1)
        return scaled_logits(features, self.text_features(), self.backbone.logit_scale)

    def text_features(self) -> Tensor:
        """Returns (C, D) unit-norm float32 features of the classes by the text tower as it is, with gradients."""
        if self._text is None:
            return self._prompts.frozen()
        return self._prompts.features(self._text, self.backbone.device, share=self.training)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the tuned norms or biases."""
        return [self.model.get_parameter(name) for name in self._names]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns what is tuned, whole, by its name in the model."""
        return {name: self.model.get_parameter(name).detach() for name in self._names}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        check_state(state, {name: value.shape for name, value in own.items()}, f"towers tuned by {self.tune}")
        for name, value in own.items():
            value.copy_(state[name])

    def published(self, shots: int, images_per_class: int) -> TowerSchedule:
        """Returns 2SFS's 300 steps per shot, all of them here."""
        return TowerSchedule(steps=300 * (shots or images_per_class))

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

    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model with the tuned numbers in their places."""
        return share_weights(self.model, also_trainable=False).requires_grad_(False)

    @torch.inference_mode(False)
    def _take_snapshot(self) -> Snapshot:
        """Returns the snapshot of the present numbers, made anew only when one of them changed."""
        state = self.adapter_state()
        if self._snapshot is None or not self._snapshot.is_of(state, self.backbone.device):
            self._snapshot = take_snapshot(
                state, self.backbone, made_with=self.tune, settings=f"{self.tune} {self.towers}",
                model=self.merged_model, prompts=self._prompts, adapts_text=self.adapts_text,
                adapts_image=self.adapts_image,
            )  # fmt: skip
        return self._snapshot
