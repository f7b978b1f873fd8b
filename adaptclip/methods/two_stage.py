# SPDX-License-Identifier: Apache-2.0
"""Two stages: the towers are tuned first, then a linear head is trained on their features (2SFS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.files import read_tensors, write_tensors
from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.lora import LoRA
from adaptclip.methods.method import Method, Variant
from adaptclip.methods.tower_tuning import TowerTuning
from adaptclip.methods.tuned_towers import TowerSchedule, tune_towers
from adaptclip.prompts import clean_class_name, zero_shot_weights

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.methods.zero_shot import ZeroShotClassifier
    from adaptclip.training.support import Loop, Preset, Support
    from adaptclip.types import Batch

FirstStage = Literal["layernorm", "bitfit", "lora"]


@dataclass(frozen=True)
class TwoStageSchedule(TowerSchedule):
    """How 2SFS learns (sec. 4 of the paper and its code): AdamW with a cosine in either stage.

    Attributes:
        steps: of both stages together.
        lr: peak learning rate of the first stage.
        batch_size: images per process and step.
        views: sets of crops that the head learns from; the published code makes fresh ones in every epoch.
        tower_share: share of the steps that tune the towers.
        head_lr: peak learning rate of the second stage.
    """

    tower_share: float = 0.6
    head_lr: float = 2e-4

    def first_steps(self) -> int:
        """Returns the steps of the first stage. Raises ConfigError where a stage has none."""
        first = round(self.tower_share * self.steps)
        if not 0 < first < self.steps:
            raise ConfigError(
                f"steps and tower_share must leave 1 step or more for each stage, got {self.steps} and "
                f"{self.tower_share:g}; LoRA has no second stage, a linear probe no first"
            )
        return first


class TwoStage(Method):
    """A linear head on tuned towers (2SFS, Farina et al. 2025, arXiv:2503.11609).

    In the first stage `first` is trained as ever: the LayerNorms of both towers, which is the published method, or as
    its ablations LoRA or BitFit. In the second it is fixed, its features are cached, and only the head learns,
    starting from the tuned text features of the classes. Classes of the training data are judged by the head, others
    by the tuned text tower (`class_weights_of`). The published second stage sees fresh crops in every epoch; recipe and
    bench take ten sets of them in turn.

    Args:
        backbone: frozen CLIP, not changed.
        class_names: C names in the order of the label ids.
        first: the first stage's adapter, of the same backbone and classes; None makes a new one.
        tune: what the new one tunes: layernorm, bitfit or lora.
        **settings: of `TowerTuning` or `LoRA`, where `first` is not given.

    Raises:
        ConfigError: see `TowerTuning` and `LoRA`, or `first` is of another backbone, of other classes, or given beside
            settings.
    """

    name = "two_stage"
    variants = {
        "two_stage": Variant(13, defaults={"tune": "layernorm"}, search={"lr": (1e-4, 2e-2), "head_lr": (1e-4, 1e-2)})
    }
    schedule_type = TwoStageSchedule
    smoke = {"steps": 80, "lr": 1e-2}
    learns_by_steps = True
    takes_new_names = True

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        first: LoRA | TowerTuning | None = None,
        tune: FirstStage | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        if first is not None:
            given = {**settings, **({} if tune is None else {"tune": tune})}
            _check_first_stage(first, backbone, self.class_names, given)
        self.first = (
            make_first_stage(backbone, class_names, tune or "layernorm", **settings) if first is None else first
        )
        if self.first.objective != "softmax":
            raise ConfigError(f"two-stage adaptation learns softmax only, got the objective {self.first.objective!r}")
        self.first.requires_grad_(False)
        self.head_weight = nn.Parameter(self.first.class_weights().clone())

    @property
    def encoder(self) -> ClipBackbone:
        """The tuned towers."""
        return self.first.encoder

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments of the first stage."""
        return {"tune": "lora", **self.first.settings}

    def train(self, mode: bool = True) -> TwoStage:
        """Changes the mode of the head; the first stage stays in evaluation mode."""
        super().train(False)
        self.training = mode
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of features that `encoder` made: scaled cosines with the rows of the head."""
        features = batch_features(batch, self.head_weight.shape[1])
        return scaled_logits(features, F.normalize(self.head_weight.float(), dim=-1), self.backbone.logit_scale)

    def published(self, shots: int, images_per_class: int) -> TwoStageSchedule:
        """Returns the paper's 300 steps per shot, 60 % of them for the towers."""
        return TwoStageSchedule(steps=300 * (shots or images_per_class))

    def schedule(self, shots: int, *, images_per_class: int = 0, preset: Preset = "paper", **given: Any) -> Any:
        """See `Method.schedule`; each stage has a step or more."""
        plan = super().schedule(shots, images_per_class=images_per_class, preset=preset, **given)
        plan.first_steps()
        return plan

    def _learn(self, support: Support, schedule: TwoStageSchedule, loop: Loop) -> dict[str, Any]:
        first = schedule.first_steps()
        for parameter in self.first.trainable_parameters():
            parameter.requires_grad_(True)
        tune_towers(self.first, support, schedule, first, loop)
        self.first.requires_grad_(False)
        with torch.no_grad():
            self.head_weight.copy_(self.first.class_weights())
        # The head learns on features of the tuned towers, which no other run could use.
        loader = support.loader(support.features(schedule.views, encoder=self.encoder), batch_size=schedule.batch_size)
        loop(
            support.training(
                self, loader, schedule.steps - first, optimizer="adamw", lr=schedule.head_lr, weight_decay=1e-2,
                schedule="cosine_per_step", final_lr=1e-6, name="head",
            )
        )  # fmt: skip
        return {
            "schedule": f"AdamW {schedule.lr:g} and {schedule.head_lr:g}, {first} steps of "
            f"{self.settings['tune']}, {schedule.steps - first} of the head, batches of {schedule.batch_size}"
        }

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        """Returns a classifier of other classes by the tuned towers."""
        return self.first.for_classes(class_names, templates)

    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model with the tuned towers."""
        return self.first.merged_model()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the (C, D) head."""
        return [self.head_weight]

    def counts(self) -> tuple[int, int]:
        """Returns how many numbers both stages learn, and how many the state holds."""
        learnt, stored = super().counts()
        return learnt + self.first.counts()[0], stored

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the head and what the first stage tuned."""
        return {"head": self.head_weight.detach(), **self.first.adapter_state()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(
            {"head": state["head"]} if "head" in state else {}, {"head": self.head_weight.shape}, "a two-stage head"
        )
        self.first.load_adapter_state({name: value for name, value in state.items() if name != "head"})
        with torch.no_grad():
            self.head_weight.copy_(state["head"])

    def save_adapter(self, folder: Path) -> list[Path]:
        """Writes the head as adapter.safetensors, beside PEFT's files of LoRA or with what else was tuned.

        Returns:
            The written files.
        """
        own = folder / "adapter.safetensors"
        if isinstance(self.first, LoRA):
            files = self.first.save_adapter(folder)
            write_tensors(own, {"head": self.head_weight.detach()})
            return [*files, own]
        write_tensors(own, self.adapter_state())
        return [own]

    def load_adapter(self, folder: Path) -> None:
        """Reads what `save_adapter` wrote. Raises StorageError or ArtifactError when it is damaged or does not fit."""
        state = read_tensors(folder / "adapter.safetensors")
        if isinstance(self.first, LoRA):
            self.first.load_adapter(folder)
            state = {**state, **self.first.adapter_state()}
        self.load_adapter_state(state)

    def class_weights(self) -> Tensor:
        """Returns the (C, D) unit-norm rows of the head, without gradients."""
        return F.normalize(self.head_weight.detach().float(), dim=-1)

    def class_weights_of(self, class_names: Sequence[str]) -> Tensor:
        """Returns (C', D) unit-norm weights of any classes: rows of the head for those it knows, else text features.

        Args:
            class_names: C' names; a class is known by its name.
        """
        known = {clean_class_name(name): row for name, row in zip(self.class_names, self.class_weights(), strict=True)}
        weights = zero_shot_weights(self.first.encoder, class_names, self.first.templates)
        return torch.stack(
            [known.get(clean_class_name(name), text) for name, text in zip(class_names, weights, strict=True)]
        )


def make_first_stage(
    backbone: ClipBackbone, class_names: Sequence[str], tune: FirstStage, *, seed: int = 0, **settings: Any
) -> LoRA | TowerTuning:
    """Returns a new first stage: `TowerTuning`, which draws nothing, or with "lora" `LoRA`, whose settings these are.

    Raises:
        ConfigError: an unknown kind, or a setting that it does not have.
    """
    if tune not in get_args(FirstStage):
        raise ConfigError(f"no first stage {tune!r}. {did_you_mean(str(tune), get_args(FirstStage))}")
    if tune == "lora":
        return LoRA(backbone, class_names, seed=seed, **settings)
    known = ("towers", "templates")
    if foreign := sorted(set(settings) - set(known)):
        raise ConfigError(
            f"{tune} has no {', '.join(foreign)}: these belong to lora; its own are {' and '.join(known)}"
        )
    return TowerTuning(backbone, class_names, tune=tune, **settings)


def _check_first_stage(
    lora: LoRA | TowerTuning, backbone: ClipBackbone, class_names: tuple[str, ...], settings: Mapping[str, Any]
) -> None:
    """Raises ConfigError unless a given first stage is of this backbone and these classes, and brings its settings."""
    if settings:
        raise ConfigError(
            f"a given first stage brings its own settings, got {', '.join(sorted(settings))} beside it; leave them out"
        )
    if lora.class_names != class_names:
        raise ConfigError(
            f"the first stage was made for the {len(lora.class_names)} classes {list(lora.class_names[:3])}…, the head "
            f"is for {len(class_names)}, {list(class_names[:3])}…; give both the same names in the same order"
        )
    if lora.backbone.digest != backbone.digest:
        raise ConfigError(f"the first stage adapts {lora.backbone.name}, with other weights than {backbone.name} here")
