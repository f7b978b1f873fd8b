# SPDX-License-Identifier: Apache-2.0
"""What a method may see of a case, one stage of learning by steps ready for a loop, and the loop of `fit`.

Named lengths of training: the paper's, or a short one for the embedded default (`Preset`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.features import FeatureCache, training_crop
from adaptclip.training.optim import build_optimizer, build_scheduler
from adaptclip.training.pixels import PixelLoader
from adaptclip.training.steps import FeatureLoader, backward_and_step, train_steps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from adaptclip.clip import ClipBackbone
    from adaptclip.data.card_block import Augmentation
    from adaptclip.data.dataset import ImageDataset
    from adaptclip.data.transforms import Augment
    from adaptclip.feature_clip import FeatureClip
    from adaptclip.training.mitigation import Mitigation
    from adaptclip.types import Features, Learner

Preset = Literal["smoke", "paper"]

AskedPreset = Literal["auto", "smoke", "paper"]


def check_preset(preset: str) -> None:
    """Raises ConfigError unless it is the name of a preset."""
    if preset not in get_args(Preset):
        raise ConfigError(f"no preset {preset!r}. {did_you_mean(str(preset), get_args(Preset))}")


def chosen_preset(preset: AskedPreset, card: str, backbone: str) -> Preset:
    """Returns whose values what is not given takes: those of the short preset, smoke, or the paper's.

    Every setting that is given stays as given and changes nothing but itself.

    Args:
        preset: "smoke", "paper", or "auto": smoke for the embedded card digits on the embedded model, else the paper's.
        card: the recipe's card.
        backbone: the recipe's backbone.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset == "auto":
        return "smoke" if (card, backbone) == ("digits", "starter") else "paper"
    check_preset(preset)
    return preset


def schedule_words(schedule: Any) -> str:
    """Returns the settings of a schedule, a dataclass, as `key value` pairs; what is None is as published, left out."""
    said = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    said = {name: {True: "yes", False: "no"}.get(v, v) if isinstance(v, bool) else v for name, v in said.items()}
    return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None) or "nothing to set"


def preset_line(asked: AskedPreset, preset: Preset, schedule: Any) -> str:
    """Words how a method is about to learn, for the line that a recipe prints before it starts.

    Args:
        asked: the flag; where it left the choice of the papers' settings to `chosen_preset`, that is said.
        preset: what was chosen.
        schedule: the method's, or what it comes to in words.
    """
    own = " (for a card or model of your own; --preset smoke is short)"
    words = schedule if isinstance(schedule, str) else schedule_words(schedule)
    return f"preset {preset}{own if asked == 'auto' and preset == 'paper' else ''}: {words}"


class Training(NamedTuple):
    """One stage of learning by steps.

    Attributes:
        adapter: what learns.
        loader: says which images a step sees.
        optimizer: over the adapter's trainable parameters.
        scheduler: of its learning rate.
        num_steps: optimizer steps, 1 or more.
        mitigation: gives the loss of a batch.
        name: of the stage; "" where there is only one.
    """

    adapter: Any
    loader: FeatureLoader | PixelLoader
    optimizer: Optimizer
    scheduler: LRScheduler
    num_steps: int
    mitigation: Mitigation
    name: str = ""


Loop = Callable[[Training], None]
"""Takes the steps of a stage, and leaves the adapter unwrapped and in evaluation mode."""


class FeatureSource(Protocol):
    """Where features of the frozen tower come from: a cache, or a store of them."""

    def get(
        self,
        backbone: Any,
        dataset: ImageDataset,
        *,
        views: int = 0,
        augment: Augment | None = None,
        accelerator: Accelerator | None = None,
    ) -> Features:
        """Returns features, as `FeatureCache.get`."""
        ...


class Support:
    """All that a method may see: images to learn from, images to choose settings with. No test image.

    Attributes:
        backbone: the frozen CLIP.
        images: N labelled training images.
        validation_images: images to choose settings with; may be empty.
        source: of the frozen tower's features.
        shots: k; 0 stands for all images.
        seed: of the order of images and of what a method draws.
        accelerator: divides the work among its processes.
        mitigation: of differences between groups or classes; plain training by default.
        reading_s: seconds spent on reading and encoding so far.
    """

    def __init__(
        self,
        backbone: ClipBackbone | FeatureClip,
        images: ImageDataset,
        validation_images: ImageDataset,
        *,
        accelerator: Accelerator,
        source: FeatureSource | None = None,
        augmentation: Augmentation | None = None,
        shots: int = 0,
        seed: int = 1,
        mitigation: Mitigation | None = None,
    ) -> None:
        """See the attributes; `augmentation` is the card's crops, `source` None encodes and keeps nothing."""
        from adaptclip.data.card_block import Augmentation
        from adaptclip.training.mitigation import Mitigation

        self.backbone: Any = backbone
        self.images, self.validation_images, self.accelerator = images, validation_images, accelerator
        self.source = FeatureCache(None) if source is None else source
        self.shots, self.seed = shots, seed
        self.mitigation = Mitigation() if mitigation is None else mitigation
        self._augmentation = Augmentation() if augmentation is None else augmentation
        self.reading_s = 0.0

    @property
    def images_per_class(self) -> int:
        """k, or for all images their rounded mean per class, 1 or more."""
        return self.shots or max(1, round(int(self.images.class_counts().sum()) / len(self.images.class_names)))

    def features(self, views: int = 0, *, min_scale: float = 0.0, encoder: Any = None) -> Features:
        """Returns features of the training images: of the evaluation transform, or of numbered crops.

        Args:
            views: sets of crops; 0 is the evaluation transform.
            min_scale: smallest crop as a share of the image's area; a larger limit of the card wins.
            encoder: an adapted model whose features nobody else could use; None is the backbone.
        """
        augment = training_crop(self.backbone, self._augmentation, min_scale=min_scale) if views else None
        return self._read(encoder, self.images, views, augment)

    def validation(self, encoder: Any = None) -> Features | None:
        """Returns features of the validation images, of the backbone or of an adapted model; None without any."""
        return self._read(encoder, self.validation_images, 0, None) if len(self.validation_images) else None

    def _read(self, encoder: Any, images: ImageDataset, views: int, augment: Augment | None) -> Features:
        started = time.perf_counter()
        own = encoder is None or encoder.image_digest == self.backbone.image_digest
        source, encoder = (self.source, self.backbone) if own else (FeatureCache(None), encoder)
        features = source.get(encoder, images, views=views, augment=augment, accelerator=self.accelerator)
        self.reading_s += time.perf_counter() - started
        return features

    def loader(
        self, features: Features | None = None, *, batch_size: int, views: int = 0
    ) -> FeatureLoader | PixelLoader:
        """Returns the loader of a stage: of features, or without any of pixels, cropped anew in every epoch.

        Args:
            features: of the training images.
            batch_size: images per process and micro-step.
            views: of pixels, the number of different crops of each image; 0 makes fresh ones in every epoch.

        Raises:
            ConfigError: a number out of range, or fewer images than parts of a step.
        """
        how: Any = {
            "batch_size": batch_size, "seed": self.seed, "accelerator": self.accelerator,
            "strata": self.mitigation.strata,
        }  # fmt: skip
        if features is not None:
            return FeatureLoader(features, **how)
        augment = training_crop(self.backbone, self._augmentation)
        return PixelLoader(self.images, self.backbone, augment=augment, views=views, **how)

    def loader_for(self, adapter: Learner, *, batch_size: int, views: int) -> FeatureLoader | PixelLoader:
        """Returns the loader of what an adapter consumes: pixels, or cached features of `views` sets of crops."""
        features = None if adapter.consumes == "pixels" else self.features(views)
        return self.loader(features, batch_size=batch_size)

    def crops(self, schedule: Any) -> Features:
        """Returns features of a schedule's `views` sets of crops; None, and at most, one for each of its epochs."""
        return self.features(min(schedule.views or schedule.epochs, schedule.epochs))

    def training_by_epochs(
        self, adapter: Any, schedule: Any, features: Features | None = None, *, optimizer: str = "sgd"
    ) -> Training:
        """Returns the stage of a schedule with `epochs`, `lr` and `batch_size`: a cosine per epoch, weight decay 5e-4.

        Args:
            adapter: what learns.
            schedule: how.
            features: of the training images; None takes pixels, cropped anew in every epoch.
            optimizer: see `build_optimizer`.
        """
        loader = self.loader(features, batch_size=schedule.batch_size)
        num_steps = schedule.epochs * loader.steps_per_epoch
        return self.training(adapter, loader, num_steps, optimizer=optimizer, lr=schedule.lr, weight_decay=5e-4)

    def training(
        self,
        adapter: Any,
        loader: FeatureLoader | PixelLoader,
        num_steps: int,
        *,
        optimizer: str,
        lr: float,
        weight_decay: float,
        schedule: str = "cosine",
        final_lr: float = 0.0,
        warmup_steps: int = 0,
        name: str = "",
        **options: Any,
    ) -> Training:
        """Returns a stage with its optimizer and schedule (`build_optimizer`, `build_scheduler`).

        Args:
            adapter: what learns.
            loader: of its images.
            num_steps: optimizer steps.
            optimizer: sgd or adamw.
            lr: peak learning rate.
            weight_decay: of the optimizer.
            schedule: see `build_scheduler`.
            final_lr: where the cosine ends.
            warmup_steps: see `build_scheduler`.
            name: of the stage.
            **options: of `build_optimizer`.
        """
        built = build_optimizer(
            adapter.trainable_parameters(), name=optimizer, lr=lr, weight_decay=weight_decay, **options
        )
        scheduler = build_scheduler(
            built,
            total_steps=num_steps,
            steps_per_epoch=loader.steps_per_epoch,
            kind=schedule,
            final_lr=final_lr,
            warmup_steps=warmup_steps,
        )
        return Training(adapter, loader, built, scheduler, num_steps, self.mitigation.fresh(), name)


def train_by_steps(training: Training, accelerator: Accelerator) -> None:
    """Takes all steps of a stage and leaves its adapter in evaluation mode.

    There are no metrics and no checkpoints: a job that was interrupted is done again from its start.

    Raises:
        TrainingError: a loss or gradient is not finite.
    """
    adapter, loader, optimizer, scheduler, num_steps, mitigation, _ = training
    model, optimizer = accelerator.prepare(adapter, optimizer)
    # --- loop: the same lines in every recipe ---
    model.train()
    for step, batch in train_steps(loader, num_steps, accelerator):
        with accelerator.accumulate(model):
            logits = model(batch)  # (B, C), already scaled by logit_scale.exp()
            loss = mitigation.loss(logits, batch) + adapter.penalty()
            backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
    # --- end of loop ---
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()  # a hundred jobs share the process, and Accelerate remembers what it prepared
